"""GLM-4V (4.1V, and 4.6V of the same parts): as Qwen2-VL, with learned positions in the encoder, patches merged by a strided
convolution, and videos whose frames use the placeholders of images."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .patched import PatchedImages
from .qwen2_vl import decoded, encoded, in_order, patched
from .qwen3_vl import learned, resampled_tables
from .registry import Call, Family, register
from .shapes import check_types

if TYPE_CHECKING:
    from transformers import Glm4vForConditionalGeneration, Glm46VForConditionalGeneration

# Learned positions that a patch's own is blended from: bicubic, 4 x 4.
_TAPS = 16


def host(config: Any, element_bytes: int | None = None) -> PatchedImages:
    """What a configuration says. Raises UnsupportedError for parts that are not GLM-4V's own."""
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil, smart_resize
    from transformers.models.glm4v.modeling_glm4v import Glm4vModel  # loaded for its users alone

    check_types(config, vision="glm4v_vision", text="glm4v_text")
    vision = config.vision_config
    side, size = vision.image_size // vision.patch_size, Glm4vImageProcessorPil.size

    def resize(height: int, width: int) -> tuple[int, int]:
        steps = vision.temporal_patch_size
        return smart_resize(
            steps, height, width, steps, vision.patch_size * vision.spatial_merge_size,
            min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"],
        )  # fmt: skip

    return patched(
        config,
        element_bytes,
        Glm4vModel,
        cut=partial(sampled, merge=vision.spatial_merge_size, side=side),
        tables=resampled_tables(min(_TAPS, side * side)),
        frames=True,
        video_token_id=None,
        resize=resize,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.out_hidden_size,
        vision_heads=vision.num_heads,
        projector_hidden=None,
    )


def sampled(rows: int, columns: int, merge: int, side: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `resampled`: the stock encoder is asked with learned positions that say which they are."""
    from transformers.models.glm4v.modeling_glm4v import Glm4vVisionEmbeddings

    order, (places,) = in_order(rows, columns, merge)
    number = side * side
    with torch.device("meta"):  # draws no random numbers
        stock = Glm4vVisionEmbeddings(cast(Any, SimpleNamespace(hidden_size=number, image_size=side, patch_size=1)))
    stock.position_embedding.weight = torch.nn.Parameter(torch.eye(number))
    index, weight = [], []
    with torch.no_grad():
        for part in places.split(4096):
            length, grid = torch.tensor([len(part)]), torch.tensor([[1, rows, columns]])
            shares = stock(torch.zeros(len(part), number), length, grid, part[:, 0], part[:, 1])
            index.append(shares.abs().topk(min(_TAPS, number), -1).indices)
            weight.append(shares.gather(1, index[-1]))
    return order, (places, torch.cat(index), torch.cat(weight))


def parts(model: Glm4vForConditionalGeneration | Glm46VForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.visual
    side = vision.config.spatial_merge_size

    def embed(m: Any, x: Tensor, real: Tensor, places: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        rows = m.norm(m.embed(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return rows + learned(m.positions, index, weight).to(rows.dtype)

    def project(m: Any, x: Tensor) -> Tensor:
        # A norm of single patches, so that it waits for what is kept.
        groups = m.norm(x.flatten(0, -3)).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        return m.merger(m.downsample(groups).flatten(1)).unflatten(0, x.shape[:-2])

    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(
            embed, embed=vision.patch_embed, norm=vision.post_conv_layernorm, positions=vision.embeddings.position_embedding
        ),
        encoder=Call(encoded, blocks=vision.blocks, rotary=vision.rotary_pos_emb),
        projector=Call(project, norm=vision.post_layernorm, downsample=vision.downsample, merger=vision.merger),
        embedding=model.get_input_embeddings(),
        decoder=Call(decoded, model=model.model.language_model),
        head=model.lm_head,
    )


register("Glm4vForConditionalGeneration", host, parts)
register("Glm46VForConditionalGeneration", host, parts)
