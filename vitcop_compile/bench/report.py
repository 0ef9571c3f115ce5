"""Results shown and kept: a table, a README's table, JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, with_config
from rich.table import Table
from typing_extensions import TypedDict

from ..errors import InputError
from . import table as tables
from .environment import hardware
from .stored import load, save

Row = Mapping[str, Any]
Columns = Mapping[str, Callable[[Row], str]]
_NOTHING = "-"
_REMEDY = "measure the results anew"


@with_config(ConfigDict(extra="allow"))
class Results(TypedDict):
    """What a benchmark writes: its conditions and a row per line of its table."""

    environment: dict[str, Any]
    rows: list[dict[str, Any]]


def milliseconds(stage: str) -> Callable[[Row], str]:
    """A column of the stage's median."""
    return lambda row: _number(row.get(f"{stage}_ms"))


def ratio(stage: str, over: str | None = None) -> Callable[[Row], str]:
    """A column of the stage's ratio to the arm `over` (None: the backend's dense row), quartiles behind it."""

    def cell(row: Row) -> str:
        arm = row["ratio_to_dense"] if over is None else row["ratio_to"].get(over)
        found = (arm or {}).get(stage)
        return (
            _NOTHING if found is None else f"{found['median']:.2f} ({found['quartiles'][0]:.2f}-{found['quartiles'][1]:.2f})"
        )

    return cell


def against_ideal(stage: str, ideal: str, realized: str) -> Callable[[Row], str]:
    """A column "ratio / ideal = realized" of the stage's ratio to dense."""

    def cell(row: Row) -> str:
        if row[realized] is None:
            return _NOTHING
        return f"{row['ratio_to_dense'][stage]['median']:.2f} / {row[ideal]:.2f} = {row[realized]:.2f}"

    return cell


def columns(results: Mapping[str, Any]) -> Columns:
    """The columns that the rows of `results` fill."""
    arms = dict.fromkeys(arm for row in results["rows"] for arm in row["ratio_to"])
    found: dict[str, Callable[[Row], str]] = {
        "backend": lambda row: row["backend"],
        "arm": lambda row: row["arm"],
        "preset": lambda row: row["preset"],
        "batch": lambda row: str(row["batch"]),
        "vision": milliseconds("vision"),
        "prefill": milliseconds("prefill"),
        "prefill ratio / FLOPs": against_ideal("prefill", "flop_ratio", "realized_over_ideal"),
        "selection": _selection,
        "TTFT": milliseconds("ttft"),
        **{f"TTFT to {arm}": ratio("ttft", arm) for arm in arms},
        "decode": milliseconds("decode"),
        "decode ratio / bytes": against_ideal("decode", "decode_byte_ratio", "decode_realized_over_ideal"),
        "KV": lambda row: _mebibytes(row["kv_bytes"]),
    }
    if results["environment"]["memory"]:
        found["peak memory"] = lambda row: _mebibytes(row["peak_memory_bytes"], "Linux only")
    constant = ("backend", "preset")
    return {
        name: cell for name, cell in found.items() if name in constant or any(cell(r) != _NOTHING for r in results["rows"])
    }


def table(results: Mapping[str, Any], chosen: Columns | None = None) -> Table:
    """One line per row: times in ms, ratios as time over the line's own time with quartiles behind."""
    return tables.printed(*_cells(results, chosen), caption(results))


def markdown(results: Mapping[str, Any], chosen: Columns | None = None) -> str:
    """The same as a Markdown table below a line with its conditions."""
    return f"{caption(results)}.\n\n{tables.markdown(*_cells(results, chosen))}"


def _cells(results: Mapping[str, Any], chosen: Columns | None) -> tuple[Iterable[str], list[list[str]]]:
    cells = chosen or columns(results)
    return cells, [[cell(row) for cell in cells.values()] for row in results["rows"]]


def caption(results: Mapping[str, Any]) -> str:
    """Hardware, versions, precision, rounds and commit in one line."""
    given = results["environment"]
    versions = [f"{name} {given[name]}" for name in ("torch", "onnxruntime") if given[name]]
    commit = [f"commit {given['commit'][:10]}{'-dirty' * given['commit'].endswith('-dirty')}"] if given["commit"] else []
    words = [hardware(given), *versions, given["dtype"], f"medians of {given['rounds']} interleaved rounds in ms", *commit]
    return ", ".join(words)


def check_target(path: Path) -> None:
    """Raises InputError where no file can be written at `path`."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: name a file in a folder that exists")


def write(results: Mapping[str, Any], path: Path) -> None:
    """Writes the results as JSON, a line per row, aside first and then moved into place. Raises InputError."""
    rows = ",\n".join("    " + json.dumps(row) for row in results["rows"])
    rest = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=2)
    text = f'{rest.removesuffix("}").rstrip()},\n  "rows": [\n{rows}\n  ]\n}}\n'
    save(text, path, InputError)


def read(path: Path, fields: Iterable[str] = ("backend", "arm", "preset", "ratio_to")) -> dict[str, Any]:
    """What `write` wrote. Raises InputError for a file that cannot be read, or whose rows lack one of `fields`."""
    found = load(path, Results, InputError, _REMEDY)
    for number, row in enumerate(found["rows"]):
        lacking = [name for name in fields if name not in row]
        if lacking:
            raise InputError(f"{path}: rows.{number} lacks {', '.join(lacking)}: {_REMEDY}")
    return found


def _selection(row: Row) -> str:
    if row["selection_ms"] is None:
        return _NOTHING
    share = "" if row["selection_share"] is None else f" ({100 * row['selection_share']:.1f} %)"
    return f"{row['selection_ms']:.2f}{share}"


def _mebibytes(count: int | None, missing: str = _NOTHING) -> str:
    return missing if count is None else f"{count / 2**20:,.1f} MiB"


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1f}"
