"""Peak memory of one arm alone: a process that builds it, serves a request, forgets the peak, and serves another."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedError
from .arms import ARMS, Build
from .cases import Case, Entrant

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_FORGET_PEAK = "5"  # proc(5): resets the peak resident set size to the current one


def peak(case: Case, entrant: Entrant, seed: int = 0) -> tuple[int, int] | None:
    """(peak while serving one request, in use before it) in bytes, weights included.

    On the CPU it is the resident memory of the process, interpreter and libraries included, and None where that cannot be
    measured, which takes Linux; on CUDA what torch has allocated. Raises UnsupportedError, with what it said, if the process
    fails. The arm's builder must be one that another process can import.
    """
    if case.shape.device == "cpu" and not _CLEAR.exists():
        return None
    # A new process, and none that is forked: what this one holds must not count.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        try:
            given = (ARMS[entrant.arm], case, entrant, seed, torch.get_num_threads())
            return process.submit(_alone, *given).result()
        except Exception as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise UnsupportedError(f"arm {entrant.key!r} cannot be measured in a process of its own: {last[0]}") from None


def _alone(build: Build, case: Case, entrant: Entrant, seed: int, threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    with torch.no_grad():
        arm = build(case.shape.model(seed), entrant.config, case.request)
        calls = [arm.stages[stage] for stage in ("ttft", "decode") if stage in arm.stages]  # a request and one more token

        def serve() -> None:
            for call in calls:
                call()

        serve()
        return around(serve, case.shape.device)


def around(request: Callable[[], Any], device: str = "cpu") -> tuple[int, int]:
    """(peak during `request`, in use before it) in bytes of this process. Linux or CUDA."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        request()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), before
    # Freed pages are given back, where libc can, so that what a compiler left behind does not count as resident.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    _CLEAR.write_text(_FORGET_PEAK)
    before = _status("VmRSS")
    request()
    return _status("VmHWM"), before


def _status(field: str) -> int:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024
