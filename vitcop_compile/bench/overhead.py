"""What the runtime itself costs: `forward` over programs that only hand out tensors made before."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from ..cache import PrunedCache
from ..optimized import OptimizedModel
from .arms import Request, inputs
from .timing import interleave


class _Replay:
    """A provider whose programs return what the real ones returned the first time."""

    def __init__(self, provider: Any):
        self._provider = provider
        self._made: dict[tuple, Callable[..., Any]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._provider, name)

    def vision(self, batch: int) -> Callable[..., Any]:
        return self._replay("vision", batch)

    def prefill(self, batch: int, rows: int, image: bool) -> Callable[..., Any]:
        return self._replay("prefill", batch, rows, image)

    def decode(self, batch: int, cache_rows: int) -> Callable[..., Any]:
        return self._replay("decode", batch, cache_rows)

    def _replay(self, kind: str, *key: Any) -> Callable[..., Any]:
        if (kind, *key) not in self._made:
            program = getattr(self._provider, kind)(*key)
            outputs: list[Any] = []

            def replay(*given: Any) -> Any:
                if not outputs:
                    outputs.append(program(*given))
                return outputs[0]

            self._made[(kind, *key)] = replay
        return self._made[(kind, *key)]


def overhead(optimized: OptimizedModel, request: Request, rounds: int = 51) -> dict[str, float]:
    """Milliseconds of `forward` outside the programs: {"prefill": ..., "decode": ...}, medians.

    Everything is in them but the programs: checks of the inputs and their values, alignment, buffers and the copy of keys and
    values into them.
    """
    replaying = OptimizedModel(optimized.model, _Replay(optimized.on_demand), optimized.settings, optimized.backend)  # type: ignore[arg-type]
    given = inputs(optimized.model, request)
    length = given["input_ids"].shape[1]

    def prefill() -> Any:
        return replaying.forward(**given, past_key_values=PrunedCache(max_length=length + 10 * rounds))

    cache = prefill().past_key_values
    token = given["input_ids"][:, :1]
    calls = {"prefill": prefill, "decode": lambda: replaying.forward(input_ids=token, past_key_values=cache)}
    return {name: statistics.median(times) for name, times in interleave(calls, rounds).items()}
