"""Results from times: one row per arm and setting, pure arithmetic over what a run has measured."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from ..config import PRESETS
from ..schedule import ModelShape, Schedule
from .cases import DENSE, STAGES, Case, Entrant
from .timing import spread

# stage -> key of the entrant -> milliseconds per round, the rounds of one stage being the same for all.
Times = Mapping[str, Mapping[str, list[float]]]
# key of the entrant -> (peak, before the request) bytes; None where it was not measured.
Peaks = Mapping[str, tuple[int, int] | None]
_SELECTION = "selection"


def rows(
    case: Case, shape: ModelShape, times: Times, attention: Mapping[str, Mapping[str, str]], peaks: Peaks
) -> list[dict[str, Any]]:
    """One row per entrant of `case`, on a model of `shape`. Times in ms, memory in bytes, all of it unrounded.

    `<stage>_ms` is the median over the rounds, `<stage>_ms_quartiles` the first and third quartile, both None where the stage
    was not measured; selection is a part of vision and prefill, and `selection_share` its share of the row's prefill.
    Ratios are time over this row's time, medians of the per-round ratios with quartiles: `ratio_to_dense` to the
    backend's dense row, `ratio_to` to every arm of `case.against`, with the same setting where that arm prunes.
    FLOPs, kv_bytes (prompt and new tokens) and memory are those of the whole batch.
    """
    return [_row(case, shape, entrant, times, attention, peaks) for entrant in case.entrants()]


def _row(
    case: Case,
    shape: ModelShape,
    entrant: Entrant,
    times: Times,
    attention: Mapping[str, Mapping[str, str]],
    peaks: Peaks,
) -> dict[str, Any]:
    schedule = entrant.config.schedule(shape)
    pruned = bool(schedule.stages)
    row: dict[str, Any] = {
        "backend": case.backend,
        "arm": entrant.arm,
        "preset": entrant.label,
        "shape": case.shape.name,
        "dtype": case.shape.dtype,
        "batch": case.batch,
        "text_tokens": case.text_tokens,
        "new_tokens": case.new_tokens,
    }
    for stage in (*STAGES, _SELECTION):
        found = times.get(stage, {}).get(entrant.key)
        row[f"{stage}_ms"] = None if found is None else statistics.median(found)
        row[f"{stage}_ms_quartiles"] = None if found is None else list(spread(found))
    row["selection_share"] = _over(row["selection_ms"], row["prefill_ms"])
    row["ratio_to_dense"] = _ratios(times, f"{case.backend} {DENSE}", entrant.key) if pruned else None
    others = {other.arm: other.key for other in case.entrants() if other.label in (DENSE, entrant.label)}
    row["ratio_to"] = {
        arm: _ratios(times, others[arm], entrant.key) for arm in case.against if arm in others and arm != entrant.arm
    }
    row |= _schedule(schedule, case)
    measured = row["ratio_to_dense"] or {}
    for stage, ideal, name in (
        ("vision", "vision_flop_ratio", "vision_realized_over_ideal"),
        ("prefill", "flop_ratio", "realized_over_ideal"),
        ("decode", "decode_byte_ratio", "decode_realized_over_ideal"),
    ):
        row[name] = _over(measured.get(stage, {}).get("median"), row[ideal])
    peak, before = peaks.get(entrant.key) or (None, None)
    row |= {"peak_memory_bytes": peak, "resident_memory_bytes": before, "attention": dict(attention.get(entrant.key, {}))}
    named = entrant.label == DENSE or entrant.label in PRESETS
    return row | {"config": None if named else dataclasses.asdict(entrant.config)}


def _schedule(schedule: Schedule, case: Case) -> dict[str, Any]:
    """What follows from the shapes alone."""
    stages, text = [stage.total for stage in schedule.decoder_stages] or [schedule.image_tokens] * 2, case.text_tokens
    tokens = {"vision": schedule.image_tokens, "shallow": stages[0], "deep": stages[-1]}
    return {
        "visual_tokens": tokens | {"mean": schedule.mean_visual_tokens()},
        "retention": schedule.mean_visual_tokens() / schedule.shape.patches,
        "kv_bytes": case.batch * schedule.kv_bytes(text, case.new_tokens),
        "vision_flops": case.batch * schedule.vision_flops(),
        "prefill_flops": case.batch * (sum(schedule.prefill_flops(text)) + schedule.head_flops()),
        "vision_flop_ratio": schedule.dense_vision_flops() / schedule.vision_flops(),
        "flop_ratio": schedule.flop_ratio(text),
        "decode_byte_ratio": schedule.decode_ratio(text, case.new_tokens, case.batch),
    }


def _ratios(times: Times, over: str, under: str) -> dict[str, Any]:
    """Time of `over` over that of `under`, by stage, where both were measured."""
    found = {}
    for stage in STAGES:
        arms = times.get(stage, {})
        if over in arms and under in arms:
            ratios = [a / b for a, b in zip(arms[over], arms[under], strict=True)]
            found[stage] = {"median": statistics.median(ratios), "quartiles": list(spread(ratios))}
    return found


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole
