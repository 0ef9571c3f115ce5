"""Qwen2-VL: an encoder of packed patches with rotary positions, patches merged two by two, positions of three coordinates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .patched import MULTIPLE, PatchedImages
from .registry import Call, Family, register
from .shapes import decoder_numbers

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration


def host(config: Any, element_bytes: int | None = None) -> PatchedImages:
    """What a configuration says."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel  # loaded for its users alone

    vision = config.vision_config
    return patched(
        config,
        element_bytes,
        Qwen2VLModel,
        cut=partial(in_order, merge=vision.spatial_merge_size),
        vision_hidden=vision.embed_dim,
        vision_intermediate=int(vision.embed_dim * vision.mlp_ratio),
        vision_heads=vision.num_heads,
    )


def patched(config: Any, element_bytes: int | None, model: Any, **more: Any) -> PatchedImages:
    """The host of a model that follows Qwen2-VL. model: its stock class, which is asked for positions; more: fields of
    `PatchedImages` that differ from Qwen2-VL's, and fields of `ModelShape`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    vision, side = config.vision_config, config.vision_config.spatial_merge_size
    own: dict[str, Any] = {
        "tables": (((2,), torch.int64),),
        "video_token_id": config.video_token_id,
        "resize": partial(smart_resize, factor=vision.patch_size * side),
    }
    own |= {name: more.pop(name) for name in ("cut", "tables", "video_token_id", "resize", "frames", "unit") if name in more}
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    square = 32 // side * side
    # The keys of most of these models have a bias that dwarfs what tokens differ in: norms of them say nothing of a token.
    keys = more.pop("keys", "centered")
    more.setdefault("projector_hidden", side * side * more["vision_hidden"])
    shape = decoder_numbers(
        config,
        element_bytes,
        grid=(square, square),
        prefix_tokens=0,
        vision_layers=vision.depth,
        feature_layer=vision.depth - 1,
        patch_features=features,
        packed=True,
        group=side * side,
        multiple=MULTIPLE,
        position_dims=3,
        saliency="attention_received",
        keys=keys,
        **more,
    )
    owner = SimpleNamespace(config=config)
    if hasattr(model, "get_vision_position_ids"):
        owner.get_vision_position_ids = partial(model.get_vision_position_ids, owner)

    def positions(
        words: Tensor, kinds: Tensor, images: Tensor | None, videos: Tensor | None, seconds: Tensor | None
    ) -> Tensor:
        found, _ = model.get_rope_index(
            owner, words[None], mm_token_type_ids=kinds[None], image_grid_thw=images, video_grid_thw=videos,
            **({} if seconds is None else {"second_per_grid_ts": seconds}),
        )  # fmt: skip
        return found[:, 0]

    return PatchedImages(
        shape,
        config.image_token_id,
        pixel_shape=(features,),
        patch=vision.patch_size,
        stock_positions=positions,
        **own,
    )


def in_order(rows: int, columns: int, merge: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A frame as the processor leaves it, and the (row, column) of every patch."""
    from transformers.vision_utils import get_vision_position_ids

    return torch.arange(rows * columns), (get_vision_position_ids(torch.tensor([[1, rows, columns]]), merge),)


def whole(real: Tensor) -> Tensor:
    """real bool [.., rows] with rows that are all padding counted as real: attention to nothing at all is not finite."""
    return real | ~real.any(-1, keepdim=True)


def merged(m: Any, x: Tensor) -> Tensor:
    """Groups [.., group, C] of patches as tokens [.., D], by a merger of packed rows."""
    return m.merger(x.flatten(0, -2)).unflatten(0, x.shape[:-2])


def embedded(m: Any, x: Tensor, *tables: Tensor) -> Tensor:
    """Patches [T, p, features] as the encoder's rows [T, p, C].

    As the stock module, with a bias of zeros: without one the convolution of an exported ONNX graph is refused by onnxruntime.
    """
    proj = m.embed.proj
    whole_patches = x.reshape(-1, proj.in_channels, *proj.kernel_size)
    rows = F.conv3d(whole_patches, proj.weight, x.new_zeros(proj.out_channels), stride=proj.stride)
    return rows.reshape(*x.shape[:2], -1)


def decoded(m: Any, x: Tensor, positions: Tensor) -> Tensor:
    """The decoder, with positions of three coordinates."""
    return m.model(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state


def encoded(m: Any, x: Tensor, real: Tensor, places: Tensor, *tables: Tensor) -> Tensor:
    """An encoder whose layers all attend to whole images."""
    rows = x.flatten(0, 1)
    rotary = m.rotary(rows, places.flatten(0, 1))
    segments = whole(real)
    for block in m.blocks:
        rows = block(rows, cu_seqlens=segments, max_seqlen=1, position_embeddings=rotary)
    return rows.unflatten(0, x.shape[:2])


def family(model: Any, host: PatchedImages, encode: Callable[..., Tensor]) -> Family:
    """The stock modules of a model whose parts are Qwen2-VL's but for its encoder's layers."""
    vision: Any = model.model.visual
    return Family(
        host=host,
        patches=Call(embedded, embed=vision.patch_embed),
        encoder=Call(encode, blocks=vision.blocks, rotary=vision.rotary_pos_emb),
        projector=Call(merged, merger=vision.merger),
        embedding=model.get_input_embeddings(),
        decoder=Call(decoded, model=model.model.language_model),
        head=model.lm_head,
    )


def parts(model: Qwen2VLForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    return family(model, host(model.config, model.dtype.itemsize), encoded)


register("Qwen2VLForConditionalGeneration", host, parts)
