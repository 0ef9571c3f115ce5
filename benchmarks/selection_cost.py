"""What selection costs alone as images become many: one per prompt of a batch, or all of them pooled in one prompt."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from vitcop_compile.passes.prune_decoder import prune_tokens
from vitcop_compile.passes.prune_encoder import cluster_patches, prune_patches

from vitcop_compile import ViTCoPConfig, bench
from vitcop_compile.backends import backend_of
from vitcop_compile.bench.runner import timed
from vitcop_compile.bench.timing import Call
from vitcop_compile.progress import Steps
from vitcop_compile.schedule import Schedule

FIELDS = ("backend", "preset", "images", "prompts", "selection_ms", "ms_per_image")
# Per-image time at many images, beside that of one, up to which the cost counts as linear.
LINEAR = 1.1


class Pooled(nn.Module):
    """As `bench.SelectionOnly`, with the tokens of `images` images in one prompt, whose budgets are `images` times as large.

    query, key: [images, prefix + patches, heads, hd]; patches: [images, prefix + patches, C]; hidden: [1, t, D]; first,
    second: [1, kv_heads, rows, hd]; visual: int64 [1, images * n].
    """

    def __init__(self, schedule: Schedule, images: int):
        super().__init__()
        self.schedule, self.images = schedule, images

    def forward(
        self, query: Tensor, key: Tensor, patches: Tensor, hidden: Tensor, first: Tensor, second: Tensor, visual: Tensor
    ) -> tuple[Tensor, ...]:
        shape, vision = self.schedule.shape, self.schedule.vision
        assert vision is not None
        prefix, images = shape.prefix_tokens, self.images
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        scale = query.shape[-1] ** -0.5
        kept_hidden, _, kept = prune_patches(patches, query, key, scale, tokens=vision.tokens, prefix=prefix)
        labels = cluster_patches(
            key,
            kept,
            grid=shape.grid,
            prefix=prefix,
            centers=vision.centers,
            density_width=vision.density_width,
            reach=vision.reach,
            exact=True,
        ).reshape(1, -1)
        shallow, deep = self.schedule.stages
        hidden, _, visual, index = prune_tokens(
            hidden, first, visual, labels, policy=shallow.policy, tokens=images * shallow.tokens, images=images
        )
        hidden, *_ = prune_tokens(
            hidden, second, visual, labels.gather(1, index), policy=deep.policy, tokens=images * deep.tokens, images=images
        )
        return kept_hidden, hidden


def pooled_inputs(schedule: Schedule, images: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Random inputs of `Pooled`."""
    query, key, patches, *_ = bench.selection_inputs(schedule, images, dtype, device)
    shape = schedule.shape
    visual = images * schedule.image_tokens
    rows = schedule.text_tokens + visual
    reduced = schedule.text_tokens + images * schedule.stages[0].tokens

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    hidden = random(1, rows, shape.hidden)
    first, second = (random(1, shape.kv_heads, length, shape.head_dim) for length in (rows, reduced))
    return query, key, patches, hidden, first, second, torch.arange(visual, device=device).unsqueeze(0)


def measure(
    shape: bench.Shape, backends: Sequence[str], counts: Sequence[int], rounds: int, preset: str = "1/9", text_tokens: int = 64
) -> dict[str, Any]:
    """{"environment": ..., "rows": [...]}: a row per backend and number of images, as a batch and pooled; the first of
    `counts` is 1. `per_image_to_one` is the time per image over that of one image, the median over the rounds."""
    shape.check()
    device, dtype = torch.device(shape.device), getattr(torch, shape.dtype)
    schedule = ViTCoPConfig.preset(preset).schedule(shape.model_shape(), text_tokens=text_tokens)
    console = Console(stderr=True)
    rows = []
    for backend in backends:
        calls: dict[str, Call] = {}
        for images in counts:
            with console.status(f"{backend}: compiling the selection of {images} images"):
                calls[f"{images} {images}"] = bench.selection_arm(
                    schedule, bench.Request(images, text_tokens), backend, dtype, device
                )
                if images > 1:
                    calls[f"{images} 1"] = _pooled(schedule, images, backend, dtype, device)
        with torch.no_grad():
            times = timed(calls, rounds, Steps(console), f"{backend}: selection")
        rows += [_row(backend, preset, key, times) for key in calls]
    conditions = {"device": shape.device, "dtype": shape.dtype, "rounds": rounds, "memory": False}
    return {"environment": bench.environment() | conditions, "rows": rows}


def _pooled(schedule: Schedule, images: int, backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    inputs = pooled_inputs(schedule, images, dtype, device)
    with torch.no_grad():
        program = backend_of(backend)(torch.export.export(Pooled(schedule, images).eval(), inputs, strict=False))
        program(*inputs)
    return lambda: program(*inputs)


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
