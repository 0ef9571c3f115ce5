"""Cases measured: arms built, warmed, and interleaved stage by stage in one process."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel

from ..progress import Steps
from .arms import Arm, build
from .cases import Case, Entrant, check_cases
from .environment import environment
from .rows import rows
from .timing import Call, interleave

_WARMUP = 3
_LEAST_MS = 40.0
# What compiling one stage of an arm takes, in calls of it: a guess, for the estimate of what is left.
_COMPILE = 8.0


def run(
    cases: Sequence[Case],
    *,
    rounds: int = 15,
    seed: int = 0,
    memory: bool = False,
    console: Console | None = None,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Measures every case: {"environment": ..., "rows": [...]}, the rows as `rows.rows` describes them.

    Weights are random, drawn from `seed`, one model per shape. memory: also run each arm alone in a process of its own,
    for its peak memory. console: where progress is shown, standard error by default. save: given the results so far after
    every case, so that a run that is cut short loses one.

    Raises ConfigError or UnsupportedError for a case that cannot be measured, before anything is built.
    """
    cases = list(cases)
    check_cases(cases, rounds)
    console = console or Console(stderr=True)
    conditions = environment() | {
        "device": _listed(case.shape.device for case in cases),
        "dtype": _listed(case.shape.dtype for case in cases),
        "rounds": rounds,
        "seed": seed,
        "memory": memory,
        "shapes": {case.shape.name: dataclasses.asdict(case.shape) for case in cases},
    }
    found: dict[int, list[dict[str, Any]]] = {}
    steps = Steps(console, sum(_weight(case, rounds) for case in cases))

    def results() -> dict[str, Any]:
        return {"environment": conditions, "rows": [row for place in sorted(found) for row in found[place]]}

    for shape in dict.fromkeys(case.shape for case in cases):
        with steps.step(f"building {shape.name}"):
            model = shape.model(seed)
        for place, case in enumerate(cases):
            if case.shape == shape:
                found[place] = measure(model, case, rounds, steps, seed=seed, memory=memory)
                save(results())
        del model
    return results()


def measure(
    model: PreTrainedModel, case: Case, rounds: int, steps: Steps, *, seed: int = 0, memory: bool = False
) -> list[dict[str, Any]]:
    """The rows of one case on `model`, which is of the case's shape and was made from `seed`."""
    with torch.no_grad(), _measured_as_compiled():
        arms = {entrant.key: _built(model, case, entrant, steps) for entrant in case.entrants()}
        times = _times(arms, case, rounds, steps)
    attention = {key: arm.attention for key, arm in arms.items()}
    del arms
    gc.collect()
    peaks = {}
    if memory:
        from .memory import peak  # not above: `python -m` runs that file as a module that nothing has imported yet

        for entrant in case.entrants():
            with steps.step(f"{_title(case)}: memory of {entrant.key}"):
                peaks[entrant.key] = peak(case, entrant, seed)
    return rows(case, case.shape.model_shape(), times, attention, peaks)


def _built(model: PreTrainedModel, case: Case, entrant: Entrant, steps: Steps) -> Arm:
    """The arm, with every measured stage run once: programs compile at their first call."""
    at = "capturing"
    with steps.step(f"{_title(case)}: compiling {entrant.key}", lambda: f"[{at}]", _COMPILE * len(case.stages)):
        arm = build(entrant.arm, model, entrant.config, case.request)
        for at, call in _calls(arm, case).items():  # noqa: B007  (shown while the step runs)
            call()
    return arm


def _calls(arm: Arm, case: Case) -> dict[str, Call]:
    calls = {stage: arm.stages[stage] for stage in case.stages if stage in arm.stages}
    if arm.selection is not None and "prefill" in case.stages:  # which it is stated as a share of
        calls["selection"] = arm.selection
    return calls


def timed(calls: dict[str, Call], rounds: int, steps: Steps, title: str) -> dict[str, list[float]]:
    """`interleave` with a bar, which is drawn between rounds only: a thread that draws would disturb what is timed."""
    with steps.bar(title, rounds + _WARMUP, len(calls) * (rounds + _WARMUP)) as advance:
        return interleave(calls, rounds, _WARMUP, tick=advance, least_ms=_LEAST_MS)


def _times(arms: dict[str, Arm], case: Case, rounds: int, steps: Steps) -> dict[str, dict[str, list[float]]]:
    calls = {key: _calls(arm, case) for key, arm in arms.items()}
    times = {}
    for stage in (*case.stages, "selection"):
        group = {key: of_arm[stage] for key, of_arm in calls.items() if stage in of_arm}
        if group:
            times[stage] = timed(group, rounds, steps, f"{_title(case)}: timing {stage}")
    return times


def _weight(case: Case, rounds: int) -> float:
    """Of all steps of a case together; stages that an arm lacks are counted as if it had them."""
    return len(case.entrants()) * len(case.stages) * (_COMPILE + rounds + _WARMUP)


@contextmanager
def _measured_as_compiled() -> Iterator[None]:
    """No arm may fall back to eager because a function was compiled too often: that fails, and every case starts anew."""
    import torch._dynamo.config as config

    torch.compiler.reset()
    with config.patch(fail_on_recompile_limit_hit=True):
        yield


def _title(case: Case) -> str:
    return f"{case.shape.name} {case.backend} batch {case.batch}"


def _listed(values: Any) -> str:
    return ", ".join(dict.fromkeys(values))
