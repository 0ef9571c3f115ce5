"""The gate itself: measures the subjects of a baseline again, and compares; or measures a new baseline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..bench.bind import bind
from ..bench.timing import Call, interleave, median_ratio
from ..config import ViTCoPConfig
from ..errors import ConfigError
from ..optimized import OptimizedModel
from ..schedule import ModelShape
from . import cuda
from . import facts as fact
from .baseline import (
    FORMAT,
    Baseline,
    Build,
    Record,
    Settings,
    Source,
    builder,
    here,
    load,
    machine,
    save,
    toolchain,
    versions,
)
from .compare import MEASURES, Failure, Report, Timing, broken_promises, compare_facts, judge, timing_of

ELSEWHERE = ("refuse", "skip", "compare")
REPEATS = 7
LEAST_MS = 20.0

Say = Callable[[str], None]
Arms = dict[str, dict[str, Call]]


def check(
    source: Source,
    baseline: str | Path,
    *,
    counts_only: bool = False,
    elsewhere: str = "refuse",
    say: Say = lambda what: None,
) -> Report:
    """Measures the subjects of the file `baseline` on `source` and compares.

    source: a model as `optimize` takes it; or a function (config, backend) -> a fresh `OptimizedModel`, called with the dense
    configuration too; or None for the model that the baseline names. counts_only: the facts alone, nothing is timed.
    elsewhere: what to do where the baseline's timings are from another processor, number of threads or device: "refuse"
    them, "skip" them, or "compare" regardless. say: called with what is being done.

    Raises ConfigError, before anything is compiled, for a baseline that is missing, of another format, of another machine
    (elsewhere="refuse") or of a model of another shape; what `optimize` raises, too.
    """
    stored = load(Path(baseline))
    if elsewhere not in ELSEWHERE:
        raise ConfigError(f"elsewhere={elsewhere!r} is unknown: use one of {', '.join(ELSEWHERE)}")
    settings, report = stored.settings, Report()
    build, dense, timing = builder(source, settings), None, None
    generated, why = _dry_run(stored, say)
    for preset, record in stored.subjects.items():
        told = _of(preset, say)
        told("capturing")
        pruned = build(ViTCoPConfig.preset(preset), settings.backend)
        if timing is None:
            _check_shape(pruned, stored, baseline)
            timing = _may_time(stored, pruned, counts_only, elsewhere, report)
        found, calls = fact.measure(pruned, settings.request, told)
        found |= {"cuda": generated[preset]} if generated else {}
        _compare(preset, record, found, stored, pruned, report, why)
        if timing and record.timed:
            dense = dense or _dense(build, settings, say)
            compare_times(preset, record.timed, {"dense": dense, "pruned": calls}, settings.rounds, report, told)
        elif timing:
            report.notes.append(f"{preset}: the baseline holds no timed measures")
    return report


def update(
    source: Source,
    baseline: str | Path,
    settings: Settings | None = None,
    *,
    counts_only: bool = False,
    repeats: int = REPEATS,
    say: Say = lambda what: None,
) -> tuple[Baseline, list[Failure]]:
    """Measures `settings` on `source`, as `check` does, and writes the file; every timing is repeated `repeats` times, one
    after the other, for its tolerance. Returns the baseline and what it breaks that no baseline can allow (a graph break, a
    recompilation, a read in a program); with any of those nothing is written.

    Raises ConfigError for timings that spread too far.
    """
    settings = (settings or Settings()).of(source)
    if not counts_only and (isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 3):
        raise ConfigError(f"repeats={repeats!r}: give an integer of at least 3, so that a spread can be told")
    build, dense = builder(source, settings), None
    records, broken = {}, []
    reason = cuda.missing() if settings.cuda else None
    if reason is not None:
        raise ConfigError(f"facts of {', '.join(settings.cuda)} cannot be counted here: {reason}; or pass --cuda none")
    generated = cuda.measure(settings, say) if settings.cuda else {}
    for preset in settings.presets:
        told = _of(preset, say)
        told("capturing")
        pruned = build(ViTCoPConfig.preset(preset), settings.backend)
        found, calls = fact.measure(pruned, settings.request, told)
        found |= {"cuda": generated[preset]} if generated else {}
        broken += broken_promises(preset, found, settings.backend)
        timed: dict[Any, Timing] = {}
        if not counts_only:
            dense = dense or _dense(build, settings, say)
            timed = measure_times({"dense": dense, "pruned": calls}, settings.rounds, repeats, told)
        records[preset] = Record(found, timed)
    made = Baseline(FORMAT, settings, here(pruned.device), _shape(pruned.schedule.shape), records)
    if not broken:
        save(made, Path(baseline))
    return made, broken


def _dry_run(stored: Baseline, say: Say) -> tuple[dict[str, Any], str | None]:
    """Facts of CUDA by preset, none where they cannot be compared, and then why."""
    if not stored.settings.cuda:
        return {}, None
    reason = cuda.missing()
    if reason is not None:
        return {}, f"no code for CUDA was generated: {reason}"
    # The names alone: what device the baseline's other facts are of does not matter.
    then, now = toolchain(stored.environment), toolchain(here(torch.device("cpu")))
    if then != now:
        return {}, f"baseline made with {then}, here is {now}"
    return cuda.measure(stored.settings, say), None


def _of(preset: str, say: Say) -> Say:
    return lambda what: say(f"{preset}: {what}")


def _dense(build: Build, settings: Settings, say: Say) -> dict[str, Call]:
    say("compiling the dense model")
    return bind(build(ViTCoPConfig.dense(), settings.backend), settings.request)


def measure_times(arms: Arms, rounds: int, repeats: int, say: Say = lambda what: None) -> dict[str, Timing]:
    """The baseline of every measure. Repeats go round all measures, so that each one's are spread over the whole time."""
    ratios: dict[str, list[float]] = {name: [] for name in MEASURES}
    for repeat in range(repeats):
        say(f"timing, {repeat + 1} of {repeats}")
        for name, found in ratios.items():
            found.append(ratio_of(arms, name, rounds))
    return {name: timing_of(name, found) for name, found in ratios.items()}


def compare_times(
    subject: str, timed: dict[Any, Timing], arms: Arms, rounds: int, report: Report, say: Say = lambda what: None
) -> None:
    """Measures every timing of a baseline again, and adds what is found to `report`."""
    for name, timing in timed.items():

        def attempt(count: int, name: str = name) -> float:
            say(f"timing {name}, {count} rounds")
            return ratio_of(arms, name, count)

        judged = judge(subject, name, timing, attempt, rounds)
        report.timed.append(judged)
        if judged.verdict == "slower":
            report.failures.append(judged.failure)
        if judged.verdict == "faster":
            report.notes.append(
                f"{subject}: {name} is faster: ratio {judged.found[-1]:.3f} where the baseline has {timing.ratio:.3f}: "
                "consider --update"
            )


def ratio_of(arms: Arms, name: str, rounds: int) -> float:
    """Median over interleaved rounds of the dense arm's time over the pruned arm's. Both share one pool of threads: nothing
    has to settle between them, and a thread that must be woken first takes a while that differs from call to call."""
    times = interleave({arm: calls[name] for arm, calls in arms.items()}, rounds, least_ms=LEAST_MS, settle=0.0)
    return median_ratio(times["dense"], times["pruned"])


def _compare(
    preset: str, record: Record, found: Any, stored: Baseline, pruned: OptimizedModel, report: Report, why: str | None
) -> None:
    before, now = stored.environment, here(pruned.device)
    other = versions(before) if versions(before) != versions(now) else None
    device = before["device"] if before["device"] != now["device"] else None
    failures, notes, compared = compare_facts(preset, record.facts, found, versions=other, device=device, toolchain=why)
    known = {failure.what for failure in failures}
    broken = [failure for failure in broken_promises(preset, found, stored.settings.backend) if failure.what not in known]
    report.failures += failures + broken
    report.notes += notes
    report.facts += compared


def _may_time(stored: Baseline, pruned: OptimizedModel, counts_only: bool, elsewhere: str, report: Report) -> bool:
    """Whether the timings are compared. Raises ConfigError where they must not be and `elsewhere` is "refuse"."""
    if counts_only:
        report.notes.append("timed measures not compared: only counts were asked for")
        return False
    theirs, ours = machine(stored.environment), machine(here(pruned.device))
    if theirs == ours or not any(record.timed for record in stored.subjects.values()):
        return True
    both = f"the baseline's timings are from {theirs}; this is {ours}"
    if elsewhere == "refuse":
        raise ConfigError(f"{both}: measure a baseline here with --update, or pass --elsewhere skip or compare")
    report.notes.append(f"{both}: timed measures {'not compared' if elsewhere == 'skip' else 'compared all the same'}")
    return elsewhere == "compare"


def _shape(shape: ModelShape) -> dict[str, Any]:
    """A shape as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(shape)))


def _check_shape(optimized: OptimizedModel, stored: Baseline, path: str | Path) -> None:
    # A baseline that is older than a number of shapes was made of a model that has the number's default.
    theirs = _shape(ModelShape()) | stored.shape
    pairs = {name: (theirs[name], value) for name, value in _shape(optimized.schedule.shape).items()}
    other = "; ".join(f"{name} {before}, here {now}" for name, (before, now) in pairs.items() if before != now)
    if other:
        raise ConfigError(f"{path} is of a model of another shape ({other}): check the model it was made of")
