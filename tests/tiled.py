"""Tiny stock LLaVA-NeXT and LLaVA-OneVision models with seeded random weights, and requests for them."""

from __future__ import annotations

from functools import cache
from typing import Any
from unittest import mock

import torch
from models import IMAGE, VOCAB, randomize, text
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as kinds
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

LAYERS = 4
# Small, so that selections are quick: 4 x 4 patches.
GRID, TILE = 4, 56
# Of none is the longer side of a grid a multiple of 5: with a reach of 0.6 the distance of some tokens would be exactly that.
SIZES = ((56, 56), (40, 100), (130, 60), (168, 150), (30, 160))
PINPOINTS = {
    "next": [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]],
    "onevision": [[56 * rows, 56 * columns] for rows in range(1, 4) for columns in range(1, 4)],
}


@cache
def model(name: str, language: str = "", **config: Any) -> Any:
    """A float32 model in evaluation mode. language: "mistral", "qwen2", or the family's own."""
    vision: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": TILE,
        "patch_size": TILE // GRID,
    }  # fmt: skip
    common: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1,
        "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    kinds: dict[str, Any] = {
        "": LlamaConfig if name == "next" else Qwen2Config,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
    }
    words = kinds[language](**common)
    if name == "next":
        settings = LlavaNextConfig(
            vision_config=CLIPVisionConfig(**vision, projection_dim=16), text_config=words, image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS[name], **config,
        )  # fmt: skip
        made: Any = LlavaNextForConditionalGeneration(settings)
    else:
        settings = LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**vision, vision_use_head=False), text_config=words, image_token_index=IMAGE,
            video_token_index=VOCAB - 2, image_grid_pinpoints=PINPOINTS[name], vision_aspect_ratio="anyres_max_4", **config,
        )  # fmt: skip
        made = LlavaOnevisionForConditionalGeneration(settings)
    made = made.eval()
    randomize(made, 0)
    return made


def images(name: str, *sizes: tuple[int, int], alone: bool = True, seed: int = 0) -> dict[str, Tensor]:
    """What a processor would give for images of those (height, width): tiles of each, padded to as many as any has."""
    generator = torch.Generator().manual_seed(3000 + seed)
    counts = [image_size_to_num_patches(size, PINPOINTS[name], TILE) if alone else 1 for size in sizes]
    pixels = torch.zeros(len(sizes), max(counts), 3, TILE, TILE)
    for image, count in enumerate(counts):
        base = torch.randn(count, 3, GRID, GRID, generator=generator)
        wide = base.repeat_interleave(TILE // GRID, 2).repeat_interleave(TILE // GRID, 3)
        pixels[image, :count] = wide + 0.3 * torch.randn(count, 3, TILE, TILE, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def processor(name: str) -> Any:
    """The stock processor, with a tokenizer of one word an id."""
    words = {"<pad>": 0, "<s>": 1, "<unk>": 2, "<video>": VOCAB - 2, "<image>": IMAGE}
    words |= {f"w{number}": number for number in range(3, VOCAB - 2)}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"image_token": "<image>", "video_token": "<video>"}
    spoken = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", extra_special_tokens=special
    )
    pinned: dict[str, Any] = {"image_grid_pinpoints": PINPOINTS[name]}
    if name == "next":
        shown = LlavaNextImageProcessorPil(
            **pinned, size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}
        )  # fmt: skip
        return LlavaNextProcessor(
            shown, spoken, patch_size=TILE // GRID, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    shown = LlavaOnevisionImageProcessorPil(**pinned, size={"height": TILE, "width": TILE})
    # Its processor of videos needs torchvision, and is not asked for any.
    with mock.patch.object(LlavaOnevisionProcessor, "check_argument_for_proper_class", lambda *given: None):
        return LlavaOnevisionProcessor(
            shown, spoken, None, num_image_tokens=GRID * GRID, vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
        )  # fmt: skip


def features(made: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """Stock features of each image, [tokens, D]."""
    return list(made.model.get_image_features(**given).pooler_output)


def ids_of(tokens: list[int], seed: int = 0) -> list[int]:
    """Text around, and between, images of so many tokens."""
    words = text(4 + 5 * len(tokens) + seed % 3, seed)
    ids = words[:3]
    for i, count in enumerate(tokens):
        ids = [*ids, *[IMAGE] * count, *words[3 + 5 * i : 3 + 5 * i + (seed + i) % 5]]
    return [*ids, *words[-2:]]
