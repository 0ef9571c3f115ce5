"""What the programs of an ONNX folder must take and give: it follows from the configuration, and nothing else is believed."""

from __future__ import annotations

from .manifest import NAME, FolderError, Manifest, ProgramSpec, TensorSpec

# Rows a dynamic prompt axis starts at, beside the image: torch.export treats a size of 1 as a constant.
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
    n, text = manifest.schedule.image_tokens, manifest.max_text_len
    pruned = manifest.schedule.vision is not None
    float_, batch = manifest.dtype, manifest.batch_size
    selection = (_ints("kept", batch, n), _ints("labels", batch, n)) if pruned else ()
    features = TensorSpec("features", float_, (batch, n, manifest.shape.hidden))
    pixels = TensorSpec("pixels", float_, (batch, *manifest.image.pixel_shape))
    programs = [ProgramSpec("vision", "", None, (pixels,), (features, *selection))]
    spans = [(LEAST_TEXT, text)] if manifest.prompt_buckets is None else [(size, size) for size in manifest.prompt_buckets]
    for least, most in spans:
        programs.append(_prefill(manifest, features, n + least, n + most, True))
        programs.append(_prefill(manifest, features, least, most, False))
    return [*programs, _decode(manifest)]


def _prefill(manifest: Manifest, features: TensorSpec, least: int, most: int, image: bool) -> ProgramSpec:
    schedule, batch = manifest.schedule, manifest.batch_size
    rows: int | str = most if least == most else "rows"
    stages = schedule.stages if image else ()
    given: tuple[TensorSpec, ...] = ()
    if image:
        n = schedule.image_tokens
        given = (features, _ints("visual", batch, n), *([_ints("labels", batch, n)] if stages else []))
    caches = []
    for name, _, delta in _caches(manifest):
        removed = delta if image else 0
        kept: int | str = rows - removed if isinstance(rows, int) else f"rows-{removed}" if removed else rows
        caches.append(TensorSpec(name, manifest.dtype, (batch, manifest.shape.kv_heads, kept, manifest.shape.head_dim)))
    return ProgramSpec(
        "prefill" if image else "text",
        "",
        (least, most),
        (_ints("ids", batch, rows), _ints("last", batch), *given),
        (_logits(manifest), *(_ints(f"stage_{stage.layer}", batch, stage.tokens) for stage in stages), *caches),
    )


def _decode(manifest: Manifest) -> ProgramSpec:
    batch, shape = manifest.batch_size, manifest.shape
    groups = len(set(manifest.schedule.removed_rows()))
    caches = [TensorSpec(name, manifest.dtype, (batch, *dims)) for name, dims, _ in _caches(manifest)]
    rows = [
        TensorSpec(f"new_{name}", manifest.dtype, (batch, shape.kv_heads, 1, shape.head_dim)) for name, *_ in _caches(manifest)
    ]
    taken = (_ints("token", batch, 1), _ints("length", batch), _ints("offsets", groups), *caches)
    return ProgramSpec("decode", "", None, taken, (_logits(manifest), *rows))


def _caches(manifest: Manifest) -> list[tuple[str, tuple[int, int, int], int]]:
    """(name, dimensions beside the batch, rows missing) of every key and value cache."""
    shape = manifest.shape
    return [
        (f"{name}_{layer}", (shape.kv_heads, manifest.cache_rows - delta, shape.head_dim), delta)
        for layer, delta in enumerate(manifest.schedule.removed_rows())
        for name in ("key", "value")
    ]


def _logits(manifest: Manifest) -> TensorSpec:
    return TensorSpec("logits", manifest.dtype, (manifest.batch_size, 1, manifest.shape.vocab))


def _ints(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)
