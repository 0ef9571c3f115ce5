"""This package's programs as arms, one per backend: "eager", "inductor", "onnxruntime", ... Dense or pruned, as configured."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..backends import BACKENDS
from ..cache import PrunedCache
from ..config import ViTCoPConfig
from ..optimized import OptimizedModel
from ..passes.token_axis import anchors
from ..pipeline import optimize
from .arms import Arm, Request, begin_step, inputs, register
from .kernels import backend_kernel
from .selection import selection_arm
from .timing import Call


def ours(backend: str, model: PreTrainedModel, config: ViTCoPConfig, request: Request) -> Arm:
    """`optimize(model, config, backend=backend)` at exactly the request's lengths: prompts are not padded to a bucket.

    A program is exported and compiled when its stage is first called. Raises as `optimize` does.
    """
    with torch.no_grad():
        optimized = optimize(model, config, backend=backend, prompt_buckets=(request.text_tokens,))
        stages = _Stages(optimized, request)
        calls = {"vision": stages.vision, "prefill": stages.prefill, "decode": stages.decode, "ttft": stages.ttft}
        attention = _attention(optimized, backend, request)
        return Arm(backend, calls, attention, _Selection(optimized, backend, request) if config.prune else None)


class _Stages:
    """The three programs as `generate` calls them, each on inputs of its own, made when first needed."""

    def __init__(self, optimized: OptimizedModel, request: Request):
        given = inputs(optimized.model, request)
        self._ids, self._pixels = given["input_ids"], given["pixel_values"]
        self._optimized, self._batch, self._new_tokens = optimized, request.batch, request.new_tokens
        self._provider, self._schedule = optimized.on_demand, optimized.schedule
        self._rows = self._schedule.image_tokens + request.text_tokens

    @torch.no_grad()
    def vision(self) -> Any:
        """features [B, n, D], and (kept, labels) where patches are pruned."""
        begin_step(self._ids.device)
        return self._provider.vision(self._batch)(self._pixels)

    @torch.no_grad()
    def prefill(self) -> Any:
        """logits [B, 1, vocab], the index of every stage, keys and values of every layer."""
        prompt = self._prompt
        begin_step(self._ids.device)
        return self._provider.prefill(self._batch, self._rows, True)(*prompt)

    @torch.no_grad()
    def decode(self) -> Any:
        """(logits [B, 1, vocab],); every call writes the row behind the prompt, so that no state changes."""
        filled = self._filled
        begin_step(self._ids.device)
        return self._provider.decode(self._batch, self._rows + self._new_tokens)(*filled)

    @torch.no_grad()
    def ttft(self) -> tuple[Tensor]:
        """(logits [B, 1, vocab],) from ids and pixels: input checks, alignment and the filling of a cache included."""
        cache = PrunedCache(max_length=self._ids.shape[1] + self._new_tokens)
        found = self._optimized.forward(input_ids=self._ids, pixel_values=self._pixels, past_key_values=cache)
        assert found.logits is not None
        return (found.logits,)

    @functools.cached_property
    def _prompt(self) -> tuple[Tensor, ...]:
        """What prefill takes: ids, last row, features, visual rows, and labels where patches are pruned."""
        features, *selection = [tensor.clone() for tensor in self.vision()]
        kept, patches = self._schedule.image_tokens, self._schedule.shape.patches
        # As `align` has it: `inputs` puts the image behind the first token; ids at visual rows are not looked at.
        image = self._ids.new_zeros(self._batch, kept)
        ids = torch.cat((self._ids[:, :1], image, self._ids[:, 1 + patches :]), 1)
        last = torch.full((self._batch,), self._rows - 1, dtype=torch.int64, device=ids.device)
        visual = torch.arange(1, 1 + kept, device=ids.device).repeat(self._batch, 1)
        return (ids, last, features, visual, *selection[1:])

    @functools.cached_property
    def _filled(self) -> tuple[Tensor, ...]:
        """What decode takes: a token, the length, the offsets, and caches that hold the prompt."""
        shape, stages = self._schedule.shape, len(self._schedule.stages)
        found = list(self.prefill())[1 + stages :]
        shapes = self._schedule.cache_shapes(self._batch, self._rows + self._new_tokens)
        caches = [rows.new_zeros(shapes[i // 2]) for i, rows in enumerate(found)]
        assert len(caches) == 2 * shape.layers
        for cache, rows in zip(caches, found, strict=True):
            cache[:, :, : rows.shape[2]] = rows
        token = self._ids[:, :1].contiguous()
        length = torch.full((self._batch,), self._rows, dtype=torch.int64, device=token.device)
        filled = (token, length, self._optimized.programs.offsets(), *caches)
        if token.is_cuda:  # as `PrunedCache` does: without it, CUDA graphs would copy every cache, or not be used
            for tensor in filled:
                torch._dynamo.mark_static_address(tensor, guard=False)
        return filled


class _Selection:
    """The selection alone, compiled when first called."""

    def __init__(self, optimized: OptimizedModel, backend: str, request: Request):
        self._optimized, self._backend, self._request = optimized, backend, request

    @functools.cached_property
    def _call(self) -> Call:
        optimized, request = self._optimized, self._request
        schedule = optimized.pruning_config.schedule(optimized.schedule.shape, text_tokens=request.text_tokens)
        return selection_arm(schedule, request, self._backend, optimized.dtype, optimized.device)

    def __call__(self) -> Any:
        return self._call()


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
