"""LLaVA-NeXT and LLaVA-OneVision in use: presets, conversations, batches, beams, other backends and language models."""

from __future__ import annotations

import math
from typing import Any

import models
import pytest
import tiled
import torch
from models import exhaustive, slow
from PIL import Image
from reference_llava import PRESETS, Settings
from reference_tiled import TiledConversation
from test_tiled import BOTH, CONFIG, NEAR, assert_as_told, by_the_book, generate, optimized, request
from vitcop_compile.export import EngineModel

from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig

# In the default run with tiles and a CLS token alone.
NEXT = pytest.mark.parametrize("name", ["next", slow("onevision")])


def published(candidates: int) -> Settings:
    """The preset 1/3 of a segment, what is kept rounded up to a multiple of 16."""
    vision, center, retention = PRESETS["1/3"]
    n = min(candidates, math.ceil(int(vision * candidates) / 16) * 16)
    merged = round((tiled.LAYERS * retention / vision - 1) / (3 - 1 + (tiled.LAYERS - 3) / 5) * n)
    return Settings(n, max(1, int(center * n)), merged, max(1, round(merged / 5)), 1, 1, 3)


@NEXT
def test_presets_round_what_is_kept_up_to_sixteen(name: str) -> None:
    config = ViTCoPConfig.preset("1/3", shallow_layer=1, deep_layer=3, scale_layers=False)
    ids, given = request(name, [(130, 60), (168, 150)], 3)
    told = TiledConversation(tiled.model(name), published)
    assert_as_told(generate(optimized(name, config), ids, given, 3), ids, given, told)


@NEXT
@pytest.mark.parametrize("scope, positions", [("pooled", "published"), slow("per_image", "original")])
def test_budgets_that_are_shared_and_positions_that_stay(name: str, scope: str, positions: str) -> None:
    config = ViTCoPConfig(
        budgets=(12, 8, 3, 4), shallow_layer=1, deep_layer=3, scale_layers=False, scope=scope, positions=positions
    )
    ids, given = request(name, [(40, 100), (30, 160)], 1)
    told = TiledConversation(tiled.model(name), lambda count: by_the_book(count, positions), pooled=scope == "pooled")
    assert_as_told(generate(optimized(name, config), ids, given, 3), ids, given, told)


def with_images(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """What a processor gives for all images so far: padded to as many tiles as any has."""
    most = max(turn["pixel_values"].shape[1] for turn in turns)
    pixels = [torch.nn.functional.pad(t["pixel_values"], (0,) * 7 + (most - t["pixel_values"].shape[1],)) for t in turns]
    return {"pixel_values": torch.cat(pixels), "image_sizes": torch.cat([turn["image_sizes"] for turn in turns])}


@pytest.mark.covers("turns")
@NEXT
@pytest.mark.parametrize("resent, backend", [(True, "eager"), slow(False, "eager")])
def test_a_conversation_with_images_in_later_turns(name: str, resent: bool, backend: str) -> None:
    fast = optimized(name, backend=backend)
    told = TiledConversation(tiled.model(name), by_the_book)
    ids: list[int] = []
    cache, shown = None, []
    for turn, size in enumerate([(40, 100), None, (130, 60), (56, 56), None]):
        new, given = request(name, [size], turn) if size else (models.text(5 + turn, turn), {})
        given.pop("batch_num_images", None)
        shown += [given] if given else []
        before, ids = len(ids), ids + new
        sent = with_images(shown) if resent and shown else given
        out = generate(fast, ids, sent, 3, **({"past_key_values": cache} if cache is not None else {}))
        said = out.sequences[0, len(ids) :].tolist()
        # The last token of the turn before is fed with this one.
        fed = ids[max(0, before - 1) :] if before else ids
        expected = told.turn(fed, given or None, said)
        torch.testing.assert_close(torch.cat(out.logits), expected, atol=NEAR if backend == "eager" else 1e-4, rtol=0)
        cache, ids = out["past_key_values"], out.sequences[0].tolist()


@pytest.mark.covers("batch")
@BOTH
@pytest.mark.parametrize("side", ["left", slow("right")])
def test_samples_of_a_batch_are_what_they_are_alone(name: str, side: str) -> None:
    fast = optimized(name)
    asked: list[list[tuple[int, int]]] = [[(40, 100)], [], [(30, 160), (56, 56)], [(40, 100)]]
    alone = [request(name, sizes, seed) if sizes else (models.text(9), {}) for seed, sizes in enumerate(asked)]
    for _, given in alone:
        given.pop("batch_num_images", None)
    ids, mask = models.pad([torch.tensor([ids]) for ids, _ in alone], side)
    common: dict[str, Any] = {
        "max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True
    }  # fmt: skip
    out = fast.generate(ids, attention_mask=mask, **with_images([given for _, given in alone if given]), **common)
    for sample, (own, given) in enumerate(alone):
        expected = generate(fast, own, given, 4)
        torch.testing.assert_close(torch.stack(out.logits)[:, sample], torch.stack(expected.logits)[:, 0], atol=NEAR, rtol=0)
        assert out.sequences[sample, ids.shape[1] :].tolist() == expected.sequences[0, len(own) :].tolist()


@pytest.mark.covers("beams")
@BOTH
def test_beams_see_images_once_and_say_what_stock_beams_say(name: str) -> None:
    ids, given = request(name, [(40, 100), (56, 56)], 2)
    fast, stock = optimized(name, ViTCoPConfig.dense()), tiled.model(name)
    if name == "onevision":  # stock repeats per image what belongs to a sample, and is asked without it
        given.pop("batch_num_images")
    ours, theirs = (generate(model, ids, given, 6, num_beams=2) for model in (fast, stock))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    towers = [key for key in fast.compiled if key[0] == "tower"]
    assert ("tower", given["pixel_values"].flatten(2).any(2).sum().item(), tiled.GRID**2) in towers


@pytest.mark.parametrize(
    "name, language", [slow("next", "mistral"), exhaustive("next", "qwen2"), exhaustive("onevision", "mistral")]
)
def test_other_language_models(name: str, language: str) -> None:
    ids, given = request(name, [(40, 100)], 1)
    stock = tiled.model(name, language)
    ours, theirs = (generate(m, ids, given, 16) for m in (optimized(name, ViTCoPConfig.dense(), language=language), stock))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    told = TiledConversation(stock, by_the_book)
    assert_as_told(generate(optimized(name, language=language), ids, given, 3), ids, given, told)


@pytest.mark.covers("backend")
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        slow("next", "inductor"), slow("onevision", "onnxruntime"), exhaustive("onevision", "inductor"),
        exhaustive("next", "onnxruntime"),
    ],
)  # fmt: skip
def test_backends_say_what_eager_says(name: str, backend: str) -> None:
    ids, given = request(name, [(168, 150)], 4)
    steps = 1 if backend == "inductor" else 4
    ours, eager = (generate(model, ids, given, steps) for model in (optimized(name, CONFIG, backend), optimized(name)))
    assert ours.sequences.tolist() == eager.sequences.tolist()
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(eager.logits), atol=1e-4, rtol=0)
    for a, b in zip(ours["past_key_values"].selection.stages, eager["past_key_values"].selection.stages, strict=True):
        assert a.tolist() == b.tolist()


@BOTH
def test_what_processors_give_is_taken_as_it_is(name: str) -> None:
    """Of two samples with one and two images; LLaVA-OneVision's processor cuts the second's into one tile each."""
    photos = [Image.effect_noise(size, 80).convert("RGB") for size in ((100, 40), (60, 130), (56, 56))]
    given = tiled.processor(name)(
        images=[photos[:1], photos[1:]], text=["w5 <image> w7 w9", "w6 <image> w8 <image> w4"], return_tensors="pt",
        padding=True, padding_side="left",
    )  # fmt: skip
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    ours, theirs = (m.generate(**given, **asked) for m in (optimized(name, ViTCoPConfig.dense()), tiled.model(name)))
    assert ours.tolist() == theirs.tolist()


def test_a_conversation_whose_start_has_changed_is_refused() -> None:
    fast, processor = optimized("onevision"), tiled.processor("onevision")
    photos = [Image.effect_noise(size, 80).convert("RGB") for size in ((100, 40), (60, 130))]
    first = processor(images=[photos[:1]], text="w5 <image> w7", return_tensors="pt")
    cache = fast.generate(**first, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)["past_key_values"]
    whole = processor(images=[photos], text="w5 <image> w7 w9 w9 <image> w4 " + "w3 " * 40, return_tensors="pt")
    with pytest.raises(InputError, match=r"the cache has seen holds \(34,\) image tokens, it was told of \(52,\)"):
        fast.generate(**whole, past_key_values=cache, max_new_tokens=2)


def test_placeholders_that_are_not_those_of_the_images_are_refused() -> None:
    ids, given = request("next", [(40, 100), (56, 56)], 1)
    fast, image = optimized("next"), models.IMAGE
    before = fast.compiled
    swapped = {name: tensor.flip(0) for name, tensor in given.items()}
    fewer = [token for i, token in enumerate(ids) if token != image or i % 2]
    for wrong, asked, words in (
        (ids, swapped, "text cannot stand inside an image"),
        (ids, {name: tensor[:1] for name, tensor in given.items()}, r"a prompt holds 88 image tokens, its images need 52:"),
        (fewer, given, "its images need 52"),
        (ids, {}, "input_ids holds 88 image tokens but there are no pixel_values"),
        (models.text(5), given, "input_ids holds no image token"),
        (ids, {"pixel_values": given["pixel_values"]}, "image_sizes is missing"),
    ):
        with pytest.raises(InputError, match=words):
            fast.generate(torch.tensor([wrong]), **asked, max_new_tokens=2)
    assert fast.compiled == before


@NEXT
def test_warm_up_makes_what_a_request_of_that_layout_takes(name: str) -> None:
    fast = models.optimize(tiled.model(name), CONFIG)
    layout = fast.layout_of(168, 150)
    ids, given = request(name, [(168, 150)], 2)
    fast.warmup(layouts=[layout], text_tokens=len(ids) - fast.schedule_of(layout).patches, max_new_tokens=4)
    before = fast.compiled
    assert sorted({key[0] for key in before}) == ["extend", "prefill", "select", "tower"]
    generate(fast, ids, given, 4)
    assert fast.compiled == before
    kinds = 2 if layout[1].taps > 1 else 1  # else both segments are of one kind
    assert f"1 tower, {kinds} select, 1 prefill, 1 extend" in repr(fast)


@BOTH
def test_no_program_has_an_operation_that_waits_or_a_symbol(name: str) -> None:
    programs = models.optimize(tiled.model(name), CONFIG).programs
    layout = programs.family.host.layout_of(168, 150)
    schedule = programs.schedule_of(layout)
    assert schedule.vision is not None and schedule.vision.side == "merge"
    exported = [programs.export_tower(5), programs.export_prefill(2, 40, layout)]
    exported += [
        programs.export_select(5, tiled.GRID**2, 2, 64, segment.taps, schedule.vision.of_segment(1)) for segment in layout
    ]
    for program in exported:
        assert not program.range_constraints
        targets = {str(node.target) for node in program.graph.nodes}
        assert not targets & {f"aten.{name}.default" for name in ("nonzero", "item", "_local_scalar_dense", "sort")}
    tower = [str(node.target) for node in exported[0].graph.nodes]
    assert sum("scaled_dot_product" in target for target in tower) == programs.family.shape.feature_layer + 1


@pytest.mark.covers("folder")
@pytest.mark.parametrize("name", [slow("next"), exhaustive("onevision")])
def test_a_folder_does_what_stock_layers_do_when_pruned_by_hand(name: str, tmp_path: Any) -> None:
    """Tiles, line breaks and all, of an image and of two."""
    fast = optimized(name)
    prompts = [request(name, sizes, seed) for seed, sizes in enumerate(([(40, 100)], [(40, 100), (168, 150)]))]
    layouts = [fast.layouts_of(torch.tensor([ids]), **given)[0] for ids, given in prompts]
    fast.export(tmp_path / "f", layouts=layouts, max_text_len=64, max_new_tokens=4)
    engine = EngineModel.from_pretrained(tmp_path / "f")
    for ids, given in prompts:
        told = TiledConversation(tiled.model(name), by_the_book)
        assert_as_told(generate(engine, ids, given, 3), ids, given, told, near=1e-4)  # sums of other kernels


def test_benchmarks_refuse_images_of_many_sizes() -> None:
    from vitcop_compile.bench import Request
    from vitcop_compile.bench.arms import inputs

    with pytest.raises(
        UnsupportedError, match="a model that cuts images into tiles is not measured here: choose another family"
    ):
        inputs(tiled.model("next"), Request())
