"""Results from times: one row per arm and setting, pure arithmetic over what a run has measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ..config import NAMED_PRESETS
from ..layout import Layout
from ..schedule import ModelShape, Schedule, resolve
from .cases import DENSE, STAGES, Case, Entrant
from .timing import ratios, summary

# stage -> key of the entrant -> milliseconds per round, the rounds of one stage being the same for all.
Times = Mapping[str, Mapping[str, list[float]]]
Row = dict[str, Any]
# stage -> the ratio that it would have if time were FLOPs, or bytes, and what the measured one is called beside that.
IDEALS = {
    "vision": ("vision_flop_ratio", "vision_realized_over_ideal"),
    "prefill": ("flop_ratio", "realized_over_ideal"),
    "decode": ("decode_byte_ratio", "decode_realized_over_ideal"),
}


def rows(
    case: Case, shape: ModelShape, times: Times, attention: Mapping[str, Mapping[str, str]], layout: Layout | None = None
) -> list[Row]:
    """One row per entrant of `case`, on a model of `shape` and prompts of `layout`, by default of one image. Times in ms,
    memory in bytes, all of it unrounded.

    `<stage>_ms` is the median over the rounds, `<stage>_ms_quartiles` the first and third quartile, both None where the stage
    was not measured; selection is a part of vision and prefill, and `selection_share` its share of the row's prefill.
    Ratios are time over this row's time, medians of the per-round ratios with quartiles: `ratio_to_dense` to the
    backend's dense row, `ratio_to` to every arm of `case.against`, with the same setting where that arm prunes.
    FLOPs and kv_bytes (prompt and new tokens) are those of the whole batch. Memory is left to who measures it.
    """
    found = []
    for entrant in case.entrants():
        schedule, key = _resolved(entrant, shape, layout), entrant.key
        row: Row = {"backend": case.backend, "arm": entrant.arm, "preset": entrant.label}
        row |= {
            "shape": case.shape.name,
            "dtype": case.shape.dtype,
            "weights": case.shape.weights,
            **dataclasses.asdict(case.request),
        }
        for stage in (*STAGES, "selection"):
            taken = times.get(stage, {}).get(key)
            middle = {"median": None, "quartiles": None} if taken is None else summary(taken)
            row |= {f"{stage}_ms": middle["median"], f"{stage}_ms_quartiles": middle["quartiles"]}
        row["selection_share"] = _over(row["selection_ms"], row["prefill_ms"])
        row["ratio_to_dense"] = _ratios(times, f"{case.backend} {DENSE}", key) if schedule.stages else None
        row["ratio_to"] = _others(case, entrant, times)
        row |= _schedule(schedule, case)
        for stage, (ideal, realized) in IDEALS.items():
            row[realized] = _over((row["ratio_to_dense"] or {}).get(stage, {}).get("median"), row[ideal])
        row |= {"peak_memory_bytes": None, "resident_memory_bytes": None, "attention": dict(attention.get(key, {}))}
        named = entrant.label == DENSE or entrant.label in NAMED_PRESETS
        found.append(row | {"config": None if named else json.loads(entrant.config.to_json())})
    return found


def _resolved(entrant: Entrant, shape: ModelShape, layout: Layout | None) -> Schedule:
    return resolve(entrant.config, shape, (shape.image,) if layout is None else layout)


def _others(case: Case, entrant: Entrant, times: Times) -> Row:
    same = [other for other in case.entrants() if other.label in (DENSE, entrant.label) and other.arm in case.against]
    return {other.arm: _ratios(times, other.key, entrant.key) for other in same if other.arm != entrant.arm}


def _schedule(schedule: Schedule, case: Case) -> Row:
    """What follows from the shapes alone."""
    stages, text = [stage.total for stage in schedule.decoder_stages] or [schedule.image_tokens] * 2, case.text_tokens
    tokens = {"vision": schedule.image_tokens, "shallow": stages[0], "deep": stages[-1]}
    return {
        "visual_tokens": tokens | {"mean": schedule.mean_visual_tokens()},
        "retention": schedule.mean_visual_tokens() / schedule.patches,
        "kv_bytes": case.batch * schedule.kv_bytes(text, case.new_tokens),
        "vision_flops": case.batch * schedule.vision_flops(),
        "prefill_flops": case.batch * (sum(schedule.prefill_flops(text)) + schedule.head_flops()),
        "vision_flop_ratio": schedule.dense_vision_flops() / schedule.vision_flops(),
        "flop_ratio": schedule.flop_ratio(text),
        "decode_byte_ratio": schedule.decode_ratio(text, case.new_tokens, case.batch),
    }


def _ratios(times: Times, over: str, under: str) -> Row:
    """Time of `over` over that of `under`, by stage, where both were measured."""
    both = {stage: times[stage] for stage in STAGES if times.get(stage, {}).keys() >= {over, under}}
    return {stage: summary(ratios(arms[over], arms[under])) for stage, arms in both.items()}


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole
