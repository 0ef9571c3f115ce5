"""Video-LLaVA: its images, which are those of LLaVA-1.5. Its videos go through an encoder of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..host import FixedImages, Images
from .registry import Call, Family, causal, register
from .shapes import PUBLISHED, pixels_of, shape_of

if TYPE_CHECKING:
    from transformers import VideoLlavaForConditionalGeneration


@dataclass(frozen=True)
class ImagesAlone(FixedImages):
    """Images of one size, and no videos."""

    inputs: tuple[str, ...] = ("pixel_values", "pixel_values_videos")

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images of `pixel_values` [images, channels, height, width]."""
        if given.get("pixel_values_videos") is not None:
            raise InputError(
                "pixel_values_videos: videos of Video-LLaVA are not supported, as they go through a second encoder with "
                "weights of its own and keep the CLS token of every frame; pass images, or a frame as one"
            )
        return super().read(given, ids, device, dtype)


def host(config: Any, element_bytes: int | None = None) -> ImagesAlone:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    strategy = config.vision_feature_select_strategy
    if strategy != "default":
        raise UnsupportedError(f"vision_feature_select_strategy={strategy!r} is not supported: 'default' (CLS dropped) is")
    return ImagesAlone(
        shape_of(config, "clip_vision_model", element_bytes, keys=PUBLISHED), config.image_token_id, pixels_of(config)
    )


def parts(model: VideoLlavaForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.image_tower
    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(lambda m, x: m.norm(m.embeddings(x)), embeddings=vision.embeddings, norm=vision.pre_layrnorm),
        encoder=Call(lambda m, x: m.encoder(inputs_embeds=x).last_hidden_state, encoder=vision.encoder),
        projector=model.model.multi_modal_projector,
        embedding=model.get_input_embeddings(),
        decoder=causal(model.model.language_model),
        head=model.lm_head,
    )


register("VideoLlavaForConditionalGeneration", host, parts)
