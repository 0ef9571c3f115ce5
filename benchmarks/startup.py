"""Start-up cost: `python benchmarks/startup.py [--output FILE]` runs two fresh processes on one empty compile cache.

The first compiles every program, the second finds them in torch's caches. A third one optimizes LLaVA-1.5-7B's shape on the
meta device, where there are no weights. Seconds are wall-clock but for "optimize, CPU". Compiled C++ headers are shared with
whatever ran before: torch keeps them outside of the cache folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vitcop_compile import ViTCoPConfig, bench
from vitcop_compile.backends import backend_of
from vitcop_compile.bench.table import printed
from vitcop_compile.cli.shared import errors_as_lines

MODEL = {
    "hidden": 1024, "layers": 12, "heads": 16, "intermediate": 2752,
    "vision_hidden": 1024, "vision_layers": 8, "vision_heads": 16,
}  # fmt: skip
LLAVA_7B = {
    "hidden": 4096, "layers": 32, "heads": 32, "intermediate": 11008, "vocab": 32064,
    "vision_hidden": 1024, "vision_layers": 24, "vision_heads": 16,
}  # fmt: skip
_STEPS = {"rewrite + export": "export_s", "compile": "compile_s", "first call": "first_call_s"}
_PROCESS = Path(__file__).with_name("startup_process.py")


def process(cache: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process reports of `asked` (see startup_process.py), with its compile cache in the folder `cache`."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    command = [sys.executable, str(_PROCESS), json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the measured process ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    model: dict[str, Any], backend: str, preset: str, console: Console, text_tokens: int = 64, planned: bool = True
) -> dict[str, Any]:
    """{"rows": one per process, by "process": "first", "second" and, where `planned`, "7B on meta"}."""
    asked = {
        "model": model, "dtype": "float32", "meta": False, "backend": backend, "preset": preset,
        "text_tokens": text_tokens, "new_tokens": 64,
    }  # fmt: skip
    steps = {"first": asked, "second": asked}
    if planned:
        steps["7B on meta"] = asked | {"model": LLAVA_7B, "dtype": "bfloat16", "meta": True}
    rows = []
    with tempfile.TemporaryDirectory(prefix="vitcop-") as cache:
        for name, step in steps.items():
            with console.status(f"{name} process"):
                rows.append({"process": name} | process(cache, step))
    return {"rows": rows}


def table(results: dict[str, Any]) -> Table:
    """Seconds of every step, and what both caches counted together, a line per program."""
    lines = []
    for row in results["rows"]:
        head = [row["process"], *(f"{row[name]:.1f}" for name in ("import_s", "optimize_s", "optimize_cpu_s"))]
        for program in row["programs"]:
            seconds = [f"{program[name]:.1f}" if name in program else "-" for name in _STEPS.values()]
            counts = [_sum(program, "_hit"), _sum(program, "_miss", "_bypass")]
            lines.append([*head, program["program"], *seconds, *counts])
            head = [""] * len(head)
    names = ("process", "import", "optimize", "optimize, CPU", "program", *_STEPS, "hits", "misses, bypasses")
    return printed(names, lines, "start-up, seconds")


def _sum(program: dict[str, Any], *endings: str) -> str:
    found = [value for name, value in program.items() if name.endswith(endings)]
    return str(sum(found)) if found else "-"


def main(
    backend: Annotated[str, typer.Option(help="What the programs compile with.")] = "inductor",
    preset: Annotated[str, typer.Option(help="A published setting.")] = "1/9",
    output: Annotated[Path | None, typer.Option(help="Where to write the JSON.")] = None,
) -> None:
    """Measure the start-up of two processes with one compile cache, and of planning a 7B model."""
    with errors_as_lines():
        backend_of(backend)
        ViTCoPConfig.preset(preset)
        if output is not None:
            bench.check_target(output)
        results = {"environment": bench.environment() | {"model": MODEL, "backend": backend, "preset": preset}}
        results |= measure(MODEL, backend, preset, Console(stderr=True))
        if output is not None:
            bench.write(results, output)
        Console(width=140).print(table(results))


if __name__ == "__main__":
    typer.run(main)
