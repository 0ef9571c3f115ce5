"""Video-LLaVA against the stock model: images, and videos, which have an encoder of their own."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import models
import naive
import pytest
import stock_family
import torch
from reference_clips import FrameConversation
from reference_llava import Settings
from stock_family import Request
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration
from vitcop_compile.export import EngineModel

import vitcop_compile
from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.families.registry import host_of
from vitcop_compile.quality import kept_saliency

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


def request(images: int, seed: int = 0, videos: int = 0, frames: int = 3) -> Request:
    """A prompt with text between its images, and its videos of so many frames before, between and behind them."""
    words = [word for word in models.text(60, seed) if word < VIDEO]
    ids = words[:4]
    for item in range(max(images, videos)):
        if item < videos:
            ids = [*ids, *[VIDEO] * frames * (GRID * GRID + 1), words[20 + item]]
        if item < images:
            ids = [*ids, *[IMAGE] * GRID * GRID, *words[4 + item : 4 + 2 * item]]
    generator = torch.Generator().manual_seed(seed)
    given = {"pixel_values": torch.randn(images, 3, SIDE, SIDE, generator=generator)} if images else {}
    if videos:
        given["pixel_values_videos"] = torch.randn(videos, frames, 3, SIDE, SIDE, generator=generator)
    return [*ids, *words[-3:]], given


def case() -> list[tuple[Any, Request]]:
    """(stock model, request) of each kind there is."""
    return [(model(), request(1)), (model(), request(2)), (model(), request(1, videos=2))]


@pytest.mark.covers("image", "several", family="video_llava")
def test_dense_is_the_stock_model() -> None:
    stock_family.check_dense(model(), request(1), request(2, 1), request(0, 2))


@pytest.mark.covers("video", family="video_llava")
def test_dense_with_videos_is_the_stock_model() -> None:
    stock_family.check_dense(model(), request(0, 3, videos=1), request(2, 4, videos=2))


@pytest.mark.slow
@pytest.mark.covers("batch", family="video_llava")
@pytest.mark.parametrize("settings", [stock_family.CONFIG], ids=["pruned"])
def test_a_batch_says_what_its_samples_say_alone(settings: ViTCoPConfig) -> None:
    requests = [request(2, seed=1, videos=1), request(0, seed=2), request(1, seed=3), request(0, seed=4, videos=2)]
    joined = {
        name: torch.cat([given[name] for _, given in requests if name in given])
        for name in ("pixel_values", "pixel_values_videos")
    }
    stock_family.check_batch(model(), requests, joined, settings)


@pytest.mark.covers("turns", family="video_llava")
def test_later_turns_are_the_whole_conversation() -> None:
    ids, given = request(1)

    def text(so_far: list[int]) -> Request:
        return so_far + models.text(5, 4)[:3], given

    def image(so_far: list[int]) -> Request:
        more, new = request(1, seed=5)
        return so_far + more, {"pixel_values": torch.cat((given["pixel_values"], new["pixel_values"]))}

    stock_family.check_turns(model(), (ids, given), text, image)


@pytest.mark.slow
def test_later_turns_with_videos_are_the_whole_conversation() -> None:
    ids, given = request(1, videos=1)

    def video(so_far: list[int]) -> Request:
        more, new = request(0, seed=6, videos=1)
        both = torch.cat((given["pixel_values_videos"], new["pixel_values_videos"]))
        return so_far + more, given | {"pixel_values_videos": both}

    stock_family.check_turns(model(), (ids, given), video)


def test_pruned_meets_its_schedule() -> None:
    schedule = stock_family.check_pruned(model(), request(2), [18, 18])
    assert schedule.vision.policy == "cls_attention" and schedule.vision.side == "encoder"


@pytest.mark.covers("pruned by hand", "backend", family="video_llava")
@pytest.mark.parametrize(
    ("scope", "backend"),
    [("per_image", "eager"), models.slow("pooled", "eager"), models.exhaustive("per_image", "onnxruntime")],
)
def test_pruned_frames_are_what_stock_layers_give_when_pruned_by_hand(scope: str, backend: str) -> None:
    """Their CLS tokens stay, in front of what is kept of each."""
    config = ViTCoPConfig(
        budgets=(12, 7, 3, 4), shallow_layer=1, deep_layer=3, scale_layers=False, scope=scope
    )  # fmt: skip
    ids, given = request(2, 5, videos=2)
    found = stock_family.generate(models.optimize(model(), config, backend=backend), [ids], given, steps=3)
    turn = FrameConversation(model(), Settings(12, 4, 7, 3, 1, 1, 3), scope == "pooled")
    logits = turn.turn(ids, given, stock_family.said(found))
    kept = [36 * number + patch for number, own in enumerate(turn.kept) for patch in own]
    assert found.past_key_values.selection.kept[0].tolist() == kept and len(turn.kept) == 8
    for stage, expected in zip(found.past_key_values.selection.stages, turn.stages, strict=True):
        assert stage[0].tolist() == [36 * number + patch for number, own in enumerate(expected) for patch in own]
    torch.testing.assert_close(torch.cat(found.logits), logits, atol=stock_family.NEAR, rtol=0)
    for layer, expected in enumerate(turn.cache.layers):
        rows = expected.keys.shape[2]
        for buffer, values in zip(
            found.past_key_values.buffers[2 * layer : 2 * layer + 2], (expected.keys, expected.values), strict=True
        ):
            torch.testing.assert_close(buffer[0, :, :rows], values[0], atol=stock_family.NEAR, rtol=1e-5)


@pytest.mark.covers("folder", family="video_llava")
@pytest.mark.slow
def test_a_dense_folder_of_images_and_videos_is_the_stock_model(tmp_path: Any) -> None:
    requests = [request(0, 3, videos=1), request(1, 2, videos=1)]
    fast = models.optimize(model(), ViTCoPConfig.dense())
    layouts = [fast.layouts_of(torch.tensor([ids]), **given)[0] for ids, given in requests]
    fast.export(tmp_path / "f", layouts=layouts, max_text_len=32, max_new_tokens=16)
    engine = EngineModel.from_pretrained(tmp_path / "f")
    for ids, given in requests:
        stock_family.check_same(*(stock_family.generate(each, [ids], given) for each in (engine, model())))


@pytest.mark.slow
def test_frames_through_the_encoder_of_images_would_be_seen() -> None:
    """A control: two towers with weights of their own."""
    ids, given = request(0, 5, videos=1)
    found = stock_family.generate(models.optimize(model(), ViTCoPConfig.dense()), [ids], given, steps=1)
    swapped = copy.deepcopy(model())
    swapped.model.video_tower = swapped.model.image_tower
    wrong = stock_family.generate(swapped, [ids], given, steps=1)
    assert (found.logits[0] - wrong.logits[0]).abs().max() > 100 * stock_family.NEAR


@pytest.mark.slow
def test_warmup_makes_every_program_that_a_video_needs() -> None:
    fast = vitcop_compile.optimize(model(), stock_family.CONFIG, backend="eager")
    fast.warmup(layouts=[fast.host.frame] * 3, text_tokens=12, max_new_tokens=3)
    before = fast.compiled
    ids, given = request(0, 3, videos=1)
    stock_family.generate(fast, [ids], given, steps=3)
    assert fast.compiled == before and ("frames", 3) in before


def test_videos_that_are_not_the_models_are_refused() -> None:
    fast = models.optimize(model(), ViTCoPConfig.dense())
    ids, given = request(0, videos=1)
    pixels, prompt = given["pixel_values_videos"], torch.tensor([ids])
    for wrong, what in (
        (pixels[0], r"pixel_values_videos is \(3, 3, 60, 60\): this model takes \[videos, frames, 3, 60, 60\]"),
        (pixels[..., :50], r"this model takes \[images, \*\(3, 60, 60\)\]"),
        (pixels[:, :1], "a prompt holds 111 image tokens, its images need 37"),
        (list(pixels), "pixel_values_videos is list"),
    ):
        with pytest.raises(InputError, match=what):
            fast(prompt, pixel_values_videos=wrong)


def test_variants_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="vision_feature_select_strategy='full' is not supported"):
        host_of(config(vision_feature_select_strategy="full"))


@pytest.mark.slow
@torch.no_grad()
def test_the_saliency_of_frames_is_that_of_their_own_encoder() -> None:
    """Attention of CLS in the layer that scores, of stock towers: a video of two frames, then an image."""
    ids, given = request(1, 6, videos=1, frames=2)
    asked = {"input_ids": torch.tensor([ids])} | given
    fast = models.optimize(model(), ViTCoPConfig(budgets=(12, 7, 3, 4), shallow_layer=1, deep_layer=3, scale_layers=False))
    layer, kept = fast.schedule.vision.layer, fast(**asked)["past_key_values"].selection.kept[0]
    scores = []
    for tower, pixels in (
        (model().model.video_tower, given["pixel_values_videos"].flatten(0, 1)),
        (model().model.image_tower, given["pixel_values"]),
    ):
        block = tower.encoder.layers[layer]
        normed = block.layer_norm1(tower(pixels, output_hidden_states=True).hidden_states[layer])
        query, key = (
            projection(normed).unflatten(2, (4, 8)).transpose(1, 2).numpy()
            for projection in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        scores += [naive.cls_saliency(*one, 8**-0.5) for one in zip(query, key, strict=True)]
    expected = torch.tensor(scores).flatten()
    assert kept_saliency(fast, asked).item() == pytest.approx((expected[kept].sum() / expected.sum()).item(), abs=1e-5)
