"""Video-LLaVA against the stock model: its images. Videos are refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import stock_family
import torch
from stock_family import Request
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.families.registry import host_of

IMAGE, VIDEO, VOCAB, GRID, SIDE = 95, 94, 96, 6, 60


def config(**more: Any) -> VideoLlavaConfig:
    """6 x 6 patches."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=SIDE // GRID, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return VideoLlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO, image_seq_length=GRID * GRID,
        **more,
    )  # fmt: skip


@cache
def model() -> Any:
    """A float32 model in evaluation mode."""
    made = VideoLlavaForConditionalGeneration(config()).eval()
    stock_family.scatter(made)
    return made


def request(images: int, seed: int = 0) -> Request:
    """A prompt with text between its images."""
    words = [word for word in models.text(60, seed) if word < VIDEO]
    ids = words[:4]
    for image in range(images):
        ids = [*ids, *[IMAGE] * GRID * GRID, *words[4 + image : 4 + 2 * image]]
    generator = torch.Generator().manual_seed(seed)
    given = {"pixel_values": torch.randn(images, 3, SIDE, SIDE, generator=generator)} if images else {}
    return [*ids, *words[-3:]], given


def case() -> list[tuple[Any, Request]]:
    """(stock model, request) of each kind there is."""
    return [(model(), request(1)), (model(), request(2))]


@pytest.mark.covers("image", "several", family="video_llava")
def test_dense_is_the_stock_model() -> None:
    stock_family.check_dense(model(), request(1), request(2, 1), request(0, 2))


@pytest.mark.slow
@pytest.mark.covers("batch", family="video_llava")
@pytest.mark.parametrize("settings", [stock_family.CONFIG], ids=["pruned"])
def test_a_batch_says_what_its_samples_say_alone(settings: ViTCoPConfig) -> None:
    requests = [request(2, seed=1), request(0, seed=2), request(1, seed=3)]
    pixels = torch.cat([given["pixel_values"] for _, given in requests if given])
    stock_family.check_batch(model(), requests, {"pixel_values": pixels}, settings)


@pytest.mark.covers("turns", family="video_llava")
def test_later_turns_are_the_whole_conversation() -> None:
    ids, given = request(1)

    def text(so_far: list[int]) -> Request:
        return so_far + models.text(5, 4)[:3], given

    def image(so_far: list[int]) -> Request:
        more, new = request(1, seed=5)
        return so_far + more, {"pixel_values": torch.cat((given["pixel_values"], new["pixel_values"]))}

    stock_family.check_turns(model(), (ids, given), text, image)


def test_pruned_meets_its_schedule() -> None:
    schedule = stock_family.check_pruned(model(), request(2), [18, 18])
    assert schedule.vision.policy == "cls_attention" and schedule.vision.side == "encoder"


def test_videos_are_refused() -> None:
    fast = models.optimize(model(), ViTCoPConfig.dense())
    ids = torch.tensor([[3, *[VIDEO] * 2 * (GRID * GRID + 1), 4]])
    for run in (fast, fast.generate):
        with pytest.raises(InputError, match="videos of Video-LLaVA are not supported, as they go through a second encoder"):
            run(input_ids=ids, pixel_values_videos=torch.zeros(1, 2, 3, SIDE, SIDE))


def test_variants_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="vision_feature_select_strategy='full' is not supported"):
        host_of(config(vision_feature_select_strategy="full"))
