"""How fast matrix products alone run at the row counts of a schedule and of decode: what no pruning can beat."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import linear

from vitcop_compile import ViTCoPConfig, bench
from vitcop_compile.bench.runner import timed
from vitcop_compile.bench.timing import Call, median_ratio
from vitcop_compile.progress import Steps

FIELDS = ("kernel", "rows", "ms", "gflops", "to_dense")
KERNELS = ("oneDNN", "oneDNN, packed", "torch")
# Rows of a decode step: prompts of the batch.
BATCHES = (16, 1)
# Enough of them that no cache holds the weights of all.
LAYERS = 6


def measure(shape: bench.Shape, rounds: int, preset: str = "1/9", text_tokens: int = 64) -> dict[str, Any]:
    """{"environment": ..., "rows": [...]}: a row per kernel and number of rows that a layer of the dense or the pruned
    prefill, or a decode step, has; `ms` of LAYERS layers' products, `gflops` in 1e9 FLOPs a second, `to_dense` the rate over
    the same kernel's at the dense number of rows."""
    schedule = ViTCoPConfig.preset(preset).schedule(shape.model_shape())
    dense = text_tokens + schedule.shape.patches
    counts = sorted({dense, *(text_tokens + visual for visual in schedule.visual_tokens()), *BATCHES}, reverse=True)
    widths = (
        [(shape.hidden, shape.hidden)] * 4 + [(shape.intermediate, shape.hidden)] * 2 + [(shape.hidden, shape.intermediate)]
    )
    weights = [torch.randn(width) for _ in range(LAYERS) for width in widths]
    flops = {rows: 2 * rows * sum(weight.numel() for weight in weights) for rows in counts}
    calls = {f"{kernel} {rows}": _products(kernel, rows, weights) for kernel in KERNELS for rows in counts}
    with torch.no_grad():
        times = timed(calls, rounds, Steps(Console(stderr=True)), "matrix products")
    found = []
    for kernel in KERNELS:
        for rows in counts:
            took, of_dense = times[f"{kernel} {rows}"], times[f"{kernel} {dense}"]
            found.append(
                {
                    "kernel": kernel,
                    "rows": rows,
                    "ms": statistics.median(took),
                    "gflops": flops[rows] / statistics.median(took) / 1e6,
                    "to_dense": median_ratio(of_dense, took) * flops[rows] / flops[dense],
                }
            )
    conditions = {"device": "cpu", "dtype": "float32", "rounds": rounds, "memory": False}
    return {"environment": bench.environment() | conditions, "rows": found}


def _products(kernel: str, rows: int, weights: list[torch.Tensor]) -> Call:
    inputs = {weight.shape[1]: torch.randn(1, rows, weight.shape[1]) for weight in weights}
    if kernel == "torch":
        return lambda: [linear(inputs[weight.shape[1]], weight) for weight in weights]
    if kernel == "oneDNN":
        return lambda: [torch.ops.vitcop.linear(inputs[weight.shape[1]], weight, None) for weight in weights]
    packed = [(weight.shape[1], torch.ops.mkldnn._reorder_linear_weight(weight, rows)) for weight in weights]
    return lambda: [
        torch.ops.mkldnn._linear_pointwise(inputs[width], weight, None, "none", [], "") for width, weight in packed
    ]
