"""Processes that compile programs into the store: a thread of Python compiles one at a time, whatever cores there are.

Each builds the model from its configuration, without values for its weights: compiled programs depend on none. Whoever is
free takes the next program, the parent too. A process that fails, or takes too long, costs its share of time and nothing else:
the parent then compiles by itself, and the log says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .quantised import parts_of
from .schedule import Method

if TYPE_CHECKING:
    from .optimized import CompiledOnDemand

log = logging.getLogger("vitcop_compile")
Asked = tuple[str, tuple]
# What another process may still take when the parent has nothing left to do: a minute, or several times what that took.
_LEAST_SECONDS, _TIMES = 60.0, 4.0


class Share(NamedTuple):
    """What a process (`filling`) is told. group: what its model must be kept by; queue: a folder of claims."""

    kind: type[nn.Module]
    config: Any
    dtype: torch.dtype
    method: Method
    backend: str
    attn_implementation: str
    threads: int
    group: str
    asked: list[Asked]
    queue: str


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def fill(
    provider: CompiledOnDemand,
    model: nn.Module,
    method: Method,
    backend: str,
    asked: list[Asked],
    processes: int | None = None,
) -> None:
    """Compiles those of `asked` that are neither held nor kept, in so many `processes`, by default one a core.

    Nothing happens where programs are not kept, or there is only one to compile: the first request does that.
    """
    missing = [ask for ask in asked if not provider.has(*ask)]
    others = min(cores() if processes is None else processes, len(missing)) - 1
    if provider.kept is None or others < 1:
        return
    if any(len(parts_of(parameter)) > 1 for parameter in model.parameters()):
        log.info("all is compiled in this process: quantised weights are not what a configuration makes")
        return
    queue = tempfile.mkdtemp(prefix="vitcop-")
    attention = provider.programs.attn_implementation
    share = Share(
        type(model), model.config, provider.dtype, method, backend, attention, torch.get_num_threads(), provider.kept.group,
        missing, queue,
    )  # fmt: skip
    started: list[tuple[subprocess.Popen, Any]] = []
    try:
        try:
            told = pickle.dumps(share)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            log.info("all is compiled in this process, as others could not be told of it: %s", error)
            return
        for _ in range(others):
            started.append(_start(told, max(1, cores() // (others + 1))))
        begun = time.monotonic()
        work(provider, share)
        _wait(started, max(_LEAST_SECONDS, _TIMES * (time.monotonic() - begun)))
    finally:
        for process, said in started:
            process.kill()
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
            process.wait()
            said.close()
        shutil.rmtree(queue, ignore_errors=True)


def _start(told: bytes, compilers: int) -> tuple[subprocess.Popen, Any]:
    said = tempfile.TemporaryFile()  # noqa: SIM115 (`fill` closes it)
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": str(compilers)}
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__package__}.filling import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=said,
        env=environment,
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it is waited for in the end, and says why
        process.stdin.write(len(told).to_bytes(8, "big") + told)
        process.stdin.flush()
    return process, said


def _wait(started: list[tuple[subprocess.Popen, Any]], seconds: float) -> None:
    """Until all have ended, or so long."""
    end = time.monotonic() + seconds
    for process, said in started:
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            log.warning("a process that compiles took more than %.0f s longer: ended, the rest is compiled here", seconds)
            continue
        if code:
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
            log.warning(
                "a process that compiles failed, the rest is compiled here: %s", lines[-1] if lines else f"exit code {code}"
            )


def work(provider: CompiledOnDemand, share: Share) -> None:
    """Makes programs that nobody has claimed, one after the other."""
    for number, (name, arguments) in enumerate(share.asked):
        try:
            os.close(os.open(Path(share.queue) / str(number), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        except FileNotFoundError:  # the parent has gone
            return
        getattr(provider, name)(*arguments)


def empty(kind: type[nn.Module], config: Any, dtype: torch.dtype) -> nn.Module:
    """A model without values: its tensors are memory that nobody has touched."""
    with torch.device("meta"):
        model = kind._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
    model = model.to_empty(device="cpu")
    model.tie_weights()
    return model.eval()
