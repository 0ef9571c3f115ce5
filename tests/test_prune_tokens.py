"""Tokens pruned by segments, against plain loops over one sample."""

from __future__ import annotations

from collections.abc import Sequence

import naive
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from vitcop_compile.passes.prune import prune_tokens, runs

from vitcop_compile import RewriteError
from vitcop_compile.policies import POLICIES, policy_of

WIDTH, HEADS, HEAD = 3, 2, 4
SEEDS = st.integers(0, 2**32 - 1)


def prompts(rng: np.random.Generator, batch: int, incoming: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, visual, labels, key) of samples whose images lie between text of any length."""
    n = sum(incoming)
    visual, labels = [], []
    for _ in range(batch):
        at, rows, free = 0, [], 5
        for tokens in incoming:
            gap = int(rng.integers(0, free + 1))
            at, free = at + gap, free - gap
            rows += range(at, at + tokens)
            at += tokens
        visual.append(rows)
        labels.append(rng.integers(-1, 3, n))
    hidden = rng.integers(-20, 20, (batch, n + 5, WIDTH)).astype(np.float32)
    key = rng.normal(0, 1, (batch, HEADS, n + 5, HEAD)).astype(np.float32)
    return (*map(torch.from_numpy, (hidden, np.array(visual), np.stack(labels).astype(np.int64), key)),)


def prune(policy: str, prompt: tuple[Tensor, ...], incoming: Sequence[int], tokens: Sequence[int]) -> tuple[Tensor, ...]:
    hidden, visual, labels, key = prompt
    needs = POLICIES[policy].needs
    given = (hidden, visual, (labels,), None, key if "key" in needs else None, None, None)
    settings = {"policy": policy, "incoming": tuple(incoming), "tokens": tuple(tokens), "options": {}, "site": {}}
    return prune_tokens(*given, **settings)


def by_hand(policy: str, hidden: Tensor, saliency: list[float], labels: list[int], budget: int) -> dict[int, np.ndarray]:
    """Candidate -> its new row, of the tokens that stay."""
    rows = hidden.numpy()
    if policy == "merge_by_cluster":
        merged, index = naive.merge_by_cluster(rows, saliency, labels, budget)
        return dict(zip(index, merged, strict=True))
    return {i: rows[i] for i in naive.keep_lowest(saliency, budget)}


def expect(policy: str, prompt: tuple[Tensor, ...], incoming: Sequence[int], tokens: Sequence[int]) -> None:
    """Checks all that `prune_tokens` returns against one problem after another, by plain Python."""
    found = prune(policy, prompt, incoming, tokens)
    hidden, keep, visual, index, labels = found
    for sample in range(hidden.shape[0]):
        old, rows_of, label, key = (tensor[sample] for tensor in prompt)
        places = rows_of.tolist()
        saliency = np.array(naive.key_norm(key.numpy()))[places].tolist()
        # A segment alone, or all of them as one problem in which clusters of two images are two clusters.
        owner = [i for i, count in enumerate(incoming) for _ in range(count)]
        apart = [1000 * i + cluster for i, cluster in zip(owner, label.tolist(), strict=True)]
        problems = zip(incoming, tokens, strict=True) if len(tokens) == len(incoming) else [(sum(incoming), tokens[0])]
        chosen: dict[int, np.ndarray] = {}
        first = 0
        for size, budget in problems:
            part = slice(first, first + size)
            rows = by_hand(policy, old[places[part]], saliency[part], apart[part], budget)
            chosen |= {first + i: row for i, row in rows.items()}
            first += size
        stay = {places[i]: i for i in chosen}
        kept = [row for row in range(old.shape[0]) if row in stay or row not in places]
        assert index[sample].tolist() == list(chosen)
        assert keep[sample].tolist() == kept
        assert visual[sample].tolist() == [at for at, row in enumerate(kept) if row in stay]
        expected = [chosen[stay[row]] if row in stay else old[row].numpy() for row in kept]
        np.testing.assert_allclose(hidden[sample].numpy(), np.stack(expected), rtol=1e-5, atol=1e-5)
        # Labels name the clusters that the tokens were of, whatever they call them.
        pairs = set(zip((apart[i] for i in chosen), labels[sample].tolist()))
        if len(tokens) != len(incoming):
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        else:
            assert labels[sample].tolist() == [int(label[i]) for i in chosen]


POLICY = st.sampled_from(["merge_by_cluster", "keep_lowest"])


@given(SEEDS, POLICY, st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.data())
def test_equal_segments_run_as_a_batch(seed: int, policy: str, batch: int, images: int, each: int, data) -> None:
    budget = data.draw(st.integers(1, each))
    assert runs((each,) * images, (budget,) * images) == [(0, images, each, budget, 1)]
    expect(policy, prompts(np.random.default_rng(seed), batch, [each] * images), [each] * images, [budget] * images)


@given(SEEDS, POLICY, st.integers(1, 2), st.lists(st.integers(1, 7), min_size=2, max_size=4), st.data())
def test_segments_of_any_sizes(seed: int, policy: str, batch: int, incoming: list[int], data) -> None:
    tokens = [data.draw(st.integers(1, size)) for size in incoming]
    expect(policy, prompts(np.random.default_rng(seed), batch, incoming), incoming, tokens)


@given(SEEDS, POLICY, st.integers(1, 2), st.lists(st.integers(1, 7), min_size=2, max_size=4), st.booleans(), st.data())
def test_segments_that_share_a_budget(seed: int, policy: str, batch: int, incoming: list[int], equal: bool, data) -> None:
    """As one problem over all tokens, in which no cluster reaches from one image into another."""
    if equal:
        incoming = incoming[:1] * len(incoming)
    n = sum(incoming)
    expect(policy, prompts(np.random.default_rng(seed), batch, incoming), incoming, [data.draw(st.integers(1, n))])


@given(SEEDS, st.lists(st.integers(2, 7), min_size=2, max_size=3), st.booleans(), st.data())
def test_clusters_stay_apart_in_every_stage(seed: int, incoming: list[int], equal: bool, data) -> None:
    """A stage behind one that images share sees one segment, and still the clusters of each image."""
    if equal:
        incoming = incoming[:1] * len(incoming)
    prompt = prompts(np.random.default_rng(seed), 1, incoming)
    first = data.draw(st.integers(2, sum(incoming)))
    second = data.draw(st.integers(1, first))
    hidden, keep, visual, index, labels = prune("merge_by_cluster", prompt, incoming, [first])
    key = prompt[3][:, :, keep[0]]
    rows, _, _, chosen, _ = prune("merge_by_cluster", (hidden, visual, labels, key), [first], [second])
    owner = [i for i, count in enumerate(incoming) for _ in range(count)]
    apart = [1000 * owner[i] + int(prompt[2][0, i]) for i in index[0].tolist()]
    saliency = np.array(naive.key_norm(key[0].numpy()))[visual[0].tolist()].tolist()
    expected = by_hand("merge_by_cluster", hidden[0, visual[0]], saliency, apart, second)
    assert chosen[0].tolist() == list(expected)
    assert rows.shape[1] == hidden.shape[1] - first + second


@pytest.mark.parametrize(
    ("incoming", "tokens", "expected"),
    [
        ((), (), []),
        ((9,), (4,), [(0, 1, 9, 4, 1)]),
        ((9, 9, 9), (4, 4, 4), [(0, 3, 9, 4, 1)]),
        ((9, 9, 5), (4, 4, 4), [(0, 2, 9, 4, 1), (18, 1, 5, 4, 1)]),
        ((9, 9), (4, 3), [(0, 1, 9, 4, 1), (9, 1, 9, 3, 1)]),
        ((9, 5, 9), (4, 2, 4), [(0, 1, 9, 4, 1), (9, 1, 5, 2, 1), (14, 1, 9, 4, 1)]),
        ((9, 9), (4,), [(0, 1, 18, 4, 2)]),
        ((9, 5), (4,), [(0, 1, 14, 4, 0)]),
    ],
)
def test_runs_of_segments(incoming: tuple, tokens: tuple, expected: list) -> None:
    assert runs(incoming, tokens) == expected


@pytest.mark.parametrize(("incoming", "tokens"), [((9, 9, 9), (4, 4)), ((9,), ()), ((9,), (4, 4))])
def test_budgets_that_do_not_match(incoming: tuple, tokens: tuple) -> None:
    with pytest.raises(RewriteError, match=f"{len(tokens)} budgets for {len(incoming)} segments: give one each, or one for"):
        runs(incoming, tokens)


@given(SEEDS, st.integers(1, 3), st.integers(1, 2), st.sampled_from([(2, 3), (4, 2), (3, 3)]), st.data())
def test_patches_behind_a_prefix(seed: int, batch: int, prefix: int, grid: tuple[int, int], data) -> None:
    """The encoder's stage: a run of candidates that starts at a row, each image in a sample of its own."""
    n = grid[0] * grid[1]
    tokens = data.draw(st.integers(1, n))
    centers = data.draw(st.integers(1, tokens))
    rng = np.random.default_rng(seed)
    hidden = rng.normal(0, 1, (batch, prefix + n, WIDTH)).astype(np.float32)
    query, key = rng.normal(0, 2, (2, batch, HEADS, prefix + n, HEAD)).astype(np.float32)
    saliency = [naive.cls_saliency(query[b], key[b], 0.5, prefix) for b in range(batch)]
    assume(min(np.diff(np.sort(row)).min(initial=1) for row in saliency) > 1e-5)
    kept = [naive.keep_lowest([-value for value in row], tokens) for row in saliency]
    features = [key[b].transpose(1, 0, 2).reshape(prefix + n, -1)[[prefix + i for i in kept[b]]] for b in range(batch)]
    places = [np.array([(i // grid[1], i % grid[1]) for i in row]) / max(grid) for row in kept]
    peaks = [naive.density_peaks(f, p, centers, 3.0, 0.6) for f, p in zip(features, places, strict=True)]
    assume(min(each.margin for each in peaks) > 1e-5)
    found = prune_tokens(
        torch.from_numpy(hidden),
        prefix,
        (),
        torch.from_numpy(query),
        torch.from_numpy(key),
        None,
        0.5,
        policy="cls_attention",
        incoming=(n,),
        tokens=(tokens,),
        options={"centers": centers, "density_width": 3.0, "reach": 0.6},
        site={"prefix": prefix, "grid": grid, "exact": True},
    )
    rows, keep, visual, index, labels = found
    assert index.tolist() == kept
    assert keep.tolist() == [[*range(prefix), *(prefix + i for i in row)] for row in kept]
    assert visual.tolist() == [list(range(prefix, prefix + tokens))] * batch
    assert torch.equal(rows, torch.stack([torch.from_numpy(hidden[b])[keep[b]] for b in range(batch)]))
    assert labels.tolist() == [each.labels for each in peaks]


def test_policies_say_what_they_need() -> None:
    assert set(POLICIES) >= {"cls_attention", "merge_by_cluster", "keep_lowest"}
    assert [policy_of(name).merges for name in ("cls_attention", "merge_by_cluster", "keep_lowest")] == [False, True, False]
    with pytest.raises(KeyError, match="'keep_best' is unknown: use one of cls_attention"):
        policy_of("keep_best")
