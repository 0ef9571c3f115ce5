"""The two models, of stock classes at small size, and processors for them: a tokenizer of the questions' words, PIL
pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from .questions import WORDS
from .scenes import GRID, PATCH, SIDE

MODELS = ("llava", "qwen2_5_vl")
_PLAIN = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER", "ASSISTANT", ":")
_CHAT = (
    "<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "user", "assistant",
)  # fmt: skip
_WIDTH, _HEADS, _TEXT_LAYERS = 128, 4, 8
_TEXT: dict[str, Any] = {
    "hidden_size": _WIDTH, "intermediate_size": 384, "num_hidden_layers": _TEXT_LAYERS, "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
_IMAGE = {"llava": "<image>\n", "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|> "}
_AROUND = {
    "llava": ("USER: ", " ASSISTANT:"),
    "qwen2_5_vl": ("<|im_start|> user ", " <|im_end|> <|im_start|> assistant"),
}
_CHAT_TEMPLATE = (
    "{{% for message in messages %}}"
    "{{% if message.role != 'user' %}}{{{{ raise_exception('one question at a time') }}}}{{% endif %}}{before}"
    "{{% if message.content is string %}}{{{{ message.content }}}}{{% else %}}"
    "{{% for part in message.content %}}"
    "{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}{after}{{% endfor %}}"
)


def prompt(kind: str, question: str) -> str:
    """What the model is given for a question about one picture."""
    before, after = _AROUND[kind]
    return before + _IMAGE[kind] + question + after


def make(kind: str, seed: int = 0) -> Any:
    """A model with random weights, float32, on the CPU. LLaVA: a CLIP tower of 576 patches with a CLS token, features of its
    last layer but one; Qwen2.5-VL: windows, 2x2 merged to 144 tokens, three-dimensional positions, biased projections."""
    torch.manual_seed(seed)
    words = {"vocab_size": len(_vocabulary(kind)), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llava":
        vision = CLIPVisionConfig(
            hidden_size=_WIDTH, intermediate_size=4 * _WIDTH, num_hidden_layers=6, num_attention_heads=_HEADS, image_size=SIDE,
            patch_size=PATCH, projection_dim=_WIDTH,
        )  # fmt: skip
        text = LlamaConfig(**_TEXT, **words)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=GRID * GRID)
        return LlavaForConditionalGeneration(config)
    tower = {
        "depth": 6, "hidden_size": _WIDTH, "intermediate_size": 3 * _WIDTH, "num_heads": _HEADS, "patch_size": PATCH,
        "out_hidden_size": _WIDTH, "window_size": 8 * PATCH, "fullatt_block_indexes": [2, 5], "tokens_per_second": 2,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    tokens = {
        "image_token_id": 4,
        "video_token_id": 5,
        "vision_start_token_id": 6,
        "vision_end_token_id": 7,
        "tie_word_embeddings": False,
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_TEXT | words | {"rope_parameters": rope}, vision_config=tower, **tokens)
    )


def _vocabulary(kind: str) -> list[str]:
    return [*(_PLAIN if kind == "llava" else _CHAT), *WORDS]


class _Pictures(Qwen2_5_VLProcessor):
    """Qwen's without its processor of videos, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]


# The name that is written to files: where torchvision is, transformers loads its own class.
_Pictures.__name__ = Qwen2_5_VLProcessor.__name__


def processor_of(kind: str) -> Any:
    """A stock processor: pictures of 192 x 192, words apart."""
    known = _vocabulary(kind)
    plain = Tokenizer(models.WordLevel({word: at for at, word in enumerate(known)}, unk_token="<unk>"))
    plain.normalizer = normalizers.Strip()
    plain.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")])
    if kind == "llava":
        plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = [word for word in known if word.startswith("<")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", pad_token="<pad>", bos_token=known[1], eos_token=known[2],
        additional_special_tokens=special[4:], padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    before, after = _AROUND[kind]
    chat = _CHAT_TEMPLATE.format(before=before, image=_IMAGE[kind], after=after)
    if kind == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        return LlavaProcessor(
            images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=chat,
            num_additional_image_tokens=1,
        )  # fmt: skip
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    exact = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    return _Pictures(Qwen2VLImageProcessorPil(patch_size=PATCH, size=exact), tokenizer, chat_template=chat)


def load_processor(folder: Path) -> Any:
    """As it was saved."""
    qwen = json.loads((folder / "config.json").read_text())["model_type"] == "qwen2_5_vl"
    return (_Pictures if qwen else AutoProcessor).from_pretrained(folder)


def pixels(processor: Any, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
    """What the model's tower takes."""
    return dict(processor.image_processor(list(pictures), return_tensors="pt"))


def save(model: Any, processor: Any, folder: Path) -> None:
    """Weights in float16, safetensors, and the processor; written aside and moved into place."""
    aside = folder.with_name(folder.name + ".partial")
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.half().save_pretrained(aside)
    processor.save_pretrained(aside)
    folder.mkdir(parents=True, exist_ok=True)
    for file in aside.iterdir():
        file.replace(folder / file.name)
    aside.rmdir()
