"""LLaVA-1.5: a CLIP encoder, an MLP projector, a causal decoder (transformers' LlavaForConditionalGeneration)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from ..errors import UnsupportedError
from ..schedule import ModelShape
from .registry import Call, Family, register

_VISION_MODEL = "clip_vision_model"


def shape(config: Any) -> ModelShape:
    """The numbers of a LLaVA model. Raises UnsupportedError for variants that are not captured."""
    vision, text = config.vision_config, config.text_config
    if vision.model_type != _VISION_MODEL:
        raise UnsupportedError(f"LLaVA with a {vision.model_type} encoder is not supported: {_VISION_MODEL} is")
    if config.vision_feature_select_strategy != "default":
        raise UnsupportedError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported: 'default' (CLS "
            "dropped) is"
        )
    feature = config.vision_feature_layer
    if not isinstance(feature, int):
        raise UnsupportedError(f"vision_feature_layer={feature!r} is not supported: a single layer is")
    # hidden_states[i] is the output of layer i - 1, hidden_states[0] the input of layer 0.
    feature_layer = feature - 1 if feature >= 0 else vision.num_hidden_layers + feature
    if not 0 <= feature_layer < vision.num_hidden_layers:
        raise UnsupportedError(f"vision_feature_layer={feature} reads no layer of {vision.num_hidden_layers}")
    side = vision.image_size // vision.patch_size
    heads = text.num_attention_heads
    return ModelShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        grid=(side, side),
        prefix_tokens=1,
        vision_layers=vision.num_hidden_layers,
        feature_layer=feature_layer,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        patch_features=vision.num_channels * vision.patch_size**2,
        element_bytes=torch.empty((), dtype=getattr(config, "dtype", None) or torch.float32).element_size(),
        max_positions=text.max_position_embeddings,
        window=getattr(text, "sliding_window", None),
    )


def parts(model: LlavaForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.vision_tower
    config: Any = model.config
    side = config.vision_config.image_size
    return Family(
        shape=dataclasses.replace(shape(config), element_bytes=model.dtype.itemsize),
        image_token_id=config.image_token_id,
        pixel_shape=(config.vision_config.num_channels, side, side),
        patches=Call(lambda m, x: m.norm(m.embeddings(x)), embeddings=vision.embeddings, norm=vision.pre_layrnorm),
        encoder=Call(lambda m, x: m.encoder(inputs_embeds=x).last_hidden_state, encoder=vision.encoder),
        projector=model.model.multi_modal_projector,
        embedding=model.get_input_embeddings(),
        decoder=Call(
            lambda m, x, positions: m.model(inputs_embeds=x, position_ids=positions[0], use_cache=False).last_hidden_state,
            model=model.model.language_model,
        ),
        head=model.lm_head,
    )


register("LlavaForConditionalGeneration", shape, parts)
