"""Results as pictures: latency against retention, where the time goes, and the KV cache as it grows. Needs matplotlib."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS, ViTCoPConfig
from ..errors import ConfigError, InputError
from ..picture import require_matplotlib
from .cases import DENSE
from .environment import hardware
from .stored import save as save_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
BASELINE = "stock_compile"
# Okabe and Ito: told apart with any kind of color vision; every line has a marker of its own besides.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GRAY = "#555555"
_WIDTH, _DPI = 9.0, 160  # inches; drawn larger than the 900 pixels it must be readable at
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "svg.hashsalt": "vitcop",  # the same results make the same file
}
Row = Mapping[str, Any]
Results = Mapping[str, Any]


def draw_all(results: Results, folder: Path, format: str = "png") -> list[Path]:
    """Writes latency, stages and kv_memory into `folder`, which is made if need be; returns the files.

    Results of several requests or shapes, which no picture may mix, make one latency and one stages picture each, named by
    them. Raises UnsupportedError without matplotlib, ConfigError for an unknown format, InputError where there is nothing to
    draw or a file cannot be written.
    """
    require_matplotlib()
    if format not in FORMATS:
        raise ConfigError(f"format {format!r} is unknown: use one of {', '.join(FORMATS)}")
    groups: dict[str, list[Row]] = {}
    for row in results["rows"]:
        name = f"_{row['shape']}_batch{row['batch']}_text{row['text_tokens']}_new{row['new_tokens']}"
        groups.setdefault(name, []).append(row)
    if not groups:
        raise InputError("the results have no rows: there is nothing to draw")
    drawings: dict[str, Figure] = {}
    for name, rows in groups.items():
        suffix, part = name * (len(groups) > 1), {**results, "rows": rows}
        drawings |= {f"latency{suffix}": latency(part), f"stages{suffix}": stages(part)}
    drawings["kv_memory"] = kv_memory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror or error}") from None
    return [save(drawing, folder / f"{name}.{format}") for name, drawing in drawings.items()]


def latency(results: Results) -> Figure:
    """TTFT and prefill in ms against the share of visual tokens kept, a line per backend, the stock model's beside it.

    Needs rows of one request and shape. Raises InputError where neither stage was measured.
    """
    backends = _backends(results["rows"])
    measured = [stage for stage in ("ttft", "prefill") if any(row[f"{stage}_ms"] is not None for row in results["rows"])]
    if not measured:
        raise InputError("the results have neither TTFT nor prefill times: there is no latency to draw")
    out, axes = _figure(1, len(measured), 4.6)
    for panel, stage in zip(axes, measured):
        rows = [row for row in results["rows"] if row[f"{stage}_ms"] is not None]
        for backend, color, marker in zip(backends, _COLORS * 2, _MARKERS * 2):
            own = sorted(_arm(rows, backend, backend), key=lambda row: row["retention"])
            share = [100 * row["retention"] for row in own]
            panel.plot(share, [row[f"{stage}_ms"] for row in own], color=color, marker=marker, label=backend)
            low, high = ([row[f"{stage}_ms_quartiles"][end] for row in own] for end in (0, 1))
            panel.fill_between(share, low, high, color=color, alpha=0.2, linewidth=0)
        # One line for the stock model, and a band over what it took beside each of the backends.
        stock = [row[f"{stage}_ms"] for row in rows if row["arm"] == BASELINE]
        if stock:
            panel.axhline(statistics.median(stock), color=_GRAY, linestyle="--", label="stock model, torch.compile, dense")
            panel.axhspan(min(stock), max(stock), color=_GRAY, alpha=0.15, linewidth=0)
        title = "TTFT: vision, prefill and between" if stage == "ttft" else stage
        panel.set(title=title, xlabel="visual tokens kept, mean over layers (%)", ylabel="time (ms)")
        panel.set_ylim(bottom=0)
    _legend(out, axes[0])
    return _titled(out, results, "Latency against retention")


def stages(results: Results) -> Figure:
    """Where a request's time goes, dense and pruned, a bar per backend and setting: until the first token, then after it.

    Selection is what it takes alone; prefill is drawn without it. Needs rows of one request and shape. Raises InputError
    where no row has all of vision, prefill and decode.
    """
    complete = [row for row in results["rows"] if None not in (row["vision_ms"], row["prefill_ms"], row["decode_ms"])]
    rows = [row for backend in _backends(complete) for row in _arm(complete, backend, backend)]
    if not rows:
        raise InputError("no row has vision, prefill and decode times: there are no stages to draw")
    out, (first, second) = _figure(2, 1, 6.6)
    at = [index + 0.7 * _backends(rows).index(row["backend"]) for index, row in enumerate(rows)]
    selection = [row["selection_ms"] or 0.0 for row in rows]
    parts = {
        "vision": [row["vision_ms"] for row in rows],
        "prefill without selection": [max(row["prefill_ms"] - cost, 0.0) for row, cost in zip(rows, selection)],
        "selection": selection,
    }
    bottom = [0.0] * len(rows)
    # Selection is thin: black shows where the bar is a pixel high.
    for (name, values), color in zip(parts.items(), (*_COLORS[:2], "black")):
        first.bar(at, values, 0.8, bottom=bottom, color=color, label=name)
        bottom = [low + value for low, value in zip(bottom, values)]
    new = rows[0]["new_tokens"]
    second.bar(at, [row["decode_ms"] * new for row in rows], 0.8, color=_COLORS[3])
    for panel, title in ((first, "until the first token"), (second, f"the {new} tokens after it: decode")):
        panel.set(title=title, ylabel="time (ms)")
        panel.grid(axis="x", visible=False)
        panel.set_xticks(at, [row["preset"] for row in rows])
    for backend in _backends(rows):
        own = [place for place, row in zip(at, rows) if row["backend"] == backend]
        second.annotate(
            backend, (sum(own) / len(own), 0), (0, -24), textcoords="offset points", ha="center", va="top",
            xycoords=second.get_xaxis_transform(), annotation_clip=False, fontweight="bold",
        )  # fmt: skip
    _legend(out, first)
    return _titled(out, results, "Where the time of a request goes")


def kv_memory(text_tokens: int = 64, longest: int = 1024) -> Figure:
    """KV cache of one prompt of LLaVA-1.5-7B in MiB against generated tokens, per preset, as the schedule counts it; nothing
    is measured."""
    out, (panel,) = _figure(1, 1, 4.6)
    settings = {DENSE: ViTCoPConfig.dense()} | {preset: ViTCoPConfig.preset(preset) for preset in PRESETS}
    tokens = range(0, longest + 1, max(1, longest // 64))
    for (label, config), color, marker in zip(settings.items(), _COLORS, _MARKERS):
        schedule = config.schedule()
        memory = [schedule.kv_bytes(text_tokens, count) / 2**20 for count in tokens]
        panel.plot(list(tokens), memory, color=color, marker=marker, markevery=8, label=label)
    panel.set(xlabel="generated tokens", ylabel="KV cache of one prompt (MiB)", xlim=(0, longest))
    panel.set_ylim(bottom=0)
    _legend(out, panel)
    below = f"LLaVA-1.5-7B, 16 bit, {schedule.image_tokens} image and {text_tokens} text tokens, computed"
    out.suptitle(f"KV memory against generated tokens\n{below}", fontsize=11)
    return out


def save(drawing: Figure, path: Path) -> Path:
    """Writes `drawing` in the format of the suffix, aside first and then moved into place. Raises InputError."""
    import matplotlib

    format = path.suffix.removeprefix(".")
    settings: Any = {"format": format, "dpi": _DPI, "metadata": {"Date": None} if format == "svg" else None}
    with matplotlib.rc_context(_STYLE):
        save_file(path, lambda aside: drawing.savefig(aside, **settings), InputError)
    return path


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, Sequence[Axes]]:
    matplotlib = require_matplotlib()
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        out = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white", layout="constrained")
        return out, list(out.subplots(rows, columns, squeeze=False).flat)


def _legend(out: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    out.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)


def _titled(out: Figure, results: Results, title: str) -> Figure:
    row, given = results["rows"][0], results["environment"]
    request = f"{row['shape']} {row['dtype']}, batch {row['batch']}, {row['text_tokens']} text tokens"
    # One text: matplotlib lays out a single title per figure.
    out.suptitle(f"{title}\n{hardware(given)}; {request}, medians of {given['rounds']}", fontsize=11)
    return out


def _backends(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["backend"] for row in rows))


def _arm(rows: Sequence[Row], backend: str, arm: str) -> list[Row]:
    return [row for row in rows if row["backend"] == backend and row["arm"] == arm]
