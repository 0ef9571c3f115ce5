"""`export`: from an optimized model to an engine folder."""

from __future__ import annotations

import dataclasses
import itertools
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch.export import ExportedProgram

from ..errors import ConfigError, UnsupportedError
from ..host import Host
from ..layout import Layout
from ..quantised import check_portable
from ..schedule import Schedule
from .contract import LEAST_TEXT, Wanted, are_of, check_programs, text_spans, wanted_programs
from .manifest import NAME, Manifest, file_digest
from .onnx import BFLOAT16_OPSET, OPSETS, WEIGHTS, WeightStore, require_packages, write_onnx
from .staging import staged

if TYPE_CHECKING:
    from ..optimized import OptimizedModel  # which imports this package when it exports

FORMATS = ("onnx", "tensorrt")
WEIGHT_KINDS = ("int8",)
# What to do about weights that are quantised already.
_REMEDIES = {
    "onnx": "export the model before it is quantized, with weights='int8'",
    "tensorrt": "export the model before it is quantized, or with format='onnx'",
}
_HALF_SCALES_OPSET = 19


def export(
    model: OptimizedModel,
    output_dir: str | Path,
    *,
    format: str = "onnx",
    batch_size: int | Sequence[int] = 1,
    max_text_len: int = 512,
    max_new_tokens: int = 256,
    prompt_buckets: Sequence[int] | None = None,
    layouts: Sequence[Sequence[Layout]] | None = None,
    later_images: bool = False,
    opset: int = 18,
    weights: str | None = None,
    processor: Any = None,
    **build_options: Any,
) -> Path:
    """Writes `model` as a folder that deploys without its Python: "onnx", or "tensorrt" engines.

    batch_size: sequences per call (prompts times beams), one number or several; max_text_len: text tokens of the longest turn;
    max_new_tokens: rows for generated tokens; later turns use what is left of both, and of the visual tokens; prompt_buckets:
    static lengths of a turn's text, ending in max_text_len, in place of a dynamic axis: ONNX files for each, or an
    optimization profile for each in a TensorRT engine; layouts: what a prompt may hold beside text, for each such prompt the
    layouts of its images as `layout_of` gives them, by default one image, where images have one size; later_images: whether
    later turns may hold it too, which takes prompt_buckets; opset: 18 to 24; weights: "int8" rounds those of linear layers,
    with a scale for each output channel; by default they stay as the model has them; processor: saved beside the engines;
    build_options: of `tensorrt.BuildOptions`. Visual budgets are static. Returns the folder, which appears whole or not at
    all.

    Raises ConfigError for numbers that do not fit, UnsupportedError for a format or a missing package, before any work.
    """
    if model.programs.attn_implementation != "sdpa":
        chosen = model.programs.attn_implementation
        raise UnsupportedError(f"attn_implementation={chosen!r} cannot leave torch: call optimize() with 'sdpa'")
    host, name = model.host, type(model.model).__name__
    prompts = check_layouts(host, layouts, name)
    schedules = [model.schedule_of(tuple(itertools.chain(*images))) for images in prompts]
    batches, buckets = check_options(schedules, format, batch_size, max_text_len, max_new_tokens, prompt_buckets, opset)
    if model.dtype == torch.bfloat16 and opset < BFLOAT16_OPSET:
        raise UnsupportedError(
            f"opset={opset} has no bfloat16 convolution: choose opset {BFLOAT16_OPSET} or later, or float16"
        )
    check_weights_option(weights, format, model.dtype, opset)
    check_portable(model.model, f"format={format!r}", _REMEDIES[format], int8=format == "onnx")
    model.check_weights()
    target = Path(output_dir)
    finish: Callable[[Path, Manifest, Progress], Manifest] | None = None
    if format == "tensorrt":
        from .tensorrt import finisher

        finish = finisher(model.dtype, **build_options)
    elif build_options:
        raise ConfigError(f"{', '.join(build_options)} are options of format='tensorrt', not of {format!r}")
    if format == "tensorrt" and buckets and buckets[0] < LEAST_TEXT:
        raise ConfigError(f"prompt_buckets={buckets}: the first must be at least {LEAST_TEXT} for format={format!r}")
    manifest = Manifest(
        product=format,
        architecture=name,
        config=model.pruning_config,
        shape=host.shape,
        position_dims=host.shape.position_dims,
        dtype=str(model.dtype).removeprefix("torch."),
        batch_sizes=batches,
        layouts=prompts,
        later_images=later_images,
        max_text_len=max_text_len,
        prompt_buckets=buckets,
        max_new_tokens=max_new_tokens,
        opset=opset,
        kv_rows=(),
        programs=(),
        versions=_versions(),
    )
    if later_images and (vary := [span for span in text_spans(manifest) if span[0] != span[1]]):
        raise ConfigError(
            f"later_images=True and text of {vary[0][0]} to {vary[0][1]} tokens: turns with images on filled caches have "
            "static lengths; pass prompt_buckets, of which format='tensorrt' takes one here"
        )
    rows = manifest.cache_rows
    manifest = dataclasses.replace(manifest, kv_rows=tuple(rows[group] for group in manifest.schedule.groups))
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with staged(target) as folder, Progress(*columns, transient=True) as progress:
        store = WeightStore(folder / WEIGHTS, int8=weights == "int8")
        specs = []
        for wanted in wanted_programs(manifest, host):
            task = progress.add_task(f"exporting {Path(wanted.spec.file).stem} to ONNX", total=None)
            inputs, outputs = ([spec.name for spec in side] for side in (wanted.spec.inputs, wanted.spec.outputs))
            program = _exporter(model, wanted, rows)
            taken, given = write_onnx(program, folder / wanted.spec.file, store, inputs, outputs, opset)
            specs.append(dataclasses.replace(wanted.spec, inputs=taken, outputs=given))
            progress.remove_task(task)
        manifest = dataclasses.replace(manifest, programs=tuple(specs), quantised=tuple(store.quantised.values()))
        check_programs(manifest, host)
        _save_configs(model, folder, processor)
        if finish is not None:
            manifest = finish(folder, manifest, progress)
        _seal(folder, manifest)
    return target


def check_weights_option(weights: str | None, format: str, dtype: torch.dtype, opset: int) -> None:
    """Raises ConfigError or UnsupportedError for `weights` that a folder of this format, type and opset cannot hold."""
    if weights is None:
        return
    if weights not in WEIGHT_KINDS:
        raise ConfigError(f"weights={weights!r} is unknown: use one of {', '.join(WEIGHT_KINDS)}, or none for the model's own")
    if format != "onnx":
        raise UnsupportedError(f"weights={weights!r} is an option of format='onnx': engines take their precision from --dtype")
    if dtype != torch.float32 and opset < _HALF_SCALES_OPSET:
        raise UnsupportedError(
            f"opset={opset} has no scales in {dtype} for weights={weights!r}: choose opset {_HALF_SCALES_OPSET} or later, or "
            "float32"
        )


def check_layouts(host: Host, layouts: Sequence[Sequence[Layout]] | None, name: str) -> tuple[tuple[Layout, ...], ...]:
    """What prompts may hold, by default one image where there is one size. Raises ConfigError."""
    if layouts is None:
        if not host.fixed:
            raise ConfigError(
                f"{name} takes images of any size, and a folder holds programs for some: say which by layouts=, such as "
                "[[model.layout_of(height, width)]] for a prompt with one image, or what model.layouts_of(**inputs) says of a "
                "processor's inputs (--image-size WIDTHxHEIGHT)"
            )
        return ((host.layout,),)
    found = tuple(dict.fromkeys(tuple(tuple(image) for image in images) for images in layouts))
    if not found or not all(images and all(images) for images in found):
        raise ConfigError(f"layouts={layouts!r}: pass what at least one prompt holds, an image at least; text needs none")
    if not are_of(host, found):
        raise ConfigError(f"layouts={layouts!r} are not of {name}: pass what its own layout_of or layouts_of says")
    return found


def _exporter(model: OptimizedModel, wanted: Wanted, rows: Sequence[int]) -> ExportedProgram:
    """What a program of a folder is written from; rows: those of the caches by group."""
    programs, (least, most) = model.programs, wanted.text
    dynamic = None if least == most else least
    match wanted.kind:
        case "vision":
            return programs.export_vision(wanted.size, exact=False)
        case "frames":
            return programs.export_frames(wanted.size, exact=False)
        case "tower":
            return programs.export_tower(wanted.size, *wanted.key)
        case "select":
            tiles, slots, candidates, taps, stage, axes = wanted.key
            return programs.export_select(tiles, slots, wanted.size, candidates, taps, stage, axes, exact=False)
        case "prefill":
            filled = wanted.key[1]
            held = rows if filled else None
            return programs.export_prefill(
                wanted.size, most, wanted.layout, held, filled=filled, in_place=False, least_text=dynamic, exact=False
            )
    return programs.export_extend(wanted.size, most, rows, in_place=False, least_tokens=dynamic)


def check_options(
    schedules: Sequence[Schedule],
    format: str,
    batch: int | Sequence[int],
    text: int,
    new: int,
    buckets: Sequence[int] | None,
    opset: int,
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """(batch sizes, text buckets), after every check of `export`'s options that needs no model. Raises as `export` does."""
    if format not in FORMATS:
        raise UnsupportedError(f"format={format!r} is unknown: use one of {', '.join(FORMATS)}")
    if opset not in OPSETS:
        raise UnsupportedError(f"opset={opset} is out of range: choose {OPSETS.start} to {OPSETS.stop - 1}")
    require_packages()
    batches = tuple(batch) if isinstance(batch, Sequence) else (batch,)
    counts = [("batch_size", value, 1) for value in batches]
    for name, value, least in (*counts, ("max_text_len", text, LEAST_TEXT), ("max_new_tokens", new, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} is not a count of at least {least}")
    if not batches or list(batches) != sorted(set(batches)):
        raise ConfigError(f"batch_size={batches}: pass one count, or ascending ones")
    most, limit = max(schedule.image_tokens for schedule in schedules), schedules[0].shape.most_tokens
    total = most + text + new
    if total > limit:
        raise ConfigError(
            f"{most} image tokens, max_text_len={text} and max_new_tokens={new} need {total} positions, the "
            f"model has {limit}: lower one of them"
        )
    # Where a position is one number and all tokens keep theirs, those that go take one too.
    shape, kept = schedules[0].shape, [schedule.patches for schedule in schedules if schedule.placed]
    places = max(kept, default=0) + text + new
    if shape.position_dims == 1 and places > shape.max_positions:
        raise ConfigError(
            f"{max(kept)} image tokens, which keep their positions, max_text_len={text} and max_new_tokens={new} need "
            f"{places} positions, the model has {shape.max_positions}: lower one of them"
        )
    if buckets is None:
        return batches, None
    values = tuple(buckets)
    if not values or list(values) != sorted(set(values)) or values[0] < 1 or values[-1] != text:
        raise ConfigError(f"prompt_buckets={values}: pass ascending lengths that end in max_text_len={text}")
    return batches, values


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
