"""Peak memory of one arm alone: a process that builds it, serves a request, forgets the peak, and serves another.

`python -m vitcop_compile.bench.memory` reads a specification from standard input, as `peak` writes it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import ViTCoPConfig
from ..errors import UnsupportedError
from .arms import ARMS, Arm, Request, build
from .cases import Case, Entrant, Shape

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_FORGET_PEAK = "5"  # proc(5): resets the peak resident set size to the current one


def available(device: str) -> bool:
    """Whether the peak can be measured: on CUDA, and on the CPU under Linux."""
    return device == "cuda" or _CLEAR.exists()


def peak(case: Case, entrant: Entrant, seed: int = 0) -> tuple[int, int] | None:
    """(peak while serving one request, in use before it) in bytes, weights included; None where `available` says no.

    On the CPU it is the resident memory of the process, interpreter and libraries included; on CUDA what torch has
    allocated. Raises UnsupportedError, with the last line of its errors, if the process fails.
    """
    if not available(case.shape.device):
        return None
    specification = {
        "shape": dataclasses.asdict(case.shape),
        "request": dataclasses.asdict(case.request),
        "arm": entrant.arm,
        "config": entrant.config.to_json(),
        "source": _source(ARMS[entrant.arm]),
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "vitcop_compile.bench.memory"]
    done = subprocess.run(command, input=json.dumps(specification), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnsupportedError(f"arm {entrant.key!r} cannot be measured in a process of its own: {last}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return found["peak"], found["before"]


def serve(arm: Arm) -> None:
    """One request and one more token."""
    for stage in ("ttft", "decode"):
        if stage in arm.stages:
            arm.stages[stage]()


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
    _trim()
    _CLEAR.write_text(_FORGET_PEAK)
    before = _status("VmRSS")
    request()
    return _status("VmHWM"), before


def main() -> None:
    """Reads the specification, prints {"peak": bytes, "before": bytes} as the last line."""
    given = json.loads(sys.stdin.read())
    torch.set_num_threads(given["threads"])
    if given["source"] is not None:
        _load(Path(given["source"]))
    shape = Shape(**given["shape"])
    with torch.no_grad():
        arm = build(
            given["arm"], shape.model(given["seed"]), ViTCoPConfig.from_json(given["config"]), Request(**given["request"])
        )
        serve(arm)
        found, before = around(lambda: serve(arm), shape.device)
    print(json.dumps({"peak": found, "before": before}))


def _source(builder: Callable) -> str | None:
    """The file that registers an arm from outside the package, which the process has to run first."""
    inside = Path(__file__).parent.parent
    while isinstance(builder, functools.partial):
        builder = builder.func
    file = inspect.getsourcefile(builder)
    return None if file is None or inside in Path(file).resolve().parents else str(Path(file).resolve())


def _load(path: Path) -> None:
    # An arm's file may import its neighbours, as it does where it is run as a script.
    sys.path.insert(0, str(path.parent))
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module
    specification.loader.exec_module(module)


def _trim() -> None:
    """Gives freed pages back, so that what a compiler left behind does not count as resident."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc only
        trim(0)


def _status(field: str) -> int:
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
