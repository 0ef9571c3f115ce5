"""Qwen3-VL: as Qwen2-VL, with learned positions in the encoder, and features of its layers that the decoder adds later."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .patched import PatchedImages
from .qwen2_vl import in_order, patched, whole
from .registry import Call, Family, register
from .shapes import check_types

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration


def host(config: Any, element_bytes: int | None = None) -> PatchedImages:
    """What a configuration says. Raises UnsupportedError for parts that are not Qwen3-VL's own."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel  # loaded for its users alone

    check_types(config, vision="qwen3_vl_vision", text="qwen3_vl_text")
    vision = config.vision_config
    side = int(vision.num_position_embeddings**0.5)
    return patched(
        config,
        element_bytes,
        Qwen3VLModel,
        cut=partial(resampled, merge=vision.spatial_merge_size, side=side),
        tables=resampled_tables(4),
        frames=True,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        vision_heads=vision.num_heads,
        deepstack=len(tapped(vision)),
        # Norms of single heads leave all keys about as long: what tokens differ in is how long they were before.
        keys="centered" if config.text_config.attention_bias else "raw",
    )


def tapped(vision: Any) -> list[int]:
    """The layers whose output is handed to the decoder."""
    return [layer for layer in range(vision.depth) if layer in vision.deepstack_visual_indexes]


def resampled_tables(taps: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Tables of (row, column), and of so many learned positions and their weights, for every patch."""
    return ((2,), torch.int64), ((taps,), torch.int64), ((taps,), torch.float32)


def resampled(rows: int, columns: int, merge: int, side: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A frame as the processor leaves it; the (row, column) of every patch, and which of side x side learned positions its own
    is blended from, and how."""
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights as blend

    order, (places,) = in_order(rows, columns, merge)
    frame = torch.tensor([[1, rows, columns]])
    index, weight = blend(frame, side, mode="bilinear", align_corners=True, spatial_merge_size=merge)
    return order, (places, index, weight.float())


def learned(embedding: Any, index: Tensor, weight: Tensor) -> Tensor:
    """Positions [T, p, C] that are blended of learned ones, in fp32 as in the stock models. A tap at a time, so that nothing
    has the taps as an axis."""
    taps = range(index.shape[-1])
    return sum((embedding(index[..., tap]).float() * weight[..., tap, None] for tap in taps[1:]),
               embedding(index[..., 0]).float() * weight[..., 0, None])  # fmt: skip


def parts(model: Qwen3VLForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.visual
    indexes = vision.config.deepstack_visual_indexes
    taps = tapped(vision.config)

    def embed(m: Any, x: Tensor, real: Tensor, places: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        rows = m.embed(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return rows + learned(m.positions, index, weight).to(rows.dtype)

    def encode(m: Any, x: Tensor, real: Tensor, places: Tensor, *positions: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        rotary = m.rotary(rows, places.flatten(0, 1))
        segments, found = whole(real), []
        for layer, block in enumerate(m.blocks):
            rows = block(rows, cu_seqlens=segments, max_seqlen=1, position_embeddings=rotary)
            found += [rows] * (layer in taps)
        return torch.cat([rows, *found], -1).unflatten(0, x.shape[:2])

    def project(m: Any, x: Tensor) -> Tensor:
        found = x.flatten(0, -2).chunk(1 + len(taps), -1)
        made = [merger(rows.contiguous()) for merger, rows in zip(m.mergers, found, strict=True)]
        return torch.cat(made, -1).unflatten(0, x.shape[:-2])

    def decode(m: Any, x: Tensor, positions: Tensor, *features: Tensor) -> Tensor:
        # As the stock loop, which adds features to the rows of a mask; outside of it they are zeros here.
        rotary = m.rotary(x, positions)
        for layer, block in enumerate(m.layers):
            x = block(x, position_embeddings=rotary)
            x = x + features[layer] if layer < len(features) else x
        return m.norm(x)

    language = model.model.language_model
    mergers = [vision.merger, *(vision.deepstack_merger_list[list(indexes).index(layer)] for layer in taps)]
    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(embed, embed=vision.patch_embed, positions=vision.pos_embed),
        encoder=Call(encode, blocks=vision.blocks, rotary=vision.rotary_pos_emb),
        projector=Call(project, mergers=torch.nn.ModuleList(mergers)),
        embedding=model.get_input_embeddings(),
        decoder=Call(decode, layers=language.layers, norm=language.norm, rotary=language.rotary_emb),
        head=model.lm_head,
    )


register("Qwen3VLForConditionalGeneration", host, parts)
