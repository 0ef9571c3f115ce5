"""What passes and what fails: pure functions of a baseline and of what was found. Nothing here measures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass as checked

from ..bench.stored import STRICT
from ..errors import ConfigError
from . import cuda

# What is timed: ratios dense / pruned of these calls.
Measure = Literal["prefill", "decode", "ttft"]
MEASURES = get_args(Measure)
# Below this no tolerance goes: a process differs from the next one by more than its own repeats show.
FLOOR = 0.1
# Robust standard deviations that a measure may fall below its baseline.
DEVIATIONS = 4.0
# Above this a timing would let almost anything pass.
CEILING = 0.3
# First measurement and repetitions, each with twice the rounds of the one before.
ATTEMPTS = 3
# What facts depend on beside the code, by the beginning of their names; the others on nothing.
BOUND = {"nodes": "versions", "kernels": "versions and device", "reads.entry": "device", "cuda": "toolchain"}


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

    @property
    def failure(self) -> Failure:
        """What it is where it fell below its bound."""
        timing, found = self.baseline, ", ".join(f"{ratio:.3f}" for ratio in self.found)
        least = f"{timing.ratio:.3f}, at least {timing.bound:.3f}"
        return Failure(self.subject, f"time.{self.what} (dense / pruned)", least, found)


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
        what = f"{self.facts} facts and {len(self.timed)} timed measures compared, {len(self.failures)} failed"
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), what])


def flatten(facts: Any, name: str = "") -> dict[str, int]:
    """Nested dicts and lists of integers as one dict of dotted names. Raises ConfigError for anything else."""
    if isinstance(facts, dict | list | tuple):
        pairs = facts.items() if isinstance(facts, dict) else enumerate(facts)
        return {k: v for key, inner in pairs for k, v in flatten(inner, f"{name}.{key}".lstrip(".")).items()}
    if isinstance(facts, bool) or not isinstance(facts, int):
        raise ConfigError(f"the fact {name or '(all)'} is {facts!r}, not an integer: measure the baseline anew with --update")
    return {name: facts}


def compare_facts(
    subject: str,
    baseline: Any,
    found: Any,
    *,
    versions: str | None = None,
    device: str | None = None,
    toolchain: str | None = None,
) -> tuple[list[Failure], list[str], int]:
    """(failures, notes, facts compared). versions, device: how the baseline's differ from those here, None where they agree;
    what is bound to them is then listed in a note instead of compared; toolchain: why facts of CUDA are not, in words."""
    made = {"versions": versions, "device": device, "versions and device": versions or device}
    differs: dict[str | None, str | None] = {
        bound: f"baseline made with {other}" if other else None for bound, other in made.items()
    }
    differs["toolchain"] = toolchain
    before, now = flatten(baseline), flatten(found)
    failures, compared, skipped = [], 0, Counter[str]()
    for name in before | now:
        group = next((group for group in BOUND if f"{name}.".startswith(f"{group}.")), None)
        if group and differs[BOUND[group]]:
            skipped[group] += 1
            continue
        compared += 1
        if before.get(name) != now.get(name):
            sides = (f"{side[name]:,}" if name in side else "none" for side in (before, now))
            failures.append(Failure(subject, name, *sides))
    notes = [f"{subject}: {group} ({number} facts) not compared: {differs[BOUND[group]]}" for group, number in skipped.items()]
    return failures, notes, compared


def broken_promises(subject: str, facts: Any, backend: str) -> list[Failure]:
    """What no baseline can allow: a graph break, a recompilation, a read inside a program, a program not compiled; on CUDA,
    what `cuda.ALWAYS` says."""
    found = flatten({name: facts[name] for name in ("stream", "reads")})
    promised = dict.fromkeys(("stream.graph_breaks", "stream.recompiles", "reads.program"), 0)
    if backend == "inductor":
        promised["stream.graphs"] = found["stream.programs"]
    for program, counted in _by_program(facts.get("cuda", {})).items():
        always = cuda.ALWAYS | (cuda.ALWAYS_DECODE if program.endswith(".decode") else {})
        promised |= {f"cuda.{program}.{name}": right for name, right in always.items()}
        found |= {f"cuda.{program}.{name}": counted[name] for name in always}
    wrong = {name: right for name, right in promised.items() if right != found[name]}
    return [Failure(subject, name, f"{right:,} (always)", f"{found[name]:,}") for name, right in wrong.items()]


def _by_program(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Facts of CUDA by "architecture.program"."""
    return {f"{name}.{program}": counted for name, of in facts.items() for program, counted in of.items()}


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
    while len(found) < ATTEMPTS and (not found or found[-1] < baseline.bound):
        found.append(measure(rounds * 2 ** len(found)))
    above = "faster" if found[-1] > baseline.ratio * (1 + baseline.tolerance) else "pass"
    return Judged(subject, what, baseline, tuple(found), above if found[-1] >= baseline.bound else "slower")
