"""Every family: dense against its stock model, pruned against stock layers pruned by hand."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import families
import models
import pytest
import torch
from families import KINDS
from reference_families import FamilyConversation
from reference_llava import Settings

from vitcop_compile import ViTCoPConfig

NEAR = 1e-5
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
def optimized(name: str, config: ViTCoPConfig, backend: str = "eager") -> Any:
    return models.optimize(families.model(name), config, backend=backend)


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


@pytest.mark.parametrize("kind", PROMPTS)
@ALL
def test_dense_is_the_stock_model(name: str, kind: str) -> None:
    ids, given = families.prompt(name, PROMPTS[kind])
    expected = generate(families.model(name), ids, given, 16, name)
    found = generate(optimized(name, ViTCoPConfig.dense()), ids, given, 16, name)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(set(found.sequences[0, -16:].tolist())) > 4
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), rtol=DENSE, atol=DENSE)


@VIDEO
def test_dense_with_images_and_videos_is_the_stock_model(name: str) -> None:
    ids, given = families.prompt(name, [3, (3, 4), 2, (3, 2, 4), 4, (2, 3, 3), 1, (2, 3), 2])
    expected = generate(families.model(name), ids, given, 16, name)
    found = generate(optimized(name, ViTCoPConfig.dense()), ids, given, 16, name)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), rtol=DENSE, atol=DENSE)


def check(found: Any, turn: FamilyConversation, logits: torch.Tensor, sample: int = 0) -> None:
    """Selections, logits, and the keys and values of every layer."""
    cache = found.past_key_values
    firsts = list(itertools.accumulate(turn.candidates, initial=0))[:-1]
    told = [first + i for first, kept in zip(firsts, turn.kept, strict=True) for i in kept]
    assert cache.selection.kept[sample][cache.selection.kept[sample] >= 0].tolist() == told
    for stage, expected in zip(cache.selection.stages, turn.stages, strict=True):
        at = [first + i for first, part in zip(firsts, expected, strict=True) for i in part]
        assert stage[sample][stage[sample] >= 0].tolist() == at
    torch.testing.assert_close(torch.stack([step[sample] for step in found.logits]), logits, rtol=NEAR, atol=NEAR)
    check_caches(cache, turn, sample)


def check_caches(cache: Any, turn: FamilyConversation, sample: int) -> None:
    for layer, expected in enumerate(turn.cache.layers):
        rows = expected.keys.shape[2]
        for buffer, values in zip(cache.buffers[2 * layer : 2 * layer + 2], (expected.keys, expected.values), strict=True):
            torch.testing.assert_close(buffer[sample, :, :rows], values[0], rtol=NEAR, atol=NEAR)


# Three tokens at least enter a last stage: two are equally far from their mean.
PRUNED: dict[str, tuple[list[Any], ViTCoPConfig]] = {
    "one image": ([3, (3, 4), 4], pruned(8, 6, 3, 3)),
    "another shape": ([2, (2, 6), 5], pruned(8, 4, 2, 5)),
    "two images": ([2, (4, 4), 3, (2, 3), 4], pruned(5, 3, 1, 2)),
    "pooled": ([2, (4, 4), 3, (3, 4), 4], pruned(8, 5, 2, 3, scope="pooled")),
}


@pytest.mark.parametrize("kind", PRUNED)
@ALL
def test_pruned_is_what_stock_layers_give_when_pruned_by_hand(name: str, kind: str) -> None:
    parts, config = PRUNED[kind]
    ids, given = families.prompt(name, parts)
    found = generate(optimized(name, config), ids, given, 3, name)
    turn = by_the_book(name, config)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()))


@VIDEO
def test_pruned_frames_are_segments(name: str) -> None:
    ids, given = families.prompt(name, [3, (3, 2, 4), 2])
    config = pruned(6, 4, 2, 3)
    found = generate(optimized(name, config), ids, given, 3, name)
    turn = by_the_book(name, config)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()))
    assert len(turn.kept) == 3


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


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "onnxruntime"])
@ALL
def test_other_backends_do_as_eager_does_by_the_book(name: str, backend: str) -> None:
    config = pruned(8, 6, 3, 3)
    ids, given = families.prompt(name, [3, (3, 4), 4])
    found = generate(optimized(name, config, backend), ids, given, 3, name)
    turn = by_the_book(name, config)
    check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()))
