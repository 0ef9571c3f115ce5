"""What long work says of itself, on a clock that only the steps move."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from vitcop_compile import progress


class Clock:
    seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_every_step_is_a_line_with_its_time_and_what_is_left(clock) -> None:
    console = Console(file=io.StringIO(), width=100)
    steps = progress.Steps(console, expected=10)
    with steps.step("building"):
        clock.seconds += 1
    with steps.step("compiling", lambda: "[vision]", weight=4):
        clock.seconds += 39
    with steps.bar("timing", 3, weight=4) as advance:
        for _ in range(3):
            clock.seconds += 100
            advance()
    with steps.step("drawing", weight=2):
        clock.seconds += 0.5
    assert lines(console) == [
        "  done building  1.0 s",
        "  done compiling  39.0 s  (about 60 s left)",  # 40 s for 4 of 10
        "  done timing  300.0 s  (about 85 s left)",  # 340 s for 8 of 10
        "  done drawing  0.5 s",
    ]


def test_without_an_expectation_nothing_is_estimated(clock) -> None:
    console = Console(file=io.StringIO(), width=100)
    with progress.Steps(console).step("compiling", weight=1):
        clock.seconds += 2
    assert lines(console) == ["  done compiling  2.0 s"]


def test_a_step_that_fails_is_not_done(clock) -> None:
    console = Console(file=io.StringIO(), width=100)
    with pytest.raises(KeyError), progress.Steps(console).step("compiling"):
        raise KeyError
    assert lines(console) == []


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (89.4, "89 s"), (90, "2 min"), (601, "10 min")])
def test_durations_as_people_say_them(seconds, words) -> None:
    assert progress.duration(seconds) == words
