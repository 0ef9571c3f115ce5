"""Tiny stock Gemma 3 models with seeded random weights, and requests for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from models import IMAGE, VOCAB, randomize, text
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

# 8 x 8 patches, averaged in squares of 2 x 2.
GRID, SIDE, TOKENS, LAYERS = 8, 56, 16, 5
# Less than an image, so that it cuts blocks as well.
WINDOW = 12


def config(window: int = WINDOW, tokens: int = TOKENS, grid: int = GRID, **words: Any) -> Gemma3Config:
    """Layers that slide but for the second and the last."""
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE // GRID * grid,
        patch_size=SIDE // GRID, vision_use_head=False,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 24,
        "max_position_embeddings": 1024, "sliding_window": window, "bos_token_id": 1, "eos_token_id": None,
        "pad_token_id": 0, "tie_word_embeddings": False,
        "layer_types": [f"{'full' if layer in (1, LAYERS - 1) else 'sliding'}_attention" for layer in range(LAYERS)],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }  # fmt: skip
    return Gemma3Config(
        text_config=Gemma3TextConfig(**settings | words), vision_config=vision, mm_tokens_per_image=tokens,
        image_token_index=IMAGE, boi_token_index=4, eoi_token_index=5, eos_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip


@cache
def model(window: int = WINDOW) -> Gemma3ForConditionalGeneration:
    """A float32 model in evaluation mode, for all tests, which leave it as it is."""
    made = Gemma3ForConditionalGeneration(config(window)).eval()
    randomize(made, 0)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name and "layer_norm" not in name and "vision" not in name:
                weight.sub_(1)  # these scale by one more than their weight
        made.get_input_embeddings().weight.mul_(0.2)  # what layers add counts, though these are scaled by 8
        made.lm_head.weight[IMAGE] = 0  # which is none of what is said
    return made


def pixels(count: int = 1, seed: int = 0) -> Tensor:
    """Random normalised images, a color of its own for every patch."""
    generator = torch.Generator().manual_seed(4000 + seed)
    base = torch.randn(count, 3, GRID, GRID, generator=generator)
    wide = base.repeat_interleave(SIDE // GRID, 2).repeat_interleave(SIDE // GRID, 3)
    return wide + 0.3 * torch.randn(count, 3, SIDE, SIDE, generator=generator)


def ids(*parts: int, seed: int = 0) -> list[int]:
    """Text of so many tokens each, an image between them."""
    words = iter(text(sum(parts), seed))
    found = [next(words) for _ in range(parts[0])]
    for count in parts[1:]:
        found += [IMAGE] * TOKENS + [next(words) for _ in range(count)]
    return found


def kinds(given: Tensor) -> Tensor:
    """What a processor says of ids: 1 for those of images."""
    return (given == IMAGE).long()
