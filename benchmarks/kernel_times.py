"""Tables of kernels alone: products by type, kernel and number of rows, and attention of one query. Plain rows.

Not named "kernels": transformers looks for a package of that name, and the scripts of this folder would find this file.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from parts import LAYERS, Rows
from rich.console import Console
from torch import Tensor
from torch.nn.functional import linear

from vitcop_compile import bench, kernels
from vitcop_compile.attention import sdpa_cached
from vitcop_compile.bench.runner import timed
from vitcop_compile.progress import Steps

TYPES = ("float32", "bfloat16", "float16", "int8")
# Rows of a decoding step at batch 1 and 16, of a short turn, and of prefill at 1/9 and dense.
ROWS = (1, 16, 64, 228, 640)
# (batch, heads, key heads, rows, width of a head)
CACHES = ((1, 16, 16, 768, 64), (16, 16, 16, 768, 64), (1, 28, 4, 1024, 128), (16, 28, 4, 1024, 128))


def products(shape: bench.Shape, rounds: int) -> Rows:
    """Milliseconds of the products of LAYERS layers by type, number of rows and kernel: "torch" is `F.linear`, "ours" what
    `lower_linear` takes by its rule, named in `chosen`; `to_torch` and `to_float32` are torch's time, and that of ours in
    float32, over the row's. Of int8 by int8, "torch" is what torchao traces, "ours" what `lower_int8` makes of it."""
    kernels.load()
    hidden, wide = shape.hidden, shape.intermediate
    sizes = [size for _ in range(LAYERS) for size in [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]]
    calls: dict[tuple[str, int, str], Callable[[], Any]] = {}
    for dtype in TYPES:
        weights = [_drawn(dtype, *size) for size in sizes]
        for rows in ROWS:
            inputs = {width: _drawn(dtype, rows, width) for width in (hidden, wide)}
            for name, kernel in (("torch", _torchao if dtype == "int8" else linear), ("ours", _ours(weights[0].dtype, rows))):
                calls[dtype, rows, name] = _all(kernel, inputs, weights)
    with torch.no_grad():
        times = timed(calls, rounds, Steps(Console(stderr=True)), "products")
    found = []
    for (dtype, rows, name), took in times.items():
        row: dict[str, Any] = {"dtype": dtype, "rows": rows, "kernel": name, "ms": statistics.median(took)}
        kind = getattr(torch, dtype)
        row["chosen"] = kernels.rule(kind).kernel(kind, rows) if name == "ours" else "-"
        row["to_torch"] = _ratio(times[dtype, rows, "torch"], took)
        row["to_float32"] = _ratio(times["float32", rows, "ours"], took)
        found.append(row)
    return found


def attention(rounds: int) -> Rows:
    """Milliseconds of attention of one query over the caches of some layers: "torch" is its fused kernel under a mask,
    compiled, "read" a sum over the same bytes, "ours" `vitcop_cpu.decode_attention`; `to_read` the row's time over that."""
    kernels.load()
    calls: dict[tuple[str, tuple[int, ...], str], Callable[[], Any]] = {}
    for dtype in TYPES[:2]:
        for batch, heads, groups, rows, width in CACHES:
            layers = 4 if batch > 1 else 12
            caches = [torch.randn(batch, groups, rows, width).to(getattr(torch, dtype)) for _ in range(2 * layers)]
            query, at = torch.randn(batch, heads, 1, width).to(caches[0].dtype), torch.full((batch, 1), rows - 1)
            key = (dtype, (batch, heads, groups, rows, width))
            for name, call in _attentions(query, caches, at).items():
                calls[(*key, name)] = call
    with torch.no_grad():
        times = timed(calls, rounds, Steps(Console(stderr=True)), "attention of one query")
    return [
        {
            "dtype": dtype,
            "caches": "x".join(map(str, sizes)),
            "kernel": name,
            "ms": statistics.median(took),
            "to_read": 1 / _ratio(times[dtype, sizes, "read"], took),
        }
        for (dtype, sizes, name), took in times.items()
    ]


def _attentions(query: Tensor, caches: list[Tensor], at: Tensor) -> dict[str, Callable[[], Any]]:
    pairs, scale = list(zip(caches[::2], caches[1::2], strict=True)), query.shape[-1] ** -0.5
    fused = torch.compile(lambda q, k, v, rows: sdpa_cached(q, k, v, scale, rows), dynamic=False)
    ours = torch.ops.vitcop_cpu.decode_attention.default
    return {
        "torch": lambda: [fused(query, key, value, at) for key, value in pairs],
        "ours": lambda: [ours(query, key, value, scale, at) for key, value in pairs],
        "read": lambda: [cache.view(torch.float32).sum() for cache in caches],
    }


def _all(kernel: Callable[..., Tensor], inputs: dict[int, Tensor], weights: list[Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [kernel(inputs[weight.shape[1]], weight) for weight in weights]


def _drawn(dtype: str, rows: int, width: int) -> Tensor:
    return (torch.randn(rows, width) * (32 if dtype == "int8" else 1)).clamp(-127, 127).to(getattr(torch, dtype))


def _torchao(x: Tensor, weight: Tensor) -> Tensor:
    """What torchao traces of a product of int8: without a sign, and the weight's sums taken from it."""
    turned = weight.t()
    whole = torch._int_mm((x.to(torch.int32) + 128).to(torch.uint8), turned)
    return whole - turned.sum([0], keepdim=True, dtype=torch.int32) * 128


def _ours(dtype: torch.dtype, rows: int) -> Callable[..., Tensor]:
    """What `lower_linear`, or `lower_int8`, makes of a product."""
    if dtype == torch.int8:
        few_rows = rows <= kernels.rule(dtype).few
        int8 = torch.ops.vitcop_cpu.linear_int8.default
        return int8 if few_rows else lambda x, weight: torch._int_mm(x, weight.t())

    def few(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.vitcop_cpu.linear_few.default(x, weight, None)

    def onednn(x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.vitcop.linear.default(x, weight, None)

    wide = onednn if kernels.rule(torch.float32).many == "onednn" else linear
    named = {"few": few, "aten": linear, "onednn": onednn}
    return named.get(kernels.rule(dtype).kernel(dtype, rows), lambda x, weight: wide(x.float(), weight.float()).to(x.dtype))


def _ratio(over: list[float], under: list[float]) -> float:
    return statistics.median([a / b for a, b in zip(over, under, strict=True)])
