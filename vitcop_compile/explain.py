"""A schedule as a table people can read."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from .errors import ConfigError
from .schedule import Schedule, Stage

# Of a prompt whose text nobody has named: about that of a short question.
TEXT_TOKENS = 64


def layer_groups(schedule: Schedule, text: int) -> list[tuple[int, int, int, int, int]]:
    """(first layer, last layer, visual tokens, KV rows, FLOPs of the group) of runs of equal layers."""
    visual, rows, flops = schedule.visual_tokens(), schedule.kv_rows(text), schedule.prefill_flops(text)
    groups: list[tuple[int, int, int, int, int]] = []
    for layer in range(schedule.shape.layers):
        if groups and groups[-1][2] == visual[layer]:
            first, _, tokens, kept, total = groups[-1]
            groups[-1] = (first, layer, tokens, kept, total + flops[layer])
        else:
            groups.append((layer, layer, visual[layer], rows[layer], flops[layer]))
    return groups


def table(schedule: Schedule, text: int = TEXT_TOKENS) -> Table:
    """The schedule as a rich table: vision stage, groups of decoder layers, totals; for a prompt of `text` text tokens beside
    the protected tokens of its images.

    Raises ConfigError if `text` is no count.
    """
    if isinstance(text, bool) or not isinstance(text, int) or text < 0:
        raise ConfigError(f"text={text!r} is not a count of text tokens")
    shape, segments = schedule.shape, len(schedule.layout)
    of = "" if segments == 1 else f" of {segments} {'segments' if shape.packed else 'images'}"
    beside = f" + {schedule.protected} protected tokens" if schedule.protected else ""
    out = Table(title=f"{text} text tokens{beside} + {schedule.patches} patches{of}, {shape.layers} layers")
    text += schedule.protected
    for name in ("layers", "visual tokens", "KV rows", "GFLOPs", "dense GFLOPs", "what happens"):
        out.add_column(name, justify="left" if name == "what happens" else "right")
    vision = _giga(schedule.vision_flops()), _giga(schedule.dense_vision_flops())
    out.add_row("vision", f"{schedule.image_tokens}", "", *vision, _vision(schedule.vision) if segments else "no image")
    starts = {stage.layer: stage for stage in schedule.decoder_stages}
    for first, last, tokens, rows, flops in layer_groups(schedule, text):
        dense = sum(schedule.dense_prefill_flops(text)[first : last + 1])
        stage = starts.get(first)
        what = f"before layer {first}: {stage.policy} to {_sum(stage.tokens)}" if stage else "spliced into the prompt"
        out.add_row(f"{first}-{last}", f"{tokens}", f"{rows}", _giga(flops), _giga(dense), what if segments else "")
    out.add_section()
    pruned_kv, dense_kv = schedule.kv_bytes(text) / 2**20, schedule.dense_kv_bytes(text) / 2**20
    out.add_row(
        "all",
        f"{schedule.mean_visual_tokens():.1f} mean",
        f"{sum(schedule.kv_rows(text))}",
        _giga(sum(schedule.prefill_flops(text))),
        _giga(sum(schedule.dense_prefill_flops(text))),
        f"prefill FLOPs / {schedule.flop_ratio(text):.2f}; KV {pruned_kv:.1f} MiB, dense {dense_kv:.1f} MiB",
    )
    return out


def summary(schedule: Schedule, text: int = TEXT_TOKENS) -> str:
    """The schedule in a line: tokens stage by stage, their mean over layers, and what that saves."""
    steps = [f"{schedule.patches} patches"]
    for stage in schedule.stages:
        where = {"encoder": "after encoder layer", "merge": "by encoder layer", "decoder": "before layer"}.get(stage.side)
        place = "behind the projector" if where is None else f"{where} {stage.layer}"
        steps.append(f"{_sum(stage.tokens)} {place} ({stage.policy})")
    text += schedule.protected
    kv = schedule.dense_kv_bytes(text) / schedule.kv_bytes(text)
    saved = f"mean {schedule.mean_visual_tokens():.1f}, prefill FLOPs / {schedule.flop_ratio(text):.2f}, KV / {kv:.2f}"
    return f"{' -> '.join(steps if len(steps) < 8 else [*steps[:2], '...', *steps[-2:]])}; {saved}"


def explain(schedule: Schedule, text: int = TEXT_TOKENS) -> str:
    """The table as text, 110 columns wide, without color."""
    console = Console(file=io.StringIO(), width=110, color_system=None, force_terminal=False)
    console.print(table(schedule, text))
    return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def _vision(stage: Stage | None) -> str:
    if stage is None:
        return "nothing pruned"
    if stage.side == "entry":
        return f"behind the projector: {stage.policy} to {_sum(stage.tokens)}"
    what = f"{'by' if stage.side == 'merge' else 'after'} layer {stage.layer}: keep {_sum(stage.tokens)}"
    centers = dict(stage.options).get("centers")
    if centers is not None:
        return f"{what}, {_sum(centers)} clusters"
    return f"{what}, {stage.policy}"


def _sum(counts: tuple[int, ...]) -> str:
    """Equal counts of several images as a product, others as a sum."""
    if len(counts) > 1 and len(set(counts)) == 1:
        return f"{len(counts)} x {counts[0]}"
    return " + ".join(map(str, counts))


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.1f}" if flops >= 1e8 else f"{flops / 1e9:.4f}"
