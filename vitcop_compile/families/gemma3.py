"""Gemma 3: a SigLIP encoder, patches averaged in squares, a decoder whose images attend to themselves both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from ..host import FixedImages, Images
from .registry import Call, Family, register
from .shapes import grouped, pixels_of, shape_of

if TYPE_CHECKING:
    from transformers import Gemma3ForConditionalGeneration


@dataclass(frozen=True)
class Gemma3Images(FixedImages):
    """Images of one size, and crops of them, each an image of its own. `token_type_ids` are taken, and must name no other
    tokens than the placeholders."""

    inputs: tuple[str, ...] = ("pixel_values", "token_type_ids")

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """As `FixedImages.read`."""
        kinds = given.get("token_type_ids")
        if kinds is not None:
            told = torch.as_tensor(kinds, device=ids.device)[..., -ids.shape[1] :]  # which may be of a whole conversation
            if told.shape != ids.shape or not torch.equal(told == 1, ids == self.token_id):
                raise InputError(
                    "token_type_ids names other tokens than the image placeholders of input_ids: pass the processor's, or none"
                )
        return super().read(given, ids, device, dtype)


def host(config: Any, element_bytes: int | None = None) -> Gemma3Images:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    text, tokens = config.text_config, config.mm_tokens_per_image
    if text.use_bidirectional_attention:
        raise UnsupportedError("use_bidirectional_attention=True is not supported: False is, text that is generated is causal")
    shape = shape_of(
        config,
        "siglip_vision_model",
        element_bytes,
        prefix_tokens=0,
        saliency="attention_received",
        packed=True,
        # Norms of single heads leave all keys equally long: what differs is what their projection says.
        keys="raw",
        marks=True,
    )
    side, rows = math.isqrt(tokens), shape.grid[0]
    if side * side != tokens or shape.grid != (rows, rows) or rows % side:
        raise UnsupportedError(
            f"mm_tokens_per_image={tokens} is not supported for {shape.grid[0]}x{shape.grid[1]} patches: a square number is, "
            "whose root divides the patches of a side"
        )
    size = rows // side
    # The window of layers that slide is in their marks: it bounds no prompt.
    shape = replace(shape, group=size * size, window=None)

    def merge(patches: Tensor) -> Tensor:
        return patches[..., 0].unfold(1, size, size).unfold(2, size, size).flatten(3).flatten(1, 2)

    return Gemma3Images(shape, config.image_token_id, pixels_of(config), pack=grouped(shape, merge))


def parts(model: Gemma3ForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.vision_tower
    projector: Any = model.model.multi_modal_projector

    found = host(model.config, model.dtype.itemsize)

    def project(m: Any, patches: Tensor) -> Tensor:
        # The encoder's last norm is one of single patches: it waits for what is kept.
        patches = m.norm(patches)
        return m.soft(patches.mean(-2) if found.shape.group > 1 else patches) @ m.weight

    return Family(
        host=found,
        patches=Call(lambda m, x: m.embeddings(x), embeddings=vision.embeddings),
        encoder=Call(lambda m, x: m.encoder(inputs_embeds=x).last_hidden_state, encoder=vision.encoder),
        projector=Call(
            project,
            norm=vision.post_layernorm,
            soft=projector.mm_soft_emb_norm,
            weight=projector.mm_input_projection_weight,
        ),
        embedding=model.get_input_embeddings(),
        decoder=Call(
            lambda m, x, positions, marks: (
                m.model(
                    inputs_embeds=x,
                    attention_mask={"full_attention": marks, "sliding_attention": marks},
                    position_ids=positions[0],
                    use_cache=False,
                ).last_hidden_state
            ),
            model=model.model.language_model,
        ),
        head=model.lm_head,
    )


register("Gemma3ForConditionalGeneration", host, parts)
