"""Every family: dense against its stock model, pruned against stock layers pruned by hand."""

from __future__ import annotations

import copy
import itertools
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import families
import models
import pytest
import torch
from families import KINDS
from reference_families import FamilyConversation
from reference_llava import Settings
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

import vitcop_compile
from vitcop_compile import ConfigError, InputError, ViTCoPConfig
from vitcop_compile.families.registry import host_of
from vitcop_compile.provider import candidate_bucket
from vitcop_compile.schedule import resolve

# Sums in another order: 1.2e-5 was seen where products use AVX-512.
NEAR = 2e-5
# What a model with random weights may say, but not in a conversation that goes on.
MEDIA = [families.IMAGE, families.VIDEO]
# Of logits: padded rows are summed in another order, over sixteen tokens.
DENSE = 1e-4
COUNTS: dict[str, Any] = {"shallow_layer": 1, "deep_layer": 3, "scale_layers": False}
ALL = pytest.mark.parametrize("name", KINDS)
VIDEO = pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.videos])
PROMPTS: dict[str, list[Any]] = {
    "one image": [3, (3, 4), 4],
    "another shape": [2, (2, 6), 5],
    "two images": [2, (4, 4), 3, (2, 3), 4],
    "text": [9],
}


@cache
def optimized(name: str, config: ViTCoPConfig) -> Any:
    return models.optimize(families.model(name), config)


def pruned(vision: int, shallow: int, deep: int, centers: int, **more: Any) -> ViTCoPConfig:
    return ViTCoPConfig(budgets=(vision, shallow, deep, centers), **COUNTS, **more)


def by_the_book(name: str, config: ViTCoPConfig) -> FamilyConversation:
    budgets, kind = config.budgets, KINDS[name]
    assert budgets is not None and budgets.centers is not None
    positions = "kept" if kind.book.three or config.positions == "original" else "published"
    settings = Settings(
        budgets.vision, budgets.centers, budgets.shallow, budgets.deep, kind.layer, 1, 3, positions
    )  # fmt: skip
    return FamilyConversation(families.model(name), kind.book, lambda _: settings, config.scope == "pooled")


def generate(model: Any, ids: list[int], given: dict[str, Any], steps: int, name: str, **more: Any) -> Any:
    prompt = torch.tensor([ids])
    told = families.types(prompt) if KINDS[name].book.three else {}
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), **given, **told, max_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


@pytest.mark.covers("image", "several")
@pytest.mark.parametrize("kind", [models.slow(kind) if kind == "another shape" else kind for kind in PROMPTS])
@ALL
def test_dense_is_the_stock_model(name: str, kind: str) -> None:
    ids, given = families.prompt(name, PROMPTS[kind])
    expected = generate(families.model(name), ids, given, 16, name)
    found = generate(optimized(name, ViTCoPConfig.dense()), ids, given, 16, name)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(set(found.sequences[0, -16:].tolist())) > 4
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), rtol=DENSE, atol=DENSE)


@pytest.mark.covers("video")
@VIDEO
def test_dense_with_images_and_videos_is_the_stock_model(name: str) -> None:
    ids, given = families.prompt(name, [3, (3, 4), 2, (3, 2, 4), 4, (2, 3, 3), 1, (2, 3), 2])
    expected = generate(families.model(name), ids, given, 16, name)
    found = generate(optimized(name, ViTCoPConfig.dense()), ids, given, 16, name)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), rtol=DENSE, atol=DENSE)


def check(found: Any, turn: FamilyConversation, logits: torch.Tensor, sample: int = 0, near: float = NEAR) -> None:
    """Selections, logits, and the keys and values of every layer."""
    cache = found.past_key_values
    firsts = list(itertools.accumulate(turn.candidates, initial=0))[:-1]
    told = [first + i for first, kept in zip(firsts, turn.kept, strict=True) for i in kept]
    assert cache.selection.kept[sample][cache.selection.kept[sample] >= 0].tolist() == told
    for stage, expected in zip(cache.selection.stages, turn.stages, strict=True):
        at = [first + i for first, part in zip(firsts, expected, strict=True) for i in part]
        assert stage[sample][stage[sample] >= 0].tolist() == at
    torch.testing.assert_close(torch.stack([step[sample] for step in found.logits]), logits, rtol=near, atol=near)
    check_caches(cache, turn, sample, near)


def check_caches(cache: Any, turn: FamilyConversation, sample: int, near: float = NEAR) -> None:
    for layer, expected in enumerate(turn.cache.layers):
        rows = expected.keys.shape[2]
        for buffer, values in zip(cache.buffers[2 * layer : 2 * layer + 2], (expected.keys, expected.values), strict=True):
            torch.testing.assert_close(buffer[sample, :, :rows], values[0], rtol=near, atol=near)


# Three tokens at least enter a last stage: two are equally far from their mean.
PRUNED: dict[str, tuple[list[Any], ViTCoPConfig]] = {
    "one image": ([3, (3, 4), 4], pruned(8, 6, 3, 3)),
    "another shape": ([2, (2, 6), 5], pruned(8, 4, 2, 5)),
    "two images": ([2, (4, 4), 3, (2, 3), 4], pruned(5, 3, 1, 2)),
    "pooled": ([2, (4, 4), 3, (3, 4), 4], pruned(8, 5, 2, 3, scope="pooled")),
}


@pytest.mark.covers("pruned by hand")
@pytest.mark.parametrize("kind", [models.slow(kind) if kind == "another shape" else kind for kind in PRUNED])
@ALL
def test_pruned_is_what_stock_layers_give_when_pruned_by_hand(name: str, kind: str) -> None:
    parts, config = PRUNED[kind]
    ids, given = families.prompt(name, parts)
    found = generate(optimized(name, config), ids, given, 3, name)
    turn = by_the_book(name, config)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()))


@pytest.mark.covers("pruned by hand")
@VIDEO
def test_pruned_frames_are_segments(name: str) -> None:
    ids, given = families.prompt(name, [3, (3, 2, 4), 2])
    config = pruned(6, 4, 2, 3)
    found = generate(optimized(name, config), ids, given, 3, name)
    turn = by_the_book(name, config)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()))
    assert len(turn.kept) == 3


@pytest.mark.covers("turns")
@ALL
def test_a_second_turn_of_text_and_of_an_image(name: str) -> None:
    config = pruned(5, 3, 1, 2)
    fast, turn = optimized(name, config), by_the_book(name, config)
    ids, given = families.prompt(name, [3, (3, 4), 4])
    found = generate(fast, ids, given, 3, name, suppress_tokens=MEDIA)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()))
    for seed, parts in enumerate(([4], [2, (2, 4), 3]), start=1):
        new, given = families.prompt(name, parts, seed)
        before = found.sequences[0].tolist()
        found = generate(fast, before + new, given, 3, name, past_key_values=found.past_key_values, suppress_tokens=MEDIA)
        said = found.sequences[0, len(before) + len(new) :].tolist()
        # The last token of a turn is fed with the next.
        logits = turn.turn(before[-1:] + new, given or None, said)
        if given:
            check(found, turn, logits)
        else:
            torch.testing.assert_close(torch.cat(found.logits), logits, rtol=NEAR, atol=NEAR)


@pytest.mark.covers("batch")
@ALL
def test_an_unequal_batch_is_its_samples_alone(name: str) -> None:
    config = pruned(5, 3, 1, 2)
    fast = optimized(name, config)
    prompts = [
        families.prompt(name, parts, seed) for seed, parts in enumerate(([2, (3, 4), 5], [6], [1, (2, 3), 2, (4, 4), 1]))
    ]
    alone = [generate(fast, ids, given, 4, name) for ids, given in prompts]
    width = max(len(ids) for ids, _ in prompts)
    ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in prompts])
    given = {key: torch.cat([own[key] for _, own in prompts if key in own]) for key in prompts[0][1]}
    told = families.types(ids) if KINDS[name].book.three else {}
    together = fast.generate(
        ids, attention_mask=mask, **given, **told, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    for sample, own in enumerate(alone):
        assert together.sequences[sample, -4:].tolist() == own.sequences[0, -4:].tolist()
        logits = torch.stack([step[sample] for step in together.logits])
        torch.testing.assert_close(logits, torch.cat(own.logits), rtol=NEAR, atol=NEAR)


@pytest.mark.covers("backend")
@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [*((name, "inductor") for name in KINDS), ("qwen2_vl", "onnxruntime")])
def test_other_backends_do_as_eager_does_by_the_book(
    name: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime serves the others from folders. Programs are kept, as those of users are."""
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "kept"))
    config = pruned(8, 6, 3, 3)
    ids, given = families.prompt(name, [3, (3, 4), 4])
    fast = models.optimize(families.model(name), config, backend=backend)
    assert fast.on_demand.kept is not None
    found = generate(fast, ids, given, 1 if backend == "inductor" else 3, name)
    turn = by_the_book(name, config)
    # Other kernels sum in another order.
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()), near=DENSE)


@pytest.mark.parametrize("name", [models.slow("qwen2_vl"), "qwen2_5_vl"])
def test_warmup_makes_every_program_that_an_image_needs(name: str) -> None:
    fast = vitcop_compile.optimize(families.model(name), pruned(5, 3, 1, 2), backend="eager")
    layout = fast.layout_of(84, 112)
    assert [segment.grid for segment in layout] == [(1, 3, 4)]
    fast.warmup(layouts=[layout], text_tokens=9, max_new_tokens=3)
    before = fast.compiled
    ids, given = families.prompt(name, [3, (3, 4), 4])
    generate(fast, ids, given, 3, name)
    assert fast.compiled == before and {key[0] for key in before} == {"tower", "select", "prefill", "extend"}


# Of 2,000 photos: programs of each kind at batch 1, one bucket of text and one of new tokens, and patches that towers see for
# each of an image, on average.
BOUNDS: dict[str, tuple[dict[str, int], float]] = {
    "qwen2_vl": ({"tower": 33, "select": 57, "prefill": 24}, 1.04),
    "qwen2_5_vl": ({"tower": 28, "select": 116, "prefill": 24}, 1.16),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_photos_of_two_thousand_sizes_share_programs(name: str) -> None:
    """Planned alone, with the published numbers: nothing is compiled."""
    config = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}[name]()
    config.architectures = [type(families.model(name)).__name__]
    host, preset, seeded = host_of(config), ViTCoPConfig.preset("1/9"), random.Random(0)
    found: dict[str, set[Any]] = {"layout": set(), "tower": set(), "select": set(), "prefill": set()}
    seen = asked = 0
    for _ in range(2000):
        height = seeded.randint(150, 3000)
        layout = host.layout_of(height, min(3000, max(150, round(height * seeded.uniform(0.4, 2.5)))))
        (tile,) = host.blank([layout], torch.device("meta"), torch.float32).cut
        slots = len(tile.order)
        schedule = resolve(preset, host.shape, layout)
        assert schedule.vision is not None
        found["layout"].add(layout)
        found["tower"].add(slots)
        found["select"].add((slots, candidate_bucket(layout[0].candidates), schedule.vision.of_segment(0)))
        found["prefill"].add(schedule.key)
        seen, asked = seen + slots, asked + tile.rows
    bounds, waste = BOUNDS[name]
    counts = {kind: len(keys) for kind, keys in found.items()}
    assert counts["layout"] > 400 and all(counts[kind] <= bound for kind, bound in bounds.items()), counts
    assert seen / asked <= waste


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_grid_thw": None}, "image_grid_thw is missing"),
        ({"image_grid_thw": torch.tensor([[1, 6, 7]])}, "multiples of 2"),
        ({"image_grid_thw": torch.tensor([[1, 6, 10]])}, "has 48 patches, image_grid_thw counts 60"),
        ({"pixel_values": torch.zeros(48, 9)}, "patches of 9 values: this model takes 1176"),
        ({"pixel_values": torch.zeros(48, 1176).int()}, "floating-point"),
    ],
)
def test_patches_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    ids, given = families.prompt("qwen2_vl", [3, (3, 4), 4])
    with pytest.raises(InputError, match=re.escape(message)):
        optimized("qwen2_vl", pruned(5, 3, 1, 2))(input_ids=torch.tensor([ids]), **given | change)


def test_a_layer_that_attends_within_windows_scores_nothing() -> None:
    with pytest.raises(
        ConfigError, match=r"vision_layer=0 is layer 0, where patches attend within windows .* choose one of 1"
    ):
        vitcop_compile.optimize(families.model("qwen2_5_vl"), pruned(5, 3, 1, 2, vision_layer=0))


def test_published_positions_need_positions_of_one_number() -> None:
    with pytest.raises(
        ConfigError, match="positions='published' counts tokens anew, and this model's positions have 3 coordinates"
    ):
        vitcop_compile.optimize(families.model("qwen2_vl"), pruned(5, 3, 1, 2, positions="published"))


def test_positions_by_index_would_be_seen() -> None:
    """A control: the reference with a position for each row, and not three, is another model."""
    config = pruned(8, 6, 3, 3)
    ids, given = families.prompt("qwen2_vl", [3, (3, 4), 4])
    found = generate(optimized("qwen2_vl", config), ids, given, 3, "qwen2_vl")
    turn = by_the_book("qwen2_vl", config)
    turn._positions = lambda ids, rows: (list(range(rows)), rows)  # type: ignore[method-assign]
    logits = turn.turn(ids, given, found.sequences[0, len(ids) :].tolist())
    assert (torch.cat(found.logits) - logits).abs().max() > 100 * NEAR


@VIDEO
def test_frames_in_another_order_would_be_seen(name: str) -> None:
    """A control."""
    ids, given = families.prompt(name, [3, (3, 2, 4), 2])
    fast, other = optimized(name, pruned(6, 4, 2, 3)), dict(given)
    other["pixel_values_videos"] = given["pixel_values_videos"].reshape(3, -1, 1176).flip(0).flatten(0, 1)
    logits = [torch.cat(generate(fast, ids, one, 1, name).logits) for one in (given, other)]
    assert (logits[0] - logits[1]).abs().max() > 100 * NEAR


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_images_side_by_side_are_refused_where_positions_would_take_them_for_one(name: str) -> None:
    ids, given = families.prompt(name, [3, (3, 4), (2, 3), 4])
    side_by_side = [word for at, word in enumerate(ids) if word not in (families.START, families.END) or at == 0]
    with pytest.raises(InputError, match="placeholders of 2 images and videos stand in 1 runs: put a token between"):
        optimized(name, pruned(5, 3, 1, 2))(input_ids=torch.tensor([side_by_side]), **given)


@pytest.mark.slow
@ALL
def test_warmup_of_several_images(name: str) -> None:
    fast = vitcop_compile.optimize(families.model(name), pruned(5, 3, 1, 2), backend="eager")
    fast.warmup(images=2, text_tokens=9, max_new_tokens=3)
    assert {key[0] for key in fast.compiled} == {"tower", "select", "prefill", "extend"}


@pytest.mark.covers("beams")
@pytest.mark.slow
@ALL
def test_beams_say_what_stock_beams_say(name: str) -> None:
    ids, given = families.prompt(name, [3, (3, 4), 2, (2, 3), 4])
    found, expected = (
        generate(model, ids, given, 6, name, num_beams=2)
        for model in (optimized(name, ViTCoPConfig.dense()), families.model(name))
    )
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, rtol=DENSE, atol=DENSE)


@ALL
def test_images_that_change_places_in_a_batch_would_be_seen(name: str) -> None:
    """A control."""
    fast = optimized(name, pruned(8, 6, 3, 3))
    prompts = [families.prompt(name, [3, (3, 4), 4], seed) for seed in (0, 1)]
    ids = torch.tensor([own for own, _ in prompts])
    given = {key: torch.cat([own[key] for _, own in prompts]) for key in prompts[0][1]}
    alone = torch.cat([fast(input_ids=torch.tensor([own]), **one).logits for own, one in prompts])
    torch.testing.assert_close(fast(input_ids=ids, **given).logits, alone, rtol=NEAR, atol=NEAR)
    other = dict(given, pixel_values=torch.cat(given["pixel_values"].chunk(2)[::-1]))
    assert (fast(input_ids=ids, **other).logits - alone).abs().amax((1, 2)).min() > 100 * NEAR


@ALL
def test_half_precision_is_the_stock_models(name: str) -> None:
    model = copy.deepcopy(families.model(name)).bfloat16()
    ids, given = families.prompt(name, [3, (3, 4), 2, (2, 3), 4])
    prompt = torch.tensor([ids])
    told = families.types(prompt) if KINDS[name].book.three else {}
    halved = given | {"pixel_values": given["pixel_values"].bfloat16()}
    with torch.no_grad():
        exact = families.model(name)(input_ids=prompt, **given, **told).logits[:, -1:]
        expected = model(input_ids=prompt, **halved, **told).logits[:, -1:]
    found = vitcop_compile.optimize(model, ViTCoPConfig.dense(), backend="eager")(input_ids=prompt, **given).logits
    assert found.dtype == torch.bfloat16
    # Kernels round in different places, by the CPU: ours is as near to what float32 gives as stock bfloat16 is.
    ours, stock = ((logits.float() - exact).square().mean().sqrt() for logits in (found, expected))
    assert ours < 1.5 * stock and stock < 0.05 * exact.square().mean().sqrt()


def test_windows_that_do_not_divide_a_bucket() -> None:
    """Windows of 6 x 6 patches: an encoder's input is whole windows all the same."""
    model = families.qwen2_5_vl(window_size=84).eval()
    models.randomize(model, 0)
    ids, given = families.prompt("qwen2_5_vl", [3, (3, 4), 2, (4, 4), 4])
    expected, found = (
        generate(one, ids, given, 4, "qwen2_5_vl")
        for one in (model, vitcop_compile.optimize(model, ViTCoPConfig.dense(), backend="eager"))
    )
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), rtol=DENSE, atol=DENSE)


def test_flops_are_those_of_the_patches_that_an_image_has() -> None:
    fast = optimized("qwen2_vl", pruned(5, 3, 1, 2))
    shape = fast.schedule.shape
    for rows, columns in ((3, 4), (2, 6), (8, 8)):
        schedule, patches = fast.schedule_of(fast.host.laid("image", 1, 2 * rows, 2 * columns)), 4 * rows * columns
        # 2 layers, 32 wide, an MLP of 64; 1,176 numbers in a patch; a projector of four patches to as many, of these to 64.
        layer = 2 * patches * (4 * 32 * 32 + 2 * 32 * 64) + 4 * patches * patches * 32
        assert schedule.vision_flops() == 2 * patches * 1176 * 32 + 2 * layer + 2 * 5 * (128 * 128 + 128 * 64)
    assert shape.vision_layers == 2 and shape.group == 4
