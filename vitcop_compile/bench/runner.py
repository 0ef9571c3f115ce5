"""Dense against pruned, stage by stage: arms interleaved in one process, medians, beside the ideal."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from ..backends import backend_of
from ..config import ViTCoPConfig
from ..errors import ConfigError
from ..optimized import OptimizedModel
from ..passes.prune_decoder import prune_tokens
from ..passes.prune_encoder import cluster_patches, prune_patches
from ..pipeline import optimize
from ..schedule import Schedule
from ..toy import small_llava
from .timing import interleave

Arm = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row: a backend and a preset at a batch size, a prompt length and a number of rows for new tokens."""

    backend: str = "inductor"
    preset: str = "1/9"
    batch: int = 1
    text_tokens: int = 64
    new_tokens: int = 64


def cases(backends: list[str], presets: list[str], batch: int, text_tokens: int, new_tokens: int) -> list[Case]:
    """Every backend with every preset. Raises ConfigError or UnsupportedError for what is unknown or not positive."""
    for name in backends:
        backend_of(name)
    for name in presets:
        ViTCoPConfig.preset(name)
    for what, value in (("batch", batch), ("text_tokens", text_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise ConfigError(f"{what}={value} is below 1")
    return [Case(backend, preset, batch, text_tokens, new_tokens) for backend in backends for preset in presets]


def dtype_of(name: str) -> torch.dtype:
    """The floating-point type `name`. Raises ConfigError for any other."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise ConfigError(f"dtype {name!r} is unknown: use one of {', '.join(known)}")
    return known[name]


class SelectionOnly(nn.Module):
    """The very functions the passes insert, and nothing else: what selection costs inside vision and prefill together."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.schedule = schedule

    def forward(
        self, query: Tensor, key: Tensor, patches: Tensor, hidden: Tensor, first: Tensor, second: Tensor, visual: Tensor
    ) -> tuple[Tensor, ...]:
        shape, vision = self.schedule.shape, self.schedule.vision
        assert vision is not None
        prefix = shape.prefix_tokens
        scale = query.shape[-1] ** -0.5
        kept_hidden, _, kept = prune_patches(patches, query, key, scale, tokens=vision.tokens, prefix=prefix)
        labels = cluster_patches(
            key, kept, grid=shape.grid, prefix=prefix, centres=vision.centres, dc=vision.dc, k=vision.k, exact=True
        )
        shallow, deep = self.schedule.stages
        hidden, _, visual, index = prune_tokens(hidden, first, visual, labels, policy=shallow.policy, tokens=shallow.tokens)
        hidden, *_ = prune_tokens(hidden, second, visual, labels.gather(1, index), policy=deep.policy, tokens=deep.tokens)
        return kept_hidden, hidden


def selection_inputs(schedule: Schedule, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Random inputs of `SelectionOnly` at the schedule's shapes."""
    shape = schedule.shape
    tokens = shape.prefix_tokens + shape.patches
    heads = max(1, shape.vision_hidden // 64)
    rows = schedule.prompt_tokens
    reduced = rows - schedule.image_tokens + schedule.stages[0].tokens

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device)

    head = shape.vision_hidden // heads
    visual = torch.arange(schedule.image_tokens, device=device).repeat(batch, 1)
    return (
        random(batch, heads, tokens, head),
        random(batch, heads, tokens, head),
        random(batch, tokens, shape.vision_hidden),
        random(batch, rows, shape.hidden),
        random(batch, shape.kv_heads, rows, shape.head_dim),
        random(batch, shape.kv_heads, reduced, shape.head_dim),
        visual,
    )


def measure(model: Any, case: Case, rounds: int, progress: Progress) -> dict[str, Any]:
    """One row of results on `model`. Prints what it is doing through `progress`."""
    config = ViTCoPConfig.preset(case.preset)
    task = progress.add_task(f"{case.backend} {case.preset}: capturing", total=None)

    def say(what: str, total: int | None = None) -> None:
        progress.update(task, description=f"{case.backend} {case.preset}: {what}", total=total, completed=0)

    dense = optimize(model, ViTCoPConfig.dense(), backend=case.backend)
    pruned = optimize(model, config, backend=case.backend)
    schedule = config.schedule(dense.schedule.shape, text_tokens=case.text_tokens)
    arms: dict[str, dict[str, Arm]] = {"vision": {}, "prefill": {}, "decode": {}, "selection": {}}
    with torch.no_grad():
        for name, optimized in (("dense", dense), ("pruned", pruned)):
            say(f"exporting and compiling {name}")
            for stage, arm in _arms(optimized, case).items():
                arms[stage][name] = arm
                arm()
        say("exporting and compiling the selection alone")
        inputs = selection_inputs(schedule, case.batch, model.dtype, model.device)
        alone = torch.export.export(SelectionOnly(schedule).eval(), inputs, strict=False)
        program = backend_of(case.backend)(alone)
        arms["selection"]["pruned"] = lambda: program(*inputs)
        times = {}
        for stage, group in arms.items():
            say(f"measuring {stage}", rounds + 3)
            times[stage] = interleave(group, rounds, tick=lambda: progress.advance(task))
    progress.remove_task(task)
    return _row(case, schedule, times, rounds)


def run(
    cases: list[Case],
    *,
    hidden: int = 1024,
    layers: int = 12,
    vision_hidden: int = 1024,
    vision_layers: int = 8,
    rounds: int = 15,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Builds one random LLaVA of the given size and measures every case: {"environment": ..., "rows": [...]}."""
    model = small_llava(
        vision_hidden=vision_hidden,
        vision_layers=vision_layers,
        vision_heads=max(1, vision_hidden // 64),
        hidden=hidden,
        layers=layers,
        heads=max(1, hidden // 64),
        intermediate=_intermediate(hidden),
        seed=seed,
        dtype=dtype,
    )
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        rows = [measure(model, case, rounds, progress) for case in cases]
    settings = {
        "hidden": hidden,
        "layers": layers,
        "intermediate": _intermediate(hidden),
        "vision_hidden": vision_hidden,
        "vision_layers": vision_layers,
        "rounds": rounds,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return {"environment": environment() | settings, "rows": rows}


def environment() -> dict[str, Any]:
    """What the numbers depend on: processor, threads, versions."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def table(results: dict[str, Any]) -> Table:
    """The rows as a table, times in milliseconds."""
    out = Table(title="dense / pruned, ms (median of interleaved rounds)")
    names = (
        "backend",
        "preset",
        "batch",
        "vision",
        "prefill",
        "ratio / FLOP ratio",
        "selection",
        "decode",
        "ratio / bytes ratio",
    )
    for name in names:
        out.add_column(name, justify="left" if name in names[:2] else "right")
    for row in results["rows"]:
        out.add_row(
            row["backend"],
            row["preset"],
            str(row["batch"]),
            f"{row['dense_vision_ms']:.1f} / {row['pruned_vision_ms']:.1f}",
            f"{row['dense_prefill_ms']:.1f} / {row['pruned_prefill_ms']:.1f}",
            f"{row['prefill_ratio']:.2f} / {row['flop_ratio']:.2f} = {row['realized_over_ideal']:.2f}",
            f"{row['selection_ms']:.2f} ({100 * row['selection_share']:.1f} %)",
            f"{row['dense_decode_ms']:.1f} / {row['pruned_decode_ms']:.1f}",
            f"{row['decode_ratio']:.2f} / {row['decode_byte_ratio']:.2f} = {row['decode_realized_over_ideal']:.2f}",
        )
    return out


def write(results: dict[str, Any], path: Path) -> None:
    """Writes the results as JSON, aside first and then moved into place."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(json.dumps(results, indent=2) + "\n")
    aside.replace(path)


def _arms(optimized: OptimizedModel, case: Case) -> dict[str, Arm]:
    """The three programs of one arm, each bound to its inputs, as `generate` calls them."""
    provider, programs = optimized.on_demand, optimized.programs
    schedule = programs.schedule
    rows = schedule.image_tokens + case.text_tokens
    pixels = torch.randn(case.batch, *programs.family.pixel_shape, device=optimized.device).to(optimized.dtype)
    vision = provider.vision(case.batch)
    features, *selection = vision(pixels)
    prefill = provider.prefill(case.batch, rows, True)
    ids, last, _, visual, *_ = programs.prefill_inputs(case.batch, rows)
    prompt = (ids, last, features, visual, *selection[1:])
    decode = provider.decode(case.batch, rows + case.new_tokens)
    shapes = schedule.cache_shapes(case.batch, rows + case.new_tokens)
    caches = [torch.randn(shape, device=optimized.device).to(optimized.dtype) for shape in shapes for _ in "kv"]
    token, length, offsets = ids[:, :1].contiguous(), torch.full_like(last, rows), programs.offsets()
    return {
        "vision": lambda: vision(pixels),
        "prefill": lambda: prefill(*prompt),
        "decode": lambda: decode(token, length, offsets, *caches),
    }


def _row(case: Case, schedule: Schedule, times: dict[str, dict[str, list[float]]], rounds: int) -> dict[str, Any]:
    row: dict[str, Any] = asdict(case)
    for stage in ("vision", "prefill", "decode"):
        for arm in ("dense", "pruned"):
            row[f"{arm}_{stage}_ms"] = statistics.median(times[stage][arm])
        ratios = [a / b for a, b in zip(times[stage]["dense"], times[stage]["pruned"], strict=True)]
        row[f"{stage}_ratio"] = statistics.median(ratios)
        row[f"{stage}_ratio_spread"] = [min(ratios), max(ratios)]
    row["selection_ms"] = statistics.median(times["selection"]["pruned"])
    row["selection_share"] = row["selection_ms"] / row["pruned_prefill_ms"]
    row["flop_ratio"] = schedule.flop_ratio()
    row["realized_over_ideal"] = row["prefill_ratio"] / row["flop_ratio"]
    row["decode_byte_ratio"] = schedule.decode_ratio(case.new_tokens, case.batch)
    row["decode_realized_over_ideal"] = row["decode_ratio"] / row["decode_byte_ratio"]
    row["vision_flop_ratio"] = schedule.dense_vision_flops() / schedule.vision_flops()
    row["ttft_ratio"] = (row["dense_vision_ms"] + row["dense_prefill_ms"]) / (
        row["pruned_vision_ms"] + row["pruned_prefill_ms"]
    )
    row["kv_bytes"], row["dense_kv_bytes"] = case.batch * schedule.kv_bytes(), case.batch * schedule.dense_kv_bytes()
    row["mean_visual_tokens"] = schedule.mean_visual_tokens()
    row["rounds"] = rounds
    return row


def _intermediate(hidden: int) -> int:
    """LLaMA's MLP width: 8/3 of the hidden size, in steps of 64."""
    return -(-hidden * 8 // 3 // 64) * 64


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return platform.processor() or platform.machine()
