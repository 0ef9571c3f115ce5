"""More families, pruned: selections, logits, keys and values are those of stock layers that are pruned by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import families_more
import models
import pytest
import torch
from families_more import KINDS, START, Part
from models import VOCAB, exhaustive, slow
from reference_llava import Settings
from torch import Tensor
from vitcop_compile.export import EngineModel

from vitcop_compile import ViTCoPConfig

NEAR = 1e-5
# Other kernels sum in another order.
BACKENDS_NEAR = 1e-4
VISION, SHALLOW, DEEP, CENTERS = 6, 4, 2, 3
# Two images, where sizes differ; in pixels for tiles.
SHAPES: dict[str, list[tuple[int, int]]] = {name: [(3, 3), (2, 4)] for name in KINDS}
SHAPES["next_video"] = [(40, 100), (110, 60)]
# Nine tokens, where an image is more.
SMALLEST: dict[str, tuple[int, ...]] = {"next_video": (1, 3, 3)}
# GLM-4.6V is GLM-4V under another name.
NAMES = [name for name in KINDS if name != "glm46v"]
# In the default run: features that are added later.
QUICK = ("qwen3_vl",)
ALL = pytest.mark.parametrize("name", NAMES)
# Compiled or exported, in CI: added features, a second tower, pixel shuffle, frames.
COMPILED = ("qwen3_vl", "video_llava", "idefics3", "next_video")
# Of these through inductor: the others' programs are made of the same operators.
INDUCTOR = ("qwen3_vl", "video_llava")
BACKENDS = pytest.mark.parametrize("name", [slow(name) if name in COMPILED else exhaustive(name) for name in NAMES])
SOME_SLOW = pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in NAMES])
VIDEO = pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in NAMES if KINDS[name].videos])


@cache
def optimized(name: str) -> Any:
    kind = KINDS[name]
    config = ViTCoPConfig(
        budgets=(VISION, SHALLOW, DEEP, CENTERS), shallow_layer=kind.layers[0], deep_layer=kind.layers[1],
        vision_layer=kind.layer, scale_layers=False,
    )  # fmt: skip
    return models.optimize(families_more.model(name), config)


def by_the_book(name: str) -> Any:
    kind = KINDS[name]
    return kind.book(
        families_more.model(name), Settings(VISION, CENTERS, SHALLOW, DEEP, kind.layer, *kind.layers, kind.positions)
    )


def generate(
    name: str, rows: Sequence[list[int]], given: dict[str, Any], steps: int = 3, model: Any = None, **more: Any
) -> Any:
    """Of prompts padded on the left; none of what is said is a placeholder."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return (model or optimized(name)).generate(
        ids, attention_mask=mask, **given, **families_more.types(name, ids, given), max_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, suppress_tokens=list(range(START, VOCAB)), **more,
    )  # fmt: skip


def check(found: Any, told: Any, logits: Tensor, sample: int = 0, near: float = NEAR) -> None:
    """Selections, logits, and the keys and values of every layer, of one sample."""
    held = found.past_key_values
    firsts = list(itertools.accumulate(told.candidates, initial=0))[:-1]
    for stage, expected in zip((held.selection.kept, *held.selection.stages), (told.kept, *told.stages), strict=True):
        through = [first + token for first, of in zip(firsts, expected, strict=True) for token in of]
        assert stage[sample][stage[sample] >= 0].tolist() == through
    torch.testing.assert_close(torch.stack([step[sample] for step in found.logits]), logits, atol=near, rtol=near)
    assert len(held.buffers) == 2 * len(told.cache.layers)
    for layer, stock in enumerate(told.cache.layers):
        for ours, theirs in zip(held.buffers[2 * layer : 2 * layer + 2], (stock.keys, stock.values), strict=True):
            torch.testing.assert_close(ours[sample, :, : theirs.shape[2]], theirs[0], atol=near, rtol=near)


def said(found: Any, sample: int = 0) -> list[int]:
    return found.sequences[sample, -len(found.logits) :].tolist()


def samples(name: str) -> list[tuple[list[int], dict[str, Any]]]:
    """One with an image, and one with two."""
    first, second = SHAPES[name]
    return [families_more.prompt(name, parts, seed) for seed, parts in enumerate(([2, first, 3], [3, first, 2, second, 4]))]


def two_samples(name: str) -> tuple[list[list[int]], dict[str, Any]]:
    """Both together: ids, and what a processor gives."""
    both = samples(name)
    return [ids for ids, _ in both], {key: torch.cat([own[key] for _, own in both]) for key in both[0][1]}


@pytest.mark.covers("pruned by hand", "batch")
@pytest.mark.slow
@ALL
def test_an_unequal_batch_is_its_samples_pruned_by_hand(name: str) -> None:
    """One image, and two."""
    found = generate(name, *two_samples(name))
    for sample, (ids, own) in enumerate(samples(name)):
        told = by_the_book(name)
        check(found, told, told.turn(ids, own, said(found, sample)), sample)


def converse(name: str, turns: Sequence[Sequence[Part]]) -> None:
    """Compares turn by turn."""
    told, found, before = by_the_book(name), None, []
    for seed, parts in enumerate(turns):
        ids, given = families_more.prompt(name, parts, seed)
        more = {} if found is None else {"past_key_values": found.past_key_values}
        found = generate(name, [before + ids], given, **more)
        # The last token of a turn is fed with the next.
        logits = told.turn(before[-1:] + ids, given, said(found))
        check(found, told, logits)
        before = found.sequences[0].tolist()


@pytest.mark.covers("pruned by hand", "turns")
@SOME_SLOW
def test_a_second_turn_with_an_image_is_pruned_by_hand(name: str) -> None:
    """The first is of a video, a segment a frame, where there are any."""
    first, second = SHAPES[name]
    converse(name, ([2, (2, 3, 3) if KINDS[name].videos else first, 3], [2, second, 3]))


@pytest.mark.slow
def test_glm_4_6v_is_pruned_by_hand() -> None:
    converse("glm46v", ([2, (3, 3), 3],))


def exchanged(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The first images of two samples, which are of one size, in each other's place."""
    pixels = given["pixel_values"]
    flat = pixels.flatten(0, 1) if name in ("idefics3", "smolvlm") else pixels
    # Rows of an image, and where the second sample begins.
    size, second = (36, 36) if pixels.dim() == 2 else (1, pixels.shape[1] if flat is not pixels else 1)
    flat = flat.clone()
    flat[:size], flat[second : second + size] = flat[second : second + size].clone(), flat[:size].clone()
    return given | {"pixel_values": flat.reshape(pixels.shape)}


@pytest.mark.slow
@ALL
def test_images_that_change_places_in_a_batch_would_be_seen(name: str) -> None:
    """A control."""
    rows, given = two_samples(name)
    logits = [torch.stack(generate(name, rows, one).logits) for one in (given, exchanged(name, given))]
    assert (logits[0] - logits[1]).abs().amax((0, 2)).min() > 100 * NEAR


@VIDEO
def test_frames_in_another_order_would_be_seen(name: str) -> None:
    """A control: the reference is told of the frames the other way round."""
    ids, given = families_more.prompt(name, [2, (2, 3, 3), 3])
    frames = given["pixel_values_videos"]
    turned = frames.flip(1) if frames.dim() == 5 else torch.cat(frames.chunk(2)[::-1])
    found, told = generate(name, [ids], given), by_the_book(name)
    logits = told.turn(ids, given | {"pixel_values_videos": turned}, said(found))
    assert (torch.cat(found.logits) - logits).abs().max() > 100 * NEAR


def test_features_that_do_not_follow_the_rows_that_stay_would_be_seen() -> None:
    """A control: to the rows that stay, what Qwen3-VL adds to the first ones."""
    ids, given = families_more.prompt("qwen3_vl", [2, (2, 3, 3), 3])
    found, told = generate("qwen3_vl", [ids], given), by_the_book("qwen3_vl")
    embed = told._embed

    def astray(ids: list[int], pixels: Any) -> Any:
        hidden, spans, labels = embed(ids, pixels)
        for span, (features, *_) in zip(spans, told._see(pixels), strict=True):
            _, *more = features[: len(span)].chunk(3, -1)
            for added, rows in zip(told.added, more, strict=True):
                added[0, span] = rows
        return hidden, spans, labels

    told._embed = astray
    assert (torch.cat(found.logits) - told.turn(ids, given, said(found))).abs().max() > 100 * NEAR


@pytest.mark.covers("onnxruntime", "folder")
@BACKENDS
def test_a_folder_gives_what_is_pruned_by_hand(name: str, tmp_path: Path) -> None:
    ids, given = families_more.prompt(name, [2, SMALLEST.get(name, (3, 3)), 3])
    rows = torch.tensor([ids])
    fast, told = optimized(name), by_the_book(name)
    layouts = fast.layouts_of(rows, **given, **families_more.types(name, rows, given))
    fast.export(tmp_path / "f", layouts=layouts, max_text_len=16, max_new_tokens=2)
    found = generate(name, [ids], given, 2, EngineModel.from_pretrained(tmp_path / "f"))
    check(found, told, told.turn(ids, given, said(found)), near=BACKENDS_NEAR)


@pytest.mark.covers("inductor")
@pytest.mark.parametrize("name", [slow(name) if name in INDUCTOR else exhaustive(name) for name in NAMES])
def test_inductor_gives_what_the_stock_model_gives(name: str) -> None:
    """Nothing is pruned, and all have nine tokens of images among as many of text, so that kernels are compiled once."""
    ids, given = families_more.prompt(name, [2, SMALLEST.get(name, (3, 3)), 3])
    stock, rows = families_more.model(name), torch.tensor([ids])
    given = given | families_more.types(name, rows, given)
    dense = models.optimize(stock, ViTCoPConfig.dense(), backend="inductor", prompt_buckets=(32,))
    with torch.no_grad():
        expected = stock(input_ids=rows, **given).logits[:, -1]
    found = dense(input_ids=rows, **given).logits[:, -1]
    torch.testing.assert_close(found, expected, atol=BACKENDS_NEAR, rtol=0)
