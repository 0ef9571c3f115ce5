"""What the gate makes of noise: fourteen thousand checks on a clock that only the arms move.

`python benchmarks/gate.py` asks the same of real programs and a real clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from vitcop_compile import regress
from vitcop_compile.bench import timing
from vitcop_compile.regress import gate
from vitcop_compile.regress.compare import CEILING, FLOOR, MEASURES, Timing

ROUNDS, CHECKS = 9, 10_000
# Milliseconds of both arms; decoding hardly gains from pruning.
TIMES = {"prefill": (200.0, 40.0), "decode": (22.0, 20.0), "ttft": (300.0, 90.0)}


class Machine:
    """A clock and a machine of seeded moods. Every call takes its time, longer or shorter by `jitter` (a relative standard
    deviation), longer still while a slow spell lasts, and many times that where something else runs: one call in thirty."""

    def __init__(self, seed: int, jitter: float):
        self.seconds, self._draw, self._jitter, self._mood = 0.0, random.Random(seed), jitter, 1.0

    def perf_counter(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def call(self, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            draw = self._draw
            if draw.random() < 0.02:
                self._mood = draw.uniform(1.0, 1.6)
            disturbed = draw.uniform(1.5, 6.0) if draw.random() < 1 / 30 else 1.0
            self.seconds += milliseconds / 1e3 * self._mood * disturbed * draw.lognormvariate(0.0, self._jitter)

        return run

    def arms(self, slower: float = 1.0) -> gate.Arms:
        return {
            "dense": {name: self.call(dense) for name, (dense, _) in TIMES.items()},
            "pruned": {name: self.call(pruned * slower) for name, (_, pruned) in TIMES.items()},
        }


@pytest.fixture
def machine(monkeypatch) -> Callable[..., Machine]:
    def make(seed: int, jitter: float = 0.03) -> Machine:
        made = Machine(seed, jitter)
        monkeypatch.setattr(timing, "time", made)
        return made

    return make


def failures(timed: dict[str, Timing], arms: gate.Arms, checks: int) -> int:
    """How many of `checks` checks of one measure each fail."""
    failed = 0
    for at in range(checks):
        name, report = MEASURES[at % len(MEASURES)], regress.Report()
        gate.compare_times("subject", {name: timed[name]}, arms, ROUNDS, report)
        failed += not report.passed
    return failed


def test_noise_fails_next_to_nothing(machine) -> None:
    """Fewer than one false alarm in a thousand, over baselines that were themselves measured under that noise."""
    failed = 0
    for seed in range(10):
        arms = machine(seed, jitter=0.06 if seed % 2 else 0.03).arms()
        timed = gate.measure_times(arms, ROUNDS, regress.REPEATS)
        assert all(FLOOR <= timing_.tolerance <= CEILING for timing_ in timed.values())
        failed += failures(timed, arms, CHECKS // 10)
    assert failed <= CHECKS // 1000


@pytest.mark.parametrize(("slower", "jitter"), [(1.25, 0.03), (1.5, 0.06)])
def test_a_slow_down_is_noticed(machine, slower: float, jitter: float) -> None:
    """99 of a hundred, by a quarter on a quiet machine and by a half on a busy one, whose tolerances are wider."""
    noticed = 0
    for seed in range(10):
        made = machine(seed, jitter)
        timed = gate.measure_times(made.arms(), ROUNDS, regress.REPEATS)
        noticed += failures(timed, made.arms(slower), CHECKS // 50)
    assert noticed >= 0.99 * CHECKS / 5
