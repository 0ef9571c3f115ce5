"""`vitcop.json`: what an engine folder holds, to the last byte, and every check before it is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import types
import typing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ..errors import VitcopError
from ..layout import Layout, Segment
from ..methods import method_of
from ..schedule import Method, ModelShape, Schedule, resolve

_Kind = TypeVar("_Kind")
FORMAT_VERSION = 3
# Of version 2, which said nothing of quantised weights, as there were none.
_BEFORE: dict[int, dict[str, Any]] = {2: {"quantised": []}, FORMAT_VERSION: {}}
NAME = "vitcop.json"
# What transformers reads of a folder, whatever the product.
CONFIGS = ("config.json", "generation_config.json")
DTYPES = ("float32", "float16", "bfloat16")
PRODUCTS = ("onnx", "tensorrt", "tensorrt_rtx")
OPSETS = range(18, 25)
SCHEMES = ("int8_channel", "int8_given")
# Kinds of programs of the vision side: of images that are a tile each, of videos that have an encoder of their own, of others.
SEEING = ({"vision"}, {"frames"}, {"vision", "frames"}, {"tower", "select"})
PROGRAMS = {"prefill", "extend", "decode"}


class FolderError(VitcopError):
    """An engine folder that cannot be trusted or does not fit this package; the message names what and the bound."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. A dimension is a count, or "rows" for a dynamic number of rows of a turn (less an offset)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ProgramSpec:
    """One program file. rows: those of a turn that it takes, least and most (equal if static); None where there are none.

    profiles: optimization profiles of a TensorRT engine with dynamic rows, each (least, optimal, most) of "rows".
    """

    kind: str
    file: str
    rows: tuple[int, int] | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True)
class QuantisedTensor:
    """A weight that is stored as int8, before a DequantizeLinear. shape: as it is stored, [inputs, outputs]; axis: that of the
    scales, one for each output channel; scheme: "int8_channel", rounded by the export, symmetric and within 127, or
    "int8_given", as the model had it."""

    name: str
    scheme: str
    shape: tuple[int, int]
    axis: int


@dataclass(frozen=True)
class Manifest:
    """Everything `vitcop.json` says. position_dims: of a token's position; batch_sizes: sequences that programs take,
    ascending; layouts: what a prompt may hold beside text, the segments of each image of each such prompt; later_images:
    whether turns after the first may hold it too; kv_rows: rows of every layer's cache; `files` maps every other file of the
    folder to (SHA-256, bytes)."""

    product: str
    architecture: str
    config: Method
    shape: ModelShape
    position_dims: int
    dtype: str
    batch_sizes: tuple[int, ...]
    layouts: tuple[tuple[Layout, ...], ...]
    later_images: bool
    max_text_len: int
    prompt_buckets: tuple[int, ...] | None
    max_new_tokens: int
    opset: int
    kv_rows: tuple[int, ...]
    programs: tuple[ProgramSpec, ...]
    quantised: tuple[QuantisedTensor, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)

    @cached_property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedule of a prompt of each of `layouts`, resolved anew from config and shape."""
        return tuple(self.schedule_of(tuple(itertools.chain(*images))) for images in self.layouts)

    @property
    def schedule(self) -> Schedule:
        """The first of them."""
        return self.schedules[0]

    def schedule_of(self, layout: Layout) -> Schedule:
        """That of a prompt with these segments."""
        return resolve(self.config, self.shape, layout)

    @cached_property
    def cache_rows(self) -> tuple[int, ...]:
        """Rows of the KV caches of each group of layers: those of the largest prompt with its new tokens."""
        most = map(max, zip(*(schedule.group_tokens() for schedule in self.schedules), strict=True))
        return tuple(tokens + self.max_text_len + self.max_new_tokens for tokens in most)

    @property
    def resolved(self) -> list[dict[str, Any]]:
        """The schedules in numbers, for readers of `vitcop.json` that cannot resolve them."""
        return [
            {
                "image_tokens": schedule.image_tokens,
                "stages": [dataclasses.asdict(stage) for stage in schedule.stages],
                "visual_tokens": list(schedule.visual_tokens()),
            }
            for schedule in self.schedules
        ]

    def to_json(self) -> str:
        """The text of `vitcop.json`, with a digest over all of it."""
        values: dict[str, Any] = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        values["config"] = json.loads(self.config.to_json())
        values["schedules"] = self.resolved
        values = json.loads(json.dumps(values))
        return json.dumps(values | {"digest": _digest(values)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks `vitcop.json`. Raises FolderError for anything that is not exactly what `to_json` writes."""
        path = _inside(folder, NAME)
        if not path.is_file():
            raise FolderError(f"{folder} holds no {NAME}: it is no engine folder")
        try:
            # ValueError: no UTF-8, no JSON, or a number too long to be read.
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FolderError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise FolderError(f"{NAME} holds a {type(values).__name__}: an object is expected")
        version = values.get("format_version")
        if isinstance(version, bool) or not isinstance(version, int) or version not in _BEFORE:
            raise FolderError(
                f"{NAME}: format_version {version!r} cannot be read, this package reads "
                f"{' and '.join(map(str, _BEFORE))}: export again with it"
            )
        since = _BEFORE[version]
        known = {f.name for f in dataclasses.fields(cls)} - since.keys() | {"format_version", "schedules", "digest"}
        if unknown := sorted(values.keys() - known):
            raise FolderError(f"{NAME}: unknown fields {unknown}; the folder may need a newer vitcop-compile")
        if missing := sorted(known - values.keys()):
            raise FolderError(f"{NAME}: fields {missing} are missing; export the folder again")
        if values.pop("digest") != _digest(values):
            raise FolderError(f"{NAME} was changed after it was written: its digest does not match; export the folder again")
        values = values | since
        values.pop("format_version")
        resolved = values.pop("schedules")
        try:
            manifest = _parse(values)
            _check_types(manifest, Manifest, "")
            manifest._check()
            if resolved != json.loads(json.dumps(manifest.resolved)):
                raise FolderError(f"{NAME}: schedules do not follow from config, shape and layouts: export the folder again")
        except FolderError:
            raise
        except (VitcopError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise FolderError(f"{NAME} is malformed: {error}") from None
        return manifest

    def verify(self, folder: Path, digests: bool = True) -> None:
        """Checks size and, with `digests`, SHA-256 of every file. Raises FolderError, naming the file, where one differs."""
        for name, (digest, size) in self.files.items():
            path = _inside(folder, name)
            if not path.is_file():
                raise FolderError(f"{name} is missing from {folder}: export the folder again")
            found = path.stat().st_size
            if found != size:
                raise FolderError(f"{name} has {found} bytes, {size} were written: the file is truncated or replaced")
            if digests and file_digest(path) != digest:
                raise FolderError(f"{name} does not have the SHA-256 in {NAME}: the file was changed or swapped")

    def program(self, kind: str, rows: int | None = None) -> ProgramSpec:
        """The program of `kind` that takes a turn of `rows` rows."""
        for spec in self.programs:
            if spec.kind == kind and (rows is None or spec.rows is None or spec.rows[0] <= rows <= spec.rows[1]):
                return spec
        raise FolderError(f"the folder holds no {kind} program{'' if rows is None else f' for {rows} rows'}")

    def _check(self) -> None:
        if self.product not in PRODUCTS:
            raise FolderError(f"{NAME}: product {self.product!r} is none of {', '.join(PRODUCTS)}")
        if self.dtype not in DTYPES:
            raise FolderError(f"{NAME}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        for name in ("position_dims", "max_text_len", "max_new_tokens", "opset"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FolderError(f"{NAME}: {name}={value!r} is not a positive count")
        if not self.batch_sizes or self.batch_sizes[0] < 1 or list(self.batch_sizes) != sorted(set(self.batch_sizes)):
            raise FolderError(f"{NAME}: batch_sizes={self.batch_sizes} are not ascending positive counts")
        if not self.layouts or not all(images and all(images) for images in self.layouts):
            raise FolderError(f"{NAME}: layouts hold a prompt or an image with nothing in it")
        if self.opset not in OPSETS:
            raise FolderError(f"{NAME}: opset={self.opset} is none of {OPSETS.start} to {OPSETS.stop - 1}")
        if self.kv_rows != tuple(self.cache_rows[group] for group in self.schedule.groups):
            raise FolderError(f"{NAME}: kv_rows do not follow from config, shape, layouts, max_text_len and max_new_tokens")
        for tensor in self.quantised:
            if tensor.scheme not in SCHEMES or tensor.axis not in (0, 1) or min(tensor.shape) < 1:
                raise FolderError(f"{NAME}: quantised tensor {tensor} is of no scheme of {', '.join(SCHEMES)}, axis 0 or 1")
        kinds = {spec.kind for spec in self.programs}
        if kinds not in [PROGRAMS | seeing for seeing in SEEING]:
            raise FolderError(f"{NAME}: programs {sorted(kinds)} are not {sorted(PROGRAMS)} and those that see images")
        needed = [*(spec.file for spec in self.programs), *CONFIGS]
        if unlisted := [file for file in needed if file not in self.files]:
            raise FolderError(f"{NAME}: files {unlisted} have no checksum")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, refused if the name leaves the folder or passes through a link."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or "\0" in name:
        raise FolderError(f"{name!r} is no path inside the folder")
    path = folder
    for part in pure.parts:
        path = path / part
        if path.is_symlink():
            raise FolderError(f"{name} is a symbolic link: a folder holds its own files")
    return path


def _digest(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


_TUPLES = ("grid", "scored_layers")  # of the fields of a shape


def _parse(values: dict[str, Any]) -> Manifest:
    """Builds the dataclasses from JSON values whose digest is right; a wrong type still ends in an error, not in a run."""
    shape, config, buckets = values["shape"], values["config"], values["prompt_buckets"]
    settings = method_of(json.dumps(config))
    if json.loads(settings.to_json()) != config:
        raise FolderError(f"{NAME}: config lacks fields: export the folder again")
    parsed = values | {
        "config": settings,
        "shape": _build(ModelShape, shape | {name: _tuple(shape[name]) for name in _TUPLES if name in shape}),
        "batch_sizes": _tuple(values["batch_sizes"]),
        "layouts": tuple(
            tuple(tuple(_segment(part) for part in _tuple(image)) for image in _tuple(images))
            for images in _tuple(values["layouts"])
        ),
        "prompt_buckets": None if buckets is None else _tuple(buckets),
        "kv_rows": _tuple(values["kv_rows"]),
        "programs": tuple(_program(spec) for spec in _tuple(values["programs"])),
        "quantised": tuple(
            _build(QuantisedTensor, tensor | {"shape": _tuple(tensor["shape"])}) for tensor in _tuple(values["quantised"])
        ),
        "files": {name: _tuple(entry) for name, entry in values["files"].items()},
    }
    return _build(Manifest, parsed)


def _segment(values: dict[str, Any]) -> Segment:
    return _build(Segment, values | {name: _tuple(values[name]) for name in ("grid", "protected")})


def _program(values: dict[str, Any]) -> ProgramSpec:
    rows = values["rows"]
    tensors = {
        name: tuple(_build(TensorSpec, spec | {"shape": _tuple(spec["shape"])}) for spec in _tuple(values[name]))
        for name in ("inputs", "outputs")
    }
    profiles = tuple(_tuple(profile) for profile in _tuple(values["profiles"]))
    rest = {"rows": None if rows is None else _tuple(rows), "profiles": profiles}
    return _build(ProgramSpec, values | tensors | rest)


def _tuple(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return tuple(value)


def _build(kind: type[_Kind], values: dict[str, Any]) -> _Kind:
    """A dataclass from exactly its fields: a default must not stand in for what a folder should say."""
    if missing := sorted({f.name for f in dataclasses.fields(kind)} - values.keys()):  # type: ignore[arg-type]
        raise FolderError(f"{NAME}: {kind.__name__} lacks {missing}: export the folder again")
    return kind(**values)


def _check_types(value: Any, hint: Any, where: str) -> None:
    """Raises FolderError where a value is not of its annotated type: JSON says 1.0, "1" or true where a count is meant."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        chosen = [option for option in arguments if isinstance(value, typing.get_origin(option) or option)]
        _check_types(value, chosen[0] if chosen and not isinstance(value, bool) else arguments[0], where)
    elif origin is tuple and isinstance(value, tuple):
        hints = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(hints) != len(value):
            raise FolderError(f"{NAME}: {where}={value!r} has {len(value)} parts, {len(hints)} are expected")
        for i, (part, expected) in enumerate(zip(value, hints)):
            _check_types(part, expected, f"{where}[{i}]")
    elif origin is dict and isinstance(value, dict):
        for key, part in value.items():
            _check_types(part, arguments[1], f"{where}[{key!r}]")
    elif hint is Method:
        pass  # it checks itself, and takes integers for fractions
    elif origin is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        if dataclasses.is_dataclass(hint):
            for name, expected in typing.get_type_hints(hint).items():
                _check_types(getattr(value, name), expected, f"{where}.{name}".lstrip("."))
    else:
        raise FolderError(f"{NAME}: {where}={value!r} is a {type(value).__name__}, {hint} is expected")
