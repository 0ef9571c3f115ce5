"""Reports and updates as tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..bench.report import printed
from .baseline import Baseline
from .compare import Failure, Report, flatten

_COLORS = {"pass": "green", "faster": "cyan", "slower": "red"}


def print_report(report: Report, console: Console) -> None:
    """Timed measures, what was not compared, what failed, and one line that says which."""
    rows = []
    for one in report.timed:
        timing, found = one.baseline, ", ".join(f"{ratio:.3f}" for ratio in one.found)
        numbers = (f"{timing.ratio:.3f}", f"{timing.tolerance:.1%}", f"{timing.bound:.3f}", found)
        rows.append((one.subject, one.what, *numbers, Text(one.verdict, style=_COLORS[one.verdict])))
    if rows:
        names = ("subject", "measure", "baseline", "tolerance", "at least", "found", "verdict")
        console.print(printed(names, rows, "dense / pruned, median of interleaved rounds"))
    for note in report.notes:
        console.print(Text(note, style="yellow"), soft_wrap=True)
    if report.failures:
        console.print(failures(report.failures))
        console.print("meant to be so? measure the baseline anew with --update and commit it with the change", style="red")
    what = f"{report.facts} facts and {len(report.timed)} timed measures compared"
    verdict = f"{len(report.failures)} failed" if report.failures else "all pass"
    console.print(Text(f"{what}: {verdict}", style="green" if report.passed else "red"), soft_wrap=True)


def failures(found: list[Failure]) -> Table:
    """What failed."""
    rows = [(failure.subject, failure.what, failure.baseline, failure.found) for failure in found]
    return printed(("subject", "fact", "baseline", "found"), rows, "regressions")


def print_update(old: Baseline | None, new: Baseline, console: Console) -> None:
    """Old and new values of every setting, fact and timed measure that an update changed, a list of numbers as one value; of
    a first baseline, nodes are not listed."""
    before, now = _values(old) if old else {}, _values(new)
    changed = [
        (*key, before.get(key, "none"), now.get(key, "none"))
        for key in before | now
        if before.get(key) != now.get(key) and (old or not key[1].startswith("nodes."))
    ]
    if not changed:
        console.print("nothing changed")
        return
    console.print(printed(("subject", "what", "old", "new"), changed, "baseline: old -> new"))


def _values(baseline: Baseline) -> dict[tuple[str, str], str]:
    lists = {name: ", ".join(getattr(baseline.settings, name)) or None for name in ("presets", "cuda")}
    settings = vars(baseline.settings) | lists
    settings = {name: value for name, value in settings.items() if value is not None}
    values = {("", name): str(value) for name, value in {**baseline.environment, **settings}.items()}
    for preset, record in baseline.subjects.items():
        for name, value in record.facts.items():
            if isinstance(value, list):
                values[preset, name] = " ".join(map(str, value))
            else:
                values |= {(preset, fact): f"{number:,}" for fact, number in flatten(value, name).items()}
        for name, timing in record.timed.items():
            values[preset, f"time.{name}"] = f"{timing.ratio:.3f}, tolerance {timing.tolerance:.1%}"
    return values
