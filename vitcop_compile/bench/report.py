"""Results shown and kept: tables, as something rich prints or as Markdown, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from ..errors import InputError
from .cases import DENSE, STAGES
from .environment import hardware
from .rows import IDEALS
from .stored import load, save

Row = Mapping[str, Any]
Results = Mapping[str, Any]
_NOTHING = "-"
_REMEDY = "measure the results anew"
_BYTES = {"KV": "kv_bytes", "peak memory": "peak_memory_bytes", "before the request": "resident_memory_bytes"}
_FIELDS = {"settings": "preset", "selection": "selection_ms"}
# Columns of text; the others are numbers.
_WORDS = {"arm", "backend", "caches", "chosen", "dtype", "fact", "kernel", "measure", "precision", "preset", "process",
          "program", "settings", "shape", "subject", "verdict", "weights", "what"}  # fmt: skip


@with_config(ConfigDict(extra="allow"))
class Stored(TypedDict):
    """What a benchmark writes: its conditions and a row per line of its table."""

    environment: dict[str, Any]
    rows: list[dict[str, Any]]


def cell(row: Row, name: str) -> str:
    """What a row has under the name of a column. Of a stage: "prefill", its ms, "prefill to stock_compile", how many times as
    long that arm takes, and "prefill ratio / FLOPs" (of a decode step: bytes) of the ratio to dense and the ideal one."""
    stage, _, rest = name.partition(" ")
    if (stage := stage.lower()) in STAGES:
        if rest.startswith("ratio"):
            ideal, realized = IDEALS[stage]
            measured = (row["ratio_to_dense"] or {}).get(stage)
            return f"{measured['median']:.2f} / {row[ideal]:.2f} = {row[realized]:.2f}" if measured else _NOTHING
        if rest:
            arm = rest.removeprefix("to ")
            return _plain(((row["ratio_to_dense"] if arm == DENSE else row["ratio_to"].get(arm)) or {}).get(stage))
        return _NOTHING if row[f"{stage}_ms"] is None else f"{row[f'{stage}_ms']:.1f}"
    if name == "selection" and row["selection_ms"] is not None:
        share = row["selection_share"]
        return f"{row['selection_ms']:.2f}" + ("" if share is None else f" ({100 * share:.1f} %)")
    if name in _BYTES:
        count = row[_BYTES[name]]
        missing = "Linux only" if name == "peak memory" else _NOTHING
        return missing if count is None else f"{count / 2**20:,.1f} MiB"
    return _plain(row[_FIELDS.get(name, name)])


def cells(results: Results, names: Sequence[str] | None) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and cells of a table, of the columns `names`, or the usual ones, those that something fills."""
    if names is None:
        arms = dict.fromkeys(f"TTFT to {arm}" for row in results["rows"] for arm in row["ratio_to"])
        memory = ["peak memory"] if results["environment"]["memory"] else []
        names = ("backend", "arm", "preset", "batch", "vision", "vision ratio / FLOPs", "tower", "select", "prefill",
                 "prefill ratio / FLOPs", "selection", "TTFT", *arms, "decode", "decode ratio / bytes", "KV",
                 *memory)  # fmt: skip
    found = {name: [cell(row, name) for row in results["rows"]] for name in names}
    filled = {name: column for name, column in found.items() if {*column} != {_NOTHING}}
    return list(filled), [list(line) for line in zip(*filled.values())]


def table(results: Results, names: Sequence[str] | None = None) -> Table:
    """One line per row: times in ms, ratios as time over the line's own time with quartiles behind."""
    return printed(*cells(results, names), caption(results))


def markdown(results: Results, names: Sequence[str] | None = None) -> str:
    """The same as a Markdown table below a line with its conditions."""
    header, lines = cells(results, names)
    rule = ["---" if name in _WORDS else "---:" for name in header]
    return f"{caption(results)}.\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *lines))


def printed(names: Iterable[str], rows: Iterable[Sequence[str | Text]], title: str | None = None) -> Table:
    """Columns `names`, numbers to the right; a cell is taken as it is, without markup."""
    out = Table(title=title, title_justify="left")
    for name in names:
        out.add_column(name, justify="left" if name in _WORDS else "right", overflow="fold" if name in _WORDS else "ellipsis")
    for row in rows:
        out.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return out


def caption(results: Results) -> str:
    """Hardware, versions, precision, rounds and commit in one line."""
    given = results["environment"]
    versions = [f"{name} {given[name]}" for name in ("torch", "onnxruntime", "openvino") if given.get(name)]
    commit = [f"commit {given['commit'][:10]}" + "-dirty" * given["commit"].endswith("-dirty")] if given["commit"] else []
    words = [hardware(given), *versions, given["dtype"], f"medians of {given['rounds']} interleaved rounds in ms", *commit]
    return ", ".join(words)


def check_target(path: Path) -> None:
    """Raises InputError where no file can be written at `path`."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: name a file in a folder that exists")


def write(results: Results, path: Path) -> None:
    """Writes the results as JSON, a line per row, aside first and then moved into place. Raises InputError."""
    rows = ",\n".join("    " + json.dumps(row) for row in results["rows"])
    rest = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=2)
    text = f'{rest.removesuffix("}").rstrip()},\n  "rows": [\n{rows}\n  ]\n}}\n'
    save(path, lambda aside: aside.write_text(text), InputError)


def read(path: Path, fields: Iterable[str] = ("backend", "arm", "preset", "ratio_to")) -> dict[str, Any]:
    """What `write` wrote. Raises InputError for a file that cannot be read, or whose rows lack one of `fields`."""
    found = load(path, Stored, InputError, _REMEDY)
    for number, row in enumerate(found["rows"]):
        lacking = [name for name in fields if name not in row]
        if lacking:
            raise InputError(f"{path}: rows.{number} lacks {', '.join(lacking)}: {_REMEDY}")
    return found


def _plain(value: Any) -> str:
    """Any field of a row, a ratio with its quartiles behind it."""
    if isinstance(value, dict):
        return f"{value['median']:.2f} ({value['quartiles'][0]:.2f}-{value['quartiles'][1]:.2f})"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return _NOTHING if value is None else str(value)
