"""What the programs of an ONNX folder must take and give: it follows from the configuration, and nothing else is believed."""

from __future__ import annotations

from ..policies import POLICIES
from ..schedule import Schedule
from .manifest import NAME, FolderError, Manifest, ProgramSpec, TensorSpec

# Text tokens a dynamic axis starts at: torch.export treats a size of 1 as a constant.
LEAST_TEXT = 2


def check_programs(manifest: Manifest) -> None:
    """Raises FolderError, naming the tensor, where the programs listed are not those of config, shape and bounds."""
    expected = expected_programs(manifest)
    kinds = [(spec.kind, spec.rows) for spec in manifest.programs]
    if kinds != [(spec.kind, spec.rows) for spec in expected]:
        raise FolderError(f"{NAME}: programs {kinds} are not those of max_text_len and prompt_buckets")
    for found, right in zip(manifest.programs, expected, strict=True):
        for side in ("inputs", "outputs"):
            listed, wanted = getattr(found, side), getattr(right, side)
            if len(listed) != len(wanted):
                raise FolderError(f"{NAME}: {found.kind} has {len(listed)} {side}, the schedule needs {len(wanted)}")
            wrong = [pair for pair in zip(listed, wanted) if pair[0] != pair[1]]
            if wrong:
                raise FolderError(f"{NAME}: {found.kind} has {wrong[0][0]} in its {side}, the schedule needs {wrong[0][1]}")


def expected_programs(manifest: Manifest) -> list[ProgramSpec]:
    """The programs of a folder, in the order they are written; files are left as ""."""
    programs = [_vision(manifest)]
    if manifest.prompt_buckets is None:
        spans = [(LEAST_TEXT, manifest.max_text_len)]
    else:
        spans = [(size, size) for size in manifest.prompt_buckets]
    for least, most in spans:
        programs.append(_prefill(manifest, least, most))
        if most > 1:  # one token is a decoding step
            programs.append(_extend(manifest, "extend", (least, most)))
    return [*programs, _extend(manifest, "decode", None)]


def _states(schedule: Schedule) -> int:
    """Tensors of state that the vision program gives."""
    return POLICIES[schedule.vision.policy].adds if schedule.vision else 0


def _vision(manifest: Manifest) -> ProgramSpec:
    batch = manifest.batch_size
    pixels = TensorSpec("pixels", manifest.dtype, (batch, *manifest.image.pixel_shape))
    kept = (_ints("kept", batch, manifest.schedule.image_tokens),) if manifest.schedule.vision else ()
    return ProgramSpec("vision", "", None, (pixels,), (_features(manifest), *kept, *_state(manifest)))


def _prefill(manifest: Manifest, least: int, most: int) -> ProgramSpec:
    schedule, batch, n = manifest.schedule, manifest.batch_size, manifest.schedule.image_tokens
    lead = schedule.shape.lead
    rows: int | str = n + most if least == most else "rows"
    stages = schedule.decoder_stages
    given = (
        _ints("ids", batch, rows),
        _ints("last", batch),
        _ints("positions", manifest.position_dims, batch, rows),
        _features(manifest),
        _ints("visual", batch, n + lead),
        *(_state(manifest) if stages else ()),
    )
    found = (_ints(f"stage_{stage.layer}", batch, stage.total) for stage in stages)
    written = []
    for removed in schedule.removed_rows():
        written.append(rows - removed if isinstance(rows, int) else f"rows-{removed}" if removed else rows)
    return ProgramSpec(
        "prefill", "", (n + least, n + most), given, (_logits(manifest), *found, *_key_values(manifest, "", written))
    )


def _extend(manifest: Manifest, kind: str, span: tuple[int, int] | None) -> ProgramSpec:
    """More tokens on filled caches; one token without a `span`."""
    batch, schedule = manifest.batch_size, manifest.schedule
    least, most = span or (1, 1)
    rows: int | str = most if least == most else "rows"
    given = (
        _ints("ids", batch, rows),
        _ints("last", batch),
        _ints("length", batch),
        _ints("position", batch),
        _ints("removed", len(schedule.group_tokens()), batch),
        *_key_values(manifest, "", [manifest.cache_rows[group] for group in schedule.groups]),
    )
    written = [rows] * manifest.shape.layers
    return ProgramSpec(kind, "", span, given, (_logits(manifest), *_key_values(manifest, "new_", written)))


def _key_values(manifest: Manifest, prefix: str, rows: list[int | str] | list[int]) -> list[TensorSpec]:
    """Keys and values of every layer, of so many rows each."""
    shape, batch = manifest.shape, manifest.batch_size
    return [
        TensorSpec(f"{prefix}{name}_{layer}", manifest.dtype, (batch, shape.kv_heads, count, shape.head_dim))
        for layer, count in enumerate(rows)
        for name in ("key", "value")
    ]


def _features(manifest: Manifest) -> TensorSpec:
    shape = (manifest.batch_size, manifest.schedule.image_tokens + manifest.shape.lead, manifest.shape.hidden)
    return TensorSpec("features", manifest.dtype, shape)


def _state(manifest: Manifest) -> list[TensorSpec]:
    schedule = manifest.schedule
    return [_ints(f"state_{i}", manifest.batch_size, schedule.image_tokens) for i in range(_states(schedule))]


def _logits(manifest: Manifest) -> TensorSpec:
    return TensorSpec("logits", manifest.dtype, (manifest.batch_size, 1, manifest.shape.vocab))


def _ints(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)
