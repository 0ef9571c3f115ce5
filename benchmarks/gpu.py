"""LLaVA-1.5-7B and 13B on a GPU, dense and pruned: TTFT, TPOT, selection, and the distance to the roofline.

`python benchmarks/gpu.py --output benchmarks/results/gpu.json` measures what fits into `--minutes`, what matters most first,
and lists what did not. Results are saved after every case, and another run on the same GPU goes on where they end; compiled
programs stay in `--cache`. A case that fails is reported, and the next run tries it again. Random bf16 weights. `--toy` runs
the same at toy size on the CPU, uncompiled.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from vitcop_compile import InputError, UnsupportedError, bench
from vitcop_compile.bench.arms import Arm
from vitcop_compile.bench.cases import DENSE, DTYPES, Case, Entrant, Shape
from vitcop_compile.bench.timing import interleave, summary
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines, without_future_warnings
from vitcop_compile.schedule import Schedule

# Goals, for the report, which names the rows that miss one.
TTFT_OVER_ROOFLINE, BATCH_RATIO, SELECTION_SHARE = 1.25, 4.0, 0.01
# `forward` reads ids and mask before it launches anything.
ENTRY_READS = 2
# In names of kernels: torch's and the flash-attn package's, and cuDNN's, which torch may prefer from sm_90 on.
FLASH = re.compile(r"flash|cudnn.*sdpa|fort_native_sdpa|cudnn.*attention", re.IGNORECASE)
# What results must share to be one table.
CONDITIONS = ("gpu", "torch", "transformers", "commit", "rounds", "memory")
LLAVA: dict[str, Any] = {
    "head": 128, "vocab": 32064, "vision_hidden": 1024, "vision_layers": 24, "dtype": "bfloat16", "device": "cuda",
}  # fmt: skip
# What goes wrong on a GPU should go wrong in the first two minutes.
SMALL = Shape(hidden=1024, layers=4, mlp=2752, name="small", **LLAVA | {"head": 64, "vision_layers": 4})
SIZES = (
    Shape(hidden=4096, layers=32, mlp=11008, name="7b", **LLAVA),
    Shape(hidden=5120, layers=40, mlp=13824, name="13b", **LLAVA),
)
TOYS = (Shape(hidden=32, layers=4, mlp=96, vocab=300, vision_hidden=32, vision_layers=3, image_size=112, name="toy"),)
COLUMNS = ("shape", "batch", "text_tokens", "preset", "TTFT", "ttft_over_roofline", "TTFT to dense", "decode",
           "decode_over_roofline", "decode to dense", "selection", "host_syncs", "graphs")  # fmt: skip


def cases(toy: bool) -> list[Case]:
    """What is measured, in this order: a small model; 7B at 1/9, at batch 1 and 8, with 64 text tokens and with 512; its other
    presets; and 13B likewise. Every case has its own dense rows, and is saved as a whole.

    Toys are not compiled: that would take minutes and show nothing of a GPU.
    """
    requests = [(1, 64), (8, 64), (1, 512), (8, 512)]
    if toy:
        pairs = [(("1/9",), 1), (("1/9",), 2), (("1/3", "2/9"), 1)]
        return [Case(TOYS[0], "eager", presets, batch, 8, against=()) for presets, batch in pairs]
    found = [Case(SMALL, presets=("1/9",), against=())]
    for shape in SIZES:
        for presets in (("1/9",), ("1/3", "2/9")):
            found += [Case(shape, presets=presets, batch=batch, text_tokens=text, against=()) for batch, text in requests]
    return found


def named(case: Case) -> str:
    """A case in words."""
    return f"{case}, {' and '.join(case.presets)}"


def measured(case: Case, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether `rows` hold all of a case."""
    found = {(row["shape"], row["batch"], row["text_tokens"], row["preset"]) for row in rows}
    return all((case.shape.name, case.batch, case.text_tokens, preset) in found for preset in case.presets)


def earlier(path: Path, rounds: int, memory: bool) -> dict[str, Any]:
    """What `path` holds, {"rows": []} where there is no such file. Raises InputError for results of other conditions."""
    if not path.exists():
        return {"rows": []}
    found = bench.read(path, ("shape", "batch", "text_tokens", "preset"))
    now = bench.environment() | {"rounds": rounds, "memory": memory}
    other = [f"{name} {found['environment'].get(name)}, here {now[name]}" for name in CONDITIONS
             if found["environment"].get(name) != now[name]]  # fmt: skip
    if other or "ceilings" not in found:
        what = "; ".join(other) or "no ceilings"
        raise InputError(f"{path} holds results of other conditions ({what}): name another file, or remove it")
    return found


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
    microseconds, launches) of the costliest in vision and prefill; graphs: CUDA graphs that a prefill launches. Raises
    UnsupportedError for a prefill without flash."""
    schedule = entrant.config.schedule(case.shape.model_shape())
    found: dict[str, Any] = {
        "roofline_ms": roofline(schedule, case, model, limits),
        "host_syncs": None,
        "graphs": None,
        "profile": {},
    }
    if case.shape.device == "cpu":
        return found
    profiles = {stage: kernels(arm.stages[stage]) for stage in ("vision", "prefill")}
    costs, graphs = profiles["prefill"]
    if not any(FLASH.search(name) for name, *_ in costs):
        ran = ", ".join(name[:60] for name, *_ in costs[:5]) or "none"
        raise UnsupportedError(
            f"{entrant.key}: prefill runs no flash-attention kernel, so the comparison would not be fair; the costliest: {ran}"
        )
    profile = {stage: costs[:12] for stage, (costs, _) in profiles.items()}
    return found | {"host_syncs": host_syncs(arm.stages["ttft"]), "graphs": graphs, "profile": profile}


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


def kernels(call: Callable[[], Any]) -> tuple[list[tuple[str, float, int]], int]:
    """((name, device microseconds, launches) of every CUDA kernel of one call, the costliest first; CUDA graphs launched)."""
    for _ in range(2):  # a CUDA graph is recorded, then replayed
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    # Operators have the time of their kernels too, and names that say what they might have called.
    found = [(e.key, e.self_device_time_total, e.count) for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    return sorted(found, key=lambda kernel: -kernel[1]), sum(e.count for e in events if e.key == "cudaGraphLaunch")


def missed(row: dict[str, Any]) -> list[str]:
    """The goals that a row misses, in words."""
    ttft, share, syncs = row["ttft_over_roofline"], row["selection_share"] or 0.0, row["host_syncs"] or 0
    graphs = row["graphs"]
    ratio = row["ratio_to_dense"]["ttft"]["median"] if row["preset"] != DENSE else 1.0
    found = {
        f"TTFT {ttft:.2f} x roofline": row["batch"] == 1 and ttft > TTFT_OVER_ROOFLINE,
        f"selection {100 * share:.1f} % of prefill": share > SELECTION_SHARE,
        f"dense / pruned TTFT {ratio:.2f}": row["batch"] >= 8 and row["preset"] == "1/9" and ratio < BATCH_RATIO,
        f"{syncs} host synchronisations": syncs > ENTRY_READS,
        "no CUDA graph was launched": graphs == 0,
    }
    return [words for words, is_missed in found.items() if is_missed]


def run(toy: bool, minutes: float, rounds: int, memory: bool, console: Console, output: Path | None = None) -> dict[str, Any]:
    """{"environment", "ceilings", "failed", "left_out", "rows"} of cases that began before `minutes` had passed, and of those
    that `output` holds; written there after every case. failed: what became of a case that ended in an error."""
    chosen = cases(toy)
    bench.check_cases(chosen, rounds)
    before = earlier(output, rounds, memory) if output is not None else {"rows": []}
    left = [case for case in chosen if not measured(case, before["rows"])]
    limits = before.get("ceilings") or ceilings(chosen[0].shape, *((256, 2**20) if toy else ()))
    failed: dict[str, str] = {}

    def told(case: Case, error: Exception) -> None:
        failed[named(case)] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        console.print(f"{named(case)} failed: {failed[named(case)]}")

    def whole(results: dict[str, Any]) -> dict[str, Any]:
        for row in results["rows"]:
            for stage, least in row["roofline_ms"].items():
                row[f"{stage}_over_roofline"] = row[f"{stage}_ms"] / least
            row["missed"] = missed(row)
        rows = [*before["rows"], *results["rows"]]
        missing = [named(case) for case in chosen if not measured(case, rows) and named(case) not in failed]
        merged = results | {"ceilings": limits, "failed": failed, "left_out": missing, "rows": rows}
        if output is not None:
            bench.write(merged, output)
        return merged

    asked: dict[str, Any] = {"rounds": rounds, "memory": memory, "minutes": minutes, "console": console}
    results = bench.run(left, inspect=functools.partial(inspect, limits), save=whole, failed=told, **asked) if left else before
    return whole(results) if left else before


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    minutes: Annotated[float, typer.Option(help="When to begin no further case.")] = 10.0,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 11,
    cache: Annotated[Path, typer.Option(help="Compiled programs, kept from run to run.")] = Path(".cache/inductor"),
    memory: Annotated[bool, typer.Option("--memory", help="Also the peak memory of each arm alone in a process.")] = False,
    toy: Annotated[bool, typer.Option("--toy", help="Toy size, uncompiled, on the CPU.")] = False,
) -> None:
    """Measure LLaVA-1.5-7B and 13B shapes on a GPU."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute()))
    with errors_as_lines(), without_future_warnings():
        bench.check_target(output)
        results = run(toy, minutes, rounds, memory, Console(stderr=True), output)
    console = Console(width=WIDE_TABLE_WIDTH)
    console.print(bench.table(results, (*COLUMNS, "peak memory") if memory else COLUMNS))
    for row in results["rows"]:
        if row["missed"]:
            console.print(f"{row['shape']} batch {row['batch']} {row['preset']}: missed {', '.join(row['missed'])}")
    for case, error in results["failed"].items():
        console.print(f"failed, {error}: {case}")
    for case in results["left_out"]:
        console.print(f"left out, no time: {case}")


if __name__ == "__main__":
    typer.run(main)
