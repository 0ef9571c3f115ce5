"""A schedule as a table people can read."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from .schedule import Schedule


def layer_groups(schedule: Schedule) -> list[tuple[int, int, int, int, int]]:
    """(first layer, last layer, visual tokens, KV rows, FLOPs of the group) of runs of equal layers."""
    visual, rows, flops = schedule.visual_tokens(), schedule.kv_rows(), schedule.prefill_flops()
    groups: list[tuple[int, int, int, int, int]] = []
    for layer in range(schedule.shape.layers):
        if groups and groups[-1][2] == visual[layer]:
            first, _, tokens, kept, total = groups[-1]
            groups[-1] = (first, layer, tokens, kept, total + flops[layer])
        else:
            groups.append((layer, layer, visual[layer], rows[layer], flops[layer]))
    return groups


def table(schedule: Schedule) -> Table:
    """The schedule as a rich table: vision stage, groups of decoder layers, totals."""
    shape, vision = schedule.shape, schedule.vision
    out = Table(title=f"{schedule.text_tokens} text tokens + {shape.patches} patches, {shape.layers} layers")
    for name in ("layers", "visual tokens", "KV rows", "GFLOPs", "dense GFLOPs", "what happens"):
        out.add_column(name, justify="left" if name == "what happens" else "right")
    what = f"after layer {vision.layer}: keep {vision.tokens}, {vision.centers} clusters" if vision else "nothing pruned"
    out.add_row(
        "vision", f"{schedule.image_tokens}", "", _giga(schedule.vision_flops()), _giga(schedule.dense_vision_flops()), what
    )
    starts = {stage.layer: stage for stage in schedule.stages}
    for first, last, tokens, rows, flops in layer_groups(schedule):
        dense = sum(schedule.dense_prefill_flops()[first : last + 1])
        stage = starts.get(first)
        what = f"before layer {first}: {stage.policy} to {stage.tokens}" if stage else "spliced into the prompt"
        out.add_row(f"{first}-{last}", f"{tokens}", f"{rows}", _giga(flops), _giga(dense), what)
    out.add_section()
    pruned_kv, dense_kv = schedule.kv_bytes() / 2**20, schedule.dense_kv_bytes() / 2**20
    out.add_row(
        "all",
        f"{schedule.mean_visual_tokens():.1f} mean",
        f"{sum(schedule.kv_rows())}",
        _giga(sum(schedule.prefill_flops())),
        _giga(sum(schedule.dense_prefill_flops())),
        f"prefill FLOPs / {schedule.flop_ratio():.2f}; KV {pruned_kv:.1f} MiB, dense {dense_kv:.1f} MiB",
    )
    return out


def explain(schedule: Schedule) -> str:
    """The table as text, 110 columns wide, without color."""
    console = Console(file=io.StringIO(), width=110, color_system=None, force_terminal=False)
    console.print(table(schedule))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.1f}" if flops >= 1e8 else f"{flops / 1e9:.4f}"
