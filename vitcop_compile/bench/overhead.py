"""What the runtime itself costs: `forward` without its programs."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

from ..optimized import OptimizedModel
from .arms import Request
from .bind import Served, with_programs
from .timing import Call, interleave, synchronize

_LEAST_MS = 0.5
_SHORTEST_MS = 0.01


def overhead(optimized: OptimizedModel, request: Request, rounds: int = 51) -> dict[str, float]:
    """Milliseconds of `forward` outside the programs, medians: {"prefill", "decode"} in requests as they are served, and
    {"prefill_alone", "decode_alone"} called in a row over programs that hand out tensors made before.

    Everything is in them but the programs: checks of the inputs and their values, alignment, buffers and the copy of keys and
    values into them. Alone, all of it stays in the processor's caches; between two programs nothing does.
    """
    inside, replay = 0.0, False

    def watch(name: str, make: Callable[[], Any]) -> Callable[..., Any]:
        program, outputs = make(), list[Any]()

        def watched(*given: Any) -> Any:
            nonlocal inside
            if not (replay and outputs):
                synchronize()
                start = time.perf_counter()
                outputs[:] = [program(*given)]
                synchronize()
                inside += time.perf_counter() - start
            return outputs[0]

        return watched

    model, served = with_programs(optimized, watch), Served(optimized, request)
    times: dict[str, list[float]] = {"prefill": [], "decode": []}
    for turn in range(3 + rounds):
        served.filled = None  # the next request takes its buffers
        for name, step in (("prefill", served.prefill), ("decode", served.decode)):
            inside, start = 0.0, time.perf_counter()
            step(model)
            synchronize()
            if turn >= 3:
                times[name].append((time.perf_counter() - start - inside) * 1e3)

    replay = True
    room = int(_LEAST_MS / _SHORTEST_MS) * (rounds + 1)
    longer = Served(optimized, dataclasses.replace(request, new_tokens=request.new_tokens + room))
    longer.prefill(model)
    calls: dict[str, Call] = {
        "prefill_alone": lambda: served.forward(model),
        "decode_alone": lambda: longer.decode(model),
    }
    times |= interleave(calls, rounds, least_ms=_LEAST_MS, settle=0.0)
    return {name: statistics.median(found) for name, found in times.items()}
