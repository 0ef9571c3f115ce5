"""This package's programs as arms, one per backend: "eager", "inductor", "onnxruntime", ... Dense or pruned, as configured."""

from __future__ import annotations

import functools

import torch
from transformers import PreTrainedModel

from .. import store
from ..backends import BACKENDS
from ..optimized import OptimizedModel
from ..pipeline import optimize
from ..schedule import Method, Schedule
from .arms import Arm, Request, layouts, register
from .bind import bind
from .kernels import backend_kernel
from .selection import selection_arm
from .timing import Call


def ours(backend: str, model: PreTrainedModel, config: Method, request: Request) -> Arm:
    """`optimize(model, config, backend=backend)`, prompts not padded to a bucket; stages as `bind` has them, the selection
    alone compiled when it is first called. Raises as `optimize` does."""
    with torch.no_grad(), store.off():  # what is measured is compiled here and now
        optimized = optimize(model, config, backend=backend, prompt_buckets=(request.text_tokens,))

    layout = tuple(segment for image in layouts(optimized.host, request) for segment in image)
    schedule = optimized.on_demand.schedule_of(layout)

    @functools.cache
    def selection() -> Call:
        padded = bool(optimized.host.tables)
        return selection_arm(schedule, request, backend, optimized.dtype, optimized.device, padded)

    attention = _attention(optimized, schedule, backend, request)
    return Arm(bind(optimized, request), attention, (lambda: selection()()) if schedule.stages else None)


def _attention(optimized: OptimizedModel, schedule: Schedule, backend: str, request: Request) -> dict[str, str]:
    """The attention kernel of every stage, at the lengths of its first layer; an encoder's windows are taken for the whole."""
    shape, batch = schedule.shape, request.batch
    kernel = functools.partial(backend_kernel, backend, dtype=optimized.dtype, device=optimized.device)
    vision = optimized.model.config.vision_config
    heads = getattr(vision, "num_heads", None) or vision.num_attention_heads
    patches = schedule.layout[0].candidates * schedule.layout[0].taps if optimized.host.tables else shape.patches
    encoder = (batch, heads, shape.prefix_tokens + patches, shape.vision_hidden // heads)
    rows = schedule.image_tokens + request.text_tokens
    cache = (batch, shape.kv_heads, rows + request.new_tokens, shape.head_dim)
    seen = kernel(encoder, encoder, decode=bool(optimized.host.tables))  # which have a mask as well
    prefill = kernel((batch, shape.heads, rows, shape.head_dim), (*cache[:2], rows, shape.head_dim), causal=True)
    decode = kernel((batch, shape.heads, 1, shape.head_dim), cache, decode=True)
    return {"vision": seen, "prefill": prefill, "decode": decode, "ttft": ", ".join(dict.fromkeys((seen, prefill)))}


for _name in BACKENDS:
    register(_name)(functools.partial(ours, _name))
