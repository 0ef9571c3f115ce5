"""This package's programs as arms, one per backend: "eager", "inductor", "onnxruntime", ... Dense or pruned, as configured."""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedModel

from ..backends import BACKENDS
from ..config import ViTCoPConfig
from ..optimized import OptimizedModel
from ..passes.token_axis import anchors
from ..pipeline import optimize
from .arms import Arm, Request, register
from .bind import bind
from .kernels import backend_kernel
from .selection import selection_arm
from .timing import Call


def ours(backend: str, model: PreTrainedModel, config: ViTCoPConfig, request: Request) -> Arm:
    """`optimize(model, config, backend=backend)`, prompts not padded to a bucket; stages as `bind` has them.

    Raises as `optimize` does.
    """
    with torch.no_grad():
        optimized = optimize(model, config, backend=backend, prompt_buckets=(request.text_tokens,))
        selection = _selection(optimized, backend, request) if config.prune else None
        return Arm(backend, bind(optimized, request), _attention(optimized, backend, request), selection)


def _selection(optimized: OptimizedModel, backend: str, request: Request) -> Call:
    """The selection alone, compiled when first called."""

    @functools.cache
    def made() -> Call:
        return selection_arm(optimized.schedule, request, backend, optimized.dtype, optimized.device)

    return lambda: made()()


def _attention(optimized: OptimizedModel, backend: str, request: Request) -> dict[str, str]:
    """The attention kernel of every stage, at the lengths of its first layer."""
    schedule, shape, batch = optimized.schedule, optimized.schedule.shape, request.batch
    kind = (optimized.dtype, optimized.device)
    query = anchors(optimized.programs.captured.encoder.graph)[0].args[0]
    heads, width = query.meta["val"].shape[1], query.meta["val"].shape[3]  # type: ignore[union-attr]
    encoder = (batch, heads, shape.prefix_tokens + shape.patches, width)
    rows = schedule.image_tokens + request.text_tokens
    prompt, cached = (batch, shape.heads, rows, shape.head_dim), rows + request.new_tokens
    vision = backend_kernel(backend, encoder, encoder, *kind)
    prefill = backend_kernel(backend, prompt, (batch, shape.kv_heads, rows, shape.head_dim), *kind, causal=True)
    decode = backend_kernel(
        backend, (batch, shape.heads, 1, shape.head_dim), (batch, shape.kv_heads, cached, shape.head_dim), *kind, decode=True
    )
    whole = ", ".join(dict.fromkeys((vision, prefill)))
    return {"vision": vision, "prefill": prefill, "decode": decode, "ttft": whole}


for _name in BACKENDS:
    register(_name)(functools.partial(ours, _name))
