"""What the study's methods take: time to the first token of one question, and of that the selection alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from vitcop_compile import ConfigError, UnsupportedError, optimize
from vitcop_compile.bench import Request
from vitcop_compile.bench.selection import selection_arm
from vitcop_compile.bench.timing import interleave
from vitcop_compile.cache import PrunedCache
from vitcop_compile.optimized import OptimizedModel
from vitcop_compile.progress import Steps
from vitcop_compile.schedule import Method, Schedule

WARMUP = 3


def times_of(
    dense: OptimizedModel, methods: Mapping[str, Method], request: Mapping[str, Any], backend: str, rounds: int, steps: Steps
) -> dict[str, dict[str, float]]:
    """Milliseconds by name, "dense" first: {"ttft": ..., "selection": ...}, medians of rounds in which all take turns.

    ttft: ids and pixels of `request` to the first logits; selection: what the passes insert, compiled alone, on random
    inputs of its shapes, none of dense. A method that `backend` cannot compile is left out, and the reason printed. Raises
    ConfigError for a method that the model cannot have, UnsupportedError where `backend` cannot compile dense."""
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    layout = tuple(segment for image in dense.layouts_of(**request)[0] for segment in image)
    for name, method in (("dense", dense.pruning_config), *methods.items()):
        own: dict[tuple[str, str], Callable[[], Any]] = {}
        try:
            fast = optimize(dense.model, method, backend=backend, like=dense)
            with steps.step(f"{name}: compiling"), torch.no_grad():
                own[name, "ttft"] = _call(fast, request)
                schedule = fast.schedule_of(layout)
                if schedule.stages:
                    own[name, "selection"] = _selection(fast, schedule, request, backend)
        except UnsupportedError as error:
            if name == "dense":
                raise
            _left_out(name, error)
            continue
        calls |= own
    with steps.bar("times", rounds + WARMUP) as advance, torch.no_grad():
        measured = interleave(calls, rounds, WARMUP, tick=advance)
    found: dict[str, dict[str, float]] = {}
    for (name, kind), values in measured.items():
        found.setdefault(name, {})[kind] = median(values)
    return found


def _call(fast: OptimizedModel, request: Mapping[str, Any]) -> Callable[[], Any]:
    def call() -> Any:
        return fast(**request, past_key_values=PrunedCache())

    call()
    return call


def _selection(fast: OptimizedModel, schedule: Schedule, request: Mapping[str, Any], backend: str) -> Callable[[], Any]:
    text = int(request["input_ids"].shape[1]) - schedule.patches
    asked = Request(batch=1, text_tokens=text, new_tokens=0)
    return selection_arm(schedule, asked, backend, fast.dtype, fast.device, bool(fast.host.tables))


def first_that_fits(dense: OptimizedModel, name: str, tries: Any) -> Method | None:
    """Of methods that are made in order, the first that the model can have; None with none, and the last reason printed."""
    why: Exception | str = "nothing was tried"
    for make in tries:
        try:
            method: Method = make()
            optimize(dense.model, method, backend="eager", like=dense)
        except (ConfigError, UnsupportedError) as error:
            why = error
            continue
        return method
    _left_out(name, why)
    return None


def _left_out(name: str, why: Exception | str) -> None:
    Console(stderr=True).print(Text(f"{name} left out: {why}", style="yellow"), soft_wrap=True)
