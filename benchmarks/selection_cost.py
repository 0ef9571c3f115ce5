"""What selection costs alone as images become many: one per prompt of a batch, or all of them pooled in one prompt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from vitcop_compile import ViTCoPConfig, bench
from vitcop_compile.bench.runner import timed
from vitcop_compile.bench.timing import Call
from vitcop_compile.progress import Steps

FIELDS = ("backend", "preset", "images", "prompts", "selection_ms", "ms_per_image")
# Per-image time at many images, beside that of one, up to which the cost counts as linear.
LINEAR = 1.1


def measure(
    shape: bench.Shape, backends: Sequence[str], counts: Sequence[int], rounds: int, preset: str = "1/9", text_tokens: int = 64
) -> dict[str, Any]:
    """{"environment": ..., "rows": [...]}: a row per backend and number of images, as a batch and pooled; the first of
    `counts` is 1. `per_image_to_one` is the time per image over that of one image, the median over the rounds."""
    shape.check()
    device, dtype = torch.device(shape.device), getattr(torch, shape.dtype)
    size = shape.model_shape()
    console = Console(stderr=True)
    rows = []
    for backend in backends:
        calls: dict[str, Call] = {}
        for images in counts:
            with console.status(f"{backend}: compiling the selection of {images} images"):
                apart = ViTCoPConfig.preset(preset).schedule(size)
                request = bench.Request(images, text_tokens)
                calls[f"{images} {images}"] = bench.selection_arm(apart, request, backend, dtype, device)
                if images > 1:
                    pooled = ViTCoPConfig.preset(preset, scope="pooled").schedule(size, (size.image,) * images)
                    request = bench.Request(1, text_tokens)
                    calls[f"{images} 1"] = bench.selection_arm(pooled, request, backend, dtype, device)
        with torch.no_grad():
            times = timed(calls, rounds, Steps(console), f"{backend}: selection")
        rows += [_row(backend, preset, key, times) for key in calls]
    conditions = {"device": shape.device, "dtype": shape.dtype, "rounds": rounds, "memory": False}
    return {"environment": bench.environment() | conditions, "rows": rows}


def _row(backend: str, preset: str, key: str, times: dict[str, list[float]]) -> dict[str, Any]:
    images, prompts = map(int, key.split())
    share = [many / images / one for many, one in zip(times[key], times["1 1"], strict=True)]
    middle = statistics.median(times[key])
    return {
        "backend": backend,
        "preset": preset,
        "images": images,
        "prompts": prompts,
        "selection_ms": middle,
        "selection_ms_quartiles": list(bench.spread(times[key])),
        "ms_per_image": middle / images,
        "per_image_to_one": {"median": statistics.median(share), "quartiles": list(bench.spread(share))},
        "linear": statistics.median(share) <= LINEAR,
    }
