"""Progress of long work: what runs now, what is done and how long it took, and what is left by an estimate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text


class Steps:
    """Steps in order: a spinner with the seconds while one runs, a line with its time when it is done.

    expected: the weight of all steps together, in any unit that grows with their time; 0 if nobody knows. With it, every line
    says what is left: the time so far, continued at the weights that are still to come.
    """

    def __init__(self, console: Console, expected: float = 0.0):
        self._console = console
        self._expected, self._done_weight, self._begun = expected, 0.0, time.perf_counter()

    @contextmanager
    def step(self, text: str, detail: Callable[[], str] = lambda: "", weight: float = 0.0) -> Iterator[None]:
        """Runs a step named `text`; `detail` is asked again and again for what it is at."""
        start = time.perf_counter()
        with self._console.status(_Running(text, detail, start)):
            yield
        self._done(text, start, weight)

    @contextmanager
    def bar(self, text: str, total: int, weight: float = 0.0) -> Iterator[Callable[[], None]]:
        """A step in `total` parts; call what it gives after each. It draws only then: a spinner would disturb timings."""
        start = time.perf_counter()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = self._console.is_terminal
        with Progress(*columns, console=self._console, auto_refresh=False, transient=True, disable=not shown) as progress:
            task = progress.add_task(text, total=total)
            yield lambda: progress.update(task, advance=1, refresh=True)
        self._done(text, start, weight)

    def _done(self, text: str, start: float, weight: float) -> None:
        now = time.perf_counter()
        self._done_weight += weight
        left = ""
        if weight and self._expected > self._done_weight:
            seconds = (now - self._begun) * (self._expected - self._done_weight) / self._done_weight
            left = f"  (about {duration(seconds)} left)"
        self._console.print(Text.assemble(("  done ", "green"), f"{text}  {now - start:.1f} s", (left, "dim")), soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "3 min"."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} min"


@dataclass
class _Running:
    text: str
    detail: Callable[[], str]
    start: float

    def __rich__(self) -> Text:
        return Text.assemble(self.text, " ", (self.detail(), "cyan"), f"  {time.perf_counter() - self.start:.0f} s")
