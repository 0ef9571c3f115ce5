"""All runs of a record as one picture: methods down, retentions across."""

from __future__ import annotations

import base64
import contextlib
import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..picture import Picture, require_matplotlib
from .record import Panel, Record, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ft2font import FT2Font

_SIDE = 240  # pixels of a panel's height
_GAP = 6
_BRIGHTNESS = (0.14, 0.62)  # of a token that leaves first, and one that all stages but the last keep
_COLUMN, _ROW = 2.6, 3.3  # inches
_GOOD, _BAD = "#14713d", "#b3261e"


def sheet(record: Record) -> Figure:
    """The picture under each run: full light for tokens that are left at the end, darker the earlier they go; and its answer.
    Raises UnsupportedError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    photos = [_decoded(uri) for uri in record.pictures]
    rows, columns = len(record.runs), len(record.retentions)
    wide = _composed(record, photos, Run()).shape[1] / _SIDE
    size = (1.0 + _COLUMN * wide * columns, 1.5 + _ROW * rows)
    out = Figure(figsize=size, dpi=100, facecolor="white")
    axes: Any = out.subplots(rows, columns, squeeze=False)
    for row, (name, runs) in enumerate(record.runs.items()):
        for column, run in enumerate(runs):
            _cell(axes[row, column], _composed(record, photos, run), record, run)
            if not row:
                axes[row, column].text(0.5, 1.2, record.retentions[column], ha="center", transform=axes[row, column].transAxes,
                                       fontsize=13, fontweight="bold")  # fmt: skip
        axes[row, 0].set_ylabel(textwrap.fill(_plain(name), 20), fontsize=12, fontweight="bold")
    dense = record.dense.text or " ".join(record.dense.pieces)
    head = f"{cut(record.prompt, 24 * columns)}\nnothing pruned: {cut(dense, 24 * columns)}"
    out.suptitle(_plain(head), fontsize=13, y=1 - 0.16 / size[1], va="top")
    out.subplots_adjust(left=0.9 / size[0], right=0.99, bottom=0.75 / size[1], top=1 - 1.25 / size[1], wspace=0.06, hspace=0.4)
    return out


def lit(run: Run, patches: int) -> np.ndarray:
    """fp64 [patches]: the light of every token, 1 for those that are left at the end."""
    stays: np.ndarray = np.zeros(patches, dtype=int)
    for step in run.steps:
        stays[list(step.kept)] += 1
    low, high = _BRIGHTNESS
    last = len(run.steps)
    return np.where(stays == last, 1.0, low + (high - low) * stays / max(last, 1))


def _composed(record: Record, photos: list[Image.Image], run: Run) -> Picture:
    """The panels beside each other, [height, width, 3]."""
    light = np.full(record.patches, _BRIGHTNESS[1]) if run.left_out else lit(run, record.patches)
    parts: list[Any] = []
    for panel in record.panels:
        parts += [np.ones((_SIDE, _GAP, 3))] if parts else []
        parts.append(_shaded(photos[panel.picture], panel, light))
    return np.concatenate(parts, 1)


def _shaded(photo: Image.Image, panel: Panel, light: np.ndarray) -> Picture:
    width = max(1, round(_SIDE * photo.width / photo.height))
    values = np.asarray(photo.resize((width, _SIDE), Image.Resampling.LANCZOS), dtype=np.float64) / 255
    own = light[panel.first : panel.first + panel.rows * panel.columns].reshape(panel.rows, panel.columns)
    rows: np.ndarray = np.arange(_SIDE) * panel.rows // _SIDE
    columns: np.ndarray = np.arange(width) * panel.columns // width
    return values * own[np.ix_(rows, columns)][..., None]


def _cell(axes: Axes, image: Picture, record: Record, run: Run) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for edge in axes.spines.values():
        edge.set_visible(False)
    if run.answer is None:
        axes.set_title("left out", fontsize=10)
        axes.set_xlabel(_plain(_lines(run.left_out or "", 36)), fontsize=8)
        return
    counts = [len(step.kept) for step in run.steps]
    shown = [record.patches, *(counts if len(counts) < 5 else [counts[0], "…", *counts[-2:]])]
    axes.set_title(" → ".join(map(str, shown)), fontsize=10)
    said = _lines(run.answer.text or " ".join(run.answer.pieces), 32)
    text = f"{said}\n" + ("as the dense answer" if run.differs is None else f"differs from token {run.differs + 1} on")
    axes.set_xlabel(_plain(text), fontsize=9, color=_GOOD if run.differs is None else _BAD)


def cut(text: str, width: int) -> str:
    """`text` on one line, so many letters of it at the most: "…" stands for what is left out. Text may have no spaces."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def _lines(text: str, width: int) -> str:
    """As many letters as two lines hold."""
    return textwrap.fill(cut(text, 2 * width - 8), width)


def _plain(text: str) -> str:
    """Without what matplotlib would take for mathematics; "?" for what its fonts (rcParams["font.family"]) have no glyph
    for, which it would draw as a box."""
    fonts = _fonts()
    shown = (letter if letter == "\n" or any(font.get_char_index(ord(letter)) for font in fonts) else "?" for letter in text)
    return "".join(shown).replace("$", r"\$")


def _fonts() -> list[FT2Font]:
    """Those that text is drawn with: the first, and those that step in where it lacks a glyph."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    found = []
    for family in FontProperties().get_family():
        with contextlib.suppress(ValueError):  # a family that is not installed
            found.append(get_font(findfont(FontProperties(family=[family]), fallback_to_default=False)))
    return found or [get_font(findfont(FontProperties()))]


def _decoded(uri: str) -> Image.Image:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return image.convert("RGB")
