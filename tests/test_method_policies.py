"""Every policy of `methods` chooses, merges and counts what its reference does: hundreds of random sites each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import method_cases as cases
import naive
import naive_methods
import numpy as np
import pytest
import reference_methods as book
import torch
from method_cases import HEADS, Prompts, Vision
from models import slow
from reference_methods import Image, OfImage, OfRows, Told
from vitcop_compile.passes.prune import prune_tokens

from vitcop_compile import methods
from vitcop_compile.ops.greedy import LOOPS
from vitcop_compile.policies import POLICIES, Choice, Site
from vitcop_compile.program_modules import _text

NEAR = 1e-5
# All grids by all kinds of budgets, up to three images each, and many more of them.
SEEDS = pytest.mark.parametrize("seeds", [range(28), slow(range(28, 160))], ids=["some", "many"])
KINDS = pytest.mark.parametrize("ties", [False, True], ids=["random", "ties"])


def check(choice: Choice, sample: int, told: Told) -> None:
    assert choice.index[sample].tolist() == told.index
    assert (choice.rows is None) == (told.rows is None)
    if choice.rows is not None:
        np.testing.assert_allclose(choice.rows[sample].numpy(), np.array(told.rows), rtol=NEAR, atol=NEAR)
    assert [state[sample].tolist() for state in choice.state] == ([] if told.sizes is None else [told.sizes])


# The vision side


def contextual_of(case: Vision) -> int:
    """Between none of the budget and all of it, as many as there are others at most."""
    return min(case.budget * (case.n % 4) // 3, case.n - case.budget + case.budget * (case.n % 4) // 3)


def cells_of(case: Vision) -> tuple[int, int]:
    rows, columns = case.grid
    return 1 + case.budget % rows, 1 + (case.budget + case.padded) % columns


# name -> (policy, its options, reference of it)
VISION: dict[str, tuple[str, Callable[[Vision], dict[str, Any]], Callable[[Vision], OfImage]]] = {
    "uniform": ("uniform", lambda case: {}, lambda case: book.uniform),
    "downsample": ("downsample", lambda case: {"cells": cells_of(case)}, lambda case: book.downsample(cells_of(case))),
    "divprune": ("max_min_diversity", lambda case: {}, lambda case: book.divprune),
    "scope": ("coverage", lambda case: {"alpha": 1.0}, lambda case: book.scope()),
    "scope, squared": ("coverage", lambda case: {"alpha": 2.0}, lambda case: book.scope(2.0)),
    "holov": ("holistic", lambda case: {"crops": 4, "alpha": 0.09}, lambda case: book.holov(4)),
    "holov, many crops": ("holistic", lambda case: {"crops": 9, "alpha": 0.09}, lambda case: book.holov(9)),
    "visionzip": (
        "dominant_and_contextual",
        lambda case: {"contextual": contextual_of(case), "heads": HEADS, "doubled": True},
        lambda case: book.visionzip(contextual_of(case)),
    ),
    "visionzip, mean": (
        "dominant_and_contextual",
        lambda case: {"contextual": contextual_of(case), "heads": HEADS, "doubled": False},
        lambda case: book.visionzip(contextual_of(case), doubled=False),
    ),
    "vscan": ("local_and_global", lambda case: {"window": 2}, lambda case: book.vscan(2)),
}


def told(name: str, case: Vision, i: int) -> Told:
    return VISION[name][2](case)(case.image(i), case.budget)


def chosen(name: str, case: Vision, exact: bool = True) -> Choice:
    policy, options, _ = VISION[name]
    site = case.scanned(exact) if name == "vscan" else case.site(exact)
    budget = math.prod(cells_of(case)) if name == "downsample" else case.budget
    return POLICIES[policy].choose(site, budget, **options(case))


def seen(name: str, ties: bool, seeds: range) -> Iterator[Vision]:
    for seed in seeds:
        case = cases.vision(seed, ties)
        if ties and name.startswith("holov"):
            # Contexts of parts that are equal on paper are not so once they have been summed: there are none.
            case.hidden[:] = 0
        yield case


@SEEDS
@KINDS
@pytest.mark.parametrize("name", VISION)
def test_vision_policies_choose_what_their_references_do(name: str, ties: bool, seeds: range) -> None:
    for case in seen(name, ties, seeds):
        choice = chosen(name, case)
        for i in range(len(case.hidden)):
            check(choice, i, told(name, case, i))


@pytest.mark.parametrize("name", ["divprune", "scope", "holov"])
def test_vision_policies_without_float64(name: str) -> None:
    """But where a choice is so close that fp32 may turn it over."""
    left = 0
    for seed in range(24):
        case = cases.vision(seed, False)

        def ask(hidden: np.ndarray, score: np.ndarray, case: Vision = case) -> list[list[int]]:
            off = Vision(case.grid, case.budget, hidden, score, case.early, case.keys)
            return [told(name, off, i).index for i in range(len(hidden))]

        if cases.steady(ask, case.hidden, case.score):
            left += 1
            assert chosen(name, case, exact=False).index.tolist() == ask(case.hidden, case.score)
    assert left >= 22


@SEEDS
def test_holov_within_a_crop_and_beyond_it(seeds: range) -> None:
    """Crops of equal attention and other features: what `ties` leaves out."""
    for seed in seeds:
        case = cases.vision(seed, True)
        case.hidden[:] = np.random.default_rng(seed).normal(size=case.hidden.shape).astype(np.float32)
        choice = chosen("holov", case)
        for i in range(len(case.hidden)):
            check(choice, i, told("holov", case, i))


@SEEDS
@pytest.mark.parametrize("prefix", [0, 1])
@KINDS
def test_tome_merges_what_its_reference_does(ties: bool, prefix: int, seeds: range) -> None:
    """With CLS, which neither goes nor is counted, and without; sizes of earlier blocks in the state."""
    for seed in seeds:
        case, rng = cases.vision(seed, ties), np.random.default_rng(seed)
        batch, n = case.hidden.shape[:2]
        gone = int(rng.integers(0, n // 2 + 1)) if prefix or n > 1 else 0
        cls = rng.normal(size=(batch, prefix, HEADS, cases.HEAD)).astype(np.float32)
        key = np.concatenate((cls, case.keys), 1).transpose(0, 2, 1, 3)
        sizes = rng.integers(1, 4, (batch, n))
        site = Site(
            at=torch.arange(prefix, prefix + n).expand(batch, n),
            hidden=torch.from_numpy(case.hidden).float(),
            key=torch.from_numpy(key).float(),
            state=(torch.from_numpy(sizes),) if seed % 3 else (),
            prefix=prefix,
        )
        choice = POLICIES["bipartite_matching"].choose(site, n - gone)
        for i in range(batch):
            keys, counts = key[i].transpose(1, 0, 2), sizes[i].tolist() if seed % 3 else []
            check(choice, i, book.tome(Image(case.grid, case.hidden[i], keys=keys, sizes=counts), n - gone))


# The encoder, through the node of the graph


@pytest.mark.parametrize("name", ["scope", "visionzip", "vscan"])
def test_in_an_encoder_scores_are_those_of_its_layers(name: str) -> None:
    """Behind a CLS row, by queries and keys of a layer, and of an earlier one."""
    for seed in range(20):
        case, rng = cases.vision(2 * seed, False), np.random.default_rng(seed)
        batch, n = case.hidden.shape[:2]
        query, key, *early = rng.normal(size=(4, batch, HEADS, 1 + n, cases.HEAD)).astype(np.float32)
        case.score = np.array([naive.cls_saliency(query[i], key[i], 0.4) for i in range(batch)])
        case.early = np.array([naive.cls_saliency(early[0][i], early[1][i], 0.4) for i in range(batch)])
        case.keys = key[:, :, 1:].transpose(0, 2, 1, 3)
        hidden = np.concatenate((rng.normal(size=(batch, 1, cases.WIDTH)), case.hidden), 1)
        policy, options, _ = VISION[name]
        more = {"also": ((torch.from_numpy(early[0]), torch.from_numpy(early[1])),)} if name == "vscan" else {}
        rows, keep, visual, index, *state = prune_tokens(
            torch.from_numpy(hidden).float(), 1, (), torch.from_numpy(query), torch.from_numpy(key), None, 0.4, more,
            policy=policy, incoming=(n,), tokens=(case.budget,), options=options(case), tap="cls_attention",
            site={"prefix": 1, "grid": case.grid, "exact": True, "places": case.site().places[:, :n]},
        )  # fmt: skip
        for i in range(batch):
            answer = told(name, case, i)
            assert index[i].tolist() == answer.index and keep[i].tolist() == [0, *(1 + j for j in answer.index)]
            kept = case.hidden[i][answer.index] if answer.rows is None else np.array(answer.rows)
            np.testing.assert_allclose(rows[i].numpy(), np.concatenate((hidden[i, :1], kept)), rtol=NEAR, atol=NEAR)
            assert [own[i].tolist() for own in state] == ([] if answer.sizes is None else [answer.sizes])
            assert visual[i].tolist() == list(range(1, 1 + case.budget))


# The decoder, through the node of the graph, for several images


DECODER: dict[str, tuple[str, dict[str, Any], OfRows]] = {
    "fastv": ("last_attention", {}, book.fastv),
    "sparsevlm": ("rated_attention", {}, book.sparsevlm),
    "v2drop": ("variation", {}, book.v2drop),
    "cdpruner": ("conditional_diversity", {}, book.cdpruner),
    "zspaprune": ("core_and_diversity", {"core": 0.5}, book.zspaprune(0.5)),
    "dart": ("duplication", {"visual_pivots": 4, "text_pivots": 4}, book.dart(4, 4)),
    "dart, few pivots": ("duplication", {"visual_pivots": 1, "text_pivots": 2}, book.dart(1, 2)),
}


def pruned(name: str, case: Prompts, **site: Any) -> tuple[torch.Tensor, ...]:
    policy, options, _ = DECODER[name]
    given = case.arguments(POLICIES[policy].needs)
    return prune_tokens(*given, policy=policy, incoming=case.incoming, tokens=case.tokens, options=options, site=site)


def expected(name: str, case: Prompts) -> list[list[list[int]]]:
    """By sample and image, its tokens that stay."""
    return [
        [DECODER[name][2](case.rows(i), rows, count) for rows, count in zip(case.parts(i), case.tokens, strict=True)]
        for i in range(len(case.visual))
    ]


@SEEDS
@KINDS
@pytest.mark.parametrize("name", DECODER)
def test_decoder_policies_choose_what_their_references_do(name: str, ties: bool, seeds: range) -> None:
    """Image by image, whether equal ones run as a batch or not; rows of padding behind each prompt see and say nothing."""
    if ties and name == "cdpruner":
        return  # determinants of what is alike are noise: see below
    for seed in seeds:
        case = cases.prompts(seed, ties)
        hidden, keep, visual, index = pruned(name, case)
        for i, of_images in enumerate(expected(name, case)):
            rows = [part[j] for part, own in zip(case.parts(i), of_images, strict=True) for j in own]
            assert [case.visual[i][j] for j in index[i].tolist()] == rows, (seed, i)
            stay = sorted({*range(case.hidden.shape[1])} - {*case.visual[i]} | {*rows})
            assert keep[i].tolist() == stay and [stay[at] for at in visual[i].tolist()] == rows
            assert torch.equal(hidden[i], torch.from_numpy(case.hidden[i][stay]).float())


@pytest.mark.parametrize("name", ["cdpruner", "zspaprune", "dart"])
def test_decoder_policies_without_float64(name: str) -> None:
    left = 0
    for seed in range(24):
        case = cases.prompts(seed, False)

        def ask(hidden: np.ndarray, case: Prompts = case) -> list[list[list[int]]]:
            return expected(name, Prompts(**(vars(case) | {"hidden": hidden})))

        if cases.steady(ask, case.hidden):
            left += 1
            index, first = pruned(name, case, exact=False)[3], 0
            for place, count in enumerate(case.tokens):
                own = index[:, first : first + count] - sum(case.incoming[:place])
                assert own.tolist() == [of[place] for of in ask(case.hidden)], seed
                first += count
    assert left >= 21


def test_cdpruner_of_copies_and_of_equal_relevance() -> None:
    """Tokens that are an axis each, or copies of one, all as near to the prompt: the first of each comes, then nothing is
    gained any more and the lower index goes first."""
    for seed in range(100):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 10))
        budget = int(rng.integers(1, n + 1))
        features, words = np.eye(8)[rng.integers(0, 4, n)], np.ones((1, 8))
        whole = torch.from_numpy(np.concatenate((features, words))).float().unsqueeze(0)
        site = Site(
            at=torch.arange(n).unsqueeze(0), hidden=whole[:, :n], whole=whole, text=(torch.arange(n + 1) == n).unsqueeze(0)
        )
        choice = POLICIES["conditional_diversity"].choose(site, budget)
        relevance = naive_methods.relevance(features, words)
        check(choice, 0, Told(naive_methods.cdpruner(features, relevance, budget)))


def test_raters_of_equal_shares_are_all() -> None:
    """Three tokens of text that are alike have a third each, however fp32 rounds it."""
    for seed in range(8):
        case = cases.prompts(3 * seed, False)
        for i, rows in enumerate(case.text):
            case.entry[i, rows] = case.entry[i, rows[0]]
        index = pruned("sparsevlm", case)[3]
        for i, of_images in enumerate(expected("sparsevlm", case)):
            assert naive_methods.raters(case.entry[i], case.text[i], case.visual[i]) == case.text[i]
            assert index[i].tolist() == of_images[0]


@pytest.mark.parametrize(
    ("visual", "last", "expected"),
    [
        ([2, 3], 6, [4, 5, 6]),
        ([2, 4], 6, [5, 6]),
        ([2, 3], 3, [0, 1]),
        ([0, 1, 2], 2, [0, 1, 2]),
        ([0, 2], 2, [1]),
    ],
    ids=["behind the images", "behind the last of them", "none is behind", "no text", "between them alone"],
)
def test_which_rows_are_text(visual: list[int], last: int, expected: list[int]) -> None:
    """What has seen all images, where there is any; padding from row `last` on is none."""
    (found,) = _text(torch.tensor([visual]), torch.tensor([last]), 9)
    assert found.nonzero().flatten().tolist() == expected


# Random


def test_random_subsets() -> None:
    """Of the real ones, the same whenever and for whichever image, another for every seed, all equally often."""
    case = cases.vision(7, False)
    assert case.padded and case.grid == (3, 4)
    site, counts = case.site(), torch.zeros(12)
    for seed in range(400):
        found = POLICIES["random"].choose(site, 5, seed=seed).index
        assert torch.equal(found, POLICIES["random"].choose(site, 5, seed=seed).index)
        assert all(row == found[0].tolist() and sorted(set(row)) == row for row in found.tolist())
        counts[found[0]] += 1
    # 400 draws of 5 of 12: five standard deviations.
    assert (counts / 400 - 5 / 12).abs().max() < 5 * math.sqrt(5 / 12 * 7 / 12 / 400)


# Controls


@pytest.mark.parametrize("name", [name for name in (*VISION, *DECODER) if name != "uniform"])
def test_a_score_that_is_shuffled_would_be_seen(name: str) -> None:
    """What policies look at, in another order: most answers are others."""
    other = number = 0
    for seed in range(14, 25):
        if name in VISION:
            case = cases.vision(seed, False)
            right = chosen(name, case)
            case.hidden, case.score, case.early, case.keys = (
                x[:, ::-1].copy() for x in (case.hidden, case.score, case.early, case.keys)
            )
            wrong = chosen(name, case)
            other += not (torch.equal(right.index, wrong.index) and (right.rows is None or right.rows.equal(wrong.rows)))
            number += 1 < case.budget < case.n
        else:
            prompts = cases.prompts(seed, False)
            right_index = pruned(name, prompts)[3]
            for i, rows in enumerate(prompts.visual):
                for values in (prompts.hidden[i], prompts.entry[i], prompts.before[i]):
                    values[rows] = values[rows[::-1]]
                prompts.key[i][:, rows] = prompts.key[i][:, rows[::-1]]
            other += not torch.equal(right_index, pruned(name, prompts)[3])
            number += any(1 < kept < n for kept, n in zip(prompts.tokens, prompts.incoming, strict=True))
    assert number >= 3 and other >= number // 2


def test_every_method_is_among_these() -> None:
    """A policy that is added has to be compared as well."""
    compared = {policy for policy, *_ in (*VISION.values(), *DECODER.values())} | {"bipartite_matching", "random"}
    own = {"cls_attention", "attention_received", "merge_by_cluster", "merge_to_means", "keep_lowest"}
    assert {name for name in POLICIES if not name.startswith("custom_")} == compared | own
    assert len(methods.METHODS) == 17 and len(LOOPS) == 3
