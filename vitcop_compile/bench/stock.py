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
from ..errors import ConfigError
from ..families import family_of
from ..schedule import Method
from .arms import Arm, Request, begin_step, inputs, register
from .kernels import recorded
from .timing import Call


@register("stock_eager")
def stock_eager(model: PreTrainedModel, config: Method, request: Request) -> Arm:
    """transformers as it is, with torch's fused attention.

    Raises ConfigError for a config that prunes, and as `check_stock` does.
    """
    # What generate() decodes on by default. It grows by concatenation, which copies it in every step: that is a cost of the
    # step. Cropping it back takes a view per layer, next to nothing.
    made, back = lambda rows: DynamicCache(config=model.config), lambda cache, prompt: cache.crop(-1)
    return _arm(model, config, request, made, back, lambda function, args, _: functools.partial(function, *args))


@register("stock_compile")
def stock_compile(model: PreTrainedModel, config: Method, request: Request) -> Arm:
    """The same under torch.compile: one full graph per stage at static shapes, with CUDA graphs on CUDA.

    Encoders that are told the grids of their images read them on the host, as their stock code has it: "vision" and "ttft" of
    these are torch.compile with its graph breaks, which is what a user gets.

    Prefill and the whole make a DynamicCache inside the graph, so that no mask exists and nothing is copied into a longer
    cache: better than `generate(cache_implementation="static")`, which runs its prefill in eager mode. Decoding is what that
    call compiles: a StaticCache of prompt and new tokens. Raises as `stock_eager` does.
    """

    def rewind(cache: Any, prompt: int) -> None:
        # Inside the graph this is one assignment per layer, in place of the step's own.
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    def made(rows: int) -> StaticCache:
        return StaticCache(config=model.config, max_cache_len=rows)

    return _arm(model, config, request, made, rewind, _compiled)


def check_stock(model: Any, config: Method | None = None) -> None:
    """Raises UnsupportedError for a model of no known family, ConfigError if it is in training mode or not on "sdpa", and
    for a config that prunes."""
    family_of(model)
    if model.training:
        raise ConfigError("the model is in training mode: call model.eval() first")
    for part in (model.config, model.config.text_config, model.config.vision_config):
        if part._attn_implementation != "sdpa":
            raise ConfigError(
                f"the {part.model_type} part has attn_implementation={part._attn_implementation!r}, the baselines are stated "
                "for 'sdpa': load the model with attn_implementation='sdpa'"
            )
    if config is not None and getattr(config, "prune", True):
        raise ConfigError("a stock model cannot prune: pass ViTCoPConfig.dense(), or choose an arm that prunes")


def _arm(
    model: Any,
    config: Method,
    request: Request,
    make_cache: Callable[[int], Any],
    rewind: Callable[[Any, int], None],
    served: Callable[[Callable[..., Any], tuple[Tensor, ...], bool], Call],
) -> Arm:
    """make_cache(rows) -> what decoding runs on; rewind(cache, prompt) takes a step back: every step writes the same row;
    served(function, arguments, whether it is one graph) -> a call."""
    check_stock(model, config)
    given = inputs(model, request)
    kind = "video" if request.frames else "image"
    ids, pixels = given["input_ids"], given.pop(named := "pixel_values_videos" if request.frames else "pixel_values")
    grids = {name: value for name, value in given.items() if name.endswith("grid_thw")}
    about = {name: value for name, value in given.items() if name != "input_ids"}
    # Where positions have several coordinates the stock model finds them on the host, in `generate` too.
    placed, following = {}, {}
    if grids:
        placed["position_ids"] = places = model.model.get_rope_index(**given)[0]
        following["position_ids"] = (places.amax((0, 2), keepdim=True) + 1).expand(len(places), len(ids), 1).contiguous()

    def vision(pixels: Tensor) -> Tensor:
        # transformers hands features out image by image, and joins them as is done here.
        found = getattr(model, f"get_{kind}_features")(**{named: pixels}, **grids).pooler_output
        return torch.cat(tuple(found)).unflatten(0, (ids.shape[0] * request.images, -1))

    def prefill(ids: Tensor, features: Tensor) -> tuple[Tensor, ...]:
        # Spliced as the model's own `forward` does.
        embeddings = model.get_input_embeddings()(ids)
        found = model.model.get_placeholder_mask(ids, inputs_embeds=embeddings, **{f"{kind}_features": features.flatten(0, 1)})
        mask = found[kind == "video"] if isinstance(found, tuple) else found
        embeddings = embeddings.masked_scatter(mask, features)
        outputs = model.model.language_model(inputs_embeds=embeddings, use_cache=True, **placed)
        return _flat(model.lm_head(outputs.last_hidden_state[:, -1:]), outputs[CACHE_NAME])

    def decode(token: Tensor) -> tuple[Tensor, ...]:
        logits = model(input_ids=token, use_cache=True, logits_to_keep=1, **following, **{CACHE_NAME: cache}).logits
        rewind(cache, prompt)
        return (logits,)

    def ttft(ids: Tensor, pixels: Tensor) -> tuple[Tensor, ...]:
        outputs = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{named: pixels}, **about)
        return _flat(outputs.logits, outputs[CACHE_NAME])

    prompt = ids.shape[1]
    cache = make_cache(prompt + request.new_tokens)
    with torch.no_grad():
        # transformers installs its hooks for hidden states in the first call, which dynamo cannot trace: it is this one.
        features = vision(pixels)
        # Filled in eager mode, as generate() does: this allocates the cache, at addresses that CUDA graphs may rely on.
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{named: pixels}, **about, **{CACHE_NAME: cache})
    bound: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "vision": (vision, (pixels,)),
        "prefill": (prefill, (ids, features)),
        "decode": (decode, (ids[:, :1].contiguous(),)),
        "ttft": (ttft, (ids, pixels)),
    }
    # Compiled or not, torch chooses by types, head sizes and masks.
    attention = {name: recorded(functools.partial(function, *args)) for name, (function, args) in bound.items()}
    whole = {name: not grids or name in ("prefill", "decode") for name in bound}
    calls = {name: torch.no_grad()(served(function, args, whole[name])) for name, (function, args) in bound.items()}
    return Arm(calls, attention)


def _flat(logits: Tensor, cache: Any) -> tuple[Tensor, ...]:
    """Everything a graph must compute: without its keys and values a prefill would be shortened to what the logits need."""
    return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def _compiled(function: Callable[..., Any], args: tuple[Tensor, ...], whole: bool) -> Call:
    # dynamo counts recompilations by code object and gives up at the eighth: every request gets an object of its own.
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    # What mode="reduce-overhead" stands for, as in `backends.inductor`. No input is the output of a graph.
    options: Any = {"triton.cudagraphs": True} if args[0].is_cuda else None
    program = torch.compile(own, fullgraph=whole, dynamic=False, options=options)

    def call() -> Any:
        begin_step(args[0].device)
        return program(*args)

    return call
