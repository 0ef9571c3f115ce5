"""The table of types, backends and budgets: every arm in one interleaving, so that all ratios are of the same rounds."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from parts import Rows
from rich.console import Console

from vitcop_compile import ViTCoPConfig
from vitcop_compile.bench.arms import Arm, build
from vitcop_compile.bench.cases import DENSE, Case, Entrant, Shape
from vitcop_compile.bench.memory import peak
from vitcop_compile.bench.timing import interleave, summary
from vitcop_compile.errors import UnsupportedError
from vitcop_compile.progress import Steps
from vitcop_compile.schedule import Method, Schedule

# How a model is loaded, by name: its type, and how its linear layers are held.
PRECISIONS = {
    "float32": ("float32", "float"), "bfloat16": ("bfloat16", "float"), "int8": ("float32", "int8"),
    "int8 dynamic": ("float32", "int8 dynamic"),
}  # fmt: skip
BACKENDS = ("inductor", "aotinductor", "onnxruntime", "openvino")
STAGES = ("vision", "prefill", "decode", "ttft")
COLUMNS = ("backend", "precision", "preset", "vision_ms", "prefill_ms", "decode_ms", "ttft_ms", "selection_ms", "tokens_per_s",
           "peak_mib", "vision_to_float32", "prefill_to_float32", "decode_to_float32", "ttft_to_dense", "vision_realised",
           "prefill_realised", "decode_realised")  # fmt: skip
_WARMUP = 1
_LEAST_MS = 40.0


class Key(NamedTuple):
    """One arm."""

    backend: str
    precision: str
    preset: str


def precisions(
    shape: Shape,
    batch: int,
    presets: tuple[str, ...],
    rounds: int,
    backends: tuple[str, ...] = BACKENDS,
    memory: bool = True,
) -> Iterator[Rows]:
    """Milliseconds of every stage of a request of 64 text tokens and 64 new ones, by backend, precision and preset; what an
    arm is refused for stands in a row of its own. All rows are given after every stage, with what was measured so far.

    tokens_per_s: of the whole batch over an answer of 64 tokens, its TTFT and 63 decode steps; peak_mib: resident memory of
    a process that serves the arm alone, with `memory`; `_to_float32`: time of the backend in float32 over the row's;
    `ttft_to_dense`: likewise of the row's dense arm; `_realised`: ratio to dense over the one that FLOPs, or in decode
    bytes, give. Ratios are medians, their quartiles in `quartiles`.
    """
    settings: dict[str, Method] = {DENSE: ViTCoPConfig.dense()} | {name: ViTCoPConfig.preset(name) for name in presets}
    cases = {
        name: Case(dataclasses.replace(shape, dtype=dtype, weights=weights), batch=batch)
        for name, (dtype, weights) in PRECISIONS.items()
    }
    keys = [Key(backend, precision, preset) for backend in backends for precision in cases for preset in settings]
    steps = Steps(Console(stderr=True), len(keys) * (8 + (rounds + _WARMUP) * len(STAGES)))
    arms: dict[Key, Arm] = {}
    refused: dict[Key, str] = {}
    with torch.no_grad():
        for precision, case in cases.items():
            model = case.shape.model()
            for key in [key for key in keys if key.precision == precision]:
                with steps.step(f"compiling {' '.join(key)}", lambda: "", 8):
                    try:
                        arms[key] = _called(build(key.backend, model, settings[key.preset], case.request))
                    except UnsupportedError as error:
                        refused[key] = str(error)
    times: dict[str, dict[Key, list[float]]] = {}
    peaks: dict[Key, float | None] = {}

    def rows() -> Rows:
        found = []
        for key in keys:
            row: dict[str, Any] = dict.fromkeys(COLUMNS) | key._asdict() | {"batch": batch, "refused": refused.get(key)}
            if key in arms:
                case = cases[key.precision]
                schedule = settings[key.preset].schedule(case.shape.model_shape(), case.layout())
                row |= row_of(key, times, schedule, case) | {"peak_mib": peaks.get(key)}
            found.append(row)
        return found

    for stage in (*STAGES, "selection"):
        with torch.no_grad():
            times[stage] = _timed(stage, arms, rounds, steps)
        yield rows()
    torch.compiler.reset()
    for key in arms if memory else ():
        with steps.step(f"memory of {' '.join(key)}"):
            peaks[key] = _peak(cases[key.precision], Entrant(key.backend, key.preset, settings[key.preset]))
    yield rows()


def by_backend(*given: Any, backends: tuple[str, ...] = BACKENDS, **more: Any) -> Iterator[Rows]:
    """`precisions` of one backend after the other, whose arms are gone before those of the next are built: all together may
    need more memory than there is. Ratios are within a backend; milliseconds of two are of different minutes."""
    done: Rows = []
    for backend in backends:
        rows: Rows = []
        for rows in precisions(*given, backends=(backend,), **more):
            yield done + rows
        done += rows


def _peak(case: Case, entrant: Entrant) -> float | None:
    """MiB; None where it cannot be measured: what was timed is not lost for it."""
    try:
        found = peak(case, entrant)
    except UnsupportedError:
        return None
    return None if found is None else found[0] / 2**20


def _called(arm: Arm) -> Arm:
    """Once all stages have compiled."""
    for call in (*(arm.stages[stage] for stage in STAGES), *([arm.selection] if arm.selection else [])):
        call()
    return arm


def _timed(stage: str, arms: dict[Key, Arm], rounds: int, steps: Steps) -> dict[Key, list[float]]:
    calls: dict[Key, Callable[[], Any]]
    if stage == "selection":
        calls = {key: arm.selection for key, arm in arms.items() if arm.selection is not None}
    else:
        calls = {key: arm.stages[stage] for key, arm in arms.items()}
    with steps.bar(f"timing {stage}", rounds + _WARMUP, len(calls) * (rounds + _WARMUP)) as advance:
        return interleave(calls, rounds, _WARMUP, tick=advance, least_ms=_LEAST_MS)


def row_of(key: Key, times: dict[str, dict[Key, list[float]]], schedule: Schedule, case: Case) -> dict[str, Any]:
    """What `precisions` says of an arm that was timed. times: milliseconds of every round, by the stages measured so far and
    arm."""
    request = case.request
    row: dict[str, Any] = {
        f"{stage}_ms": statistics.median(took[key]) if key in took else None for stage, took in times.items()
    }
    if {"ttft", "decode"} <= times.keys():
        answer = row["ttft_ms"] + (request.new_tokens - 1) * row["decode_ms"]
        row["tokens_per_s"] = 1e3 * request.batch * request.new_tokens / answer
    ratio = functools.partial(_ratio, times, key, row.setdefault("quartiles", {}))
    for stage in [stage for stage in STAGES if stage in times]:
        if key.precision != "float32":
            row[f"{stage}_to_float32"] = ratio(stage, key._replace(precision="float32"), f"{stage}_to_float32")
    if key.preset != DENSE:
        for stage, ideal in _ideals(key, schedule, case).items():
            if stage not in times:
                continue
            found = ratio(stage, key._replace(preset=DENSE), f"{stage}_to_dense")
            row |= {f"{stage}_to_dense": found, f"{stage}_ideal": ideal, f"{stage}_realised": found and found / ideal}
        if "ttft" in times:
            row["ttft_to_dense"] = ratio("ttft", key._replace(preset=DENSE), "ttft_to_dense")
    return row


def _ratio(times: Any, key: Key, quartiles: dict[str, Any], stage: str, over: Key, name: str) -> float | None:
    took = times[stage]
    if over not in took:
        return None
    found = summary([a / b for a, b in zip(took[over], took[key], strict=True)])
    quartiles[name] = found["quartiles"]
    return found["median"]


def _ideals(key: Key, schedule: Schedule, case: Case) -> dict[str, float]:
    """Ratios to dense, were time FLOPs, or in decode bytes of weights and caches."""
    text, new, batch = case.text_tokens, case.new_tokens, case.batch
    weights = schedule.weight_bytes()
    if case.shape.weights.startswith("int8"):
        weights //= schedule.shape.element_bytes  # a byte each; a scale for each row is next to nothing
    dense, pruned = (weights + batch * rows for rows in (schedule.dense_kv_bytes(text, new), schedule.kv_bytes(text, new)))
    vision = schedule.dense_vision_flops() / schedule.vision_flops()
    return {"vision": vision, "prefill": schedule.flop_ratio(text), "decode": dense / pruned}
