"""How many decode steps between two prefills: `python benchmarks/serving_every.py` plays requests that come by chance to the
scheduler itself, on a clock that programs move by the times that benchmarks/serving.py measured of them; `--tables` prints
what was found.

Thousands of requests take seconds so, and nothing of the machine disturbs them; what HTTP, Python and a client cost is not in
it. By the same times it says which rates slots and a loop sustain, of which 25 seconds of a server hold but a few requests.
Written to benchmarks/results/serving_every.json.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from serving import Search
from serving_load import Answered, Item, poisson, summed
from torch import Tensor

from vitcop_compile import bench
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines
from vitcop_compile.errors import InputError
from vitcop_compile.serve.requests import Event, Sampling, Token
from vitcop_compile.serve.scheduler import SlotScheduler

FOLDER = Path(__file__).parent / "results"
EVERY = (1, 2, 4, 8, 16)
# Of the rate at which the programs are busy without a pause.
LOADS = (0.5, 0.7, 0.85, 0.95)
SLOTS = 8
BATCHES = (1, 2, 4)
COLUMNS = ("arm", "every", "load", "rate", "per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "requests")
_END, _WORDS, _PROMPT = 0, 2, torch.ones(1, 1, dtype=torch.int64)


class Costs(NamedTuple):
    """Seconds that programs take: of a prefill, for every request in it, and of a decode step of all slots."""

    prefill: float
    step: float


class Asked(NamedTuple):
    """A request as `Timed` knows it."""

    key: str
    text_tokens: int = 1
    image_tokens: int = 0
    ids: Tensor = _PROMPT


class Timed:
    """Programs that a scheduler drives, which move `now`, in seconds, and say nothing."""

    count, batches, ends, device = SLOTS, BATCHES, (_END,), torch.device("cpu")

    def __init__(self, costs: Costs):
        self._costs, self.now = costs, 0.0

    def examine(self, inputs: Mapping[str, Any], sampling: Sampling) -> Asked:
        """A request by the key of its programs."""
        return Asked(inputs["key"])

    def prefill(self, requests: Sequence[Asked], places: Sequence[Sequence[int]]) -> Tensor:
        """Logits of first tokens."""
        self.now += self._costs.prefill * len(requests)
        return self._said(len(requests))

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Logits of next ones."""
        self.now += self._costs.step
        return self._said(self.count)

    def free(self, slots: Sequence[int]) -> None:
        """Nothing: slots hold nothing."""

    def clear(self) -> None:
        """As `free`."""

    def counts(self) -> dict[str, float]:
        """None beside the scheduler's own."""
        return {}

    def _said(self, rows: int) -> Tensor:
        logits = torch.zeros(rows, _WORDS)
        logits[:, _WORDS - 1] = 1  # never the end
        return logits


def played(items: Sequence[Item], costs: Costs, every: int) -> tuple[list[Answered], float]:
    """What became of requests that leave when they are meant to, and seconds until the last was answered."""
    programs = Timed(costs)
    scheduler = SlotScheduler(programs, most_queued=len(items) + 1, every=every, clock=lambda: programs.now, threaded=False)
    told: list[list[float]] = [[] for _ in items]

    def listener(number: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if isinstance(event, Token):
                told[number].append(programs.now)

        return listen

    sent = 0
    while True:
        while sent < len(items) and items[sent].at <= programs.now:
            key = f"{items[sent].text} {items[sent].picture is None}"
            scheduler.submit({"key": key}, Sampling(max_new_tokens=items[sent].new), listener(sent))
            sent += 1
        wait = scheduler.step()
        coming = items[sent].at if sent < len(items) else math.inf
        if wait is None:
            if coming == math.inf:
                break
            programs.now = max(programs.now, coming)
        elif wait:
            # A wait may be shorter than what a float of seconds can tell.
            programs.now = max(math.nextafter(programs.now, math.inf), min(programs.now + wait, coming))
    found = [
        Answered(200, len(times) == item.new, item.at, times[0], times[-1], len(times))
        for item, times in zip(items, told, strict=True)
    ]
    return found, programs.now


def looped(items: Sequence[Item], costs: Costs) -> tuple[list[Answered], float]:
    """As `played`, of a loop around `generate()`: one request after the other, a step of one answer taking what that of all
    slots does."""
    now, found = 0.0, []
    for item in items:
        first = max(now, item.at) + costs.prefill
        now = first + (item.new - 1) * costs.step
        found.append(Answered(200, True, item.at, first, now, item.new))
    return found, now


def sustained(
    play: Callable[[Sequence[Item]], tuple[list[Answered], float]], requests: int, limits: Mapping[str, float]
) -> float:
    """The rate at which p99 of TTFT and TPOT stay within `limits`, in ms, of so many requests."""
    search = Search(0.5)
    for _ in range(12):
        if search.over:
            break
        said = summed(*play(poisson(search.rate, requests / search.rate, seed=1)))
        search.note(all(said[f"{name}_p99_ms"] <= most for name, most in limits.items()))
    return search.passed


def measured(path: Path) -> tuple[dict[str, tuple[Costs, float]], dict[str, float]]:
    """Of serving.json: by arm, what its programs take, and the requests a second that they alone would serve; and its limits
    of p99, in ms. Raises InputError for a file that does not say."""
    try:
        found = bench.read(path, ())["environment"]["found"]
        programs = {
            name: (Costs(1e-3 * each["prefill_ms"], 1e-3 * each["step_ms"]), float(each["per_s"]))
            for name, each in found["programs"].items()
        }
        return programs, {name: float(found["limits_ms"][name]) for name in ("ttft", "tpot")}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} does not say what programs take ({error!r}): run benchmarks/serving.py first") from None


def rows(
    found: Mapping[str, tuple[Costs, float]], requests: int, say: Callable[[list[Any]], Any] = list
) -> list[dict[str, Any]]:
    """A row for every arm, load and number of steps; all numbers of steps of an arm and load get the same requests."""
    asked = [(arm, load, every) for arm in found for load in LOADS for every in EVERY]
    rows = []
    for arm, load, every in say(asked):
        costs, most = found[arm]
        rate = load * most
        items = poisson(rate, requests / rate, seed=0)
        answers, took = played(items, costs, every)
        said = summed(answers, took)
        row = {"arm": arm, "every": every, "load": load, "rate": rate, "requests": len(items), "whole": said["whole"]}
        names = [name for name in COLUMNS if name.startswith(("ttft", "tpot", "per_s"))]
        rows.append(row | {name: said[name] for name in names})
    return rows


def rates(
    found: Mapping[str, tuple[Costs, float]], requests: int, limits: Mapping[str, float], every: int = 4
) -> dict[str, float]:
    """`sustained` of slots and of a loop, by arm."""
    sustains = {}
    for arm, (costs, _) in found.items():
        sustains[f"slots {arm}"] = sustained(lambda items, costs=costs: played(items, costs, every), requests, limits)
        sustains[f"loop {arm}"] = sustained(lambda items, costs=costs: looped(items, costs), requests, limits)
    return sustains


def told(rates: Mapping[str, float]) -> str:
    """What is sustained, a line an arm."""
    return "\n".join(f"{name}: {rate:.2f} requests a second are sustained" for name, rate in rates.items())


def main(
    requests: Annotated[int, typer.Option(min=10, help="Of every row, about.")] = 1000,
    results: Annotated[Path, typer.Option(help="The folder of serving.json, and of what is written.")] = FOLDER,
    tables: Annotated[bool, typer.Option("--tables", help="Measure nothing, print what was found.")] = False,
) -> None:
    """Play requests to the scheduler by the times of its programs."""
    target = results / "serving_every.json"
    with errors_as_lines():
        if tables:
            kept = bench.read(target, COLUMNS)
            print(bench.markdown(kept, COLUMNS) + "\n" + told(kept["environment"]["sustained_per_s"]))
            return
        bench.check_target(target)
        found, limits = measured(results / "serving.json")
        conditions = bench.environment() | {"device": "none: a clock that is set", "dtype": "-", "rounds": 1, "memory": False}
        programs = {name: costs._asdict() for name, (costs, _) in found.items()}
        conditions |= {"slots": SLOTS, "programs_s": programs, "command": "python benchmarks/serving_every.py"}
        console = Console(stderr=True)
        made = rows(found, requests, lambda asked: track(asked, "playing", console=console, transient=True))
        conditions["sustained_per_s"] = rates(found, requests, limits)
        bench.write({"environment": conditions, "rows": made}, target)
        Console(width=WIDE_TABLE_WIDTH).print(bench.table({"environment": conditions, "rows": made}, COLUMNS))
        print(told(conditions["sustained_per_s"]))


if __name__ == "__main__":
    typer.run(main)
