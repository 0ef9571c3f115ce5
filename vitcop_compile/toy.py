"""A LLaVA-1.5 at any size with random weights, and a tokenizer to match: demos, benchmarks and tests without a download."""

from __future__ import annotations

from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .errors import ConfigError

# Ids of the byte-level vocabulary: three special tokens, 256 bytes, the image placeholder.
PAD, BOS, EOS = 0, 1, 2
FIRST_BYTE = 3
IMAGE_TOKEN = FIRST_BYTE + 256
PLACEHOLDER = "<image>"
# The library's own initial weights give nearly uniform attention and one token for ever. Wider ones make scores that differ
# clearly between patches, and varied tokens.
_VISION_FACTOR, _TEXT_SPREAD = 3.0, 1.5


def small_llava(
    *,
    vision_hidden: int = 256,
    vision_layers: int = 6,
    vision_heads: int = 4,
    hidden: int = 512,
    layers: int = 12,
    heads: int = 8,
    kv_heads: int | None = None,
    intermediate: int = 1376,
    vocab: int = 2048,
    image_size: int = 336,
    patch_size: int = 14,
    max_positions: int = 4096,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LlavaForConditionalGeneration:
    """A stock LlavaForConditionalGeneration in eval mode, on the CPU, with random weights drawn from `seed`.

    The global random state is left alone. Its generation ends at `max_new_tokens` only: random weights would stop anywhere.
    Raises ConfigError if `vocab` cannot hold the byte-level tokenizer.
    """
    if vocab <= IMAGE_TOKEN:
        raise ConfigError(f"vocab={vocab} cannot hold 256 bytes and the special tokens: choose at least {IMAGE_TOKEN + 1}")
    vision = CLIPVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=4 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_heads,
        image_size=image_size,
        patch_size=patch_size,
        initializer_factor=_VISION_FACTOR,
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        vocab_size=vocab,
        max_position_embeddings=max_positions,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        initializer_range=_TEXT_SPREAD * hidden**-0.5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(image_size // patch_size) ** 2,
        dtype=dtype,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).to(dtype).eval()  # type: ignore[arg-type]


def encode(prompt: str, config: LlavaConfig) -> Tensor:
    """`prompt` as int64 [1, T], a token per byte after BOS; "<image>", or else the prompt's start, becomes the placeholders.

    A stand-in for a tokenizer: only the lengths are like the real thing.
    """
    before, found, after = prompt.partition(PLACEHOLDER)
    if not found:
        before, after = "", prompt
    vision: Any = config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    ids = [BOS, *_bytes(before), *[config.image_token_id] * patches, *_bytes(after)]
    return torch.tensor([ids], dtype=torch.int64)


def decode(ids: list[int]) -> str:
    """The text of byte tokens; every other token is left out."""
    return bytes(i - FIRST_BYTE for i in ids if FIRST_BYTE <= i < IMAGE_TOKEN).decode(errors="replace")


def processor(config: LlavaConfig) -> CLIPImageProcessorPil:
    """CLIP's preprocessing at the model's image size."""
    vision: Any = config.vision_config
    side = vision.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def pixels(image: Image, config: LlavaConfig) -> Tensor:
    """`image` resized, center-cropped and normalised: float32 [1, 3, side, side]."""
    return processor(config)(image.convert("RGB"), return_tensors="pt")["pixel_values"]


def request(prompt: str, image: Image, config: LlavaConfig) -> dict[str, Tensor]:
    """What `generate` takes for one prompt and one image: input_ids, attention_mask, pixel_values."""
    ids = encode(prompt, config)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(image, config)}


def _bytes(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]
