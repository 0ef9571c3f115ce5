"""The programs of one compiled model, bound to one request exactly as `generate` calls them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from ..bench import Request, inputs
from ..cache import PrunedCache
from ..optimized import OptimizedModel
from ..runtime import CompiledModel

Call = Callable[[], Any]
Program = Callable[..., Any]


def runtime_over(optimized: OptimizedModel, *, vision: Program, prefill: Program, decode: Program) -> CompiledModel:
    """The runtime of `optimized` on other programs: functions of a key's numbers, as its provider has them."""
    provider = optimized.on_demand
    kept = ("schedule", "image", "device", "dtype", "plan", "default_new_tokens")
    attributes = {name: getattr(provider, name) for name in kept}
    programs: Any = SimpleNamespace(vision=vision, prefill=prefill, decode=decode, **attributes)
    return CompiledModel(programs, optimized.config, optimized.generation_config)


@torch.no_grad()
def bind(
    optimized: OptimizedModel, request: Request, around: Callable[[str], AbstractContextManager] = lambda name: nullcontext()
) -> dict[str, Call]:
    """Calls of "vision", "prefill", "decode" (one token, always into the same row) and "ttft" (`forward`: ids and pixels to
    the first logits, checks and cache included), on the same random request for every model of one shape.

    The programs are exported and compiled by one prompt and one token that pass through the runtime, each program's first call
    inside `around(name)`; what the runtime gives them is what they are called with later.
    """
    provider, prompt = optimized.on_demand, inputs(optimized.model, request)
    bound: dict[str, tuple[Program, tuple[Any, ...]]] = {}

    def first(name: str, make: Callable[..., Program]) -> Program:
        def made(*key: Any) -> Program:
            program = make(*key)

            def call(*given: Any) -> Any:
                bound[name] = program, given
                with around(name):
                    return program(*given)

            return call

        return made

    runtime = runtime_over(
        optimized,
        vision=first("vision", provider.vision),
        prefill=first("prefill", provider.prefill),
        decode=first("decode", provider.decode),
    )
    length = prompt["input_ids"].shape[1]
    cache = PrunedCache(max_length=length + request.new_tokens)
    runtime.forward(**prompt, past_key_values=cache)
    runtime.forward(input_ids=prompt["input_ids"][:, :1], past_key_values=cache)

    def again(name: str) -> Call:
        program, given = bound[name]
        held = cache  # its buffers would serve another request once it is gone

        def call() -> Any:
            _begin_step(held)
            return program(*given)

        return torch.no_grad()(call)

    return {name: again(name) for name in bound} | {
        "ttft": lambda: optimized.forward(**prompt, past_key_values=PrunedCache(max_length=length + request.new_tokens))
    }


def _begin_step(cache: PrunedCache) -> None:
    """CUDA graphs may write over what earlier calls returned."""
    if cache.length.is_cuda:
        torch.compiler.cudagraph_mark_step_begin()
