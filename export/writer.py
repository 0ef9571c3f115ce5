"""`export`: from an optimized model to an engine folder."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch.export import ExportedProgram

from ..errors import ConfigError, UnsupportedError
from ..host import Host
from ..schedule import Schedule
from .contract import LEAST_TEXT, check_programs
from .manifest import NAME, ImageInput, Manifest, ProgramSpec, file_digest
from .onnx import OPSETS, WEIGHTS, WeightStore, require_packages, write_onnx
from .staging import staged

if TYPE_CHECKING:
    from ..optimized import OptimizedModel  # which imports this package when it exports

FORMATS = ("onnx", "tensorrt")
_BFLOAT16_OPSET = 22


def export(
    model: OptimizedModel,
    output_dir: str | Path,
    *,
    format: str = "onnx",
    batch_size: int = 1,
    max_text_len: int = 512,
    max_new_tokens: int = 256,
    prompt_buckets: Sequence[int] | None = None,
    opset: int = 18,
    processor: Any = None,
    **build_options: Any,
) -> Path:
    """Writes `model` as a folder that deploys without its Python: "onnx", or "tensorrt" engines.

    batch_size: sequences per call (prompts times beams), all with one image or all without; max_text_len: text tokens of the
    longest turn; max_new_tokens: rows for generated tokens; later turns of text use what is left of both; prompt_buckets:
    static lengths of a turn's text, ending in max_text_len, in place of a dynamic axis: ONNX files for each, or an
    optimization profile for each in a TensorRT engine; opset: 18 to 24; processor: saved beside the engines; build_options:
    of `tensorrt.BuildOptions`. Visual budgets are static. Returns the folder, which appears whole or not at all.

    Raises ConfigError for numbers that do not fit, UnsupportedError for a format or a missing package, before any work.
    """
    if model.programs.attn_implementation != "sdpa":
        chosen = model.programs.attn_implementation
        raise UnsupportedError(f"attn_implementation={chosen!r} cannot leave torch: call optimize() with 'sdpa'")
    buckets = check_options(model.programs.schedule, format, batch_size, max_text_len, max_new_tokens, prompt_buckets, opset)
    if model.dtype == torch.bfloat16 and opset < _BFLOAT16_OPSET:
        raise UnsupportedError(
            f"opset={opset} has no bfloat16 convolution: choose opset {_BFLOAT16_OPSET} or later, or float16"
        )
    check_images(model.host, type(model.model).__name__)
    model.check_weights()
    target = Path(output_dir)
    finish: Callable[[Path, Manifest, Progress], Manifest] | None = None
    if format == "tensorrt":
        from .tensorrt import finisher

        finish = finisher(model.dtype, **build_options)
    elif build_options:
        raise ConfigError(f"{', '.join(build_options)} are options of format='tensorrt', not of {format!r}")
    spans = _spans(format, max_text_len, buckets)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with staged(target) as folder, Progress(*columns, transient=True) as progress:
        store = WeightStore(folder / WEIGHTS)
        specs = []
        for kind, rows, make, inputs, outputs in _programs(model, batch_size, max_text_len, max_new_tokens, spans):
            task = progress.add_task(f"exporting {kind}{'' if rows is None else f' ({rows[1]} rows)'} to ONNX", total=None)
            file = f"{kind}_{rows[1]}.onnx" if rows and rows[0] == rows[1] else f"{kind}.onnx"
            taken, given = write_onnx(make(), folder / file, store, inputs, outputs, opset)
            specs.append(ProgramSpec(kind, file, rows, taken, given))
            progress.remove_task(task)
        _save_configs(model, folder, processor)
        schedule = model.programs.schedule
        manifest = Manifest(
            product="onnx",
            architecture=type(model.model).__name__,
            config=model.pruning_config,
            shape=schedule.shape,
            image=ImageInput(model.host.token_id, model.host.pixel_shape, schedule.shape.patches),
            position_dims=model.programs.family.shape.position_dims,
            dtype=str(model.dtype).removeprefix("torch."),
            batch_size=batch_size,
            max_text_len=max_text_len,
            prompt_buckets=buckets,
            max_new_tokens=max_new_tokens,
            opset=opset,
            kv_rows=schedule.kv_rows(max_text_len, max_new_tokens),
            programs=tuple(specs),
            versions=_versions(),
        )
        if format == "onnx":
            check_programs(manifest)
        if finish is not None:
            manifest = finish(folder, manifest, progress)
        _seal(folder, manifest)
    return target


def check_images(host: Host, name: str) -> None:
    """Raises UnsupportedError for images that are put together behind the encoder."""
    if host.shape.packed:
        raise UnsupportedError(
            f"{name} puts images together behind its encoder, by programs that a folder does not hold yet: serve it with "
            "optimize(), of which backend='onnxruntime' needs no compiler either"
        )


def _programs(
    model: OptimizedModel, batch: int, text: int, new: int, spans: list[tuple[int, int]]
) -> Iterator[tuple[str, tuple[int, int] | None, Callable[[], ExportedProgram], list[str], list[str]]]:
    """(kind, rows of a turn, export, input names, output names) of every program of a folder."""
    programs, schedule = model.programs, model.schedule
    layers = range(schedule.shape.layers)
    state = [f"state_{i}" for i in range(programs.states)]
    kept = ["kept"] if schedule.vision else []
    yield "vision", None, lambda: programs.export_vision(batch, exact=False), ["pixels"], ["features", *kept, *state]
    caches = [f"{name}_{layer}" for layer in layers for name in ("key", "value")]
    stages = [f"stage_{stage.layer}" for stage in schedule.decoder_stages]
    image = ["ids", "last", "positions", "features", "visual", *(state if stages else [])]
    longer = ["ids", "last", "length", "position", "removed", *caches]
    new_rows = [f"new_{name}" for name in caches]
    n, rows = schedule.image_tokens, [tokens + text + new for tokens in schedule.group_tokens()]
    for least, most in spans:
        dynamic = None if least == most else least

        def prefill(most: int = most, dynamic: int | None = dynamic) -> ExportedProgram:
            return programs.export_prefill(batch, most, in_place=False, least_text=dynamic)

        def extend(most: int = most, dynamic: int | None = dynamic) -> ExportedProgram:
            return programs.export_extend(batch, most, rows, in_place=False, least_tokens=dynamic)

        yield "prefill", (n + least, n + most), prefill, image, ["logits", *stages, *caches]
        if most > 1:  # one token is a decoding step
            yield "extend", (least, most), extend, longer, ["logits", *new_rows]
    yield "decode", None, lambda: programs.export_extend(batch, 1, rows, in_place=False), longer, ["logits", *new_rows]


def _spans(format: str, text: int, buckets: tuple[int, ...] | None) -> list[tuple[int, int]]:
    """Fewest and most text tokens of every prefill and extend file: one of each with dynamic rows, or one for each bucket.

    TensorRT takes one file for all buckets: an engine holds its weights once and a profile for every bucket.
    """
    if buckets is None:
        return [(LEAST_TEXT, text)]
    if format == "onnx":
        return [(size, size) for size in buckets]
    if buckets[0] < LEAST_TEXT:
        raise ConfigError(f"prompt_buckets={buckets}: the first must be at least {LEAST_TEXT} for format={format!r}")
    return [(buckets[0], buckets[-1])]


def check_options(
    schedule: Schedule, format: str, batch: int, text: int, new: int, buckets: Sequence[int] | None, opset: int
) -> tuple[int, ...] | None:
    """The text buckets, after every check of `export`'s options that needs no model. Raises as `export` does."""
    if format not in FORMATS:
        raise UnsupportedError(f"format={format!r} is unknown: use one of {', '.join(FORMATS)}")
    if opset not in OPSETS:
        raise UnsupportedError(f"opset={opset} is out of range: choose {OPSETS.start} to {OPSETS.stop - 1}")
    require_packages()
    for name, value, least in (("batch_size", batch, 1), ("max_text_len", text, LEAST_TEXT), ("max_new_tokens", new, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} is not a count of at least {least}")
    total, limit = schedule.image_tokens + text + new, schedule.shape.most_tokens
    if total > limit:
        raise ConfigError(
            f"{schedule.image_tokens} image tokens, max_text_len={text} and max_new_tokens={new} need {total} positions, the "
            f"model has {limit}: lower one of them"
        )
    if buckets is None:
        return None
    values = tuple(buckets)
    if not values or list(values) != sorted(set(values)) or values[0] < 1 or values[-1] != text:
        raise ConfigError(f"prompt_buckets={values}: pass ascending lengths that end in max_text_len={text}")
    return values


def _save_configs(model: OptimizedModel, folder: Path, processor: Any) -> None:
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)


def _seal(folder: Path, manifest: Manifest) -> None:
    """Writes `vitcop.json` with the size and digest of every other file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): (file_digest(path), path.stat().st_size) for path in files}
    manifest.files.update(digests)
    (folder / NAME).write_text(manifest.to_json(), encoding="utf-8")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("vitcop-compile", "onnx", "onnx-ir", "onnxscript", "onnxruntime"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
