"""LLaVA-1.5-7B and 13B on a GPU, dense and pruned: TTFT, TPOT, memory, selection, and the distance to the roofline.

`python benchmarks/gpu.py --output benchmarks/results/gpu.json` measures what fits into `--minutes`, the most telling cases
first, and lists what did not; compiled programs stay in `--cache`, so that another run goes further. Random bf16 weights.
`--toy` runs the same at toy size on the CPU, uncompiled.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vitcop_compile import UnsupportedError, bench
from vitcop_compile.bench.cases import DENSE, DTYPES, Case, Entrant
from vitcop_compile.bench.environment import environment
from vitcop_compile.bench.rows import rows
from vitcop_compile.bench.runner import timed
from vitcop_compile.bench.table import markdown
from vitcop_compile.cli.shared import errors_as_lines
from vitcop_compile.families.registry import shape_of
from vitcop_compile.progress import Steps
from vitcop_compile.schedule import ModelShape, Schedule

STAGES = ("vision", "prefill", "decode", "ttft")
# Goals, for the report: they decide which rows get a profile, and nothing else.
TTFT_OVER_ROOFLINE, BATCH_RATIO, SELECTION_SHARE = 1.25, 4.0, 0.01


@dataclass(frozen=True)
class Model:
    """A LLaVA-1.5 by the numbers of its published config; fits where a bench `Shape` does."""

    name: str
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    intermediate: int = 11008
    vocab: int = 32064
    vision_hidden: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    image_size: int = 336
    dtype: str = "bfloat16"
    device: str = "cuda"

    def config(self) -> LlavaConfig:
        """The transformers config."""
        vision = CLIPVisionConfig(
            hidden_size=self.vision_hidden,
            intermediate_size=4 * self.vision_hidden,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=14,
        )
        text = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocab,
            max_position_embeddings=4096,
        )
        return LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=self.vocab - 64, dtype=DTYPES[self.dtype],
            architectures=["LlavaForConditionalGeneration"],
        )  # fmt: skip

    def check(self) -> None:
        """Raises UnsupportedError without the device."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("device 'cuda' needs a CUDA GPU, and there is none: use --toy for a look on the CPU")

    def model(self, seed: int = 0) -> LlavaForConditionalGeneration:
        """Random weights, drawn where they will be."""
        torch.manual_seed(seed)
        with torch.device(self.device):
            model = LlavaForConditionalGeneration._from_config(self.config(), dtype=DTYPES[self.dtype])
        return model.eval()

    def model_shape(self) -> ModelShape:
        """What a schedule depends on."""
        return shape_of(self.config())


SIZES = {"7b": Model("7b"), "13b": Model("13b", hidden=5120, layers=40, heads=40, intermediate=13824)}
_TOY = {"intermediate": 96, "vocab": 300, "vision_hidden": 32, "vision_layers": 3, "vision_heads": 2, "image_size": 112}
TOYS = {"toy": Model("toy", hidden=32, layers=4, heads=2, dtype="float32", device="cpu", **_TOY)}  # type: ignore[arg-type]


def cases(models: dict[str, Model], toy: bool) -> list[Case]:
    """What is measured, the most telling first: batch 1 and 8 of both models at 64 text tokens, then 512.

    Toys are not compiled: that would take minutes and show nothing of a GPU.
    """
    backend = "eager" if toy else "inductor"
    return [
        Case(model, backend, batch=batch, text_tokens=text, new_tokens=64, against=(), stages=STAGES)  # type: ignore[arg-type]
        for text in ((8,) if toy else (64, 512))
        for model in models.values()
        for batch in ((1, 2) if toy else (1, 8))
    ]


# Ceilings


def ceilings(device: str, dtype: torch.dtype, toy: bool) -> dict[str, float]:
    """Measured: FLOP/s of a square matrix product on random data, bytes/s of a copy, read and written both counted."""
    side, count = (256, 2**20) if toy else (8192, 2**30)
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {"matmul": lambda: a @ b, "copy": lambda: target.copy_(source)}
    best = {name: statistics.median(times) / 1e3 for name, times in bench.interleave(calls, 10).items()}
    return {"flops_per_second": 2 * side**3 / best["matmul"], "bytes_per_second": 2 * count / best["copy"]}


def roofline(schedule: Schedule, case: Case, model: Any, limits: dict[str, float]) -> dict[str, float]:
    """Least ms of every stage: the larger of FLOPs at the matrix rate and bytes at the copy rate, program by program.

    Bytes are the weights a program reads once and the KV cache it writes or reads; activations are taken to stay on chip.
    """
    shape, batch = schedule.shape, case.batch
    size = shape.element_bytes
    seen = sum(p.numel() for p in model.model.vision_tower.parameters())
    seen += sum(p.numel() for p in model.model.multi_modal_projector.parameters())
    text = case.text_tokens
    prefill_flops = batch * (sum(schedule.prefill_flops(text)) + schedule.head_flops())
    decode_bytes = schedule.weight_bytes() + batch * schedule.kv_bytes(text, case.new_tokens)
    pairs = {
        "vision": (batch * schedule.vision_flops(), seen * size),
        "prefill": (prefill_flops, schedule.weight_bytes() + batch * schedule.kv_bytes(text)),
        "decode": (batch * 2 * schedule.weight_bytes() // size, decode_bytes),
    }
    found = {
        stage: 1e3 * max(flops / limits["flops_per_second"], moved / limits["bytes_per_second"])
        for stage, (flops, moved) in pairs.items()
    }
    return found | {"ttft": found["vision"] + found["prefill"]}


# What only a GPU shows


def host_syncs(call: Callable[[], Any]) -> int | None:
    """Synchronising CUDA operations that `call` issues; None without CUDA."""
    if not torch.cuda.is_available():
        return None
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
    """(name, device microseconds, launches) of every CUDA kernel of one call, the costliest first; empty without CUDA."""
    if not torch.cuda.is_available():
        return []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        torch.cuda.synchronize()
    found = [(e.key, e.self_device_time_total, e.count) for e in profiler.key_averages() if e.self_device_time_total > 0]
    return sorted(found, key=lambda kernel: -kernel[1])


def require_flash(entrant: Entrant, call: Callable[[], Any]) -> list[str]:
    """Names of the flash-attention kernels that prefill runs. Raises UnsupportedError on CUDA if there is none."""
    if not torch.cuda.is_available():
        return []
    names = [name for name, *_ in kernels(call) if "flash" in name.lower()]
    if not names:
        raise UnsupportedError(f"{entrant.key}: prefill runs no flash-attention kernel, so the comparison would not be fair")
    return names


def reserved() -> int | None:
    """Bytes that CUDA graphs, caches and weights hold together; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


# The run


def measure(model: Any, case: Case, limits: dict[str, float], rounds: int, console: Console) -> list[dict[str, Any]]:
    """The rows of one case, each with its roofline, syncs, flash kernels, and, where a goal is missed, a profile."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    title = f"{case.shape.name}, batch {case.batch}, {case.text_tokens} text tokens"
    arms, extra = {}, {}
    with torch.no_grad():
        for entrant in case.entrants():
            before = reserved()
            with console.status(f"{title}: compiling {entrant.key}") as status:
                arm = arms[entrant.key] = bench.build(entrant.arm, model, entrant.config, case.request)
                for stage in STAGES:
                    status.update(f"{title}: compiling {entrant.key}, {stage}")
                    for _ in range(3):  # compile, record, replay
                        arm.stages[stage]()
                flash = require_flash(entrant, arm.stages["prefill"])
            after = reserved()
            extra[entrant.key] = {
                "host_syncs": host_syncs(arm.stages["ttft"]),
                "flash_kernels": flash,
                "memory_bytes": None if after is None or before is None else weights + after - before,
            }
        calls = {key: {stage: arm.stages[stage] for stage in STAGES} for key, arm in arms.items()}
        for key, arm in arms.items():
            if arm.selection is not None:
                calls[key]["selection"] = arm.selection
        times = {}
        for stage in (*STAGES, "selection"):
            group = {key: of_arm[stage] for key, of_arm in calls.items() if stage in of_arm}
            times[stage] = timed(group, rounds, Steps(console), f"{title}: {stage}")
    attention = {key: arm.attention for key, arm in arms.items()}
    found = rows(case, case.shape.model_shape(), times, attention, {})
    for row, entrant in zip(found, case.entrants(), strict=True):
        schedule = entrant.config.schedule(case.shape.model_shape())
        row |= extra[entrant.key] | {"roofline_ms": roofline(schedule, case, model, limits)}
        row["over_roofline"] = {stage: row[f"{stage}_ms"] / least for stage, least in row["roofline_ms"].items()}
        row["missed"] = missed(row)
        if row["missed"]:
            row["profile"] = {stage: kernels(arms[entrant.key].stages[stage])[:12] for stage in ("vision", "prefill")}
    return found


def missed(row: dict[str, Any]) -> list[str]:
    """The goals that a row misses, in words."""
    found = []
    if row["batch"] == 1 and row["over_roofline"]["ttft"] > TTFT_OVER_ROOFLINE:
        found.append(f"TTFT {row['over_roofline']['ttft']:.2f} x roofline")
    if row["preset"] != DENSE and row["selection_share"] > SELECTION_SHARE:
        found.append(f"selection {100 * row['selection_share']:.1f} % of prefill")
    if row["preset"] == "1/9" and row["batch"] >= 8 and row["ratio_to_dense"]["ttft"]["median"] < BATCH_RATIO:
        found.append(f"dense / pruned TTFT {row['ratio_to_dense']['ttft']['median']:.2f}")
    if row["host_syncs"]:
        found.append(f"{row['host_syncs']} host synchronisations")
    return found


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown, times in ms, memory in GiB."""
    names = ("model", "batch", "text", "preset", "TTFT", "x roofline", "ratio", "TPOT", "x roofline", "ratio", "selection",
             "memory", "host syncs")  # fmt: skip
    lines = []
    for row in results["rows"]:
        ratios = row["ratio_to_dense"] or {}
        cells = [row["shape"], str(row["batch"]), str(row["text_tokens"]), row["preset"]]
        for stage in ("ttft", "decode"):
            ratio = f"{ratios[stage]['median']:.2f}" if ratios else ""
            cells += [f"{row[f'{stage}_ms']:.2f}", f"{row['over_roofline'][stage]:.2f}", ratio]
        share = row["selection_share"]
        cells.append("" if share is None else f"{row['selection_ms']:.2f} ({100 * share:.1f} %)")
        cells.append("" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**30:.1f}")
        cells.append("" if row["host_syncs"] is None else str(row["host_syncs"]))
        lines.append(cells)
    return markdown(names, lines).rstrip()


def run(models: dict[str, Model], toy: bool, minutes: float, rounds: int, console: Console) -> dict[str, Any]:
    """{"environment", "ceilings", "rows", "left_out"}: cases that began before `minutes` had passed, and the others."""
    for chosen in models.values():
        chosen.check()
    started = time.monotonic()
    first = next(iter(models.values()))
    limits = ceilings(first.device, DTYPES[first.dtype], toy)
    found: list[dict[str, Any]] = []
    left_out = []
    longest, current, model = 0.0, None, None
    for case in cases(models, toy):
        begun = time.monotonic()
        # A case is begun only if one as long as the longest so far would end in time.
        if begun - started + longest > 60 * minutes:
            left_out.append({"model": case.shape.name, "batch": case.batch, "text_tokens": case.text_tokens})
            continue
        if current != case.shape:
            model = None
            _forget()
            with console.status(f"building {case.shape.name}"):
                model, current = case.shape.model(), case.shape
        found += measure(model, case, limits, rounds, console)
        _forget()
        longest = max(longest, time.monotonic() - begun)
    conditions = environment() | {
        "rounds": rounds,
        "minutes": (time.monotonic() - started) / 60,
        "shapes": {name: dataclasses.asdict(chosen) for name, chosen in models.items()},
    }
    return {"environment": conditions, "ceilings": limits, "rows": found, "left_out": left_out}


def _forget() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    minutes: Annotated[float, typer.Option(help="When to begin no further case.")] = 8.0,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 11,
    cache: Annotated[Path, typer.Option(help="Compiled programs, kept from run to run.")] = Path(".cache/inductor"),
    toy: Annotated[bool, typer.Option("--toy", help="Toy size, uncompiled, on the CPU.")] = False,
) -> None:
    """Measure LLaVA-1.5-7B and 13B shapes on a GPU."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.absolute()))
    console = Console(width=200)
    with errors_as_lines():
        bench.check_target(output)
        results = run(TOYS if toy else SIZES, toy, minutes, rounds, console)
        bench.write(results, output)
    console.print(table(results), markup=False)
    for row in results["rows"]:
        if row["missed"]:
            console.print(f"{row['shape']} batch {row['batch']} {row['preset']}: missed {', '.join(row['missed'])}")
    for case in results["left_out"]:
        console.print(f"left out, no time: {case}")


if __name__ == "__main__":
    typer.run(main)
