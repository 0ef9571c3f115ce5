"""The programs of a folder, what each must take and give: it follows from the configuration, and nothing else is believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..host import Host
from ..layout import Layout
from ..policies import states_of, tap_of
from ..schedule import Schedule, Stage
from ..vision import see
from .manifest import NAME, FolderError, Manifest, ProgramSpec, TensorSpec

# Text tokens a dynamic axis starts at: torch.export treats a size of 1 as a constant.
LEAST_TEXT = 2


class Wanted(NamedTuple):
    """A program of a folder, and its spec. kind, key, size: as the runtime asks for it; size: images that "vision" takes,
    frames of "frames", tiles of "tower", segments of "select", and sequences of "prefill", "extend" and "decode", fewer of
    which go through it as well; key: all else. layout: of a prefill's prompts; text: its fewest and most text tokens, or those
    of a turn.
    """

    kind: str
    key: tuple[Any, ...]
    size: int
    spec: ProgramSpec
    layout: Layout = ()
    text: tuple[int, int] = (1, 1)


def check_programs(manifest: Manifest, host: Host) -> list[Wanted]:
    """The programs of a folder, as `wanted_programs` has them, with the specs listed.

    Raises FolderError, naming the tensor, where those listed are not those of config, shape, layouts and bounds.
    """
    wanted = wanted_programs(manifest, host)
    kinds = [(spec.kind, spec.rows) for spec in manifest.programs]
    if kinds != [(program.kind, program.spec.rows) for program in wanted]:
        raise FolderError(f"{NAME}: programs {kinds} are not those of layouts, batch_sizes, max_text_len and prompt_buckets")
    for found, right in zip(manifest.programs, wanted, strict=True):
        for side in ("inputs", "outputs"):
            listed, needed = getattr(found, side), getattr(right.spec, side)
            if len(listed) != len(needed):
                raise FolderError(f"{NAME}: {found.kind} has {len(listed)} {side}, the schedule needs {len(needed)}")
            wrong = [pair for pair in zip(listed, needed) if pair[0] != pair[1]]
            if wrong:
                raise FolderError(f"{NAME}: {found.kind} has {wrong[0][0]} in its {side}, the schedule needs {wrong[0][1]}")
    return [program._replace(spec=spec) for program, spec in zip(wanted, manifest.programs, strict=True)]


def wanted_programs(manifest: Manifest, host: Host) -> list[Wanted]:
    """The programs of a folder, in the order they are written. Files are named for what makes a program one of several."""
    found = _seeing(manifest, host)
    schedules = {schedule.key: schedule for schedule in manifest.schedules}
    for batch in manifest.batch_sizes:
        suffix = f"_batch{batch}" if len(manifest.batch_sizes) > 1 else ""
        for least, most in text_spans(manifest):
            for number, schedule in enumerate(schedules.values()):
                name = suffix + (f"_layout{number}" if len(schedules) > 1 else "")
                for filled in (False, True)[: 1 + manifest.later_images]:
                    found.append(_prefill(manifest, schedule, batch, (least, most), filled, name + "_later" * filled))
            if most > 1:  # one token is a decoding step
                found.append(_extend(manifest, "extend", batch, (least, most), suffix))
        found.append(_extend(manifest, "decode", batch, None, suffix))
    return found


def text_spans(manifest: Manifest) -> list[tuple[int, int]]:
    """Fewest and most text tokens of every prefill and extend program: one of each with dynamic rows, or one for each bucket.

    TensorRT takes one for all buckets: an engine holds its weights once and a profile for every bucket.
    """
    buckets = manifest.prompt_buckets
    if buckets is None:
        return [(LEAST_TEXT, manifest.max_text_len)]
    return [(size, size) for size in buckets] if manifest.product == "onnx" else [(buckets[0], buckets[-1])]


def are_of(host: Host, layouts: Sequence[Sequence[Layout]]) -> bool:
    """Whether the images of prompts are such as `host` makes, as far as it can tell."""
    every = tuple(tuple(image) for images in layouts for image in images)
    if host.fixed:
        return all(segment in host.layout for image in every for segment in image)
    try:
        return host.blank(every, torch.device("meta"), torch.float32).layouts == every
    except Exception:  # segments of another family have grids that this one cannot lay out
        return False


class _Noting:
    """Stands for the programs of the vision side: notes which are asked for, and answers on the meta device."""

    def __init__(self, host: Host):
        self.host = host
        self.asked: dict[tuple[Any, ...], None] = {}

    def vision(self, *key: Any) -> Callable[..., list[Tensor]]:
        return self._noted("vision", *key)

    def frames(self, *key: Any) -> Callable[..., list[Tensor]]:
        return self._noted("frames", *key)

    def tower(self, *key: Any) -> Callable[..., list[Tensor]]:
        return self._noted("tower", *key)

    def select(self, *key: Any) -> Callable[..., list[Tensor]]:
        return self._noted("select", *key)

    def _noted(self, kind: str, *key: Any) -> Callable[..., list[Tensor]]:
        self.asked[(kind, *key)] = None
        # Of what a program says, the caller reads no more than the tiles and slots of a tower.
        return lambda *inputs: [torch.empty(key[:2] if kind == "tower" else (0,), device="meta")]


def _seeing(manifest: Manifest, host: Host) -> list[Wanted]:
    """The programs of the vision side: those that batches of one layout each go through, found by sending them."""
    noting = _Noting(host)
    for batch in manifest.batch_sizes:
        for images, schedule in zip(manifest.layouts, manifest.schedules, strict=True):
            blank = host.blank(list(images) * batch, torch.device("meta"), getattr(torch, manifest.dtype))
            see(noting, blank, [len(images)] * batch, [schedule] * batch)
    makers: dict[str, Callable[..., Wanted]] = {
        "vision": partial(_encoder, "vision"),
        "frames": partial(_encoder, "frames"),
        "tower": _tower,
        "select": _select,
    }
    order = sorted(noting.asked, key=lambda key: list(makers).index(key[0]))
    found = [makers[kind](manifest, host, *key) for kind, *key in order]
    # Selections may differ in their policy's options alone.
    names = [program.spec.file for program in found]
    for place, program in enumerate(found):
        if (same := names[:place].count(program.spec.file)) > 0:
            found[place] = program._replace(spec=_renamed(program.spec, f"_{same}"))
    return found


def _encoder(kind: str, manifest: Manifest, host: Host, count: int) -> Wanted:
    """Images, or frames of videos that have an encoder of their own, through all of it."""
    every = [image for images in manifest.layouts for image in images]
    schedule = manifest.schedule_of(next(image for image in every if (image[0].kind == "video") == (kind == "frames"))[:1])
    n = schedule.image_tokens
    features = TensorSpec("features", manifest.dtype, (count, n + schedule.lead, manifest.shape.feature_width))
    found = (features, *_chosen(schedule.vision_stages, count, n))
    pixels = TensorSpec("pixels", manifest.dtype, (count, *host.pixel_shape))
    alone = kind == "vision" and len(manifest.batch_sizes) == 1 and {len(images) for images in manifest.layouts} == {1}
    return Wanted(kind, (), count, _spec(kind, kind if alone else f"{kind}_{count}", (pixels,), found))


def _tower(manifest: Manifest, host: Host, tiles: int, slots: int) -> Wanted:
    whole = (tiles, slots)
    given = [TensorSpec("pixels", manifest.dtype, (tiles, *host.pixel_shape))]
    if host.tables:
        given = [TensorSpec("pixels", manifest.dtype, (*whole, *host.pixel_shape)), TensorSpec("real", "bool", whole)]
        given += [
            TensorSpec(f"table_{i}", str(dtype).removeprefix("torch."), (*whole, *size))
            for i, (size, dtype) in enumerate(host.tables)
        ]
    return Wanted("tower", (slots,), tiles, _spec("tower", f"tower_{tiles}x{slots}", given, _patches(manifest, tiles, slots)))


def _select(
    manifest: Manifest,
    host: Host,
    tiles: int,
    slots: int,
    segments: int,
    candidates: int,
    taps: int,
    stage: Stage | None,
    axes: int = 2,
) -> Wanted:
    whole = (segments, candidates)
    given = [*_patches(manifest, tiles, slots), _ints("index", *whole, taps)]
    if taps > 1 and manifest.shape.group == 1:
        given.append(TensorSpec("weight", "float32", (*whole, taps)))
    if stage is not None:
        given.append(TensorSpec("places", "float32", (*whole, axes)))
    kept = candidates if stage is None else stage.total
    features = TensorSpec("features", manifest.dtype, (segments, kept, manifest.shape.feature_width))
    name = f"select_{tiles}x{slots}_{segments}x{candidates}_{kept}"
    spec = _spec("select", name, given, (features, *_chosen(() if stage is None else (stage,), segments, kept)))
    return Wanted("select", (tiles, slots, candidates, taps, stage, axes), segments, spec)


def _patches(manifest: Manifest, tiles: int, slots: int) -> list[TensorSpec]:
    """What a tower says of its patches."""
    shape = manifest.shape
    found = [TensorSpec("hidden", manifest.dtype, (tiles, slots, shape.vision_width))]
    stage = manifest.schedule.vision
    if stage is not None and tap_of(stage) is not None:
        layers = (1 + len(stage.also),) if stage.also else ()
        found.append(TensorSpec("score", "float32", (tiles, slots, *layers)))
        found.append(TensorSpec("keys", manifest.dtype, (tiles, slots, shape.key_features or shape.vision_hidden)))
    return found


def _chosen(stages: Sequence[Stage], count: int, kept: int) -> list[TensorSpec]:
    """What stages before the decoder say beside the features of what they keep."""
    return [_ints("kept", count, kept), *_state(stages, count, kept)] if stages else []


def _prefill(manifest: Manifest, schedule: Schedule, batch: int, span: tuple[int, int], filled: bool, suffix: str) -> Wanted:
    least, most = span
    n, lead = schedule.image_tokens, schedule.lead
    rows: int | str = n + most if least == most else "rows"
    stages = schedule.decoder_stages
    groups = _removed(schedule)
    written = [rows - removed if isinstance(rows, int) else f"rows-{removed}" if removed else rows for removed in groups]
    given = [
        _ints("ids", batch, rows),
        _ints("last", batch),
        _ints("positions", manifest.position_dims, batch, rows),
        TensorSpec("features", manifest.dtype, (batch, n + lead, schedule.shape.feature_width)),
        _ints("visual", batch, n + lead),
        *(_state(schedule.vision_stages, batch, n) if schedule.follows else ()),
    ]
    if filled:
        given += [_ints("length", batch), _ints("removed", len(groups), batch), *_caches(manifest, "", batch)]
    found = [_ints(f"stage_{stage.layer}", batch, stage.total) for stage in stages]
    name = f"prefill{suffix}" + (f"_{rows}" if isinstance(rows, int) else "")
    outputs = (_logits(manifest, batch), *found, *_caches(manifest, "new_" * filled, batch, written))
    spec = _spec("prefill", name, given, outputs, (n + least, n + most))
    return Wanted("prefill", (schedule.key, filled), batch, spec, schedule.layout, span)


def _extend(manifest: Manifest, kind: str, batch: int, span: tuple[int, int] | None, suffix: str) -> Wanted:
    """More tokens on filled caches; one token without a `span`."""
    least, most = span or (1, 1)
    rows: int | str = most if least == most else "rows"
    given = (
        _ints("ids", batch, rows),
        _ints("last", batch),
        _ints("length", batch),
        _ints("position", batch),
        _ints("removed", len(manifest.cache_rows), batch),
        *_caches(manifest, "", batch),
    )
    name = f"{kind}{suffix}" + (f"_{rows}" if span and least == most else "")
    outputs = (_logits(manifest, batch), *_caches(manifest, "new_", batch, [rows] * len(manifest.cache_rows)))
    return Wanted(kind, (), batch, _spec(kind, name, given, outputs, span), text=(least, most))


def _removed(schedule: Schedule) -> list[int]:
    """Tokens of a prompt that each group of layers lacks."""
    return [schedule.image_tokens - tokens for tokens in schedule.group_tokens()]


def _caches(manifest: Manifest, prefix: str, batch: int, rows: Sequence[int | str] | None = None) -> list[TensorSpec]:
    """Caches, of so many rows in each group of layers or their own: positions, where masks are made of them, or how many
    tokens rows stand for; keys, values."""
    shape, rows = manifest.shape, manifest.cache_rows if rows is None else rows
    name = "place" if shape.marks else "size"
    return [_ints(f"{prefix}{name}_{group}", batch, rows[group]) for group in manifest.schedule.told] + [
        TensorSpec(f"{prefix}{name}_{layer}", manifest.dtype, (batch, shape.kv_heads, rows[group], shape.head_dim))
        for layer, group in enumerate(manifest.schedule.groups)
        for name in ("key", "value")
    ]


def _state(stages: Sequence[Stage], count: int, kept: int) -> list[TensorSpec]:
    return [_ints(f"state_{i}", count, kept) for i in range(states_of(stages))]


def _logits(manifest: Manifest, batch: int) -> TensorSpec:
    return TensorSpec("logits", manifest.dtype, (batch, 1, manifest.shape.vocab))


def _ints(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)


def _spec(
    kind: str, name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], rows: tuple[int, int] | None = None
) -> ProgramSpec:
    return ProgramSpec(kind, f"{name}.onnx", rows, tuple(inputs), tuple(outputs))


def _renamed(spec: ProgramSpec, suffix: str) -> ProgramSpec:
    return ProgramSpec(spec.kind, spec.file.replace(".onnx", f"{suffix}.onnx"), spec.rows, spec.inputs, spec.outputs)
