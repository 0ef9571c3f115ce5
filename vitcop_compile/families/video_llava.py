"""Video-LLaVA: images, which are those of LLaVA-1.5, and videos, whose frames go through an encoder of their own and keep its
CLS token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..host import FixedImages, Images, check_pixels, in_order
from ..layout import Layout
from .registry import Call, Family, Frames, causal, register
from .shapes import PUBLISHED, pixels_of, shape_of

if TYPE_CHECKING:
    from transformers import VideoLlavaForConditionalGeneration


@dataclass(frozen=True)
class ImagesAndFrames(FixedImages):
    """Images of one size, and videos as `pixel_values_videos` [videos, frames, channels, height, width], every frame of which
    is an image of its own. video_token_id: that of a video's placeholders."""

    video_token_id: int = -1
    inputs: tuple[str, ...] = ("pixel_values", "pixel_values_videos")
    fixed = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of images, and of videos."""
        return (self.token_id, self.video_token_id)

    @property
    def frame(self) -> Layout:
        """That of a frame."""
        return (self.shape.segment("video", self.shape.image.grid, self.shape.prefix_tokens),)

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images and frames in the order in which `ids` name them."""
        pixels, images, videos = [], 0, given.get("pixel_values_videos")
        if given.get("pixel_values") is not None:
            pixels.append(check_pixels(given["pixel_values"], self.pixel_shape, device, dtype))
            images = len(pixels[0])
        if videos is not None:
            if not isinstance(videos, Tensor) or videos.dim() != 5 or not videos.shape[1]:
                what = tuple(videos.shape) if isinstance(videos, Tensor) else type(videos).__name__
                tile = ", ".join(map(str, self.pixel_shape))
                raise InputError(f"pixel_values_videos is {what}: this model takes [videos, frames, {tile}]")
            pixels.append(check_pixels(videos.flatten(0, 1), self.pixel_shape, device, dtype))
        frames = sum(map(len, pixels)) - images
        found = Images(torch.cat(pixels), (self.layout,) * images + (self.frame,) * frames)
        return found.take(in_order(ids, {self.token_id: found.tokens[:images], self.video_token_id: found.tokens[images:]}))


def host(config: Any, element_bytes: int | None = None) -> ImagesAndFrames:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    strategy = config.vision_feature_select_strategy
    if strategy != "default":
        raise UnsupportedError(f"vision_feature_select_strategy={strategy!r} is not supported: 'default' (CLS dropped) is")
    shape = shape_of(config, "clip_vision_model", element_bytes, keys=PUBLISHED)
    return ImagesAndFrames(shape, config.image_token_id, pixels_of(config), video_token_id=config.video_token_id)


def parts(model: VideoLlavaForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    found = host(model.config, model.dtype.itemsize)

    def seeing(tower: Any) -> tuple[Call, Call]:
        return (
            Call(lambda m, x: m.norm(m.embeddings(x)), embeddings=tower.embeddings, norm=tower.pre_layrnorm),
            Call(lambda m, x: m.encoder(inputs_embeds=x).last_hidden_state, encoder=tower.encoder),
        )

    patches, encoder = seeing(model.model.image_tower)
    return Family(
        host=found,
        patches=patches,
        encoder=encoder,
        projector=model.model.multi_modal_projector,
        embedding=model.get_input_embeddings(),
        decoder=causal(model.model.language_model),
        head=model.lm_head,
        frames=Frames(*seeing(model.model.video_tower), found.frame),
    )


register("VideoLlavaForConditionalGeneration", host, parts)
