"""Interleaved timing: every arm runs in every round, so that what disturbs one disturbs all."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]
# Seconds before every timed call: idle threads of OpenMP and of onnxruntime spin for some milliseconds before they sleep,
# and the arm that comes next would pay for the arm before it.
SETTLE = 0.02


def interleave(
    arms: Mapping[Any, Call],
    rounds: int,
    warmup: int = 3,
    tick: Callable[[], None] = lambda: None,
    least_ms: float = 0.0,
    settle: float = SETTLE,
) -> dict[Any, list[float]]:
    """Milliseconds of every arm in every round.

    The order is drawn anew for every other round and turned around for the one after it, so that no arm always follows the
    same one. least_ms: an arm that was faster than this in a warm-up round runs several times in every round that counts,
    and its mean is taken: on a shared machine a short call is either interrupted or not, and the median of such rounds jumps
    between the two; and waking a thread is a cost of the pause, not of the call. settle: seconds of that pause.
    """
    shortest = dict.fromkeys(arms, math.inf)
    times: dict[Any, list[float]] = {name: [] for name in arms}
    draw = random.Random(0)
    order = list(arms)
    for turn in range(warmup + rounds):
        if turn % 2:
            order.reverse()
        else:
            draw.shuffle(order)
        for name in order:
            if turn < warmup:
                shortest[name] = min(shortest[name], _milliseconds(arms[name], 1, settle))
            else:
                number = max(1, math.ceil(least_ms / shortest[name]))
                times[name].append(_milliseconds(arms[name], number, settle))
        tick()
    return times


def _milliseconds(call: Call, number: int, settle: float) -> float:
    """Mean of `number` calls in a row, after a pause."""
    synchronize()
    time.sleep(settle)
    start = time.perf_counter()
    for _ in range(number):
        call()
    synchronize()
    return (time.perf_counter() - start) * 1e3 / number


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of two arms of the same rounds."""
    return summary(ratios(over, under))["median"]


def ratios(over: list[float], under: list[float]) -> list[float]:
    """The ratio of two arms in every round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def summary(values: list[float]) -> dict[str, Any]:
    """Median, and first and third quartile."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "quartiles": [low, high]}


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
