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
    """`optimize(model, config, backend=backend)`, prompts not padded to a bucket; stages as `bind` has them, the selection
    alone compiled when it is first called. Raises as `optimize` does."""
    with torch.no_grad():
        optimized = optimize(model, config, backend=backend, prompt_buckets=(request.text_tokens,))

    @functools.cache
    def selection() -> Call:
        return selection_arm(optimized.schedule, request, backend, optimized.dtype, optimized.device)

    attention = _attention(optimized, backend, request)
    return Arm(bind(optimized, request), attention, (lambda: selection()()) if config.prune else None)


def _attention(optimized: OptimizedModel, backend: str, request: Request) -> dict[str, str]:
    """The attention kernel of every stage, at the lengths of its first layer."""
    schedule, shape, batch = optimized.schedule, optimized.schedule.shape, request.batch
    kernel = functools.partial(backend_kernel, backend, dtype=optimized.dtype, device=optimized.device)
    query = anchors(optimized.programs.captured.encoder.graph)[0].args[0].meta["val"]  # type: ignore[union-attr]
    encoder = (batch, query.shape[1], shape.prefix_tokens + shape.patches, query.shape[3])
    rows = schedule.image_tokens + request.text_tokens
    cache = (batch, shape.kv_heads, rows + request.new_tokens, shape.head_dim)
    vision = kernel(encoder, encoder)
    prefill = kernel((batch, shape.heads, rows, shape.head_dim), (*cache[:2], rows, shape.head_dim), causal=True)
    decode = kernel((batch, shape.heads, 1, shape.head_dim), cache, decode=True)
    return {"vision": vision, "prefill": prefill, "decode": decode, "ttft": ", ".join(dict.fromkeys((vision, prefill)))}


for _name in BACKENDS:
    register(_name)(functools.partial(ours, _name))
