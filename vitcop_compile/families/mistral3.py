"""Mistral 3: a Pixtral encoder of packed patches with rotary positions, patches merged side by side, and a token of text
behind every row of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.image_utils import ChannelDimension

from ..errors import InputError, UnsupportedError
from ..host import Images, check_pixels
from ..layout import Layout
from .patched import MULTIPLE, PatchedImages
from .qwen2_vl import in_order, whole
from .registry import Call, Family, causal, register
from .shapes import decoder_numbers, feature_layer_of
from .tiled import sizes_of

if TYPE_CHECKING:
    from transformers import Mistral3ForConditionalGeneration


class PixtralImages(PatchedImages):
    """Images of any size as `pixel_values` [images, channels, height, width], each in the corner of its own, and `image_sizes`
    [images, 2]."""

    inputs = ("pixel_values", "image_sizes")  # type: ignore[assignment]

    @property
    def token_ids(self) -> tuple[int, ...]:
        """One."""
        return (self.token_id,)

    def laid(self, kind: str, time: int, rows: int, columns: int) -> Layout:
        """One segment, with text between its rows."""
        return tuple(replace(segment, broken=True) for segment in super().laid(kind, time, rows, columns))

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images, as rows of patches."""
        sizes, pixels, step = sizes_of(given.get("image_sizes")), given["pixel_values"], self.patch * self.side
        odd = [size for size in sizes if size[0] % step or size[1] % step]
        if odd:
            raise InputError(f"image_sizes holds {odd[0]}: pass the processor's, multiples of {step}")
        area = tuple(pixels.shape[2:]) if isinstance(pixels, Tensor) and pixels.dim() == 4 else ("height", "width")
        pixels = check_pixels(pixels, (self.channels, *area), device, dtype)
        most = tuple(map(max, zip(*sizes, strict=True)))
        if len(pixels) != len(sizes) or any(held < asked for held, asked in zip(pixels.shape[2:], most, strict=True)):
            raise InputError(
                f"pixel_values is {tuple(pixels.shape)}, image_sizes counts {len(sizes)} images of up to {most[0]}x{most[1]} "
                "pixels: pass both of one processor's call"
            )
        items = [("image", (1, height // self.patch, width // self.patch)) for height, width in sizes]
        rows = [self._rows(image, *size) for image, size in zip(pixels, sizes, strict=True)]
        return self._images(items, torch.cat(rows), ())

    @property
    def side(self) -> int:
        """Patches of a token, in a row."""
        return round(self.shape.group**0.5)

    @property
    def channels(self) -> int:
        """Colors."""
        return self.pixel_shape[0] // self.patch**2

    def _rows(self, image: Tensor, height: int, width: int) -> Tensor:
        """[patches, features] of an image, the patches of a token one after another."""
        patch, side = self.patch, self.side
        cut = image[:, :height, :width].unflatten(2, (-1, side, patch)).unflatten(1, (-1, side, patch))
        return cut.permute(1, 4, 2, 5, 0, 3, 6).flatten(4).flatten(0, 3)


def host(config: Any, element_bytes: int | None = None) -> PixtralImages:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    vision, side = config.vision_config, config.spatial_merge_size
    if vision.model_type != "pixtral":
        raise UnsupportedError(f"Mistral3 with a {vision.model_type} encoder is not supported: pixtral is")
    features = vision.num_channels * vision.patch_size**2
    square = 32 // side * side
    shape = decoder_numbers(
        config,
        element_bytes,
        grid=(square, square),
        prefix_tokens=0,
        vision_layers=vision.num_hidden_layers,
        feature_layer=feature_layer_of(config),
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        vision_heads=vision.num_attention_heads,
        patch_features=features,
        packed=True,
        group=side * side,
        multiple=MULTIPLE,
        saliency="attention_received",
    )

    def resize(height: int, width: int) -> tuple[int, int]:
        from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

        # The function asks an image for its size alone.
        image = np.broadcast_to(np.zeros((1, 1, 1), np.uint8), (height, width, vision.num_channels))
        return get_resize_output_image_size(image, vision.image_size, vision.patch_size * side, ChannelDimension.LAST)

    return PixtralImages(
        shape,
        config.image_token_id,
        config.image_token_id,
        (features,),
        (((2,), torch.int64),),
        vision.patch_size,
        resize=resize,
        cut=partial(in_order, merge=side),
        stock_positions=lambda words, *given: torch.arange(len(words))[None],
    )


def parts(model: Mistral3ForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.vision_tower
    channels, patch, side = vision.config.num_channels, vision.config.patch_size, model.config.spatial_merge_size
    # What leaves a layer is packed, and not what an encoder returns: it ends here, where another would be cut.
    layers = vision.transformer.layers[: feature_layer_of(model.config) + 1]

    def embed(m: Any, x: Tensor, *tables: Tensor) -> Tensor:
        rows = m.conv(x.flatten(0, 1).unflatten(1, (channels, patch, patch))).flatten(1)
        return m.norm(rows).unflatten(0, x.shape[:2])

    def encode(m: Any, x: Tensor, real: Tensor, places: Tensor) -> Tensor:
        rows = x.flatten(0, 1).unsqueeze(0)
        rotary, segments = m.rotary(rows, places.flatten(0, 1)), whole(real)
        for layer in m.layers:
            rows = layer(rows, None, position_embeddings=rotary, cu_seq_lens_q=segments)
        return rows.squeeze(0).unflatten(0, x.shape[:2])

    def project(m: Any, x: Tensor) -> Tensor:
        # The tokens, side by side, are an image as high as one of them: what the model itself merges.
        tokens = x.flatten(0, -3).unflatten(1, (side, side)).transpose(0, 1)
        size = (side * patch, tokens.shape[1] * side * patch)
        return m.projector(tokens.flatten(0, 2), [size]).unflatten(0, x.shape[:-2])

    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(embed, conv=vision.patch_conv, norm=vision.ln_pre),
        encoder=Call(encode, layers=layers, rotary=vision.patch_positional_embedding),
        projector=Call(project, projector=model.model.multi_modal_projector),
        embedding=model.get_input_embeddings(),
        decoder=causal(model.model.language_model),
        head=model.lm_head,
    )


register("Mistral3ForConditionalGeneration", host, parts)
