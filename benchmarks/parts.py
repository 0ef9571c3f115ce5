"""Tables of the suite that compare no arms: selection alone, frames of a video, the runtime alone, matrix products alone.
Plain rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch.nn.functional import linear

from vitcop_compile import ViTCoPConfig, bench, optimize
from vitcop_compile.bench.bind import bind
from vitcop_compile.bench.memory import around
from vitcop_compile.bench.overhead import overhead as overhead_of
from vitcop_compile.bench.runner import timed
from vitcop_compile.bench.selection import selection_arm
from vitcop_compile.bench.timing import Call, median_ratio, summary
from vitcop_compile.progress import Steps

Rows = list[dict[str, Any]]
# Per-image time at many images, beside that of one, up to which the cost of selection counts as linear.
LINEAR = 1.1
# What a video goes through until the first logits.
VIDEO = ("tower", "select", "prefill")
KERNELS = ("oneDNN", "oneDNN, packed", "torch")
# Rows of a decode step: prompts of the batch.
BATCHES = (16, 1)
# Enough of them that no cache holds the weights of all.
LAYERS = 6


def selection(
    shape: bench.Shape, backends: Sequence[str], counts: Sequence[int], rounds: int, preset: str = "1/9", text_tokens: int = 64
) -> Rows:
    """What selection costs alone as images become many: one per prompt of a batch, or all of them pooled in one prompt; the
    first of `counts` is 1. `per_image_to_one` is the time per image over that of one image, in every round."""
    shape.check()
    size, console, found = shape.model_shape(), Console(stderr=True), []
    for backend in backends:
        calls: dict[tuple[int, int], Call] = {}
        for images in counts:
            with console.status(f"{backend}: compiling the selection of {images} images"):
                for prompts in dict.fromkeys((images, 1)):
                    config = ViTCoPConfig.preset(preset, scope="per_image" if prompts == images else "pooled")
                    schedule = config.schedule(size, (size.image,) * (images // prompts))
                    given = (bench.Request(prompts, text_tokens), backend, getattr(torch, shape.dtype))
                    calls[images, prompts] = selection_arm(schedule, *given, torch.device(shape.device))
        with torch.no_grad():
            times = timed(calls, rounds, Steps(console), f"{backend}: selection")
        found += [{"backend": backend, "preset": preset} | selection_row(key, times) for key in calls]
    return found


def selection_row(key: tuple[int, int], times: dict[tuple[int, int], list[float]]) -> dict[str, Any]:
    """Of `key`, (images, prompts)."""
    images, prompts = key
    share = summary([many / images / one for many, one in zip(times[key], times[1, 1], strict=True)])
    taken = summary(times[key])
    return {
        "images": images,
        "prompts": prompts,
        "selection_ms": taken["median"],
        "selection_ms_quartiles": taken["quartiles"],
        "ms_per_image": taken["median"] / images,
        "per_image_to_one": share,
        "linear": share["median"] <= LINEAR,
    }


def frames(
    shape: bench.Shape,
    counts: Sequence[int],
    rounds: int,
    backend: str = "inductor",
    preset: str = "1/9",
    text_tokens: int = 64,
) -> Rows:
    """What every stage of a prompt with a video of so many frames takes, and what it allocates at most at a time, its results
    included; `*_to_first`: per frame, beside that of the first of `counts`, in every round."""
    shape.check()
    console, model = Console(stderr=True), shape.model()
    optimized = optimize(model, ViTCoPConfig.preset(preset), backend=backend, prompt_buckets=(text_tokens,))
    calls: dict[tuple[str, int], Call] = {}
    for count in counts:
        request = bench.Request(1, text_tokens, frames=count, side=shape.image_size)
        bound = bind(optimized, request)
        with console.status(f"compiling the programs of {count} frames"), torch.no_grad():
            for stage in VIDEO:
                bound[stage]()
                calls[stage, count] = bound[stage]
    with torch.no_grad():
        times = timed(calls, rounds, Steps(console), "frames")
        peaks = {key: [peak - before for peak, before in (around(call) for _ in range(3))] for key, call in calls.items()}
    visual = {}
    for count in counts:
        layout = optimized.host.layout_of(shape.image_size, shape.image_size) * count
        schedule = optimized.on_demand.schedule_of(layout)
        visual[count] = {"tokens": schedule.patches, "kept": schedule.image_tokens}
    return [{"frames": count} | visual[count] | frames_row(count, counts[0], times, peaks) for count in counts]


def frames_row(
    count: int, first: int, times: dict[tuple[str, int], list[float]], peaks: dict[tuple[str, int], list[int]]
) -> dict[str, Any]:
    """Of `count` frames, beside `first`."""
    row: dict[str, Any] = {}
    for stage in VIDEO:
        taken, bytes_ = summary(times[stage, count]), statistics.median(peaks[stage, count])
        share = [many / count / (one / first) for many, one in zip(times[stage, count], times[stage, first], strict=True)]
        row |= {f"{stage}_ms": taken["median"], f"{stage}_ms_quartiles": taken["quartiles"]}
        row |= {f"{stage}_ms_to_first": summary(share), f"{stage}_mib": bytes_ / 2**20}
        row[f"{stage}_mib_to_first"] = bytes_ / count / (statistics.median(peaks[stage, first]) / first)
    return row


def overhead(rounds: int) -> Rows:
    """`forward` outside of its programs: 32 narrow layers, where the copy of keys and values hardly counts, and the table
    `cpu`'s model, where it does."""
    found = []
    for shape in (bench.Shape(hidden=64, layers=32, vision_hidden=64, vision_layers=3, name="64x32"), bench.Shape()):
        model = shape.model()
        for preset in ("1/3", "1/9"):
            optimized = optimize(model, ViTCoPConfig.preset(preset), backend="eager")
            for batch in (1, 8) if shape.hidden == 64 else (1,):
                cost = overhead_of(optimized, bench.Request(batch), rounds)
                row = {"shape": shape.name, "preset": preset, "batch": batch}
                found.append(row | {f"{name}_ms": value for name, value in cost.items()})
    return found


def matmul_rate(shape: bench.Shape, rounds: int, preset: str = "1/9", text_tokens: int = 64) -> Rows:
    """How fast matrix products alone run, which no pruning can beat: a row per kernel and number of rows that a layer of the
    dense or the pruned prefill, or a decode step, has; `ms` of LAYERS layers' products, `gflops` in 1e9 FLOPs a second,
    `to_dense` the rate over the same kernel's at the dense number of rows."""
    schedule = ViTCoPConfig.preset(preset).schedule(shape.model_shape())
    dense = text_tokens + schedule.shape.patches
    counts = sorted({dense, *(text_tokens + visual for visual in schedule.visual_tokens()), *BATCHES}, reverse=True)
    hidden, wide = shape.hidden, shape.intermediate
    weights = [torch.randn(w) for _ in range(LAYERS) for w in [(hidden, hidden)] * 4 + [(wide, hidden)] * 2 + [(hidden, wide)]]
    flops = {rows: 2 * rows * sum(weight.numel() for weight in weights) for rows in counts}
    calls = {(kernel, rows): _products(kernel, rows, weights) for kernel in KERNELS for rows in counts}
    with torch.no_grad():
        times = timed(calls, rounds, Steps(Console(stderr=True)), "matrix products")
    return [
        {
            "kernel": kernel,
            "rows": rows,
            "ms": statistics.median(took),
            "gflops": flops[rows] / statistics.median(took) / 1e6,
            "to_dense": median_ratio(times[kernel, dense], took) * flops[rows] / flops[dense],
        }
        for (kernel, rows), took in times.items()
    ]


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
