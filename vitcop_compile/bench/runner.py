"""Cases measured: arms built, warmed, and interleaved stage by stage in one process."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ..progress import Steps
from .arms import Arm, build
from .cases import Case, Entrant, Shape, check_cases
from .environment import environment
from .memory import peak
from .rows import rows
from .timing import Call, interleave

_WARMUP = 3
_LEAST_MS = 40.0
# What compiling one stage of an arm takes, in calls of it: a guess, for the estimate of what is left.
_COMPILE = 8.0
# inspect(model, case, entrant, arm) -> more fields for the arm's row, asked for once its stages are compiled.
Inspect = Callable[[Any, Case, Entrant, Arm], dict[str, Any]]


def run(
    cases: Sequence[Case],
    *,
    rounds: int = 15,
    seed: int = 0,
    memory: bool = False,
    minutes: float = math.inf,
    inspect: Inspect = lambda *_: {},
    console: Console | None = None,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
    failed: Callable[[Case, Exception], None] | None = None,
) -> dict[str, Any]:
    """Measures every case: {"environment": ..., "rows": [...], "left_out": [...]}, the rows as `rows.rows` describes them.

    Weights are random, drawn from `seed`, one model per shape. memory: also run each arm alone in a process of its own, for
    its peak memory. minutes: once they have passed no further case is begun, but listed as left out. console: where progress
    is shown, standard error by default. save: given the results so far after every case, so that a run that is cut short
    loses one. failed: told of a case that ends in an error, which is then listed as left out; by default it ends the run.

    Raises ConfigError or UnsupportedError for a case that cannot be measured, before anything is built.
    """
    check_cases(cases, rounds)
    begun, left_out = time.monotonic(), list[str]()
    found: dict[int, list[dict[str, Any]]] = {}
    conditions = environment() | {
        "device": ", ".join(dict.fromkeys(case.shape.device for case in cases)),
        "dtype": ", ".join(dict.fromkeys(_precision(case.shape) for case in cases)),
        "rounds": rounds,
        "seed": seed,
        "memory": memory,
        "shapes": {case.shape.name: dataclasses.asdict(case.shape) for case in cases},
    }
    # Stages that an arm lacks are counted as if it had them.
    weight = sum(len(case.entrants()) * len(case.stages) for case in cases) * (_COMPILE + rounds + _WARMUP)
    steps = Steps(console or Console(stderr=True), weight)

    def results() -> dict[str, Any]:
        ordered = [row for place in sorted(found) for row in found[place]]
        return {"environment": conditions, "rows": ordered, "left_out": left_out}

    for shape in dict.fromkeys(case.shape for case in cases):
        model = None
        for place, case in enumerate(cases):
            if case.shape != shape:
                continue
            if time.monotonic() - begun >= 60 * minutes:
                left_out.append(str(case))
                continue
            if model is None:
                with steps.step(f"building {shape.name}"):
                    model = shape.model(seed)
            try:
                found[place] = _measure(model, case, rounds, steps, inspect)
            except Exception as error:
                if failed is None:
                    raise
                failed(case, error)
                left_out.append(str(case))
                continue
            finally:
                _forget()
            for row, entrant in zip(found[place] if memory else (), case.entrants()):
                with steps.step(f"{case}: memory of {entrant.key}"):
                    row["peak_memory_bytes"], row["resident_memory_bytes"] = peak(case, entrant, seed) or (None, None)
            save(results())
    return results()


def _precision(shape: Shape) -> str:
    return shape.dtype + (f" with {shape.weights} weights" if shape.weights != "float" else "")


def _measure(model: PreTrainedModel, case: Case, rounds: int, steps: Steps, inspect: Inspect) -> list[dict[str, Any]]:
    """The rows of one case on `model`, which is of its shape."""
    stages = (*case.stages, *(["selection"] if "prefill" in case.stages else []))  # which it is stated as a share of
    calls: dict[str, dict[str, Call]] = {stage: {} for stage in stages}
    attention, more = {}, []
    with torch.no_grad(), _measured_as_compiled():
        for entrant in case.entrants():
            arm = _built(model, case, entrant, calls, steps)
            attention[entrant.key] = arm.attention
            more.append(inspect(model, case, entrant, arm))
        times = {at: timed(group, rounds, steps, f"{case}: timing {at}") for at, group in calls.items() if group}
    found = rows(case, case.shape.model_shape(), times, attention, case.layout())
    return [row | fields for row, fields in zip(found, more, strict=True)]


def _built(model: Any, case: Case, entrant: Entrant, calls: dict[str, dict[str, Call]], steps: Steps) -> Arm:
    """The arm, and its `calls` by stage, each called once: programs compile at their first call."""
    at = "capturing"
    with steps.step(f"{case}: compiling {entrant.key}", lambda: f"[{at}]", _COMPILE * len(case.stages)):
        arm = build(entrant.arm, model, entrant.config, case.request)
        own = arm.stages | ({"selection": arm.selection} if arm.selection else {})
        for at in [stage for stage in calls if stage in own]:  # shown while the step runs
            own[at]()
            calls[at][entrant.key] = own[at]
    return arm


def timed(calls: Mapping[Any, Call], rounds: int, steps: Steps, title: str) -> dict[Any, list[float]]:
    """`interleave` with a bar, which is drawn between rounds only: a thread that draws would disturb what is timed."""
    with steps.bar(title, rounds + _WARMUP, len(calls) * (rounds + _WARMUP)) as advance:
        return interleave(calls, rounds, _WARMUP, tick=advance, least_ms=_LEAST_MS)


def _forget() -> None:
    """Whatever earlier cases have left behind, CUDA graphs and their memory included."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _measured_as_compiled() -> Iterator[None]:
    """No arm may fall back to eager because a function was compiled too often: that fails; every case starts anew."""
    import torch._dynamo.config as config

    _forget()
    with config.patch(fail_on_recompile_limit_hit=True):
        yield
