"""Videos whose frames share a budget: one selection over a clip, and clusters with time as a third coordinate."""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import families
import frames
import gemma
import models
import pytest
import stock_family
import test_family_llava_next_video as next_video
import test_family_qwen3_vl as qwen3_vl
import torch
from families import KINDS
from reference_clips import ClipConversation
from reference_llava import Settings, cluster
from test_families import NEAR, check, generate, pruned
from vitcop_compile.export import EngineModel

import vitcop_compile
from vitcop_compile import ConfigError, InputError, ViTCoPConfig
from vitcop_compile.ops import density_peaks

POOLED = pruned(11, 7, 3, 4, clips="pooled")
# A clip, an image and text in one prompt; a clip of one frame is an image.
PROMPTS: dict[str, list[Any]] = {
    "a clip": [3, (3, 2, 4), 2],
    "clips and an image": [2, (3, 2, 4), 3, (3, 4), 1, (2, 3, 3), 4],
}


@cache
def optimized(name: str, config: ViTCoPConfig, backend: str = "eager") -> Any:
    return models.optimize(families.model(name), config, backend=backend)


def by_the_book(name: str, config: ViTCoPConfig) -> ClipConversation:
    budgets, kind = config.budgets, KINDS[name]
    assert budgets is not None and budgets.centers is not None
    settings = Settings(
        budgets.vision, budgets.centers, budgets.shallow, budgets.deep, kind.layer, 1, 3, "kept"
    )  # fmt: skip
    return ClipConversation(families.model(name), kind.book, lambda _: settings, config.scope == "pooled")


@pytest.mark.covers("pruned by hand")
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen2_vl", "a clip"),
        models.slow("qwen2_vl", "clips and an image"),
        models.slow("qwen2_5_vl", "a clip"),
    ],
)
def test_a_pooled_clip_is_what_stock_layers_give_when_pruned_by_hand(name: str, kind: str) -> None:
    ids, given = families.prompt(name, PROMPTS[kind])
    found = generate(optimized(name, POOLED), ids, given, 3, name)
    turn = by_the_book(name, POOLED)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()))
    # One selection among all frames: not as many of each.
    of_frames = [sum(i // 8 == frame for i in turn.kept[0]) for frame in range(3)]
    assert len(turn.kept[0]) == 11 and len(set(of_frames)) > 1


@pytest.mark.covers("folder", "onnxruntime", family="qwen2_vl")
@pytest.mark.slow
def test_a_folder_of_clips(tmp_path: Any) -> None:
    ids, given = families.prompt("qwen2_vl", PROMPTS["a clip"])
    fast = optimized("qwen2_vl", POOLED)
    fast.export(
        tmp_path / "f", layouts=fast.layouts_of(torch.tensor([ids]), **given), max_text_len=16, max_new_tokens=4
    )  # fmt: skip
    found = generate(EngineModel.from_pretrained(tmp_path / "f"), ids, given, 3, "qwen2_vl")
    turn = by_the_book("qwen2_vl", POOLED)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()), near=1e-4)


@pytest.mark.slow
def test_a_clip_and_an_image_share_the_decoders_budgets_where_all_is_pooled() -> None:
    config = pruned(11, 7, 3, 4, clips="pooled", scope="pooled")
    ids, given = families.prompt("qwen2_vl", PROMPTS["clips and an image"])
    found = generate(optimized("qwen2_vl", config), ids, given, 3, "qwen2_vl")
    turn = by_the_book("qwen2_vl", config)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()))


def test_time_is_a_coordinate_of_clusters() -> None:
    """Against loops; and a control: without time, or with time in another unit, labels are others."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(1, 60, 6, generator=generator)
    places = torch.tensor(list(itertools.product(range(5), range(3), range(4)))).float() / 4
    assert density_peaks(features, places[None], 7, 2.0, 0.6).tolist() == [
        cluster(features[0], [tuple(place) for place in places.tolist()], 7, 2.0, 0.6)
    ]
    other = places * torch.tensor([0.5, 1, 1])
    found = [density_peaks(features, given[None], 7, 2.0, 0.6).tolist() for given in (places, places[:, 1:], other)]
    assert found[0] != found[1] and found[0] != found[2]


def test_frames_of_one_time_cluster_as_an_image_does() -> None:
    features, places = torch.randn(2, 12, 5), torch.rand(2, 12, 2)
    timed = torch.cat((torch.full((2, 12, 1), 0.25), places), 2)
    assert torch.equal(density_peaks(features, timed, 4), density_peaks(features, places, 4))


def test_segments_and_budgets_of_a_clip() -> None:
    fast = optimized("qwen2_vl", ViTCoPConfig.preset("1/3", clips="pooled"))
    clip, frame = fast.host.laid("video", 8, 16, 20), fast.host.laid("image", 1, 16, 20)
    (segment,) = clip
    assert (segment.grid, segment.candidates, segment.tiles) == ((8, 8, 10), 640, 8)
    assert fast.host.laid("video", 1, 16, 20)[0].grid == frame[0].grid
    schedule, apart = fast.schedule_of(clip), fast.schedule_of(frame * 8)
    assert schedule.segment_tokens == (320,) and apart.segment_tokens == (48,) * 8  # multiples of 16
    assert schedule.vision_flops() < apart.vision_flops()  # fewer are projected, and frames are seen one by one
    assert schedule.dense_vision_flops() == apart.dense_vision_flops()


def test_a_clip_that_keeps_too_many_is_refused_before_anything_runs() -> None:
    fast = optimized("qwen2_vl", ViTCoPConfig.preset("1/3", clips="pooled"))
    fast.schedule_of(fast.host.laid("video", 32, 32, 32))  # 4096 of 8192
    with pytest.raises(
        ConfigError,
        match=re.escape(
            "keeps 4224 tokens of a clip of 33 frames, all pairs of which are compared, and the most is 4096: lower"
        ),
    ):
        fast.schedule_of(fast.host.laid("video", 33, 32, 32))
    per_frame = optimized("qwen2_vl", ViTCoPConfig.preset("1/3"))
    per_frame.schedule_of(per_frame.host.laid("video", 128, 32, 32))


@pytest.mark.parametrize("stock", [models.shared, lambda: families.model("internvl"), gemma.model])
def test_models_without_videos_of_their_own_refuse(stock: Any) -> None:
    with pytest.raises(ConfigError, match="clips='pooled' takes a model that is told of videos"):
        vitcop_compile.optimize(stock(), POOLED, backend="eager")
    with pytest.raises(ConfigError, match="clips='both' is unknown: use 'per_frame' or 'pooled'"):
        pruned(5, 3, 1, 2, clips="both")


@pytest.mark.slow
def test_pooled_frames_of_tiles() -> None:
    """LLaVA-NeXT-Video, beside an image in tiles; a dense model does not depend on whose budgets there are."""
    model = next_video.model()
    config = ViTCoPConfig.preset("1/3", shallow_layer=1, deep_layer=3, clips="pooled")
    fast = models.optimize(model, config)
    ids, given = next_video.request(5, next_video.SIZES[0])
    found = stock_family.generate(fast, [ids], given, steps=3)
    (clip, *image) = fast.host.layout_of_video(5) + fast.host.layout_of(*next_video.SIZES[0])
    assert clip.grid == (5, 2, 2) and found.past_key_values.selection.kept.shape[1] == sum(
        fast.schedule_of((clip, *image)).segment_tokens
    )
    every = models.optimize(model, ViTCoPConfig(prune=False, clips="pooled"))
    stock_family.check_same(stock_family.generate(every, [ids], given), stock_family.generate(model, [ids], given))


@pytest.mark.slow
def test_pooled_frames_with_text_between() -> None:
    """Qwen3-VL: selects, and keeps every token of a clip of 3 frames of 6; and a selection of them runs, in a batch too."""
    stock, request = qwen3_vl.model(), qwen3_vl.REQUESTS["video"]
    every = frames.Everything(budgets=(18, 18, 18), shallow_layer=3, deep_layer=4, clips="pooled")
    frames.assert_same(frames.generate(models.optimize(stock, every), request), frames.generate(stock, request))
    few = models.optimize(stock, ViTCoPConfig(budgets=(8, 5, 2), shallow_layer=3, deep_layer=4, clips="pooled"))
    alone = frames.generate(few, request, 4)
    assert alone.past_key_values.selection.kept.shape == (1, 8)
    both = qwen3_vl.request(2, ("video", 2, 4, 6), 1, ("image", 4, 8), 2, ("video", 2, 6, 4), 3, seed=3)
    other = frames.generate(few, both, 4)
    assert other.past_key_values.selection.kept.shape == (1, 24)
    found = frames.generate(few, frames.batch(request, both), 4)
    for row, own in enumerate((alone, other)):
        torch.testing.assert_close(torch.stack(found.logits, 1)[row], torch.cat(own.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["qwen2_vl", "qwen3_vl"])
def test_warmup_makes_every_program_that_a_clip_needs(which: str) -> None:
    stock = families.model(which) if which in KINDS else qwen3_vl.model()
    settings = {"budgets": (8, 5, 2), "shallow_layer": 3, "deep_layer": 4} if which == "qwen3_vl" else {}
    config = ViTCoPConfig(**settings, clips="pooled") if settings else POOLED
    fast = vitcop_compile.optimize(stock, config, backend="eager")
    fast.warmup(layouts=[fast.host.laid("video", 3, 4, 8)], text_tokens=9, max_new_tokens=3)
    before = fast.compiled
    if which == "qwen3_vl":
        frames.generate(fast, qwen3_vl.request(2, ("video", 3, 4, 8), 3), 3)
    else:
        ids, given = families.prompt(which, [3, (3, 2, 4), 2])
        generate(fast, ids, given, 3, which)
    assert fast.compiled == before
    assert [key[-1] for key in before if key[0] == "select"] == [3]


@pytest.mark.parametrize("name", ["qwen2_vl", models.slow("qwen2_5_vl")])
def test_frames_in_another_order_would_be_seen(name: str) -> None:
    """A control."""
    ids, given = families.prompt(name, PROMPTS["a clip"])
    other = dict(given)
    other["pixel_values_videos"] = given["pixel_values_videos"].reshape(3, -1, 1176).flip(0).flatten(0, 1)
    logits = [generate(optimized(name, POOLED), ids, one, 1, name).logits[0] for one in (given, other)]
    assert (logits[0] - logits[1]).abs().max() > 100 * NEAR


@pytest.mark.slow
def test_frames_that_the_prompt_does_not_name_are_refused() -> None:
    fast = models.optimize(qwen3_vl.model(), ViTCoPConfig(prune=False, clips="pooled"))
    given = dict(qwen3_vl.REQUESTS["video"])
    given["video_grid_thw"] = torch.tensor([[2, 4, 6]])
    given["pixel_values_videos"] = given["pixel_values_videos"][: 2 * 24]
    with pytest.raises(InputError, match="a prompt holds 18 image tokens, its images need 12"):
        fast(**given)
