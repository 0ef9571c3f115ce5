"""Qwen2.5-VL: as Qwen2-VL, most of whose encoder's layers attend within windows."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .patched import UNIT, PatchedImages
from .qwen2_vl import family, in_order, patched, whole
from .registry import Family, register

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration


def host(config: Any, element_bytes: int | None = None) -> PatchedImages:
    """What a configuration says."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel  # loaded for its users alone

    vision = config.vision_config
    return patched(
        config,
        element_bytes,
        Qwen2_5_VLModel,
        cut=partial(in_windows, merge=vision.spatial_merge_size, window=vision.window_size, patch=vision.patch_size),
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        vision_heads=vision.num_heads,
        unit=math.lcm(UNIT, window_slots(vision)),
        # What a patch receives within a window says nothing of the image.
        scored_layers=tuple(vision.fullatt_block_indexes),
    )


def window_slots(vision: Any) -> int:
    """Patches of a whole window."""
    return (vision.window_size // vision.spatial_merge_size // vision.patch_size * vision.spatial_merge_size) ** 2


def in_windows(rows: int, columns: int, merge: int, window: int, patch: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A frame window by window, each filled up to a whole one, and the (row, column) of every patch."""
    from transformers.vision_utils import get_vision_window_index

    _, (places,) = in_order(rows, columns, merge)
    tokens, ends = get_vision_window_index(torch.tensor([[1, rows, columns]]), merge, window, patch)
    group = merge * merge
    patches = (tokens[:, None] * group + torch.arange(group)).flatten()
    slots = (window // merge // patch * merge) ** 2
    order = torch.full((len(ends) - 1, slots), -1)
    for place, (start, end) in enumerate(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)):
        order[place, : end - start] = patches[start:end]
    order = order.flatten()
    return order, (places[order.clamp_min(0)],)


def parts(model: Qwen2_5_VLForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.config.vision_config
    slots, full = window_slots(vision), set(vision.fullatt_block_indexes)

    def encode(m: Any, x: Tensor, real: Tensor, places: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        rotary = m.rotary(rows, places.flatten(0, 1))
        images, windows = whole(real), whole(real.reshape(-1, slots))
        for layer, block in enumerate(m.blocks):
            segments = images if layer in full else windows
            rows = block(rows, cu_seqlens=segments, max_seqlen=1, position_embeddings=rotary)
        return rows.unflatten(0, x.shape[:2])

    return family(model, host(model.config, model.dtype.itemsize), encode)


register("Qwen2_5_VLForConditionalGeneration", host, parts)
