"""What the runtime itself costs: `forward` without its programs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from ..cache import PrunedCache
from ..optimized import OptimizedModel
from .arms import Request, inputs
from .bind import with_programs
from .timing import interleave, synchronize

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
        program = make()
        outputs: list[Any] = []

        def watched(*given: Any) -> Any:
            nonlocal inside
            if replay and outputs:
                return outputs[0]
            synchronize()
            start = time.perf_counter()
            outputs[:] = [program(*given)]
            synchronize()
            inside += time.perf_counter() - start
            return outputs[0]

        return watched

    model = with_programs(optimized, watch)
    given = inputs(optimized.model, request)
    length, token = given["input_ids"].shape[1], given["input_ids"][:, :1]

    def prefill(new_tokens: int = request.new_tokens) -> PrunedCache:
        cache = PrunedCache(max_length=length + new_tokens)
        model.forward(**given, past_key_values=cache)
        return cache

    served: dict[str, list[float]] = {"prefill": [], "decode": []}
    for turn in range(3 + rounds):
        cache = None  # the next request takes its buffers
        for name in served:
            inside, start = 0.0, time.perf_counter()
            if cache is None:
                cache = prefill()
            else:
                model.forward(input_ids=token, past_key_values=cache)
            synchronize()
            spent = time.perf_counter() - start - inside
            if turn >= 3:
                served[name].append(spent * 1e3)

    replay = True
    cache = prefill(int(_LEAST_MS / _SHORTEST_MS) * (rounds + 1))
    calls: dict[str, Callable[[], Any]] = {
        "prefill_alone": prefill,
        "decode_alone": lambda: model.forward(input_ids=token, past_key_values=cache),
    }
    alone = interleave(calls, rounds, least_ms=_LEAST_MS, settle=0.0)
    return {name: statistics.median(times) for name, times in (served | alone).items()}
