"""What selection costs by itself: the functions that the passes insert, compiled alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import backend_of
from ..errors import ConfigError
from ..isolation import tracing
from ..passes.prune import of_one, prune_tokens
from ..schedule import Schedule
from .arms import Request, begin_step
from .timing import Call


class SelectionOnly(nn.Module):
    """The very functions the passes insert, and nothing else: what selection costs inside vision and prefill together.

    I: images of the batch, B: its prompts. query, key: [I, prefix + patches, heads, hd] of the encoder's scoring layer, as its
    projections leave them; patches: [I, prefix + patches, C], its output; hidden: [B, L0, D], what enters the shallow stage;
    first, second: [B, kv_heads, rows, hd], the keys before the shallow and the deep stage; visual: int64 [B, n], the visual
    rows. Returns what leaves the vision and the deep stage.
    """

    def __init__(self, schedule: Schedule, exact: bool = True):
        super().__init__()
        self.schedule, self.exact = schedule, exact

    def forward(
        self, query: Tensor, key: Tensor, patches: Tensor, hidden: Tensor, first: Tensor, second: Tensor, visual: Tensor
    ) -> tuple[Tensor, ...]:
        shape, vision = self.schedule.shape, self.schedule.vision
        assert vision is not None
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        scale, prefix = query.shape[-1] ** -0.5, shape.prefix_tokens
        kept_hidden, _, _, _, labels = prune_tokens(
            patches, prefix, (), query, key, None, scale, policy=vision.policy, incoming=(shape.patches,),
            tokens=vision.tokens[:1], options={name: of_one(value) for name, value in vision.options},
            site={"prefix": prefix, "grid": shape.grid, "exact": self.exact},
        )  # fmt: skip
        labels, incoming = labels.reshape(visual.shape), self.schedule.segment_tokens
        for stage, keys in zip(self.schedule.decoder_stages, (first, second), strict=True):
            hidden, _, visual, _, labels = prune_tokens(
                hidden, visual, (labels,), None, keys, None, None, policy=stage.policy, incoming=incoming,
                tokens=stage.tokens, options={}, site={},
            )  # fmt: skip
            incoming = stage.tokens
        return kept_hidden, hidden


def selection_inputs(schedule: Schedule, request: Request, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Random inputs of `SelectionOnly` at the schedule's shapes; the encoder's heads are taken to be 64 wide."""
    shape, batch = schedule.shape, request.batch
    images, tokens = batch * len(schedule.layout), shape.prefix_tokens + shape.patches
    heads = max(1, shape.vision_hidden // 64)
    query = (images, tokens, heads, shape.vision_hidden // heads)
    rows = schedule.prompt_tokens(request.text_tokens)
    reduced = request.text_tokens + schedule.decoder_stages[0].total
    first, second = ((batch, shape.kv_heads, count, shape.head_dim) for count in (rows, reduced))
    sizes = (query, query, (images, tokens, shape.vision_hidden), (batch, rows, shape.hidden), first, second)
    visual = torch.arange(schedule.image_tokens, device=device).repeat(batch, 1)
    return (*(torch.randn(size, dtype=dtype, device=device) for size in sizes), visual)


def selection_arm(schedule: Schedule, request: Request, backend: str, dtype: torch.dtype, device: torch.device) -> Call:
    """`SelectionOnly` of `schedule` through `backend`, bound to random inputs, compiled and run once.

    Raises ConfigError for a schedule that selects nothing, UnsupportedError for a backend that is unknown or cannot work here.
    """
    if schedule.vision is None:
        raise ConfigError("a dense schedule selects nothing: measure the selection of a pruned one")
    compile = backend_of(backend)
    inputs = selection_inputs(schedule, request, dtype, device)
    with tracing():
        program = compile(torch.export.export(SelectionOnly(schedule, compile.exact).eval(), inputs, strict=False))

    @torch.no_grad()
    def call() -> Any:
        begin_step(device)
        return program(*inputs)

    call()
    return call
