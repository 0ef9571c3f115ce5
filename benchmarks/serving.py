"""A server under load: `python benchmarks/serving.py` measures slots, dense and pruned, beside `generate()` in a loop and in
batches, over loopback, on one model and in one run; `--tables` prints what was measured, `--tiny` shows that all of it runs.

Written to benchmarks/results/serving.json after every step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.console import Console
from serving_load import NEW, TEXT_ONLY, Answered, Load, poisson, summed

from vitcop_compile import bench
from vitcop_compile.bench import Shape
from vitcop_compile.bench.cases import DENSE
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines, without_future_warnings
from vitcop_compile.errors import UnsupportedError

RESULTS = Path(__file__).parent / "results" / "serving.json"
FULL = Shape(layers=4, vision_layers=3)
TINY = Shape(hidden=64, layers=4, vision_hidden=64, vision_layers=3, vocab=300, image_size=112, name="tiny")
PRESET = "1/9"
ARMS = tuple(f"{name} {label}" for name in ("slots", "loop", "batch") for label in (DENSE, PRESET))
SLOTS, QUEUED = 8, 64
CLIENTS = (1, 2, 4, 8)
# Rates are told apart down to this.
_CLOSE = 1.1
COLUMNS = ("what", "arm", "rate", "per_s", "tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms",
           "requests", "whole", "refused", "broken")  # fmt: skip
Row = dict[str, Any]


class Search:
    """The largest rate that passes, by probes: twice as fast until one fails, or half until one passes, then between."""

    def __init__(self, first: float):
        self.rate, self.passed, self.failed = first, 0.0, float("inf")

    def note(self, passed: bool) -> None:
        """What became of the probe at `rate`, which then is that of the next."""
        if passed:
            self.passed = max(self.passed, self.rate)
        else:
            self.failed = min(self.failed, self.rate)
        if not self.passed:
            self.rate = self.failed / 2
        elif self.failed == float("inf"):
            self.rate = self.passed * 2
        else:
            self.rate = (self.passed * self.failed) ** 0.5

    @property
    def over(self) -> bool:
        """Whether it is known closely enough."""
        return self.failed / _CLOSE <= self.passed


def _warm(shape: Shape, label: str, backend: str) -> None:
    """A process of its own: compiles the programs of a setting, which are kept for the server's."""
    import serving_arms

    with without_future_warnings():
        serving_arms.warmed(shape.model(), label, backend, SLOTS)


def _serve(shape: Shape, backend: str, ready: Connection) -> None:
    """The server's process."""
    import serving_arms

    from vitcop_compile.serve.server import Server, bound, url_of

    with without_future_warnings():
        door, slots = serving_arms.door(shape, (PRESET,), backend, SLOTS, QUEUED)
        held = bound("127.0.0.1", 0)
        costs = serving_arms.work(slots, 1 - TEXT_ONLY)
        for label, own in slots.items():
            costs[label] |= {"slots_per_gib": 2**30 * SLOTS / own.bytes()}
            # What the programs alone would serve: each request its prefill, and its rows of decode steps that are full.
            costs[label]["per_s"] = 1e3 / (costs[label]["prefill_ms"] + (mean(NEW) - 1) * costs[label]["step_ms"] / SLOTS)
        Server(door, 0.0, ready=lambda: ready.send((url_of(held), costs))).run(sockets=[held])


class Run:
    """One run against a server: rows as they come."""

    def __init__(self, load: Load, seconds: float, say: Callable[[str], None], save: Callable[[list[Row]], None]):
        self._load, self._seconds, self._say, self._save = load, seconds, say, save
        self.rows: list[Row] = []

    async def closed(self, arm: str, clients: int, each: int, what: str) -> Row:
        """So many clients that wait for their answers."""
        self._say(f"{arm}: {clients} clients")
        found, took = await self._load.closed_loop(arm, clients, each, seed=clients)
        return self._note(what, arm, found, took, clients)

    async def open(self, arm: str, rate: float, what: str, seed: int) -> Row:
        """Requests that come by chance, until all are answered."""
        self._say(f"{arm}: {rate:.2f} requests a second")
        found = await self._load.open_loop(arm, poisson(rate, self._seconds, seed))
        # What was let in is answered after the last has come, too.
        ends = [one.last for one in found if one.last is not None]
        took = max(self._seconds, max(ends) - min(one.sent for one in found)) if ends else self._seconds
        return self._note(what, arm, found, took, rate)

    async def sustained(self, arms: list[str], first: dict[str, float], ttft: float, tpot: float) -> dict[str, float]:
        """The rate of each arm at which p99 of TTFT and TPOT, in ms, stay below those, and nothing is refused; in turns."""
        searches = {arm: Search(first[arm]) for arm in arms}
        for turn in range(12):
            for arm, search in searches.items():
                if search.over:
                    continue
                row = await self.open(arm, search.rate, "probe", seed=turn)
                in_time = row["ttft_p99_ms"] <= ttft and row["tpot_p99_ms"] <= tpot
                search.note(in_time and row["whole"] == row["requests"])
        return {arm: search.passed for arm, search in searches.items()}

    async def beside_a_slow_reader(self, arm: str, each: int) -> tuple[Row, Row]:
        """TPOT of three clients alone, and beside one that reads twice a second."""
        alone = await self.closed(arm, 3, each, "alone")
        item = poisson(100.0, 1.0, seed=0)[0]
        body = self._load.body(arm, dataclasses.replace(item, new=64))
        slow = asyncio.ensure_future(self._load.ask(body, 0.0, pause=0.5))
        beside = await self.closed(arm, 3, each, "beside a slow reader")
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        return alone, beside

    def _note(self, what: str, arm: str, found: list[Answered], took: float, rate: float) -> Row:
        row = {"what": what, "arm": arm, "rate": rate} | summed(found, took)
        self.rows.append(row)
        self._save(self.rows)
        return row


async def measure(run: Run, arms: list[str], each: int) -> dict[str, Any]:
    """Everything, in order. each: requests of a client. Returns what the rows do not say themselves."""
    for arm in arms:
        await run.closed(arm, CLIENTS[-1], 2, "warm-up")
    alone = {arm: await run.closed(arm, 1, 3 * each, "unloaded") for arm in arms}
    dense = alone[f"slots {DENSE}"]
    limits = {"ttft": 2 * dense["ttft_p50_ms"], "tpot": 4 * dense["tpot_p50_ms"]}
    for clients in CLIENTS:
        for arm in arms:
            await run.closed(arm, clients, each, "clients")
    rates = await run.sustained(arms, {arm: alone[arm]["per_s"] for arm in arms}, limits["ttft"], limits["tpot"])
    pruned = f"slots {PRESET}"
    peak = await run.open(pruned, max(rates[pruned], 0.1), "peak", seed=99)
    flood = await run.open(pruned, 10 * max(rates[pruned], 0.1), "10x overload", seed=99)
    before, beside = await run.beside_a_slow_reader(pruned, each)
    return {
        "limits_ms": limits,
        "sustained_per_s": rates,
        "goodput_at_10x": flood["per_s"] / peak["per_s"] if peak["per_s"] else None,
        "tpot_beside_a_slow_reader": beside["tpot_p50_ms"] / before["tpot_p50_ms"],
    }


def main(
    tables: Annotated[bool, typer.Option("--tables", help="Measure nothing, print what the JSON file holds.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy model, uncompiled, and a second per rate.")] = False,
    seconds: Annotated[float, typer.Option(help="Of a rate.")] = 40.0,
    backend: Annotated[str, typer.Option(help="Of the programs.")] = "inductor",
    output: Annotated[Path, typer.Option(help="Where the JSON file is.")] = RESULTS,
) -> None:
    """Measure a server under load, or print what was measured."""
    with errors_as_lines(), without_future_warnings():
        if tables:
            found = bench.read(output, COLUMNS)
            rows = [row for row in found["rows"] if row["what"] not in ("warm-up", "probe")]
            print(bench.markdown(found | {"rows": rows}, COLUMNS))
            print(found["environment"]["found"])
            return
        bench.check_target(output)
        shape, each = (TINY, 2) if tiny else (FULL, 6)
        seconds, backend = (1.0, "eager") if tiny else (seconds, backend)
        conditions = {
            "device": "cpu",
            "dtype": "float32",
            "rounds": 1,
            "memory": False,
            "seconds": seconds,
            "backend": backend,
        }
        conditions |= {"slots": SLOTS, "queued": QUEUED, "command": "python benchmarks/serving.py", "found": None}
        environment, console = bench.environment() | conditions, Console(stderr=True)

        def save(rows: list[Row]) -> None:
            bench.write({"environment": environment, "rows": rows}, output)

        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        server = context.Process(target=_serve, args=(shape, backend, there), daemon=True)
        try:
            with console.status("compiling some hundred programs, or finding them") as status:
                warming = [context.Process(target=_warm, args=(shape, label, backend)) for label in (DENSE, PRESET)]
                for each_setting in warming:
                    each_setting.start()
                for each_setting in warming:
                    each_setting.join()
                server.start()
                while not here.poll(1.0):
                    if not server.is_alive():
                        raise UnsupportedError(f"the server's process ended with {server.exitcode}: what it said is above")
                url, costs = here.recv()

                async def measured() -> tuple[list[Row], dict[str, Any]]:
                    load = Load(url, shape.image_size)
                    run = Run(load, seconds, status.update, save)
                    try:
                        return run.rows, await measure(run, list(ARMS), each)
                    finally:
                        await load.close()

                rows, found = asyncio.run(measured())
        finally:
            if server.is_alive():
                server.terminate()
                server.join()
        found["programs"] = costs
        found["ideal"] = costs[PRESET]["per_s"] / costs[DENSE]["per_s"]
        environment["found"] = found
        save(rows)
        shown = [row for row in rows if row["what"] not in ("warm-up", "probe")]
        Console(width=WIDE_TABLE_WIDTH).print(bench.table({"environment": environment, "rows": shown}, COLUMNS))
        console.print(found)


if __name__ == "__main__":
    typer.run(main)
