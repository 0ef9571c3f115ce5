"""An hour of requests in five minutes: `python benchmarks/serving_soak.py` asks a server of a toy folder without a pause, well
and badly, and reads its memory, files and threads every few seconds.

Clients draw at random: prompts with and without a picture, answers that are read to their end, clients that vanish in the
middle, bodies that are no JSON, pictures that are cut off, prompts beyond the programs, models that are not served. A picture
is one of 64, so that the cache of features fills at once. Written to benchmarks/results/serving_soak.json.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from serving_folder import SHAPE, serving, written
from serving_load import Item, Load, poisson

from vitcop_compile import bench
from vitcop_compile.cli.shared import errors_as_lines, without_future_warnings

RESULTS = Path(__file__).parent / "results" / "serving_soak.json"
PICTURES, SLOTS, EVERY = 64, 8, 5.0
# What clients do, how often, and the status that answers it.
KINDS = {
    "answered": (0.80, 200), "vanished": (0.10, 200), "no JSON": (0.025, 400), "cut picture": (0.025, 400),
    "too long": (0.025, 400), "unknown model": (0.025, 404),
}  # fmt: skip


class Client:
    """Asks at random until the end, and counts what it was told. wrong: what should not have been."""

    def __init__(self, load: Load, model: str, seed: int):
        self._load, self._model, self._draw = load, model, random.Random(seed)
        self.told: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    async def run(self, http: httpx.AsyncClient, end: float) -> None:
        names, weights = list(KINDS), [often for often, _ in KINDS.values()]
        while time.monotonic() < end:
            kind = self._draw.choices(names, weights)[0]
            status = await self._one(http, kind)
            self.told[kind] += 1
            if status != KINDS[kind][1]:
                self.wrong.append(f"{kind}: {status}")

    async def _one(self, http: httpx.AsyncClient, kind: str) -> int:
        item = self._item()
        if kind == "answered":
            found = await self._load.ask(self._load.body(self._model, item), time.perf_counter())
            return found.status if found.whole and found.tokens == item.new else 0
        body = self._load.body("another" if kind == "unknown model" else self._model, item)
        if kind == "vanished":
            async with http.stream("POST", "/v1/chat/completions", content=body) as answer:
                async for _ in answer.aiter_lines():
                    return answer.status_code
        if kind == "no JSON":
            body = body[: len(body) // 2]
        if kind == "cut picture":
            body = self._load.body(self._model, dataclasses.replace(item, picture=0))
            start = body.index(b"base64,") + 7
            body = body[: start + 64] + body[body.index(b'"', start) :]
        if kind == "too long":
            body = self._load.body(self._model, dataclasses.replace(item, text=500))
        return (await http.post("/v1/chat/completions", content=body)).status_code

    def _item(self) -> Item:
        item = poisson(100.0, 1.0, self._draw.randrange(10**6))[0]
        return item if item.picture is None else dataclasses.replace(item, picture=self._draw.randrange(PICTURES))


def state(pid: int, http: httpx.Client) -> dict[str, float]:
    """Of the server, now: MiB of resident memory, open files, threads, slots in use and prompts that wait."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    counts = {}
    for line in http.get("/metrics").text.splitlines():
        for name in ("occupied", "queued"):
            if line.startswith("vitcop_") and name in line.split("{")[0] and "seconds" not in line:
                counts[name] = float(line.rsplit(" ", 1)[1])
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return {"mib": int(lines["VmRSS"].split()[0]) / 1024, "files": files, "threads": int(lines["Threads"])} | counts


async def soak(url: str, pid: int, model: str, seconds: float, clients: int, say: Any) -> dict[str, Any]:
    """Clients for so long. Returns samples of `state`, the last of them when all have gone, and what clients were told."""
    load, begun = Load(url, SHAPE.image_size), time.monotonic()
    asking = [Client(load, model, seed) for seed in range(clients)]
    samples: list[dict[str, float]] = []
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as reader:

        async def sample() -> None:
            now = {"s": time.monotonic() - begun} | await asyncio.to_thread(state, pid, reader)
            samples.append(now)
            say(f"{now['s']:.0f} s: {sum(sum(one.told.values()) for one in asking)} requests, {now['mib']:.0f} MiB")

        async def watch() -> None:
            while True:
                await sample()
                await asyncio.sleep(EVERY)

        async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
            watching = asyncio.ensure_future(watch())
            await asyncio.gather(*(one.run(http, begun + seconds) for one in asking))
            watching.cancel()
        await load.close()
        await asyncio.sleep(2)
        await sample()
    told = sum((one.told for one in asking), collections.Counter())
    return {"samples": samples, "told": dict(told), "wrong": [text for one in asking for text in one.wrong]}


def main(
    seconds: Annotated[float, typer.Option(help="How long.")] = 300.0,
    clients: Annotated[int, typer.Option(help="That ask at the same time.")] = 12,
    output: Annotated[Path, typer.Option(help="Where the JSON file goes.")] = RESULTS,
) -> None:
    """Ask a server well and badly, and read its memory."""
    with errors_as_lines(), without_future_warnings(), tempfile.TemporaryDirectory() as temporary:
        bench.check_target(output)
        console = Console(stderr=True)
        with console.status("exporting a toy model") as status:
            folder = written(Path(temporary) / "tiny", SLOTS)
            status.update("starting the server")
            with serving(folder) as (url, pid):
                found = asyncio.run(soak(url, pid, "tiny", seconds, clients, status.update))
        samples = found["samples"]
        fifth, last = samples[len(samples) // 5], samples[-1]
        summary = {
            "requests": sum(found["told"].values()),
            "requests_per_s": sum(found["told"].values()) / seconds,
            "wrong": len(found["wrong"]),
            "mib_after_a_fifth": fifth["mib"],
            "mib_at_the_end": last["mib"],
            "files": (samples[0]["files"], max(one["files"] for one in samples), last["files"]),
            "occupied_at_the_end": last.get("occupied"),
        }
        environment = bench.environment() | {"command": "python benchmarks/serving_soak.py", "found": summary}
        bench.write({"environment": environment, "rows": samples, "told": found["told"], "wrong": found["wrong"]}, output)
        console.print_json(json.dumps(summary | {"told": found["told"]}))


if __name__ == "__main__":
    typer.run(main)
