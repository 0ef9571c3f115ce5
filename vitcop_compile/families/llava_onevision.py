"""LLaVA-OneVision: a SigLIP encoder, which has no CLS token, images in tiles as LLaVA-NeXT's, large ones resized."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .registry import Call, Family, causal, register
from .shapes import PUBLISHED, pixels_of, shape_of
from .tiled import MULTIPLE, TiledImages, with_breaks

if TYPE_CHECKING:
    from transformers import LlavaOnevisionForConditionalGeneration

# More tiles than any image has.
_ANY = "anyres_max_1000000"


def host(config: Any, element_bytes: int | None = None) -> TiledImages:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel  # loaded for its users alone

    strategy = config.vision_feature_select_strategy
    if strategy != "full":
        raise UnsupportedError(
            f"vision_feature_select_strategy={strategy!r} is not supported: 'full' is, this encoder has no CLS token to drop"
        )
    shape = shape_of(
        config,
        "siglip_vision_model",
        element_bytes,
        prefix_tokens=0,
        saliency="attention_received",
        packed=True,
        multiple=MULTIPLE,
        keys=PUBLISHED,
    )
    owner = cast(LlavaOnevisionModel, SimpleNamespace(config=config))

    def packing(features: Tensor, size: tuple[int, int], line_break: Tensor, as_it_is: bool) -> Tensor:
        ratio = _ANY if as_it_is else config.vision_aspect_ratio
        return LlavaOnevisionModel.pack_image_features(owner, [features], torch.tensor([size]), line_break, ratio)[0][0]

    pinpoints = tuple((height, width) for height, width in config.image_grid_pinpoints)
    return TiledImages(shape, config.image_token_id, pixels_of(config), pinpoints, packing, alone=True)


def parts(model: LlavaOnevisionForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.vision_tower
    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(lambda m, x: m.embeddings(x), embeddings=vision.embeddings),
        encoder=Call(lambda m, x: m.encoder(inputs_embeds=x).last_hidden_state, encoder=vision.encoder),
        projector=model.model.multi_modal_projector,
        embedding=with_breaks(model.get_input_embeddings(), model.model.image_newline),
        decoder=causal(model.model.language_model),
        head=model.lm_head,
    )


register("LlavaOnevisionForConditionalGeneration", host, parts)
