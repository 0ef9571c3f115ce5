"""A record as one HTML page that needs nothing else, and as a picture of all runs."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from ..errors import InputError
from .record import Record

VERSION = 1
_DIGITS = 5
_LONGEST = 896  # pixels of a picture's longer side
# What a script's text must not hold as it is: it would end the script, or a line of it.
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def picture_uri(picture: Image.Image) -> str:
    """`picture` as a data URI, JPEG, or PNG where it is small; no longer than a page can show."""
    small = picture.convert("RGB")
    if max(small.size) > _LONGEST:
        small.thumbnail((_LONGEST, _LONGEST), Image.Resampling.LANCZOS)
    kind = "png" if max(small.size) <= 128 else "jpeg"
    held = io.BytesIO()
    small.save(held, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}"


def data_of(record: Record) -> dict[str, Any]:
    """What the page's script reads: the fields of `Record`, numbers to five digits."""
    return {"version": VERSION, "patches": record.patches} | _plain(asdict(record))


def page(record: Record) -> str:
    """The page: HTML 5, complete and without references; its policy forbids any. Nothing of the record is markup."""
    files = resources.files(__package__)
    style, script, whole = (files.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js", "page.html"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(data_of(record), ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)
    title = html.escape(f"{record.prompt} - {record.model}")
    return Template(whole).substitute(title=title, style=style, script=script, digest=digest, data=data)


def save_page(record: Record, path: str | Path) -> Path:
    """Writes the page, aside first and then moved into place. Raises InputError."""
    target = Path(path)
    aside = target.with_name(target.name + ".partial")
    try:
        aside.write_text(page(record), "utf-8")
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{target} cannot be written: {error.strerror or error}") from None
    return target


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
