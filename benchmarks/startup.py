"""Start-up cost: `python benchmarks/startup.py [--output FILE]` runs two fresh processes on one empty compile cache.

The first compiles every program, the second finds them in torch's caches. A third one optimizes LLaVA-1.5-7B's shape on the
meta device, where there are no weights. With `--kept` two processes share an empty folder of kept programs
(`vitcop_compile.store`) in their place, and do what a user's do: optimize, and answer with a token. Seconds are wall-clock but
for "optimize, CPU". Compiled C++ headers are shared with whatever ran before: torch keeps them outside of the cache folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

from vitcop_compile import ViTCoPConfig, bench, optimize
from vitcop_compile.backends import backend_of
from vitcop_compile.bench.bind import Served, compiled_by, with_programs
from vitcop_compile.bench.cases import MODELS, Shape
from vitcop_compile.bench.report import printed
from vitcop_compile.cli.shared import errors_as_lines

LLAVA_7B = Shape(hidden=4096, layers=32, mlp=11008, head=128, vocab=32064, vision_layers=24, dtype="bfloat16")
# Counters of torch.compile's two caches, and what of them is reported.
CACHES = {"fxgraph": ("inductor", "fxgraph_cache_"), "autograd": ("aot_autograd", "autograd_cache_")}
EVENTS = ("hit", "miss", "bypass")
_STEPS = {"rewrite + export": "export_s", "compile": "compile_s", "first call": "first_call_s"}
# The fresh process times the imports that every user of the package makes before this file makes any.
_PROCESS = """import json, sys, time
start = time.perf_counter()
import torch, vitcop_compile
imported = time.perf_counter() - start
import startup
asked = json.loads(sys.argv[1])
print(json.dumps({"import_s": imported} | getattr(startup, asked.pop("what"))(**asked)))"""


def process(cache: str, what: str = "steps", **asked: Any) -> dict[str, Any]:
    """What `steps`, or another function, reports of `asked` in a fresh process, with its caches in the folder `cache`."""
    folders = os.pathsep.join((str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "PYTHONPATH": folders.rstrip(os.pathsep)}
    environment["VITCOP_CACHE"] = os.path.join(cache, "vitcop_compile") if what == "served" else "off"
    command = [sys.executable, "-c", _PROCESS, json.dumps(asked | {"what": what})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measured process ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def steps(shape: dict[str, Any], meta: bool, backend: str, preset: str, text_tokens: int) -> dict[str, Any]:
    """Seconds of every step of a first request, on a model of `shape`; meta: built on the meta device, and only exported."""
    with torch.device("meta" if meta else "cpu"):
        model = MODELS["llava"](Shape(**shape), 0)
    processor = time.process_time()
    captured, fast = timed(lambda: optimize(model, ViTCoPConfig.preset(preset), backend=backend))
    result = {"optimize_s": captured, "optimize_cpu_s": time.process_time() - processor, "programs": []}
    row: dict[str, Any] = {}

    def compiled(program: Any) -> Callable[..., Any]:
        row["nodes"] = len(program.graph.nodes)
        if meta:
            return program.module(check_guards=False)
        counters.clear()
        row["compile_s"], call = timed(lambda: backend_of(backend)(program))
        return call

    def made(name: str, make: Callable[[], Any]) -> Callable[..., Any]:
        row.clear()
        took, program = timed(make)
        row.update(program=name, export_s=took - row.get("compile_s", 0.0))

        def first(*given: Any) -> Any:
            seconds, found = timed(lambda: program(*given))
            if not meta:
                row["first_call_s"] = seconds
                for cache, (group, prefix) in CACHES.items():
                    row.update({f"{cache}_{event}": counters[group][prefix + event] for event in EVENTS})
            result["programs"].append(dict(row))
            return found

        return first

    Served(fast, bench.Request(1, text_tokens)).decode(with_programs(compiled_by(fast, compiled), made))
    return result


def served(shape: dict[str, Any], backend: str, preset: str, text_tokens: int) -> dict[str, Any]:
    """Seconds to the first token of a user's process, and how often it exported."""
    built, model = timed(lambda: MODELS["llava"](Shape(**shape), 0))
    exports, plain = [0], torch.export.export

    def export(*given: Any, **named: Any) -> Any:
        exports[0] += 1
        return plain(*given, **named)

    torch.export.export = export
    captured, fast = timed(lambda: optimize(model, ViTCoPConfig.preset(preset), backend=backend))
    request = Served(fast, bench.Request(1, text_tokens))
    first, _ = timed(lambda: request.forward(fast))
    again, _ = timed(lambda: request.forward(fast))
    return {"build_s": built, "optimize_s": captured, "first_token_s": first, "again_s": again, "exports": exports[0]}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `call` takes, and what it returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(
    shape: Shape, backend: str, preset: str, console: Console, text_tokens: int = 64, planned: bool = True
) -> list[dict[str, Any]]:
    """A row per process, by "process": "first", "second" and, where `planned`, "7B on meta"."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="vitcop-") as cache:
        for name in ("first", "second", "7B on meta")[: 3 if planned else 2]:
            meta = name == "7B on meta"
            asked = dataclasses.asdict(LLAVA_7B if meta else shape)
            with console.status(f"{name} process"):
                found = process(cache, shape=asked, meta=meta, backend=backend, preset=preset, text_tokens=text_tokens)
            rows.append({"process": name} | found)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Seconds of every step, and what both caches counted together, a line per program."""
    lines = []
    for row in rows:
        head = [row["process"], *(f"{row[name]:.1f}" for name in ("import_s", "optimize_s", "optimize_cpu_s"))]
        for program in row["programs"]:
            seconds = [f"{program[name]:.1f}" if name in program else "-" for name in _STEPS.values()]
            lines.append([*head, program["program"], *seconds, _sum(program, "_hit"), _sum(program, "_miss", "_bypass")])
            head = [""] * len(head)
    names = ("process", "import", "optimize", "optimize, CPU", "program", *_STEPS, "hits", "misses, bypasses")
    return printed(names, lines, "start-up, seconds")


def measure_kept(shape: Shape, backend: str, preset: str, console: Console, text_tokens: int = 64) -> list[dict[str, Any]]:
    """A row for each of two processes that share a folder of kept programs, empty at first."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="vitcop-") as cache:
        for name in ("first", "second"):
            asked = {"shape": dataclasses.asdict(shape), "backend": backend, "preset": preset, "text_tokens": text_tokens}
            with console.status(f"{name} process"):
                rows.append({"process": name} | process(cache, "served", **asked))
    return rows


def kept_table(rows: list[dict[str, Any]]) -> Table:
    """Seconds up to the first token, a line per process. The model's weights are made up in "build", not loaded."""
    steps = ("import_s", "build_s", "optimize_s", "first_token_s", "again_s")
    lines = []
    for row in rows:
        total = sum(row[name] for name in ("import_s", "optimize_s", "first_token_s"))
        lines.append([row["process"], *(f"{row[name]:.1f}" for name in steps), f"{total:.1f}", str(row["exports"])])
    names = ("process", "import", "build", "optimize", "first token", "next", "import + optimize + first token", "exports")
    return printed(names, lines, "start-up with kept programs, seconds")


def _sum(program: dict[str, Any], *endings: str) -> str:
    found = [value for name, value in program.items() if name.endswith(endings)]
    return str(sum(found)) if found else "-"


def main(
    backend: Annotated[str, typer.Option(help="What the programs compile with.")] = "inductor",
    preset: Annotated[str, typer.Option(help="A published setting.")] = "1/9",
    kept: Annotated[bool, typer.Option("--kept", help="Two processes with kept programs alone.")] = False,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = Shape.layers,
    hidden: Annotated[int, typer.Option(help="Width of the decoder.")] = Shape.hidden,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = Shape.dtype,
    output: Annotated[Path | None, typer.Option(help="Where to write the JSON.")] = None,
) -> None:
    """Measure the start-up of two processes with one compile cache, and of planning a 7B model."""
    with errors_as_lines():
        backend_of(backend)
        ViTCoPConfig.preset(preset)
        if output is not None:
            bench.check_target(output)
        shape = Shape(hidden=hidden, layers=layers, dtype=dtype)
        conditions = bench.environment() | {"model": dataclasses.asdict(shape), "backend": backend, "preset": preset}
        rows = (measure_kept if kept else measure)(shape, backend, preset, Console(stderr=True))
        if output is not None:
            bench.write({"environment": conditions, "rows": rows}, output)
        Console(width=140).print((kept_table if kept else table)(rows))


if __name__ == "__main__":
    typer.run(main)
