"""What passes and what fails: pure functions of a baseline and of what was found. Nothing here measures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from ..bench.stored import STRICT
from ..errors import ConfigError

# What is timed: ratios dense / pruned of these calls.
MEASURES = ("prefill", "decode", "ttft")
Measure = Annotated[str, Field(pattern="^(prefill|decode|ttft)$")]
# Below this no tolerance goes: a process differs from the next one by more than its own repeats show.
FLOOR = 0.1
# Robust standard deviations that a measure may fall below its baseline.
DEVIATIONS = 4.0
# Above this a timing would let almost anything pass.
CEILING = 0.3
# First measurement and repetitions, each with twice the rounds of the one before.
ATTEMPTS = 3

# What facts depend on beside the code, by the beginning of their names; the others on nothing.
BOUND = {"nodes": "versions", "kernels": "versions and device", "reads.entry": "device"}


@dataclass(frozen=True)
class Failure:
    """One difference that fails the gate. what: a fact ("flops.prefill", "nodes.decode.aten.add.Tensor", "kv_rows.3") or a
    timed measure; baseline and found as they are printed, "none" for a fact that one side does not have."""

    subject: str
    what: str
    baseline: str
    found: str


@checked(frozen=True, config=STRICT)
class Timing:
    """A measure of the baseline: the ratio dense / pruned, and the relative fall that passes."""

    ratio: Annotated[float, Field(gt=0)]
    tolerance: Annotated[float, Field(ge=FLOOR, le=CEILING)]

    @property
    def bound(self) -> float:
        """The least ratio that passes."""
        return self.ratio * (1 - self.tolerance)


@dataclass(frozen=True)
class Judged:
    """A timed measure and the ratios found, one per attempt. verdict: "pass", "faster" or "slower"."""

    subject: str
    what: str
    baseline: Timing
    found: tuple[float, ...]
    verdict: str


@dataclass
class Report:
    """The outcome of a check: `failures`, empty where it passed; `timed`: every timed measure; `notes`: what was not compared,
    and why; `facts`: how many facts were compared."""

    failures: list[Failure] = field(default_factory=list)
    timed: list[Judged] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: int = 0

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def __str__(self) -> str:
        lines = [f"{f.subject}: {f.what}: baseline {f.baseline}, found {f.found}" for f in self.failures]
        lines += [f"note: {note}" for note in self.notes]
        what = f"{self.facts} facts and {len(self.timed)} timed measures compared, {len(self.failures)} failed"
        return "\n".join([*lines, what])


def flatten(facts: Any, name: str = "") -> dict[str, int]:
    """Nested dicts and lists of integers as one dict of dotted names. Raises ConfigError for anything else."""
    if isinstance(facts, dict | list | tuple):
        pairs: Iterable[tuple[Any, Any]] = facts.items() if isinstance(facts, dict) else enumerate(facts)
        flat: dict[str, int] = {}
        for key, value in pairs:
            flat |= flatten(value, f"{name}.{key}" if name else str(key))
        return flat
    if isinstance(facts, bool) or not isinstance(facts, int):
        raise ConfigError(f"the fact {name or '(all)'} is {facts!r}, not an integer: measure the baseline anew with --update")
    return {name: facts}


def compare_facts(
    subject: str, baseline: Any, found: Any, *, versions: str | None = None, device: str | None = None
) -> tuple[list[Failure], list[str], int]:
    """(failures, notes, facts compared). versions, device: how the baseline's differ from those here, None where they agree;
    what is bound to them is then listed in a note instead of compared."""
    differs = {"versions": versions, "device": device, "versions and device": versions or device}
    before, now = flatten(baseline), flatten(found)
    failures, notes, compared = [], [], 0
    skipped: dict[str, int] = {}
    for name in before | now:
        group = next((group for group in BOUND if name == group or name.startswith(f"{group}.")), None)
        if group is not None and differs[BOUND[group]]:
            skipped[group] = skipped.get(group, 0) + 1
            continue
        compared += 1
        if before.get(name) != now.get(name):
            failures.append(Failure(subject, name, _count(before.get(name)), _count(now.get(name))))
    for group, number in skipped.items():
        notes.append(f"{subject}: {group} ({number} facts) not compared: baseline made with {differs[BOUND[group]]}")
    return failures, notes, compared


def broken_promises(subject: str, facts: Any, backend: str) -> list[Failure]:
    """What no baseline can allow: a graph break, a recompilation, a read inside a program, a program not compiled."""
    stream, reads = facts["stream"], facts["reads"]
    promised = {
        "stream.graph_breaks": (0, stream["graph_breaks"]),
        "stream.recompiles": (0, stream["recompiles"]),
        "reads.program": (0, reads["program"]),
    }
    if backend == "inductor":
        promised["stream.graphs"] = (stream["programs"], stream["graphs"])
    wrong = {name: pair for name, pair in promised.items() if pair[0] != pair[1]}
    return [Failure(subject, name, f"{right:,} (always)", f"{value:,}") for name, (right, value) in wrong.items()]


def timing_of(name: str, ratios: list[float]) -> Timing:
    """The baseline of a measure from independent repeats. Raises ConfigError if they spread too far to tell anything.

    The ratio is their median; the tolerance is DEVIATIONS robust standard deviations (1.4826 times the median absolute
    deviation), relative to the ratio, and at least FLOOR.
    """
    ratio = statistics.median(ratios)
    deviation = 1.4826 * statistics.median(abs(value - ratio) for value in ratios) / ratio
    tolerance = max(FLOOR, DEVIATIONS * deviation)
    if tolerance > CEILING:
        raise ConfigError(
            f"{name}: the repeats {', '.join(f'{value:.2f}' for value in ratios)} would need a tolerance of {tolerance:.0%}, "
            f"above {CEILING:.0%}: measure on a quiet machine, or with more --rounds"
        )
    return Timing(ratio, tolerance)


def judge(subject: str, what: str, baseline: Timing, measure: Callable[[int], float], rounds: int) -> Judged:
    """Calls `measure(rounds)` for the ratio, and again with twice the rounds while it is below the bound, ATTEMPTS times at
    most: noise passes one of them, a slow-down none."""
    found: list[float] = []
    for attempt in range(ATTEMPTS):
        found.append(measure(rounds * 2**attempt))
        if found[-1] >= baseline.bound:
            verdict = "faster" if found[-1] > baseline.ratio * (1 + baseline.tolerance) else "pass"
            return Judged(subject, what, baseline, tuple(found), verdict)
    return Judged(subject, what, baseline, tuple(found), "slower")


def failure_of(judged: Judged) -> Failure:
    """A timed measure that fell below its bound."""
    timing = judged.baseline
    found = ", ".join(f"{ratio:.3f}" for ratio in judged.found)
    what = f"time.{judged.what} (dense / pruned)"
    return Failure(judged.subject, what, f"{timing.ratio:.3f}, at least {timing.bound:.3f}", found)


def _count(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"
