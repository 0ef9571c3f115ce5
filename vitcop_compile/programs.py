"""The programs of a model, exported at concrete shapes: vision (or tower and select), prefill, extend.

Each is a rewritten graph between the model's own embedding, projector and head. Exporting it at static shapes removes
every symbol, and what remains is an ordinary ExportedProgram: the one input of every backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from .attention import evaluating
from .capture import Capture, LaterCapture, capture_encoder
from .errors import RewriteError
from .families import Family
from .isolation import tracing
from .layout import Layout
from .passes import Passes, encoder_passes, extend_passes, prefill_passes, rewrite, text_passes, tower_passes
from .policies import states_of, tap_of
from .program_modules import Extend, Prefill, Select, Tower, Vision
from .schedule import Method, Schedule, Stage, resolve

_MOST_SCHEDULES = 4096


@dataclass(frozen=True)
class Programs:
    """Rewrites and exports on demand. Schedules are the contract; `export_*` raise RewriteError where a graph breaks it.

    method: what is pruned; dump: a folder that gets every graph after every pass.
    """

    family: Family
    captured: Capture | LaterCapture
    method: Method
    attn_implementation: str = "sdpa"
    dump: Path | None = None
    # By layout: held here and not for all methods there ever were, as those can hold weights.
    _schedules: dict[Layout, Schedule] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def schedule(self) -> Schedule:
        """That of a prompt with one image."""
        return self.schedule_of(self.family.host.layout)

    def _schedule(self, images: int | Layout) -> Schedule:
        return self.schedule_of(self.family.host.layout * images if isinstance(images, int) else images)

    def schedule_of(self, layout: Layout) -> Schedule:
        """That of a prompt with the images of `layout`."""
        if layout not in self._schedules:
            if len(self._schedules) >= _MOST_SCHEDULES:
                self._schedules.clear()
            self._schedules[layout] = resolve(self.method, self.family.shape, layout)
        return self._schedules[layout]

    @property
    def states(self) -> int:
        """Tensors of state that the vision stage hands to the decoder's."""
        return states_of(self.schedule.vision_stages)

    def export_vision(self, images: int, exact: bool = True) -> ExportedProgram:
        """The vision program for so many images; `exact` as in `ops.density_peaks`."""
        return self._export_seeing(self.schedule, self.vision_module(images, exact), images)

    def export_frames(self, frames: int, exact: bool = True) -> ExportedProgram:
        """The vision program for so many frames of videos, where these have an encoder of their own."""
        assert self.family.frames is not None
        schedule = self.schedule_of(self.family.frames.layout)
        return self._export_seeing(schedule, self.frames_module(frames, exact), frames)

    def _export_seeing(self, schedule: Schedule, module: Vision, images: int) -> ExportedProgram:
        program = _export(module, (self._zeros(images, *self.family.pixel_shape),))
        _expect("vision features", _shapes(program)[0][:2], (images, schedule.image_tokens + schedule.lead))
        return program

    def vision_module(self, images: int = 1, exact: bool = True) -> Vision:
        """The vision program before export."""
        assert self.captured.encoder is not None
        return self._seeing("encoder", self.schedule, self.family.patches, self.captured.encoder, images, exact)

    def frames_module(self, frames: int = 1, exact: bool = True) -> Vision:
        """The vision program of videos that have an encoder of their own before export."""
        assert self.family.frames is not None and self.captured.frames is not None
        schedule = self.schedule_of(self.family.frames.layout)
        return self._seeing("frames", schedule, self.family.frames.patches, self.captured.frames, frames, exact)

    def _seeing(
        self, name: str, schedule: Schedule, patches: nn.Module, captured: fx.GraphModule, images: int, exact: bool
    ) -> Vision:
        passes = encoder_passes(schedule, self.attn_implementation, exact)
        encoder = self._rewrite(name, captured, passes, [self._patches(images)])
        stages = [stage.of_segment(0) for stage in schedule.vision_stages]
        return Vision(patches, encoder, self.family.projector, stages, schedule.layout[0], exact)

    def export_tower(self, tiles: int, slots: int | None = None) -> ExportedProgram:
        """The tower program for so many tiles of so many patches, by default those of the one size there is."""
        module, inputs = self.tower_module(tiles, slots)
        program = _export(module, inputs)
        _expect("patches", _shapes(program)[0][:2], (tiles, slots or self.family.shape.patches))
        return program

    def tower_module(self, tiles: int, slots: int | None = None) -> tuple[Tower, tuple[Tensor, ...]]:
        """The tower program before export, and examples of what it takes."""
        family, slots = self.family, slots or self.family.shape.patches
        passes = tower_passes(self.schedule, self.attn_implementation)
        if self.captured.encoder is not None:
            encoder, tables = self.captured.encoder, []
            pixels, patches = self._zeros(tiles, *family.pixel_shape), self._patches(tiles)
        else:
            whole = (tiles, slots)
            tables = [torch.ones(whole, dtype=torch.bool, device=self._device())]
            tables += [torch.zeros(*whole, *size, dtype=dtype, device=self._device()) for size, dtype in family.host.tables]
            pixels, patches = self._zeros(*whole, *family.pixel_shape), self._zeros(*whole, family.shape.vision_hidden)
            encoder = capture_encoder(family, patches, *tables)
        tower = self._rewrite("tower", encoder, passes, [patches, *tables])
        return Tower(family, tower), (pixels, *tables)

    def export_select(
        self,
        tiles: int,
        slots: int,
        segments: int,
        candidates: int,
        taps: int,
        stage: Stage | None,
        axes: int = 2,
        exact: bool = True,
    ) -> ExportedProgram:
        """The program that selects, or without a `stage` takes all, from so many segments of at most `candidates` tokens each,
        among tiles of `slots` patches; `exact` as in `ops.density_peaks`; axes: coordinates of a candidate's place."""
        shape = self.family.shape
        hidden = self._zeros(tiles, slots, shape.vision_width)
        index = self._ints(segments, candidates, taps)
        wide = self._parameter().new_zeros
        inputs = [hidden]
        if stage is not None and tap_of(stage) is not None:
            score = wide((*hidden.shape[:2], *((1 + len(stage.also),) * bool(stage.also))), dtype=torch.float32)
            inputs += [score, self._zeros(tiles, slots, shape.key_features or shape.vision_hidden)]
        inputs.append(index)
        inputs += [wide(index.shape, dtype=torch.float32)] * (taps > 1 and shape.group == 1)
        inputs += [wide((segments, candidates, axes), dtype=torch.float32)] * (stage is not None)
        program = _export(Select(self.family, stage, taps, exact), tuple(inputs))
        _expect("features", _shapes(program)[0][:2], (segments, candidates if stage is None else stage.total))
        return program

    def export_prefill(
        self,
        batch: int,
        text: int,
        images: int | Layout = 1,
        rows: Sequence[int] | None = None,
        *,
        filled: bool = False,
        in_place: bool = True,
        least_text: int | None = None,
        exact: bool = True,
    ) -> ExportedProgram:
        """The prefill program for `batch` prompts of `text` text tokens, and so many images or those of a layout each.

        rows: those of the caches by group, by default as many as the prompt has; filled: the caches hold an earlier turn. With
        `least_text` the text is a dynamic axis from there to `text`, which takes `in_place=False`; budgets stay static.
        `exact` as `policies.Site` has it."""
        if not images or (isinstance(images, int) and images < 0):
            raise RewriteError(f"images={images}: a prompt without an image is text, which export_extend takes")
        schedule = self._schedule(images)
        for group, (has, needs) in enumerate(zip(rows or (), (text + tokens for tokens in schedule.group_tokens()))):
            if has < needs:
                raise RewriteError(f"caches of {has} rows in group {group} hold no prompt of {needs}: give at least as many")
        inputs = self.prefill_inputs(batch, text, images, rows, filled=filled, in_place=in_place)
        module = self.prefill_module(images, filled=filled, in_place=in_place, inputs=inputs, exact=exact)
        if least_text is not None:
            kept = schedule.image_tokens
            axis = Dim("rows", min=least_text + kept, max=text + kept)
            axes: list[dict[int, Dim] | None] = [{1: axis}, None, {2: axis}, None, None]
            more = [(None,) * (len(inputs) - 5)] if len(inputs) > 5 else []
            return _export(module, inputs, (*axes, *more))
        program = _export(module, inputs)
        shapes = _shapes(program)
        for stage, found in zip(schedule.decoder_stages, shapes[1:], strict=False):
            _expect(f"selection of layer {stage.layer}", found, (batch, stage.total))
        written = _written(program) if in_place else shapes[1 + len(schedule.decoder_stages) + len(schedule.told) :]
        _expect_rows(schedule, written, batch, [text + tokens for tokens in schedule.group_tokens()])
        return program

    def export_extend(
        self,
        batch: int,
        tokens: int,
        rows: Sequence[int],
        *,
        in_place: bool = True,
        least_tokens: int | None = None,
        kernels: bool = False,
    ) -> ExportedProgram:
        """The program for `tokens` more tokens of `batch` sequences, on caches with `rows` by group. A dynamic axis from
        `least_tokens` on, which takes `in_place=False`. kernels: as `Backend` has it; otherwise it holds ATen alone."""
        schedule, inputs = self.schedule, self.extend_inputs(batch, tokens, rows)
        module = self.extend_module(tokens, in_place=in_place, inputs=inputs, kernels=kernels)
        if least_tokens is not None:
            axis = Dim("rows", min=least_tokens, max=tokens)
            return _export(module, inputs, ({1: axis}, None, None, None, None, (None,) * (len(inputs) - 5)))
        program = _export(module, inputs)
        if not in_place:
            _expect_rows(schedule, _shapes(program)[1 + len(schedule.told) :], batch, [tokens] * len(rows))
        return program

    def extend_module(
        self, tokens: int, *, in_place: bool = True, inputs: tuple[Tensor, ...] = (), kernels: bool = False
    ) -> Extend:
        """The extend program before export; inputs: as of `prefill_module`; kernels: as of `export_extend`."""
        schedule = self.schedule
        passes = extend_passes(schedule, self.attn_implementation, in_place, kernels)
        captured, text = self.captured.decoder, text_passes(schedule)
        captured = rewrite(captured, text) if text else captured
        decoder = self._rewrite(f"extend_{tokens}", captured, passes, self._decoder_inputs(inputs, (2, 4), 0))
        return Extend(self.family, decoder)

    def extend_inputs(self, batch: int, tokens: int, rows: Sequence[int]) -> tuple[Tensor, ...]:
        """Example inputs of the extend program, at the last rows."""
        schedule = self.schedule
        counts = [self._ints(batch, tokens), self._ints(batch) + tokens - 1, self._ints(batch) + rows[0] - tokens]
        removed = self._ints(len(rows), batch) + torch.tensor([[rows[0] - r] for r in rows], device=self._device())
        return (*counts, counts[2].clone(), removed, *self._caches(schedule, batch, rows))

    def prefill_module(
        self,
        images: int | Layout = 1,
        *,
        filled: bool = False,
        in_place: bool = True,
        all_logits: bool = False,
        inputs: tuple[Tensor, ...] = (),
        exact: bool = True,
    ) -> Prefill:
        """The prefill program before export; inputs: examples of what it takes, for the dump of its graphs."""
        schedule = self._schedule(images)
        states = self.states if schedule.follows else 0
        settings = {"states": states, "filled": filled, "in_place": in_place, "exact": exact}
        passes = prefill_passes(schedule, self.attn_implementation, **settings)  # type: ignore[arg-type]
        pruned = (4,) if schedule.follows else ()
        name = f"prefill_{images if isinstance(images, int) else len(images)}{'_filled' * filled}"
        given = self._decoder_inputs(inputs, pruned, schedule.shape.deepstack)
        decoder = self._rewrite(name, self.captured.decoder, passes, given)
        return Prefill(self.family, decoder, schedule, states, all_logits)

    def prefill_inputs(
        self,
        batch: int,
        text: int,
        images: int | Layout = 1,
        rows: Sequence[int] | None = None,
        *,
        filled: bool = False,
        in_place: bool = True,
    ) -> tuple[Tensor, ...]:
        """Example inputs of the prefill program."""
        schedule = self._schedule(images)
        n, lead = schedule.image_tokens, schedule.lead
        tokens = text + n
        visual = torch.arange(n + lead, device=self._device()).repeat(batch, 1)
        positions = torch.arange(tokens, device=self._device()).repeat(self.family.shape.position_dims, batch, 1)
        features = self._zeros(batch, n + lead, schedule.shape.feature_width)
        state = [torch.zeros_like(visual[:, :n])] * (self.states if schedule.follows else 0)
        rows = rows or [text + kept for kept in schedule.group_tokens()]
        places = [self._ints(batch), self._ints(len(rows), batch)] if filled else []
        caches = self._caches(schedule, batch, rows) if in_place or filled else []
        return (
            self._ints(batch, tokens),
            self._ints(batch) + tokens - 1,
            positions,
            features,
            visual,
            *state,
            *places,
            *caches,
        )

    def _rewrite(self, name: str, captured: fx.GraphModule, passes: Passes, inputs: list[Tensor]) -> fx.GraphModule:
        dump = self.dump / name if self.dump is not None and inputs else None
        return rewrite(captured, passes, dump, inputs)

    def _decoder_inputs(self, inputs: tuple[Tensor, ...], own: tuple[int, ...], more: int) -> list[Tensor]:
        """What the decoder gets where its program gets `inputs`: embeddings, positions, marks if it takes them, so many `more`
        features, those in `own`, and all from the sixth."""
        if self.dump is None or not inputs:
            return []
        batch, tokens = inputs[0].shape
        positions = self._ints(self.family.shape.position_dims, batch, tokens)
        embeddings = self._zeros(batch, tokens, self.family.shape.hidden)
        marks = [self._ints(batch, 2, 1, tokens)] if self.family.shape.marks else []
        return [embeddings, positions, *marks, *[embeddings] * more, *(inputs[i] for i in own), *inputs[5:]]

    def _patches(self, tiles: int) -> Tensor:
        """What the encoder gets for so many inputs."""
        shape = self.family.shape
        return self._zeros(tiles, shape.prefix_tokens + shape.patches, shape.vision_hidden)

    def _caches(self, schedule: Schedule, batch: int, rows: Sequence[int]) -> list[Tensor]:
        told = [self._ints(batch, rows[group]) for group in schedule.told]
        return [*told, *(self._zeros(*shape) for shape in schedule.cache_shapes(batch, rows) for _ in "kv")]

    def _parameter(self) -> Tensor:
        return self.family.example

    def _device(self) -> torch.device:
        return self._parameter().device

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._parameter().dtype, device=self._device())

    def _ints(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device())


def _export(module: nn.Module, inputs: tuple[Tensor, ...], axes: tuple | None = None) -> ExportedProgram:
    with tracing(module), evaluating(module):
        return torch.export.export(module, inputs, dynamic_shapes=axes, strict=False)


def _shapes(program: ExportedProgram) -> list[tuple[int, ...]]:
    """Of what the program returns to its caller; updates of its inputs come before that."""
    outputs = program.graph_signature.user_outputs
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    return [tuple(values[name].shape) for name in outputs]


def _written(program: ExportedProgram) -> list[tuple[int, ...]]:
    """Shapes of the keys and values that a program writes into its inputs, in their order."""
    found = []
    for node in program.graph.nodes:
        if not node.args or getattr(node.args[0], "op", None) != "placeholder":  # a value that is made in place
            continue
        if node.target is torch.ops.aten.index_put_.default:
            found.append(node.args[2])
        elif node.target is torch.ops.aten.copy_.default:  # of rows that are padded to those of the cache
            source = node.args[1]
            found.append(source.args[0] if source.target is torch.ops.aten.pad.default else source)
    return [tuple(rows.meta["val"].shape) for rows in found if rows.meta["val"].is_floating_point()]


def _expect_rows(schedule: Schedule, found: list[tuple[int, ...]], batch: int, rows: Sequence[int]) -> None:
    _expect("the list of keys and values", (len(found),), (2 * schedule.shape.layers,))
    for layer, expected in enumerate(schedule.cache_shapes(batch, rows)):
        _expect(f"keys of layer {layer}", found[2 * layer], expected)
        _expect(f"values of layer {layer}", found[2 * layer + 1], expected)


def _expect(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise RewriteError(f"{what} has shape {tuple(found)}, the schedule says {tuple(expected)}")
