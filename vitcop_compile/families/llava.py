"""LLaVA-1.5: a CLIP encoder, an MLP projector, a causal decoder (transformers' LlavaForConditionalGeneration)."""

from __future__ import annotations

from typing import Any

from transformers import LlavaForConditionalGeneration

from ..host import FixedImages
from .registry import Call, Family, causal, register
from .shapes import PUBLISHED, pixels_of, shape_of

# Rows of the encoder before its patches that become tokens of the language model: with "full" features the CLS token does.
_LEADS = {"default": 0, "full": 1}


def host(config: Any, element_bytes: int | None = None) -> FixedImages:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    lead = _LEADS[config.vision_feature_select_strategy]
    shape = shape_of(config, "clip_vision_model", element_bytes, lead=lead, keys=PUBLISHED)
    return FixedImages(shape, config.image_token_id, pixels_of(config))


def parts(model: LlavaForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.vision_tower
    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(lambda m, x: m.norm(m.embeddings(x)), embeddings=vision.embeddings, norm=vision.pre_layrnorm),
        encoder=Call(lambda m, x: m.encoder(inputs_embeds=x).last_hidden_state, encoder=vision.encoder),
        projector=model.model.multi_modal_projector,
        embedding=model.get_input_embeddings(),
        decoder=causal(model.model.language_model),
        head=model.lm_head,
    )


register("LlavaForConditionalGeneration", host, parts)
