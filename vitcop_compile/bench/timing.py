"""Interleaved timing: every arm runs in every round, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]


def interleave(
    arms: dict[str, Call], rounds: int, warmup: int = 3, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Milliseconds of every arm in every round; the order of the arms turns from round to round."""
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            synchronize()
            start = time.perf_counter()
            arms[name]()
            synchronize()
            if turn >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
        tick()
    return times


def median_ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios of two arms of the same rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(times: list[float]) -> tuple[float, float]:
    """First and third quartile."""
    if len(times) < 2:
        return times[0], times[0]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, high


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
