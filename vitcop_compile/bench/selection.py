"""What selection costs by itself: the functions that the passes insert, compiled alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import backend_of
from ..errors import ConfigError
from ..isolation import tracing
from ..passes.prune_decoder import prune_tokens
from ..passes.prune_encoder import cluster_patches, prune_patches
from ..schedule import Schedule
from .arms import Request, begin_step
from .timing import Call


class SelectionOnly(nn.Module):
    """The very functions the passes insert, and nothing else: what selection costs inside vision and prefill together.

    query, key: [B, prefix + patches, heads, hd] of the encoder's scoring layer, as its projections leave them; patches:
    [B, prefix + patches, C], its output; hidden: [B, L0, D], what enters the shallow stage; first, second: [B, kv_heads,
    rows, hd], the keys before the shallow and the deep stage; visual: int64 [B, n], the visual rows. Returns what leaves the
    vision and the deep stage.
    """

    def __init__(self, schedule: Schedule, exact: bool = True):
        super().__init__()
        self.schedule, self.exact = schedule, exact

    def forward(
        self, query: Tensor, key: Tensor, patches: Tensor, hidden: Tensor, first: Tensor, second: Tensor, visual: Tensor
    ) -> tuple[Tensor, ...]:
        shape, vision = self.schedule.shape, self.schedule.vision
        assert vision is not None
        prefix = shape.prefix_tokens
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
            exact=self.exact,
        )
        shallow, deep = self.schedule.stages
        hidden, _, visual, index = prune_tokens(hidden, first, visual, labels, policy=shallow.policy, tokens=shallow.tokens)
        hidden, *_ = prune_tokens(hidden, second, visual, labels.gather(1, index), policy=deep.policy, tokens=deep.tokens)
        return kept_hidden, hidden


def selection_inputs(schedule: Schedule, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Random inputs of `SelectionOnly` at the schedule's shapes; the encoder's heads are taken to be 64 wide."""
    shape = schedule.shape
    tokens = shape.prefix_tokens + shape.patches
    heads = max(1, shape.vision_hidden // 64)
    rows = schedule.prompt_tokens
    reduced = rows - schedule.image_tokens + schedule.stages[0].tokens

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    head = shape.vision_hidden // heads
    visual = torch.arange(schedule.image_tokens, device=device).repeat(batch, 1)
    return (
        random(batch, tokens, heads, head),
        random(batch, tokens, heads, head),
        random(batch, tokens, shape.vision_hidden),
        random(batch, rows, shape.hidden),
        random(batch, shape.kv_heads, rows, shape.head_dim),
        random(batch, shape.kv_heads, reduced, shape.head_dim),
        visual,
    )


def selection_arm(schedule: Schedule, request: Request, backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    """`SelectionOnly` of `schedule` through `backend`, bound to random inputs, compiled and run once.

    Raises ConfigError for a schedule that selects nothing, or whose prompt is not that of `request`; UnsupportedError for a
    backend that is unknown or cannot work here.
    """
    if schedule.vision is None:
        raise ConfigError("a dense schedule selects nothing: measure the selection of a pruned one")
    if schedule.text_tokens != request.text_tokens:
        raise ConfigError(
            f"the schedule is stated for {schedule.text_tokens} text tokens, the request has {request.text_tokens}: make it "
            f"with text_tokens={request.text_tokens}"
        )
    compile = backend_of(backend)
    inputs = selection_inputs(schedule, request.batch, dtype, device)
    with tracing():
        program = compile(torch.export.export(SelectionOnly(schedule, compile.exact).eval(), inputs, strict=False))

    @torch.no_grad()
    def call() -> Any:
        begin_step(device)
        return program(*inputs)

    call()
    return call
