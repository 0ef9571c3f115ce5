"""Files of measured numbers: written aside and moved into place; JSON is read as the types it is meant to be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ..errors import VitcopError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def save(path: Path, write: Callable[[Path], Any], error: type[VitcopError]) -> None:
    """Calls `write` with a path beside `path`, and moves what it wrote into place. Raises `error`."""
    aside = path.with_name(path.name + ".partial")
    try:
        write(aside)
        aside.replace(path)
    except OSError as reason:
        aside.unlink(missing_ok=True)
        raise error(f"{path} cannot be written: {reason.strerror or reason}") from None


def load(path: Path, kind: Any, error: type[VitcopError], remedy: str) -> Any:
    """What `path` holds, as `kind`, a type that pydantic checks. Raises `error`, naming the file, the field and `remedy`."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}: {remedy}") from None
    except ValidationError as reason:
        raise error(f"{path}: {said(reason)}: {remedy}") from None


def said(error: ValidationError) -> str:
    """The first thing that is wrong, in words, with its field and what it holds."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    where, held = ".".join(map(str, first["loc"])), repr(first["input"])
    return f"{where}: {reason}, found {held if len(held) < 80 else held[:77] + '...'}" if where else reason
