"""What Ray costs beside one process: `python benchmarks/serving_ray.py` asks two servers of one toy folder in turns, `serve`
and `serve --ray` with one replica. A model takes next to nothing there, so that the difference is the way between.

Written to benchmarks/results/serving_ray.json; `--tables` prints what was measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from serving_folder import SHAPE, serving, written
from serving_load import Load, summed

from vitcop_compile import bench
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines, without_future_warnings
from vitcop_compile.errors import UnsupportedError

RESULTS = Path(__file__).parent / "results" / "serving_ray.json"
SLOTS = 8
COLUMNS = ("server", "clients", "per_s", "tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms")


async def measured(urls: dict[str, str], rounds: int, say: Any) -> list[dict[str, Any]]:
    """Medians over rounds in which the servers take turns."""
    loads = {name: Load(url, SHAPE.image_size) for name, url in urls.items()}
    rows = []
    for clients in (1, 4, 8):
        found: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
        for turn in range(-1, rounds):
            for name, load in loads.items():
                say(f"{name}, {clients} clients")
                answered, took = await load.closed_loop("tiny", clients, 20, seed=turn)
                if turn >= 0:
                    found[name].append(summed(answered, took))
        for name, each in found.items():
            if broken := sum(one["requests"] - one["whole"] for one in each):
                raise UnsupportedError(f"{broken:.0f} requests of {name} were not answered whole: see its log above")
            rows.append({"server": name, "clients": clients} | {key: median(one[key] for one in each) for key in each[0]})
    for load in loads.values():
        await load.close()
    return rows


def main(
    tables: Annotated[bool, typer.Option("--tables", help="Measure nothing, print what the JSON file holds.")] = False,
    rounds: Annotated[int, typer.Option(help="Turns of each server.")] = 5,
    output: Annotated[Path, typer.Option(help="Where the JSON file is.")] = RESULTS,
) -> None:
    """Ask a server and Ray's in turns, or print what was measured."""
    with errors_as_lines(), without_future_warnings():
        if tables:
            print(bench.markdown(bench.read(output, COLUMNS), COLUMNS))
            return
        bench.check_target(output)
        if importlib.util.find_spec("ray") is None:
            raise UnsupportedError("Ray is not installed: pip install 'vitcop-compile[ray]'")
        console = Console(stderr=True)
        with contextlib.ExitStack() as stack, console.status("exporting a toy model") as status:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            token = temporary / "token"
            token.touch(0o600)
            token.write_text(secrets.token_hex(32))
            os.environ |= {"RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
            folder = written(temporary / "tiny", SLOTS)
            status.update("starting the servers")
            options = {"serve": (), "serve --ray": ("--ray", "--cpus", "1")}
            urls = {name: stack.enter_context(serving(folder, *more))[0] for name, more in options.items()}
            rows = asyncio.run(measured(urls, rounds, status.update))
        conditions = {"device": "cpu", "dtype": "float32", "rounds": rounds, "memory": False, "slots": SLOTS}
        results = {
            "environment": bench.environment() | conditions | {"command": "python benchmarks/serving_ray.py"},
            "rows": rows,
        }
        bench.write(results, output)
        Console(width=WIDE_TABLE_WIDTH).print(bench.table(results, COLUMNS))


if __name__ == "__main__":
    typer.run(main)
