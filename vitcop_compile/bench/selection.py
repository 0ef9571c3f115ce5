"""What selection costs by itself: the functions that the passes insert, compiled alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import backend_of
from ..errors import ConfigError
from ..host import grid_places
from ..isolation import tracing
from ..ops.indexing import take_rows
from ..passes.prune import of_one, prune_tokens
from ..passes.raw_key import rows_of
from ..policies import tap_of
from ..program_modules import choose
from ..schedule import Schedule
from .arms import Request, begin_step
from .timing import Call


class SelectionOnly(nn.Module):
    """The very functions the passes insert, and nothing else: what selection costs inside vision and prefill together.

    I: images of the batch, B: its prompts. query, key: [I, prefix + patches, heads, hd] of the encoder's scoring layer, as its
    projections leave them; patches: [I, prefix + patches, C], its output; hidden: [B, L0, D], what enters the shallow stage;
    first, second: [B, kv_heads, rows, hd], the keys before the shallow and the deep stage; visual: int64 [B, n], the visual
    rows. Where tokens are put together behind the encoder, images are its inputs, all alike, and `index`, `places` as in
    `program_modules.Select` follow, and real: bool [I, patches] if it pads them. Returns what leaves the vision stage, its
    rows or which patches, and the deep stage.
    """

    def __init__(self, schedule: Schedule, exact: bool = True):
        super().__init__()
        self.schedule, self.exact = schedule, exact

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        patches: Tensor,
        hidden: Tensor,
        first: Tensor,
        second: Tensor,
        visual: Tensor,
        *packed: Tensor,
    ) -> tuple[Tensor, ...]:
        shape, vision = self.schedule.shape, self.schedule.vision
        assert vision is not None
        query, key = query.transpose(1, 2), key.transpose(1, 2)
        scale, prefix = query.shape[-1] ** -0.5, shape.prefix_tokens
        if packed:
            index, places, *real = packed
            tap = tap_of(vision)
            assert tap is not None
            score = tap(query, key, scale, prefix, real[0] if real else None)
            choice = choose(vision.of_segment(0), (score, rows_of(key)[:, prefix:]), index, None, places, self.exact)
            kept_hidden, (labels,) = take_rows(index, choice.index), choice.state
        else:
            kept_hidden, _, _, _, labels = prune_tokens(
                patches, prefix, (), query, key, None, scale, policy=vision.policy, incoming=(shape.patches,),
                tokens=vision.tokens[:1], options={name: of_one(value) for name, value in vision.options},
                site={"prefix": prefix, "grid": shape.grid, "exact": self.exact}, tap=tap_of(vision),
            )  # fmt: skip
        labels, incoming = labels.reshape(visual.shape), self.schedule.segment_tokens
        for stage, keys in zip(self.schedule.decoder_stages, (first, second), strict=True):
            hidden, _, visual, _, labels = prune_tokens(
                hidden, visual, (labels,), None, keys, None, None, policy=stage.policy, incoming=incoming,
                tokens=stage.tokens, options={}, site={"centered": stage.keys == "centered"},
            )  # fmt: skip
            incoming = stage.tokens
        return kept_hidden, hidden


def selection_inputs(
    schedule: Schedule, request: Request, dtype: torch.dtype, device: torch.device, padded: bool = False
) -> tuple[Tensor, ...]:
    """Random inputs of `SelectionOnly` at the schedule's shapes; the encoder's heads are taken to be 64 wide. padded: whether
    it is told which of its patches are padding; there is none here."""
    shape, batch, segment = schedule.shape, request.batch, schedule.layout[0]
    patches = segment.candidates * segment.taps if shape.packed else shape.patches
    images, tokens = batch * len(schedule.layout), shape.prefix_tokens + patches
    heads = max(1, shape.vision_hidden // 64)
    query = (images, tokens, heads, shape.vision_hidden // heads)
    rows = schedule.prompt_tokens(request.text_tokens)
    reduced = request.text_tokens + schedule.decoder_stages[0].total
    first, second = ((batch, shape.kv_heads, count, shape.head_dim) for count in (rows, reduced))
    sizes = (query, query, (images, tokens, shape.vision_hidden), (batch, rows, shape.hidden), first, second)
    visual = torch.arange(schedule.image_tokens, device=device).repeat(batch, 1)
    random = (*(torch.randn(size, dtype=dtype, device=device) for size in sizes), visual)
    if not shape.packed:
        return random
    index = torch.arange(images * patches, device=device).reshape(images, -1, segment.taps)
    places = grid_places(*segment.grid[1:]).to(device).repeat(images, 1, 1)
    return (*random, index, places, *([index.new_ones(images, patches, dtype=torch.bool)] if padded else []))


def selection_arm(
    schedule: Schedule, request: Request, backend: str, dtype: torch.dtype, device: torch.device, padded: bool = False
) -> Call:
    """`SelectionOnly` of `schedule` through `backend`, bound to random inputs, compiled and run once.

    Raises ConfigError for a schedule that selects nothing, UnsupportedError for a backend that is unknown or cannot work here.
    """
    if schedule.vision is None:
        raise ConfigError("a dense schedule selects nothing: measure the selection of a pruned one")
    compile = backend_of(backend)
    inputs = selection_inputs(schedule, request, dtype, device, padded)
    with tracing():
        program = compile(torch.export.export(SelectionOnly(schedule, compile.exact).eval(), inputs, strict=False))

    @torch.no_grad()
    def call() -> Any:
        begin_step(device)
        return program(*inputs)

    call()
    return call
