"""InternVL: an encoder with a CLS token, patches merged two by two, tiles that follow one another, a causal decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from ..errors import UnsupportedError
from ..host import FixedImages
from .registry import Call, Family, causal, register
from .shapes import grouped, pixels_of, shape_of

if TYPE_CHECKING:
    from transformers import InternVLForConditionalGeneration


def host(config: Any, element_bytes: int | None = None) -> FixedImages:
    """What a configuration says: every tile of an image, and every frame of a video, is an image of its own. Raises
    UnsupportedError for variants that are not captured."""
    from transformers.models.internvl.modeling_internvl import InternVLModel  # loaded for its users alone

    if config.vision_feature_select_strategy != "default":
        raise UnsupportedError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported: 'default' is, the "
            "CLS token has no place in a grid that is merged"
        )
    side = round(1 / config.downsample_ratio)
    shape = shape_of(config, "internvl_vision", element_bytes, packed=True, group=side * side)

    def merge(patches: Tensor) -> Tensor:
        merged = InternVLModel.pixel_shuffle(cast(InternVLModel, None), patches, config.downsample_ratio)
        return merged.flatten(1, 2)

    def tiles(height: int, width: int) -> int:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil as Processor

        _, high, wide = pixels_of(config)
        cut = {"crop_to_patches": True, "patch_size": {"height": high, "width": wide}}
        return Processor.get_number_of_image_patches(cast(Processor, Processor), height, width, cut)

    return FixedImages(shape, config.image_token_id, pixels_of(config), pack=grouped(shape, merge), tiles=tiles)


def parts(model: InternVLForConditionalGeneration) -> Family:
    """The stock modules of `model`, none of them changed."""
    vision: Any = model.model.vision_tower
    # Features of the last layer are normalised, those of an earlier one are not; a norm of single patches commutes with
    # leaving others out, so it waits for what is kept.
    last = host(model.config).shape.feature_layer == vision.config.num_hidden_layers - 1
    norms = {"norm": vision.layernorm} if last else {}
    return Family(
        host=host(model.config, model.dtype.itemsize),
        patches=Call(lambda m, x: m.embeddings(x), embeddings=vision.embeddings),
        encoder=Call(lambda m, x: m.encoder(x)[0], encoder=vision.encoder),
        projector=Call(
            lambda m, x: m.projector((m.norm(x) if hasattr(m, "norm") else x).flatten(-2)),
            projector=model.model.multi_modal_projector,
            **norms,
        ),
        embedding=model.get_input_embeddings(),
        decoder=causal(model.model.language_model),
        head=model.lm_head,
    )


register("InternVLForConditionalGeneration", host, parts)
