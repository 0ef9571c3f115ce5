"""LLaVA-NeXT (1.6): LLaVA with images in tiles, packed without padding, a line break behind every row."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .registry import Call, Family, causal, register
from .shapes import PUBLISHED, pixels_of, shape_of
from .tiled import MULTIPLE, TiledImages, with_breaks

if TYPE_CHECKING:
    from transformers import LlavaNextForConditionalGeneration

_Images = TypeVar("_Images", bound=TiledImages)


def host(config: Any, element_bytes: int | None = None) -> TiledImages:
    """What a configuration says. Raises UnsupportedError for variants that are not captured."""
    from transformers.models.llava_next.modeling_llava_next import LlavaNextModel  # loaded for its users alone

    return tiled(config, element_bytes, LlavaNextModel, TiledImages)


def tiled(config: Any, element_bytes: int | None, model: Any, kind: type[_Images], group: int = 1, **more: Any) -> _Images:
    """The host of a model that packs tiles as LLaVA-NeXT does. model: its stock class, which is asked for the packing; kind:
    of host, with `more` of its fields; group: as in `ModelShape`."""
    strategy = config.vision_feature_select_strategy
    if strategy != "default":
        raise UnsupportedError(
            f"vision_feature_select_strategy={strategy!r} is not supported: 'default' (CLS dropped) is, tiles with a CLS "
            "token cannot be put together"
        )
    shape = shape_of(config, "clip_vision_model", element_bytes, packed=True, multiple=MULTIPLE, group=group, keys=PUBLISHED)
    owner = SimpleNamespace(config=config)

    def packing(features: Tensor, size: tuple[int, int], line_break: Tensor, as_it_is: bool) -> Tensor:
        return model.pack_image_features(owner, [features], torch.tensor([size]), strategy, line_break)[0][0]

    pinpoints = tuple((height, width) for height, width in config.image_grid_pinpoints)
    return kind(shape, config.image_token_id, pixels_of(config), pinpoints, packing, **more)


def parts(model: LlavaNextForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.vision_tower
    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(lambda m, x: m.norm(m.embeddings(x)), embeddings=vision.embeddings, norm=vision.pre_layrnorm),
        encoder=Call(lambda m, x: m.encoder(inputs_embeds=x).last_hidden_state, encoder=vision.encoder),
        projector=model.model.multi_modal_projector,
        embedding=with_breaks(model.get_input_embeddings(), model.model.image_newline),
        decoder=causal(model.model.language_model),
        head=model.lm_head,
    )


register("LlavaNextForConditionalGeneration", host, parts)
