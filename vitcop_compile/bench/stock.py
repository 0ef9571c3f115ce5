"""The dense baselines a user has without this package: the stock model as it is, and the stock model under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from ..cache import CACHE_NAME
from ..config import ViTCoPConfig
from ..errors import ConfigError
from ..families import family_of
from .arms import Arm, Request, begin_step, inputs, register
from .kernels import recorded


@register("stock_eager")
def stock_eager(model: PreTrainedModel, config: ViTCoPConfig, request: Request) -> Arm:
    """transformers as it is, with torch's fused attention.

    Raises ConfigError for a config that prunes, and as `check_stock` does.
    """
    _check(model, config)
    given = inputs(model, request)
    ids, pixels = given["input_ids"], given["pixel_values"]
    token = ids[:, :1].contiguous()
    with torch.no_grad():
        features = _vision(model, pixels)
        # What generate() decodes on by default. It grows by concatenation, which copies it in every step: that is a cost of
        # the step. Cropping it back takes a view per layer, next to nothing.
        cache = _prefill(model, ids, features)[1]

    def decode() -> tuple[Tensor, ...]:
        logits = _decode(model, token, cache)
        cache.crop(-1)
        return (logits,)

    stages = {
        "vision": torch.no_grad()(lambda: _vision(model, pixels)),
        "prefill": torch.no_grad()(lambda: _prefill(model, ids, features)),
        "decode": torch.no_grad()(decode),
        "ttft": torch.no_grad()(lambda: _whole(model, ids, pixels)),
    }
    return Arm("stock_eager", stages, {name: recorded(call) for name, call in stages.items()})


@register("stock_compile")
def stock_compile(model: PreTrainedModel, config: ViTCoPConfig, request: Request) -> Arm:
    """The same under torch.compile: one full graph per stage at static shapes, with CUDA graphs on CUDA.

    Prefill and the whole make a DynamicCache inside the graph, so that no mask exists and nothing is copied into a longer
    cache: better than `generate(cache_implementation="static")`, which runs its prefill in eager mode. Decoding is what that
    call compiles: a StaticCache of prompt and new tokens. Raises as `stock_eager` does.
    """
    _check(model, config)
    given = inputs(model, request)
    ids, pixels = given["input_ids"], given["pixel_values"]
    token = ids[:, :1].contiguous()
    prompt = ids.shape[1]
    cache: Any = StaticCache(config=model.config, max_cache_len=prompt + request.new_tokens)
    with torch.no_grad():
        # transformers installs its hooks for hidden states in the first call, which dynamo cannot trace: it is this one.
        features = _vision(model, pixels)
        # Filled in eager mode, as generate() does: this allocates the cache, at addresses that CUDA graphs may rely on.
        model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
    lengths = [layer.cumulative_length for layer in cache.layers]

    def vision(pixels: Tensor) -> Tensor:
        return _vision(model, pixels)

    def prefill(ids: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        return _flat(*_prefill(model, ids, features))

    def decode(token: Tensor) -> tuple[Tensor, ...]:
        logits = _decode(model, token, cache)
        # Back to the prompt's end: every call writes the same row. Inside the graph this is one assignment per layer, in
        # place of the step's own.
        for length in lengths:
            length.fill_(prompt)
        return (logits,)

    def whole(ids: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        return _flat(*_whole(model, ids, pixels))

    bound: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "vision": (vision, (pixels,)),
        "prefill": (prefill, (ids, features)),
        "decode": (decode, (token,)),
        "ttft": (whole, (ids, pixels)),
    }
    # Compiled or not, torch chooses by types, head sizes and masks.
    attention = {name: recorded(functools.partial(function, *args)) for name, (function, args) in bound.items()}
    stages = {name: _compiled(function, args) for name, (function, args) in bound.items()}
    return Arm("stock_compile", stages, attention)


def check_stock(model: Any) -> None:
    """Raises UnsupportedError for a model of no known family, ConfigError if it is in training mode or not on "sdpa"."""
    family_of(model)
    if model.training:
        raise ConfigError("the model is in training mode: call model.eval() first")
    for part in (model.config, model.config.text_config, model.config.vision_config):
        if part._attn_implementation != "sdpa":
            raise ConfigError(
                f"the {part.model_type} part has attn_implementation={part._attn_implementation!r}, the baselines are stated "
                "for 'sdpa': load the model with attn_implementation='sdpa'"
            )


def _check(model: PreTrainedModel, config: ViTCoPConfig) -> None:
    check_stock(model)
    if config.prune:
        raise ConfigError("a stock model cannot prune: pass ViTCoPConfig.dense(), or choose an arm that prunes")


def _vision(model: Any, pixels: Tensor) -> Tensor:
    """Projected features [B, patches, D]. transformers hands them out image by image, and joins them as is done here."""
    return torch.cat(tuple(model.get_image_features(pixel_values=pixels).pooler_output)).unflatten(0, (pixels.shape[0], -1))


def _prefill(model: Any, ids: Tensor, features: Tensor) -> tuple[Tensor, DynamicCache]:
    """(logits [B, 1, vocab], cache) from ids and features, spliced as `LlavaModel.forward` splices them."""
    embeddings = model.get_input_embeddings()(ids)
    image = model.model.get_placeholder_mask(ids, inputs_embeds=embeddings, image_features=features)
    embeddings = embeddings.masked_scatter(image, features)
    outputs = model.model.language_model(inputs_embeds=embeddings, use_cache=True)
    return model.lm_head(outputs.last_hidden_state[:, -1:]), outputs[CACHE_NAME]


def _decode(model: Any, token: Tensor, cache: DynamicCache | StaticCache) -> Tensor:
    """Logits [B, 1, vocab] of one token on a filled cache."""
    return model(input_ids=token, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache}).logits


def _whole(model: Any, ids: Tensor, pixels: Tensor) -> tuple[Tensor, DynamicCache]:
    """(logits [B, 1, vocab], cache) from ids and pixels."""
    outputs = model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)
    return outputs.logits, outputs[CACHE_NAME]


def _flat(logits: Tensor, cache: Any) -> tuple[Tensor, ...]:
    """Everything a graph must compute: without its keys and values a prefill would be shortened to what the logits need."""
    return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def _compiled(function: Callable[..., Any], args: tuple[Tensor, ...]) -> Callable[[], Any]:
    # dynamo counts recompilations by code object and gives up at the eighth: every request gets an object of its own.
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    # What mode="reduce-overhead" stands for, as in `backends.inductor`. No input is the output of a graph.
    options: Any = {"triton.cudagraphs": True} if args[0].is_cuda else None
    program = torch.compile(own, fullgraph=True, dynamic=False, options=options)

    @torch.no_grad()
    def call() -> Any:
        begin_step(args[0].device)
        return program(*args)

    return call
