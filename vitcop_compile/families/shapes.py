"""The numbers of models that are put together as LLaVA is: an encoder of patches, a projector, a causal decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..host import Pack, grid_places
from ..schedule import ModelShape


def shape_of(config: Any, encoder: str, element_bytes: int | None = None, **more: Any) -> ModelShape:
    """The numbers of the model that `config` describes, with `more` of the fields of `ModelShape`.

    encoder: the model type that its vision config must have. Raises UnsupportedError for another, and for features that are
    not those of one of its layers.
    """
    vision = config.vision_config
    name = type(config).__name__.removesuffix("Config")
    if vision.model_type != encoder:
        raise UnsupportedError(f"{name} with a {vision.model_type} encoder is not supported: {encoder} is")
    sides = tuple(size // patch for size, patch in zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True))
    return decoder_numbers(
        config,
        element_bytes,
        grid=sides,
        vision_layers=vision.num_hidden_layers,
        feature_layer=feature_layer_of(config),
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        vision_heads=vision.num_attention_heads,
        patch_features=vision.num_channels * math.prod(_pair(vision.patch_size)),
        **more,
    )


# Which keys score tokens, by the type of a decoder. A bias on keys dwarfs what tokens differ in, and a norm of each head's key
# makes all of one length: neither says anything of a token.
KEYS = {"qwen2": "centered", "qwen3": "raw"}
# What the method was published with, on LLaVA: the keys that attention meets.
PUBLISHED = "rotated"


def feature_layer_of(config: Any) -> int:
    """The encoder layer whose output the projector gets. Raises UnsupportedError for features that are not those of one of its
    layers."""
    feature, layers = getattr(config, "vision_feature_layer", -1), config.vision_config.num_hidden_layers
    if not isinstance(feature, int):
        raise UnsupportedError(f"vision_feature_layer={feature!r} is not supported: a single layer is")
    # hidden_states[i] is the output of layer i - 1, hidden_states[0] the input of layer 0.
    found = feature - 1 if feature >= 0 else layers + feature
    if not 0 <= found < layers:
        raise UnsupportedError(f"vision_feature_layer={feature} reads no layer of {layers}")
    return found


def decoder_numbers(config: Any, element_bytes: int | None = None, **more: Any) -> ModelShape:
    """The numbers of the decoder that `config` describes, with `more` of the fields of `ModelShape`."""
    text = config.text_config
    heads = text.num_attention_heads
    more.setdefault("keys", KEYS.get(text.model_type, PUBLISHED))
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        element_bytes=element_bytes or torch.empty((), dtype=getattr(config, "dtype", None) or torch.float32).element_size(),
        max_positions=text.max_position_embeddings,
        window=getattr(text, "sliding_window", None),
        **more,
    )


def check_types(config: Any, vision: str, text: str) -> None:
    """Raises UnsupportedError unless `config` is of an encoder and a language model of these types."""
    name = type(config).__name__.removesuffix("Config")
    for what, part, wanted in (
        ("encoder", config.vision_config, vision), ("language model", config.text_config, text),
    ):  # fmt: skip
        if part.model_type != wanted:
            raise UnsupportedError(f"{name} with a {part.model_type} {what} is not supported: {wanted} is")


def pixels_of(config: Any) -> tuple[int, int, int]:
    """The shape of one input of the encoder."""
    vision = config.vision_config
    return vision.num_channels, *_pair(vision.image_size)


def grouped(shape: ModelShape, merge: Callable[[Tensor], Tensor]) -> Pack:
    """Which patches each token of an image is made of.

    merge: the model's own, from patches [1, rows, columns, 1] to groups [1, tokens, group], which is asked with patches that
    say their numbers.
    """
    rows, columns = shape.grid
    numbers = torch.arange(rows * columns, dtype=torch.float64).reshape(1, rows, columns, 1)
    return Pack(merge(numbers)[0].long(), None, grid_places(*shape.image.grid[1:]))


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return height, width
