"""LLaVA-1.5-7B and 13B on a GPU, dense and pruned: TTFT, TPOT, selection, and the distance to the roofline.

`python benchmarks/gpu.py --output benchmarks/results/gpu.json` measures what fits into `--minutes` and lists what did not;
compiled programs stay in `--cache`, so that another run goes further. Random bf16 weights. `--toy` runs the same at toy size
on the CPU, uncompiled.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from vitcop_compile import UnsupportedError, bench
from vitcop_compile.bench.arms import Arm
from vitcop_compile.bench.cases import DENSE, DTYPES, Case, Entrant, Shape
from vitcop_compile.bench.timing import interleave, summary
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines, without_future_warnings
from vitcop_compile.schedule import Schedule

# Goals, for the report, which names the rows that miss one.
TTFT_OVER_ROOFLINE, BATCH_RATIO, SELECTION_SHARE = 1.25, 4.0, 0.01
LLAVA: dict[str, Any] = {
    "head": 128, "vocab": 32064, "vision_hidden": 1024, "vision_layers": 24, "dtype": "bfloat16", "device": "cuda",
}  # fmt: skip
SIZES = (
    Shape(hidden=4096, layers=32, mlp=11008, name="7b", **LLAVA),
    Shape(hidden=5120, layers=40, mlp=13824, name="13b", **LLAVA),
)
TOYS = (Shape(hidden=32, layers=4, mlp=96, vocab=300, vision_hidden=32, vision_layers=3, image_size=112, name="toy"),)
COLUMNS = ("shape", "batch", "text_tokens", "preset", "TTFT", "ttft_over_roofline", "TTFT to dense", "decode",
           "decode_over_roofline", "decode to dense", "selection", "host_syncs")  # fmt: skip


def cases(toy: bool) -> list[Case]:
    """What is measured: both models at batch 1 and 8, with 64 text tokens and with 512.

    Toys are not compiled: that would take minutes and show nothing of a GPU.
    """
    if toy:
        return [Case(TOYS[0], "eager", batch=batch, text_tokens=8, against=()) for batch in (1, 2)]
    return [
        Case(shape, batch=batch, text_tokens=text, against=()) for shape in SIZES for text in (64, 512) for batch in (1, 8)
    ]


def ceilings(shape: Shape, side: int = 8192, count: int = 2**30) -> dict[str, float]:
    """Measured: FLOP/s of a square matrix product on random data, bytes/s of a copy, read and written both counted."""
    a, b = torch.randn(2, side, side, device=shape.device).to(DTYPES[shape.dtype]).unbind()
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=shape.device)
    target = torch.empty_like(source)
    times = interleave({"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}, 10)
    seconds = {name: summary(found)["median"] / 1e3 for name, found in times.items()}
    return {"flops_per_second": 2 * side**3 / seconds["matmul"], "bytes_per_second": 2 * count / seconds["copy"]}


def roofline(schedule: Schedule, case: Case, model: Any, limits: dict[str, float]) -> dict[str, float]:
    """Least ms of every stage: the larger of FLOPs at the matrix rate and bytes at the copy rate, program by program.

    Bytes are the weights a program reads once and the KV cache it writes or reads; activations are taken to stay on chip.
    """
    batch, text, size = case.batch, case.text_tokens, schedule.shape.element_bytes
    seen = (model.model.vision_tower, model.model.multi_modal_projector)
    pairs = {
        "vision": (batch * schedule.vision_flops(), size * sum(p.numel() for part in seen for p in part.parameters())),
        "prefill": (
            batch * (sum(schedule.prefill_flops(text)) + schedule.head_flops()),
            schedule.weight_bytes() + batch * schedule.kv_bytes(text),
        ),
        "decode": (
            batch * 2 * schedule.weight_bytes() // size,
            schedule.weight_bytes() + batch * schedule.kv_bytes(text, case.new_tokens),
        ),
    }
    found = {
        stage: 1e3 * max(flops / limits["flops_per_second"], moved / limits["bytes_per_second"])
        for stage, (flops, moved) in pairs.items()
    }
    return found | {"ttft": found["vision"] + found["prefill"]}


def inspect(limits: dict[str, float], model: Any, case: Case, entrant: Entrant, arm: Arm) -> dict[str, Any]:
    """What is asked of a compiled arm, for its row: the roofline, and what only a GPU shows. profile: (kernel, device
    microseconds, launches) of the costliest in vision and prefill. Raises UnsupportedError for a prefill without flash."""
    schedule = entrant.config.schedule(case.shape.model_shape())
    found: dict[str, Any] = {"roofline_ms": roofline(schedule, case, model, limits), "host_syncs": None, "profile": {}}
    if case.shape.device == "cpu":
        return found
    profile = {stage: kernels(arm.stages[stage]) for stage in ("vision", "prefill")}
    if not any("flash" in name.lower() for name, *_ in profile["prefill"]):
        raise UnsupportedError(f"{entrant.key}: prefill runs no flash-attention kernel, so the comparison would not be fair")
    profile = {stage: costs[:12] for stage, costs in profile.items()}
    return found | {"host_syncs": host_syncs(arm.stages["ttft"]), "profile": profile}


def host_syncs(call: Callable[[], Any]) -> int:
    """Synchronising CUDA operations that `call` issues."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def kernels(call: Callable[[], Any]) -> list[tuple[str, float, int]]:
    """(name, device microseconds, launches) of every CUDA kernel of one call, the costliest first."""
    for _ in range(2):  # a CUDA graph is recorded, then replayed
        call()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    found = [(e.key, e.self_device_time_total, e.count) for e in profiler.key_averages() if e.self_device_time_total > 0]
    return sorted(found, key=lambda kernel: -kernel[1])


def missed(row: dict[str, Any]) -> list[str]:
    """The goals that a row misses, in words."""
    ttft, share, syncs = row["ttft_over_roofline"], row["selection_share"] or 0.0, row["host_syncs"] or 0
    ratio = row["ratio_to_dense"]["ttft"]["median"] if row["preset"] != DENSE else 1.0
    found = {
        f"TTFT {ttft:.2f} x roofline": row["batch"] == 1 and ttft > TTFT_OVER_ROOFLINE,
        f"selection {100 * share:.1f} % of prefill": share > SELECTION_SHARE,
        f"dense / pruned TTFT {ratio:.2f}": row["batch"] >= 8 and row["preset"] == "1/9" and ratio < BATCH_RATIO,
        f"{syncs} host synchronisations": syncs > 0,
    }
    return [words for words, is_missed in found.items() if is_missed]


def run(toy: bool, minutes: float, rounds: int, memory: bool, console: Console) -> dict[str, Any]:
    """{"environment", "ceilings", "rows", "left_out"} of cases that began before `minutes` had passed, and the others."""
    chosen = cases(toy)
    bench.check_cases(chosen, rounds)
    limits = ceilings(chosen[0].shape, *((256, 2**20) if toy else ()))
    asked: dict[str, Any] = {"rounds": rounds, "memory": memory, "minutes": minutes, "console": console}
    results = bench.run(chosen, inspect=functools.partial(inspect, limits), **asked)
    for row in results["rows"]:
        for stage, least in row["roofline_ms"].items():
            row[f"{stage}_over_roofline"] = row[f"{stage}_ms"] / least
        row["missed"] = missed(row)
    return results | {"ceilings": limits}


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    minutes: Annotated[float, typer.Option(help="When to begin no further case.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 11,
    cache: Annotated[Path, typer.Option(help="Compiled programs, kept from run to run.")] = Path(".cache/inductor"),
    memory: Annotated[bool, typer.Option("--memory", help="Also the peak memory of each arm alone in a process.")] = False,
    toy: Annotated[bool, typer.Option("--toy", help="Toy size, uncompiled, on the CPU.")] = False,
) -> None:
    """Measure LLaVA-1.5-7B and 13B shapes on a GPU."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute()))
    with errors_as_lines(), without_future_warnings():
        bench.check_target(output)
        results = run(toy, minutes, rounds, memory, Console(stderr=True))
        bench.write(results, output)
    console = Console(width=WIDE_TABLE_WIDTH)
    console.print(bench.table(results, (*COLUMNS, "peak memory") if memory else COLUMNS))
    for row in results["rows"]:
        if row["missed"]:
            console.print(f"{row['shape']} batch {row['batch']} {row['preset']}: missed {', '.join(row['missed'])}")
    for case in results["left_out"]:
        console.print(f"left out, no time: {case}")


if __name__ == "__main__":
    typer.run(main)
