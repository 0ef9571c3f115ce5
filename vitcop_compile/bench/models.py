"""Random stock models of the families that are measured, by the numbers of a `Shape`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..toy import small_llava

if TYPE_CHECKING:
    from .cases import Shape

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_PATCH = 14


def heads(width: int, head: int = 64) -> int:
    """How many heads a layer of `width` has, one where it is narrower than they are."""
    return max(1, width // head)


def llava(shape: Shape, seed: int) -> PreTrainedModel:
    """A LLaVA-1.5."""
    return small_llava(
        vision_hidden=shape.vision_hidden, vision_layers=shape.vision_layers, vision_heads=heads(shape.vision_hidden),
        hidden=shape.hidden, layers=shape.layers, heads=heads(shape.hidden, shape.head), intermediate=shape.intermediate,
        vocab=shape.vocab, image_size=shape.image_size, seed=seed, dtype=DTYPES[shape.dtype],
    )  # fmt: skip


def internvl(shape: Shape, seed: int) -> PreTrainedModel:
    """An InternVL with Qwen2's decoder; an image is a tile."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

    vision = InternVLVisionConfig(
        hidden_size=shape.vision_hidden, intermediate_size=4 * shape.vision_hidden, num_hidden_layers=shape.vision_layers,
        num_attention_heads=heads(shape.vision_hidden), image_size=[shape.image_size] * 2, patch_size=[_PATCH] * 2,
    )  # fmt: skip
    text = Qwen2Config(**_text(shape))
    return _random(InternVLForConditionalGeneration, shape, seed, InternVLConfig, text, vision, downsample_ratio=0.5)


def qwen2_vl(shape: Shape, seed: int) -> PreTrainedModel:
    """A Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        "depth": shape.vision_layers, "embed_dim": shape.vision_hidden, "hidden_size": shape.hidden, "mlp_ratio": 4,
        "num_heads": heads(shape.vision_hidden), "patch_size": _PATCH,
    }  # fmt: skip
    return _random(Qwen2VLForConditionalGeneration, shape, seed, Qwen2VLConfig, _placed(shape), vision)


def qwen2_5_vl(shape: Shape, seed: int) -> PreTrainedModel:
    """A Qwen2.5-VL: one encoder layer in eight attends to whole images, the last of all among them."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    last = shape.vision_layers - 1
    vision = {
        "depth": shape.vision_layers, "hidden_size": shape.vision_hidden, "out_hidden_size": shape.hidden,
        "intermediate_size": -(-shape.vision_hidden * 8 // 3 // 4) * 4, "num_heads": heads(shape.vision_hidden),
        "patch_size": _PATCH, "window_size": 112, "fullatt_block_indexes": list(range(last % 8, last + 1, 8)),
    }  # fmt: skip
    return _random(Qwen2_5_VLForConditionalGeneration, shape, seed, Qwen2_5_VLConfig, _placed(shape), vision)


# By family: build(shape, seed) -> a stock model in eval mode, on torch's current device, which may be "meta".
MODELS: dict[str, Callable[[Shape, int], PreTrainedModel]] = {
    "llava": llava, "internvl": internvl, "qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl,
}  # fmt: skip
# Pixels of a side of their images: 576 tokens of the language model, or 256.
IMAGE_SIZES = {"llava": 336, "internvl": 448, "qwen2_vl": 448, "qwen2_5_vl": 448}


def _int8(model: PreTrainedModel) -> PreTrainedModel:
    """Linear layers by torchao, in place: a byte a weight and a scale an output channel; products in the model's type."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def _dynamic(model: PreTrainedModel) -> PreTrainedModel:
    """As `_int8`, and the rows that weights multiply are rounded to int8, too, each with a scale of its own."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


# How linear layers are held, and what they multiply.
WEIGHTS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "float": lambda model: model, "int8": _int8, "int8 dynamic": _dynamic,
}  # fmt: skip


def _text(shape: Shape) -> dict[str, Any]:
    """Numbers of a decoder that follows LLaMA's."""
    count = heads(shape.hidden, shape.head)
    return {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": count, "num_key_value_heads": count, "vocab_size": shape.vocab,
        "max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _placed(shape: Shape) -> dict[str, Any]:
    """The same, with positions of three coordinates, which share the pairs of a head as in Qwen's own."""
    text = _text(shape)
    pairs = shape.hidden // text["num_attention_heads"] // 2
    rest = pairs - pairs // 4
    sections = [pairs // 4, rest // 2, rest - rest // 2]
    return text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}}


def _random(kind: Any, shape: Shape, seed: int, config: Any, text: Any, vision: Any, **more: Any) -> PreTrainedModel:
    """A model `kind` of `config`, its placeholders the last ids of the vocabulary."""
    ids = {"image_token_id": shape.vocab - 1}
    if not more:
        ids |= {"video_token_id": shape.vocab - 2, "vision_start_token_id": 2, "vision_end_token_id": 2}
    made = config(text_config=text, vision_config=vision, dtype=DTYPES[shape.dtype], **ids, **more)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(made).to(DTYPES[shape.dtype]).eval()
