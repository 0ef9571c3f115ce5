"""What selection costs by itself: the functions that the passes insert, compiled alone."""

from __future__ import annotations

from collections.abc import Sequence
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
from ..policies import POLICIES, tap_of
from ..program_modules import choose
from ..schedule import Schedule, Stage
from .arms import Request, begin_step
from .timing import Call


class SelectionOnly(nn.Module):
    """The very functions the passes insert, and nothing else: what selection costs inside vision and prefill together.

    Takes what `selection_inputs` makes of the same schedule, in order, and returns what leaves the last stage before the
    decoder, its rows or which patches, and the last stage in it, if there are such."""

    def __init__(self, schedule: Schedule, names: Sequence[str], exact: bool = True):
        super().__init__()
        self.schedule, self.names, self.exact = schedule, tuple(names), exact

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, values, strict=True))
        inside = [stage for stage in self.schedule.vision_stages if stage.side == "encoder"]
        found: list[Tensor] = []
        state: tuple[Tensor, ...] = ()
        if inside:
            patches, state = self._inside(inside, given)
            found.append(patches)
        elif self.schedule.vision is not None:
            patches, state = self._behind(self.schedule.vision.of_segment(0), given)
            found.append(patches)
        if self.schedule.decoder_stages:
            found.append(self._decoder(given, state))
        return tuple(found)

    def _inside(self, stages: list[Stage], given: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        shape, hidden = self.schedule.shape, given["patches"]
        state: tuple[Tensor, ...] = ()
        incoming: tuple[int, ...] = (shape.patches,)
        prefix = shape.prefix_tokens
        for number, stage in enumerate(stages):
            looked = _looked_at(stage, given, f"vision_{number}")
            hidden, _, _, _, *rest = prune_tokens(
                hidden, prefix, state, *looked, {"also": self._also(stage, given)}, policy=stage.policy, incoming=incoming,
                tokens=stage.tokens[:1], options={name: of_one(value) for name, value in stage.options},
                site={"prefix": prefix, "grid": shape.grid, "exact": self.exact}, tap=stage.tap,
            )  # fmt: skip
            state, incoming = tuple(rest), stage.tokens[:1]
        return hidden, state

    def _behind(self, stage: Stage, given: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        prefix, score_of = self.schedule.shape.prefix_tokens, tap_of(stage)
        told: tuple[Tensor, ...] = ()
        if score_of is not None:
            query, key, _, scale = _looked_at(stage, given, "vision_0")
            assert query is not None and key is not None and scale is not None
            pairs = (*self._also(stage, given), (query, key))
            scores = [score_of(own, other, scale, prefix, given.get("real")) for own, other in pairs]
            told = (scores[0] if len(scores) == 1 else torch.stack(scores, -1), rows_of(key)[:, prefix:])
        index = given["index"]
        choice = choose(stage, told, index, None, given["places"], self.exact, given.get("features"))
        rows = take_rows(given.get("features", index), choice.index) if choice.rows is None else choice.rows
        return rows, choice.state

    def _also(self, stage: Stage, given: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
        return tuple(
            (given[f"query_also_{layer}"].transpose(1, 2), given[f"key_also_{layer}"].transpose(1, 2)) for layer in stage.also
        )

    def _decoder(self, given: dict[str, Tensor], state: tuple[Tensor, ...]) -> Tensor:
        hidden, visual = given["hidden"], given["visual"]
        state, incoming = tuple(values.reshape(visual.shape) for values in state), self.schedule.segment_tokens
        for number, stage in enumerate(self.schedule.decoder_stages):
            more = {
                name: given[f"{name}_{number}"] for name in ("before", "entry", "text", "last") if f"{name}_{number}" in given
            }
            hidden, _, visual, _, *rest = prune_tokens(
                hidden, visual, state, *_looked_at(stage, given, f"decoder_{number}"), more, policy=stage.policy,
                incoming=incoming, tokens=stage.tokens, options={name: of_one(value) for name, value in stage.options},
                site={"centered": stage.keys == "centered", "exact": self.exact},
            )  # fmt: skip
            state, incoming = tuple(rest), stage.tokens
        return hidden


def _looked_at(
    stage: Stage, given: dict[str, Tensor], place: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float | None]:
    """(query, key, value, scale) of the layer that a stage looks at, as far as it does."""
    found = [given.get(f"{name}_{place}") for name in ("query", "key", "value")]
    if place.startswith("vision"):  # as projections leave them
        found = [None if tensor is None else tensor.transpose(1, 2) for tensor in found]
    scale = None if found[0] is None else found[0].shape[-1] ** -0.5
    return found[0], found[1], found[2], scale


def selection_inputs(
    schedule: Schedule, request: Request, dtype: torch.dtype, device: torch.device, padded: bool = False
) -> dict[str, Tensor]:
    """Random inputs of `SelectionOnly` at the schedule's shapes, by name. padded: whether it is told which patches of an
    encoder are padding; there is none here.

    I: images of the batch, B: its prompts. Of the i-th stage before the decoder query_vision_i, key_vision_i [I, rows, heads,
    hd], as projections leave them, and of layers that it looks at as well query_also_l, key_also_l; patches [I, rows, C], what
    enters the first of them, or for one behind the encoder index and places, as in `program_modules.Select`, and features [I,
    n, D] behind the projector. hidden [B, L0, D] and visual int64 [B, n] enter the decoder's first stage; of the i-th
    query_decoder_i, key_decoder_i [B, heads, rows, hd], before_i, entry_i [B, rows, D], text_i and last_i, as far as it needs
    them."""
    shape, batch, segment = schedule.shape, request.batch, schedule.layout[0]
    images, found = batch * len(schedule.layout), dict[str, Tensor]()

    def noise(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    patches = segment.candidates * segment.taps if shape.packed else shape.patches
    heads, rows = shape.vision_heads, shape.prefix_tokens + patches
    width = shape.vision_hidden // heads
    for number, stage in enumerate(schedule.vision_stages):
        needs = POLICIES[stage.policy].needs | ({"query", "key"} if tap_of(stage) else set())
        for name in sorted(needs & {"query", "key", "value"}):
            found[f"{name}_vision_{number}"] = noise(images, rows, heads, width)
        for layer in stage.also:
            found |= {f"{name}_also_{layer}": noise(images, rows, heads, width) for name in ("query", "key")}
        if number == 0 and stage.side == "encoder":
            found["patches"] = noise(images, rows, shape.vision_hidden)
        if stage.side != "encoder":
            places = grid_places(*segment.grid[1:]) if segment.grid[0] == 1 else torch.zeros(segment.candidates, 3)
            found["index"] = torch.arange(images * patches, device=device).reshape(images, -1, segment.taps)
            found["places"] = places.to(device).repeat(images, 1, 1)
            if stage.side == "entry":
                found["features"] = noise(images, segment.candidates, shape.feature_width)
            if padded:
                found["real"] = torch.ones(images, patches, dtype=torch.bool, device=device)
        rows = shape.prefix_tokens + stage.tokens[0]
    if schedule.decoder_stages:
        found |= _decoder_inputs(schedule, request, noise, device)
    return found


def _decoder_inputs(schedule: Schedule, request: Request, noise: Any, device: torch.device) -> dict[str, Tensor]:
    shape, batch = schedule.shape, request.batch
    rows = schedule.prompt_tokens(request.text_tokens)
    found = {"hidden": noise(batch, rows, shape.hidden)}
    found["visual"] = torch.arange(schedule.image_tokens, device=device).repeat(batch, 1)
    tokens = schedule.image_tokens
    for number, stage in enumerate(schedule.decoder_stages):
        needs = POLICIES[stage.policy].needs
        heads = {"query": shape.heads, "key": shape.kv_heads, "value": shape.kv_heads}
        for name in sorted(needs & heads.keys()):
            found[f"{name}_decoder_{number}"] = noise(batch, heads[name], rows, shape.head_dim)
        for name in sorted(needs & {"before", "entry"}):
            found[f"{name}_{number}"] = noise(batch, rows, shape.hidden)
        if "text" in needs:
            found[f"text_{number}"] = (torch.arange(rows, device=device) >= tokens).repeat(batch, 1)
        if "last" in needs:
            found[f"last_{number}"] = torch.full((batch,), rows - 1, device=device)
        rows, tokens = rows - tokens + stage.total, stage.total
    return found


def selection_arm(
    schedule: Schedule, request: Request, backend: str, dtype: torch.dtype, device: torch.device, padded: bool = False
) -> Call:
    """`SelectionOnly` of `schedule` through `backend`, bound to random inputs, compiled and run once.

    Raises ConfigError for a schedule that selects nothing, UnsupportedError for a backend that is unknown or cannot work here.
    """
    if not schedule.stages:
        raise ConfigError("a dense schedule selects nothing: measure the selection of a pruned one")
    compile = backend_of(backend)
    given = selection_inputs(schedule, request, dtype, device, padded)
    inputs = tuple(given.values())
    with tracing():
        module = SelectionOnly(schedule, tuple(given), compile.exact).eval()
        program = compile(torch.export.export(module, inputs, strict=False))

    @torch.no_grad()
    def call() -> Any:
        begin_step(device)
        return program(*inputs)

    call()
    return call
