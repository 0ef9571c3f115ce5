"""More families, pruned: selections, logits, keys and values are those of stock layers that are pruned by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import families_more
import models
import pytest
import torch
from families_more import KINDS, START, Part
from models import VOCAB, slow
from reference_llava import Settings
from torch import Tensor

from vitcop_compile import ViTCoPConfig

NEAR = 1e-5
# Other kernels sum in another order.
BACKENDS_NEAR = 1e-4
VISION, SHALLOW, DEEP, CENTERS = 6, 4, 2, 3
# Two images of a turn and one of another, where sizes differ; in pixels for tiles.
SHAPES: dict[str, list[tuple[int, int]]] = {name: [(3, 4), (2, 4), (3, 3)] for name in KINDS}
SHAPES["next_video"] = [(40, 100), (110, 60), (100, 40)]
# In the default run: features that are added later, text within a segment, and the encoder that drops tokens itself.
QUICK = ("qwen3_vl", "mistral3", "video_llava")
NAMES = [name if name in QUICK else slow(name) for name in KINDS]
VIDEOS = [slow(name) for name, kind in KINDS.items() if kind.videos and name != "glm46v"]


@cache
def optimized(name: str, backend: str = "eager") -> Any:
    kind = KINDS[name]
    config = ViTCoPConfig(
        budgets=(VISION, SHALLOW, DEEP, CENTERS), shallow_layer=kind.layers[0], deep_layer=kind.layers[1],
        vision_layer=kind.layer, scale_layers=False,
    )  # fmt: skip
    return models.optimize(families_more.model(name), config, backend=backend)


def by_the_book(name: str) -> Any:
    kind = KINDS[name]
    return kind.book(
        families_more.model(name), Settings(VISION, CENTERS, SHALLOW, DEEP, kind.layer, *kind.layers, kind.positions)
    )


def generate(name: str, rows: Sequence[list[int]], given: dict[str, Any], steps: int = 3, backend: str = "eager", **more: Any) -> Any:
    """Of prompts padded on the left; none of what is said is a placeholder."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return optimized(name, backend).generate(
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
    for layer, stock in enumerate(told.cache.layers):
        for ours, theirs in zip(held.buffers[2 * layer : 2 * layer + 2], (stock.keys, stock.values), strict=True):
            torch.testing.assert_close(ours[sample, :, : theirs.shape[2]], theirs[0], atol=near, rtol=near)


def said(found: Any, sample: int = 0) -> list[int]:
    return found.sequences[sample, -len(found.logits) :].tolist()


@pytest.mark.covers("pruned by hand")
@pytest.mark.parametrize("name", NAMES)
def test_an_unequal_batch_is_its_samples_pruned_by_hand(name: str) -> None:
    """One image, and two."""
    one, two, three = SHAPES[name]
    prompts = [families_more.prompt(name, parts, seed) for seed, parts in enumerate(([2, three, 3], [3, one, 2, two, 4]))]
    given = {key: torch.cat([own[key] for _, own in prompts]) for key in prompts[0][1]}
    found = generate(name, [ids for ids, _ in prompts], given)
    for sample, (ids, own) in enumerate(prompts):
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


@pytest.mark.covers("pruned by hand")
@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_with_an_image_is_pruned_by_hand(name: str) -> None:
    """The first is of a video, a segment a frame, where there are any."""
    one, _, three = SHAPES[name]
    converse(name, ([2, (2, 3, 3) if KINDS[name].videos else three, 3], [2, one, 3]))
