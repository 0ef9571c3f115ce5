"""Reports and updates as tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bench.table import printed
from .baseline import Baseline
from .compare import Failure, Judged, Report, flatten

_COLORS = {"pass": "green", "faster": "cyan", "slower": "red"}


def print_report(report: Report, console: Console) -> None:
    """Timed measures, what was not compared, what failed, and one line that says which."""
    if report.timed:
        console.print(_timed(report.timed))
    for note in report.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)
    if report.failures:
        console.print(failures(report.failures))
        console.print(
            Text("meant to be so? measure the baseline anew with --update and commit it with the change", style="red")
        )
    what = f"{report.facts} facts and {len(report.timed)} timed measures compared"
    verdict = Text(f"{what}: {len(report.failures)} failed" if report.failures else f"{what}: all pass")
    verdict.stylize("green" if report.passed else "red")
    console.print(verdict, soft_wrap=True)


def failures(found: list[Failure]) -> Table:
    """What failed."""
    rows = [(failure.subject, failure.what, failure.baseline, failure.found) for failure in found]
    return printed(("subject", "fact", "baseline", "found"), rows, "regressions")


def print_update(old: Baseline | None, new: Baseline, console: Console) -> None:
    """Old and new values of everything that an update changed; of a first baseline, nodes are not listed."""
    changed = [row for row in differences(old, new) if old or not row[1].startswith("nodes.")]
    if not changed:
        console.print("nothing changed")
        return
    console.print(printed(("subject", "what", "old", "new"), changed, "baseline: old -> new"))


def differences(old: Baseline | None, new: Baseline) -> Iterator[tuple[str, str, str, str]]:
    """(subject, what, old, new) of every setting, fact and timed measure that differs; a list of numbers is one value."""
    before, now = _values(old) if old else {}, _values(new)
    for key in before | now:
        if before.get(key) != now.get(key):
            yield *key, before.get(key, "none"), now.get(key, "none")


def _values(baseline: Baseline) -> dict[tuple[str, str], str]:
    values = {("", name): str(value) for name, value in baseline.environment.items()}
    settings = vars(baseline.settings) | {"presets": ", ".join(baseline.settings.presets)}
    values |= {("", name): str(value) for name, value in settings.items() if value is not None}
    for preset, record in baseline.subjects.items():
        for name, value in record.facts.items():
            flat = {name: " ".join(map(str, value))} if isinstance(value, list) else _named(name, value)
            values |= {(preset, fact): text for fact, text in flat.items()}
        for name, timing in record.timed.items():
            values[(preset, f"time.{name}")] = f"{timing.ratio:.3f}, tolerance {timing.tolerance:.1%}"
    return values


def _named(name: str, value: object) -> dict[str, str]:
    return {fact: f"{number:,}" for fact, number in flatten(value, name).items()}


def _timed(judged: list[Judged]) -> Table:
    rows = []
    for one in judged:
        timing, found = one.baseline, ", ".join(f"{ratio:.3f}" for ratio in one.found)
        numbers = (f"{timing.ratio:.3f}", f"{timing.tolerance:.1%}", f"{timing.bound:.3f}", found)
        rows.append((one.subject, one.what, *numbers, Text(one.verdict, style=_COLORS[one.verdict])))
    names = ("subject", "measure", "baseline", "tolerance", "at least", "found", "verdict")
    return printed(names, rows, "dense / pruned, median of interleaved rounds")
