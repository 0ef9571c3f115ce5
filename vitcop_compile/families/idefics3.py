"""Idefics3 and SmolVLM: tiles of one size in a SigLIP encoder, patches merged side by side, text between the tiles, a causal
decoder. A frame of a video is a tile like any other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..host import FixedImages, Images, check_device
from .registry import Call, Family, causal, register
from .shapes import grouped, pixels_of, shape_of

if TYPE_CHECKING:
    from transformers import Idefics3ForConditionalGeneration, SmolVLMForConditionalGeneration


@dataclass(frozen=True)
class PaddedImages(FixedImages):
    """Tiles of one size, of every sample as many, the missing ones all zero. patch: side of a patch in pixels; least: images
    of a request without any."""

    patch: int = 14
    least: int = 0
    inputs: tuple[str, ...] = ("pixel_values", "pixel_attention_mask")

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images of `pixel_values` [B, images, channels, height, width] that are not all zero, as the stock models tell
        them from padding, and `pixel_attention_mask` [B, images, height, width], which may leave no patch of these out."""
        pixels, mask = given["pixel_values"], given.get("pixel_attention_mask")
        if not isinstance(pixels, Tensor) or pixels.dim() != 5:
            what = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise InputError(
                f"pixel_values is {what}: this model takes [batch, images, {', '.join(map(str, self.pixel_shape))}]"
            )
        flat = pixels.flatten(0, 1)
        check_device(device, "pixel_values", flat)
        # As the stock models do: in their type, in which a faint pixel may vanish.
        real = (flat.to(dtype) != 0).flatten(1).any(1)
        real[: self.least] |= ~real.any()
        if not real.any():
            raise InputError("pixel_values is all zero, which means that no image is there: leave it out")
        if mask is not None:
            self._check(mask, pixels, real)
        return super().read({"pixel_values": flat[real]}, ids, device, dtype)

    def _check(self, mask: Any, pixels: Tensor, real: Tensor) -> None:
        """Raises InputError unless `mask` shows a pixel of every patch of each real image: so much makes the stock models see
        it."""
        wanted = (*pixels.shape[:2], *pixels.shape[3:])
        if not isinstance(mask, Tensor) or tuple(mask.shape) != wanted:
            what = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(f"pixel_attention_mask is {what}: pass the processor's, {wanted}")
        shown = mask.flatten(0, 1)[real.to(mask.device)]
        for axis in (1, 2):
            shown = shown.unfold(axis, self.patch, self.patch)
        partial = ~(shown != 0).flatten(3).any(3).flatten(1).all(1)
        if partial.any():
            raise InputError(
                f"pixel_attention_mask leaves patches of {int(partial.sum())} images out: only whole images are supported; "
                f"resize each to {self.pixel_shape[-2]}x{self.pixel_shape[-1]} pixels, as the processor does by default"
            )


def host(config: Any, element_bytes: int | None = None) -> PaddedImages:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector  # loaded for its users alone

    smol = config.model_type == "smolvlm"
    scale = config.scale_factor
    shape = shape_of(
        config,
        "smolvlm_vision" if smol else "idefics3_vision",
        element_bytes,
        prefix_tokens=0,
        packed=True,
        group=scale * scale,
        saliency="attention_received",
    )

    def merge(patches: Tensor) -> Tensor:
        return Idefics3Connector.pixel_shuffle(cast(Idefics3Connector, None), patches.flatten(1, 2), scale)

    def tiles(height: int, width: int) -> int:
        from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil as Processor

        # Tiles as large as the encoder's input, of an image that has four of them in its longer side.
        side = config.vision_config.image_size
        cut = {"max_image_size": {"longest_edge": side}, "size": {"longest_edge": 4 * side}}
        number, _, _ = Processor.get_number_of_image_patches(cast(Processor, Processor), height, width, cut)
        return max(1, number)

    return PaddedImages(
        shape,
        config.image_token_id,
        pixels_of(config),
        pack=grouped(shape, merge),
        patch=config.vision_config.patch_size,
        # SmolVLM takes the first image of a request that seems to have none for one.
        least=int(smol),
        tiles=tiles,
    )


def positions_of(embeddings: Any) -> Tensor:
    """int64 [patches]: the row of the position table that each patch of a whole image takes.

    The stock embeddings find it by comparing floating-point numbers that are meant to be equal, so they are asked once, and
    not compiled.
    """
    side, weight = embeddings.num_patches_per_side, embeddings.position_embedding.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    asked = SimpleNamespace(
        patch_size=1,
        num_patches_per_side=side,
        patch_embedding=torch.zeros_like,
        position_embedding=lambda ids: ids.unsqueeze(-1),
    )
    seen = torch.ones(1, side, side, dtype=torch.bool, device=device)
    told = type(embeddings).forward(asked, torch.zeros(1, 1, side, side, dtype=torch.float64, device=device), seen)
    return told[0, :, 0].long().to(weight.device)


def parts(model: Idefics3ForConditionalGeneration | SmolVLMForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.vision_model
    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(
            lambda m, x: m.patch(x).flatten(2).transpose(1, 2) + m.position(m.places),
            patch=vision.embeddings.patch_embedding,
            position=vision.embeddings.position_embedding,
            places=nn.Buffer(positions_of(vision.embeddings)),
        ),
        encoder=Call(lambda m, x: m.encoder(inputs_embeds=x).last_hidden_state, encoder=vision.encoder),
        # A norm of single patches commutes with leaving others out, so it waits for what is kept.
        projector=Call(
            lambda m, x: m.projection(m.norm(x).flatten(-2)),
            projection=model.model.connector.modality_projection,
            norm=vision.post_layernorm,
        ),
        embedding=model.get_input_embeddings(),
        decoder=causal(model.model.text_model),
        head=model.lm_head,
    )


register("Idefics3ForConditionalGeneration", host, parts)
register("SmolVLMForConditionalGeneration", host, parts)
