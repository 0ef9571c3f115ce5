"""`vitcop.json`: what an engine folder holds, to the last byte, and every check before it is believed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..config import ViTCoPConfig
from ..errors import VitcopError
from ..prompt import ImageInput
from ..schedule import ModelShape, Schedule

FORMAT_VERSION = 1
NAME = "vitcop.json"
DTYPES = ("float32", "float16", "bfloat16")
PRODUCTS = ("onnx", "tensorrt", "tensorrt_rtx")
PROGRAMS = ("vision", "prefill", "text", "decode")


class FolderError(VitcopError):
    """An engine folder that cannot be trusted or does not fit this package; the message names what and the bound."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. A dimension is a count, or "rows" for a dynamic number of prompt rows (plus an offset)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ProgramSpec:
    """One program file. rows: prompt rows it takes, least and most (equal if static); None where there are none."""

    kind: str
    file: str
    rows: tuple[int, int] | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Manifest:
    """Everything `vitcop.json` says. `files` maps every other file of the folder to (SHA-256, bytes)."""

    product: str
    architecture: str
    config: ViTCoPConfig
    shape: ModelShape
    image: ImageInput
    dtype: str
    batch_size: int
    max_text_len: int
    text_buckets: tuple[int, ...] | None
    max_new_tokens: int
    opset: int
    kv_rows: tuple[int, ...]
    programs: tuple[ProgramSpec, ...]
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        """The schedule, resolved anew from config and shape."""
        return self.config.schedule(self.shape, text_tokens=self.max_text_len)

    @property
    def cache_rows(self) -> int:
        """Rows of layer 0's KV cache."""
        return self.schedule.image_tokens + self.max_text_len + self.max_new_tokens

    def to_json(self) -> str:
        """The text of `vitcop.json`, with a digest over all of it."""
        values: dict[str, Any] = {"format_version": FORMAT_VERSION} | dataclasses.asdict(self)
        values["config"] = json.loads(self.config.to_json())
        values = json.loads(json.dumps(values))
        return json.dumps(values | {"digest": _digest(values)}, indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks `vitcop.json`. Raises FolderError for anything that is not exactly what `to_json` writes."""
        path = _inside(folder, NAME)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise FolderError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(values, dict):
            raise FolderError(f"{NAME} holds a {type(values).__name__}: an object is expected")
        version = values.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise FolderError(f"{NAME}: format_version {version!r} cannot be read, this package reads {FORMAT_VERSION}")
        known = {f.name for f in dataclasses.fields(cls)} | {"format_version", "digest"}
        if unknown := sorted(values.keys() - known):
            raise FolderError(f"{NAME}: unknown fields {unknown}; the folder may need a newer vitcop-compile")
        if missing := sorted(known - values.keys()):
            raise FolderError(f"{NAME}: fields {missing} are missing; export the folder again")
        if values.pop("digest") != _digest(values):
            raise FolderError(f"{NAME} was changed after it was written: its digest does not match; export the folder again")
        values.pop("format_version")
        try:
            manifest = _parse(values)
            manifest._check()
        except FolderError:
            raise
        except (VitcopError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise FolderError(f"{NAME} is malformed: {error}") from None
        return manifest

    def verify(self, folder: Path) -> None:
        """Checks size and SHA-256 of every file. Raises FolderError, naming the file, for any that is not as exported."""
        for name, (digest, size) in self.files.items():
            path = _inside(folder, name)
            if not path.is_file():
                raise FolderError(f"{name} is missing from {folder}: export the folder again")
            found = path.stat().st_size
            if found != size:
                raise FolderError(f"{name} has {found} bytes, {size} were written: the file is truncated or replaced")
            if file_digest(path) != digest:
                raise FolderError(f"{name} does not have the SHA-256 in {NAME}: the file was changed or swapped")

    def program(self, kind: str, rows: int | None = None) -> ProgramSpec:
        """The program of `kind` that takes `rows` prompt rows."""
        for spec in self.programs:
            if spec.kind == kind and (rows is None or spec.rows is None or spec.rows[0] <= rows <= spec.rows[1]):
                return spec
        raise FolderError(f"the folder holds no {kind} program{'' if rows is None else f' for {rows} rows'}")

    def _check(self) -> None:
        if self.product not in PRODUCTS:
            raise FolderError(f"{NAME}: product {self.product!r} is none of {', '.join(PRODUCTS)}")
        if self.dtype not in DTYPES:
            raise FolderError(f"{NAME}: dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        for name in ("batch_size", "max_text_len", "max_new_tokens", "opset"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FolderError(f"{NAME}: {name}={value!r} is not a positive count")
        schedule = self.schedule
        if self.kv_rows != schedule.kv_rows(self.max_new_tokens):
            raise FolderError(f"{NAME}: kv_rows do not follow from config, shape, max_text_len and max_new_tokens")
        kinds = {spec.kind for spec in self.programs}
        if kinds != set(PROGRAMS):
            raise FolderError(f"{NAME}: programs {sorted(kinds)} are not {sorted(PROGRAMS)}")
        if unlisted := [spec.file for spec in self.programs if spec.file not in self.files]:
            raise FolderError(f"{NAME}: program files {unlisted} have no checksum")


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


def _parse(values: dict[str, Any]) -> Manifest:
    """Builds the dataclasses from JSON values whose digest is right; a wrong type still ends in an error, not in a run."""
    shape = dict(values["shape"])
    image = dict(values["image"])
    buckets = values["text_buckets"]
    parsed = values | {
        "config": ViTCoPConfig.from_json(json.dumps(values["config"])),
        "shape": ModelShape(**(shape | {"grid": tuple(shape["grid"])})),
        "image": ImageInput(**(image | {"pixel_shape": tuple(image["pixel_shape"])})),
        "text_buckets": None if buckets is None else tuple(buckets),
        "kv_rows": tuple(values["kv_rows"]),
        "programs": tuple(_program(spec) for spec in values["programs"]),
        "files": {name: (str(digest), int(size)) for name, (digest, size) in values["files"].items()},
    }
    return Manifest(**parsed)


def _program(values: dict[str, Any]) -> ProgramSpec:
    rows = values["rows"]
    tensors = {
        name: tuple(TensorSpec(**(spec | {"shape": tuple(spec["shape"])})) for spec in values[name])
        for name in ("inputs", "outputs")
    }
    return ProgramSpec(**(values | tensors | {"rows": None if rows is None else (int(rows[0]), int(rows[1]))}))
