"""LLaVA-NeXT-Video: images as LLaVA-NeXT has them, and videos, every frame of which is a tile that is pooled before the
projector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..host import Images, Pack, check_pixels, grid_places, in_order, packs_of, segments_of
from ..layout import Layout
from . import llava_next
from .registry import Call, Family, register
from .tiled import TiledImages

if TYPE_CHECKING:
    from transformers import LlavaNextVideoForConditionalGeneration


@dataclass(frozen=True)
class TiledImagesAndVideos(TiledImages):
    """Images in tiles, and videos as `pixel_values_videos` [videos, frames, channels, height, width].

    video_token_id: that of a video's placeholders; stride: patches of a frame's token, in a row; clips: whether all frames of
    a video are one segment.
    """

    video_token_id: int = -1
    stride: int = 2
    clips: bool = False
    inputs = ("pixel_values", "image_sizes", "pixel_values_videos")  # type: ignore[assignment]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of images, and of videos."""
        return (self.token_id, self.video_token_id)

    def layout_of_video(self, frames: int) -> Layout:
        """A segment for every frame, or for all of them."""
        rows, columns = (side // self.stride for side in self.shape.grid)
        return segments_of("video", (frames, rows, columns), self.stride**2, self.clips)

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images and videos in the order in which `ids` name them."""
        found = []
        if given.get("pixel_values") is not None:
            found.append(super().read(given, ids, device, dtype))
        if given.get("pixel_values_videos") is not None:
            found.append(self._videos(given["pixel_values_videos"], device, dtype))
        if len(found) == 1:
            return found[0]
        images, videos = found
        both = Images(torch.cat((images.pixels, videos.pixels)), images.layouts + videos.layouts, images.packs + videos.packs)
        return both.take(in_order(ids, {self.token_id: images.tokens, self.video_token_id: videos.tokens}))

    def _videos(self, pixels: Any, device: torch.device, dtype: torch.dtype) -> Images:
        if not isinstance(pixels, Tensor) or pixels.dim() != 5 or not pixels.shape[1]:
            what = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            tile = ", ".join(map(str, self.pixel_shape))
            raise InputError(f"pixel_values_videos is {what}: this model takes [videos, frames, {tile}]")
        videos, frames = pixels.shape[:2]
        tiles = check_pixels(pixels.flatten(0, 1), self.pixel_shape, device, dtype)
        own, patches = self._frame, self.shape.patches
        layout = self.layout_of_video(frames)
        return Images(tiles, (layout,) * videos, (packs_of(layout, own, frames, patches),) * videos)

    @cached_property
    def _frame(self) -> Pack:
        """Which patches each token of a frame is pooled from."""
        rows, columns = self.shape.grid
        numbers = torch.arange(rows * columns, dtype=torch.float64).reshape(1, rows, columns)
        index = F.unfold(numbers, self.stride, stride=self.stride).T.long()
        return Pack(index, None, grid_places(rows // self.stride, columns // self.stride))


def host(config: Any, element_bytes: int | None = None) -> TiledImagesAndVideos:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    from transformers.models.llava_next_video.modeling_llava_next_video import LlavaNextVideoModel  # for its users alone

    stride = config.spatial_pool_stride
    return llava_next.tiled(
        config,
        element_bytes,
        LlavaNextVideoModel,
        TiledImagesAndVideos,
        group=stride * stride,
        video_token_id=config.video_token_id,
        stride=stride,
    )


def parts(model: LlavaNextVideoForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    stride = model.config.spatial_pool_stride

    def project(m: Any, x: Tensor) -> Tensor:
        if x.dim() == 4:  # groups of a video's patches
            squares = x.flatten(0, 1).transpose(1, 2).unflatten(2, (stride, stride))
            x = m.pool(squares).flatten(1).unflatten(0, x.shape[:2])
        return m.projector(x)

    own = Call(project, pool=model.model.vision_resampler.pool, projector=model.model.multi_modal_projector)
    return replace(
        llava_next.parts(model),  # type: ignore[arg-type]
        host=host(model.config, model.dtype.itemsize),
        projector=own,
    )


register("LlavaNextVideoForConditionalGeneration", host, parts)
