"""LLaVA-NeXT-Video against the stock model: images in tiles, and videos of pooled frames."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import stock_family
import tiled
import torch
from stock_family import Request
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.families.registry import host_of

IMAGE, VIDEO, VOCAB, GRID, SIDE = 95, 94, 96, 5, 60
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
FRAME = (GRID // 2) ** 2
SIZES = ((50, 100), (130, 60))


def config(**more: Any) -> LlavaNextVideoConfig:
    """5 x 5 patches a tile: pooling leaves the last row and column out."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
        patch_size=SIDE // GRID, projection_dim=16,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlavaNextVideoConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS, **more,
    )  # fmt: skip


@cache
def model(mode: str = "average") -> Any:
    """A float32 model in evaluation mode. mode: of the pooling."""
    made = LlavaNextVideoForConditionalGeneration(config(spatial_pool_mode=mode)).eval()
    stock_family.scatter(made)
    return made


def images(*sizes: tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """What a processor gives for images of those (height, width)."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    counts = [image_size_to_num_patches(size, PINPOINTS, SIDE) for size in sizes]
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(len(sizes), max(counts), 3, SIDE, SIDE, generator=generator),
        "image_sizes": torch.tensor(sizes),
    }


def videos(count: int, frames: int, seed: int = 0) -> dict[str, Any]:
    """Videos of so many frames each."""
    generator = torch.Generator().manual_seed(100 + seed)
    return {"pixel_values_videos": torch.randn(count, frames, 3, SIDE, SIDE, generator=generator)}


def request(*what: tuple[int, int] | int, seed: int = 0) -> Request:
    """A prompt about images of some (height, width), and videos of so many frames, with text between."""
    sizes, frames = [item for item in what if isinstance(item, tuple)], [item for item in what if isinstance(item, int)]
    given: dict[str, Any] = {}
    runs = []
    if sizes:
        given |= images(*sizes, seed=seed)
        with torch.no_grad():
            runs = [[IMAGE] * len(found) for found in tiled.features(model(), given)]
    if frames:
        given |= videos(len(frames), frames[0], seed)
    left = {tuple: iter(runs), int: iter([[VIDEO] * FRAME * count for count in frames])}
    words = [word for word in models.text(60, seed) if word < VIDEO]
    ids = words[:4]
    for place, item in enumerate(what):
        ids = [*ids, *next(left[type(item)]), *words[4 + place : 4 + 2 * place]]
    return [*ids, *words[-3:]], given


def case() -> list[tuple[Any, Request]]:
    """(stock model, request) of each kind there is."""
    return [(model(), request(SIZES[0])), (model(), request(3)), (model(), request(2, SIZES[1], 2))]


@pytest.mark.covers("image", "several", "video", family="next_video")
def test_dense_is_the_stock_model() -> None:
    stock_family.check_dense(
        model(),
        request(SIZES[0]),
        request(*SIZES, seed=1),
        request(3, seed=2),
        request(2, SIZES[1], 2, seed=3),
        request(seed=4),
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["max", "conv"])
def test_other_poolings_are_the_stock_models(mode: str) -> None:
    stock_family.check_dense(model(mode), request(2))


@pytest.mark.slow
@pytest.mark.covers("batch", family="next_video")
@pytest.mark.parametrize("settings", [stock_family.CONFIG], ids=["pruned"])
def test_a_batch_says_what_its_samples_say_alone(settings: ViTCoPConfig) -> None:
    requests = [request(2, SIZES[0], seed=1), request(seed=2), request(2, seed=3)]
    frames = torch.cat([requests[0][1]["pixel_values_videos"], requests[2][1]["pixel_values_videos"]])
    stock_family.check_batch(model(), requests, requests[0][1] | {"pixel_values_videos": frames}, settings)


@pytest.mark.covers("turns", family="next_video")
def test_later_turns_are_the_whole_conversation() -> None:
    ids, given = request(SIZES[0])

    def text(so_far: list[int]) -> Request:
        return so_far + models.text(5, 4)[:3], given

    def video(so_far: list[int]) -> Request:
        more, new = request(2, seed=5)
        return so_far + more, given | new

    stock_family.check_turns(model(), (ids, given), text, video)


@pytest.mark.slow
def test_pruned_meets_its_schedule() -> None:
    schedule = stock_family.check_pruned(model(), request(3), [4, 4, 4])
    assert schedule.vision.policy == "cls_attention" and schedule.vision.side == "merge"
    stock_family.check_pruned(model(), request(2, SIZES[0]), [4, 4, 16, 32])


def test_videos_that_are_not_the_models_are_refused() -> None:
    fast = models.optimize(model(), ViTCoPConfig.dense())
    ids, given = request(2)
    pixels, prompt = given["pixel_values_videos"], torch.tensor([ids])
    for wrong, what in (
        (pixels[0], r"pixel_values_videos is \(2, 3, 60, 60\): this model takes \[videos, frames, 3, 60, 60\]"),
        (pixels[..., :50], r"this model takes \[images, \*\(3, 60, 60\)\]"),
        (pixels[:, :1], "a prompt holds 8 image tokens, its images need 4"),
        (list(pixels), "pixel_values_videos is list"),
    ):
        with pytest.raises(InputError, match=what):
            fast(prompt, pixel_values_videos=wrong)


def test_variants_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="vision_feature_select_strategy='full' is not supported"):
        host_of(config(vision_feature_select_strategy="full"))
