"""What calibration is made of: attention by sizes, and merges that say how many tokens a row stands for."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_merges import attend
from torch import Tensor
from vitcop_compile.passes.attach_cache import attend_apart
from vitcop_compile.passes.prune import prune_tokens

from vitcop_compile.attention import ANCHOR, sdpa_cached, sdpa_marked, weighed, weighed_before, weighed_cached
from vitcop_compile.ops import mean_by_cluster, merge_by_cluster
from vitcop_compile.policies import POLICIES, Site

# Attention


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 5))
def test_attention_against_one_head_at_a_time(seed: int, shared: int, held: int, new: int, free: int) -> None:
    """Of a prompt, causal and not; of rows in caches; and of rows that never enter them."""
    generator = torch.Generator().manual_seed(seed)
    batch, groups, width = 2, 2, 4
    query = torch.randn(batch, groups * shared, held + new, width, generator=generator)
    key, value = torch.randn(2, batch, groups, held + new, width, generator=generator)
    sizes = torch.randint(1, 9, (batch, held + new), generator=generator)
    if new == 1:  # a step of decoding
        sizes[:, -1] = 1
    scale = 0.3

    def by_hand(causal: bool) -> Tensor:
        heads = [
            [
                attend(
                    query[b, h].numpy(), key[b, h // shared].numpy(), value[b, h // shared].numpy(), scale, causal,
                    sizes[b].tolist(),
                )
                for h in range(groups * shared)
            ]
            for b in range(batch)
        ]  # fmt: skip
        return torch.tensor(heads, dtype=torch.float32)

    for causal in (True, False):
        found = sdpa_marked(query, key, value, scale, weighed(sizes, causal, torch.float32))
        torch.testing.assert_close(found, by_hand(causal), atol=1e-5, rtol=1e-5)
        anchor = ANCHOR(query, key, value, scale, causal, None, None, 0, sizes)
        torch.testing.assert_close(anchor, by_hand(causal), atol=1e-5, rtol=1e-5)
    expected, query = by_hand(True)[:, :, held:], query[:, :, held:]
    at = torch.arange(held, held + new).expand(batch, new)
    rows = torch.nn.functional.pad(sizes, (0, free))  # what is not written yet stands for nothing
    caches = [torch.nn.functional.pad(tensor, (0, 0, 0, free)) for tensor in (key, value)]
    found = sdpa_cached(query, *caches, scale, at, weighed_cached(at, rows, torch.float32))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    parts = [tensor[:, :, held:] for tensor in (key, value)]
    masks = weighed(sizes[:, held:], True, torch.float32), weighed_before(at, rows)
    found = attend_apart(query, *caches, *parts, scale, at, *masks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Merging


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.booleans(), st.data())
def test_means_of_clusters_against_loops(seed: int, n: int, counted: bool, data: st.DataObject) -> None:
    """What merges is what merges in the published stage; a row is the mean of all that stand in it."""
    rng, budget = np.random.default_rng(seed), data.draw(st.integers(1, n))
    hidden, labels = rng.integers(-20, 20, (2, n, 3)).astype(np.float32), rng.integers(-1, 3, (2, n))
    saliency = rng.permutation(2 * n).reshape(2, n).astype(np.float32)
    counts = rng.integers(1, 9, (2, n)) if counted else np.ones((2, n), dtype=int)
    given_ = [torch.from_numpy(values) for values in (hidden, saliency, labels)]
    rows, index, sizes = mean_by_cluster(*given_, budget, 1, torch.from_numpy(counts) if counted else None)
    assert torch.equal(index, merge_by_cluster(*given_, budget)[1])
    for b in range(2):
        merged, where = naive.merge_by_cluster(np.eye(n), saliency[b].tolist(), labels[b].tolist(), budget)
        assert index[b].tolist() == where
        for k, i in enumerate(where):
            group = [j for j in range(n) if merged[k, j] - (i == j) > 0] or [i]
            assert sizes[b, k] == sum(counts[b, j] for j in group)
            mean = sum(counts[b, j] * hidden[b, j].astype(float) for j in group) / sum(counts[b, j] for j in group)
            np.testing.assert_allclose(rows[b, k], mean, atol=1e-5)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.data())
def test_means_of_clusters_of_several_images(seed: int, each: int, data: st.DataObject) -> None:
    """Images that share a budget: as one image whose clusters are told apart."""
    rng, images = np.random.default_rng(seed), 3
    n = images * each
    budget = data.draw(st.integers(1, n))
    hidden, labels = rng.normal(size=(2, n, 3)).astype(np.float32), rng.integers(-1, 3, (2, n))
    saliency = torch.from_numpy(rng.permutation(2 * n).reshape(2, n).astype(np.float32))
    counts = torch.from_numpy(rng.integers(1, 9, (2, n)))
    apart = torch.from_numpy(labels + 10 * (np.arange(n) // each))
    found = mean_by_cluster(torch.from_numpy(hidden), saliency, torch.from_numpy(labels), budget, images, counts)
    expected = mean_by_cluster(torch.from_numpy(hidden), saliency, apart, budget, 1, counts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_mean_of_two_by_hand() -> None:
    """Two of three merge, at the middle member, the second; published, that is it and the mean of both."""
    hidden, saliency, labels = torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[5.0, 6.0, 1.0]]), torch.zeros(1, 3).long()
    rows, index, sizes = mean_by_cluster(hidden, saliency, labels, 2)
    assert (rows.flatten().tolist(), index.tolist(), sizes.tolist()) == ([3, 9], [[1, 2]], [[2, 1]])
    assert merge_by_cluster(hidden, saliency, labels, 2)[0].flatten().tolist() == [7, 9]
    rows, _, sizes = mean_by_cluster(hidden, saliency, labels, 2, 1, torch.tensor([[3, 1, 5]]))
    assert (rows.flatten().tolist(), sizes.tolist()) == ([2.5, 9], [[4, 5]])


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["dominant_and_contextual", "local_and_global", "downsample"]))
def test_what_has_merged_merges_again(seed: int, name: str) -> None:
    """A merge of candidates that stand for several is the merge of as many copies of each: in total, and in every mean."""
    rng, n = np.random.default_rng(seed), 12
    hidden = torch.from_numpy(rng.normal(size=(1, n, 5)).astype(np.float32))
    counts = torch.from_numpy(rng.integers(1, 6, (1, n)))
    places = torch.stack((torch.arange(n) // 4 / 4, torch.arange(n) % 4 / 4), -1)[None]
    score = torch.from_numpy(rng.normal(size=(1, n, 2) if name == "local_and_global" else (1, n)).astype(np.float32))
    options: dict[str, Any] = {
        "dominant_and_contextual": {"contextual": 2, "heads": 1, "doubled": False},
        "local_and_global": {"window": 2},
        "downsample": {"cells": (3, 2)},
    }[name]
    given_ = {"at": torch.arange(n)[None], "hidden": hidden, "score": score, "features": hidden, "places": places}
    plain, found = (POLICIES[name].choose(Site(**given_, counts=c), 6, **options) for c in (None, counts))
    assert torch.equal(plain.index, found.index)
    # Which candidates are in a row: what becomes of unit vectors, where means are of rows alone.
    units = torch.eye(n)[None]
    if name == "local_and_global":  # which merges by the rows themselves
        shares = _groups(hidden[0], plain.index[0].tolist())
    else:
        shares = POLICIES[name].choose(Site(**given_ | {"hidden": units}), 6, **options).rows[0] > 0
    weights = shares * counts[0]
    assert torch.equal(found.state[-1][0], weights.sum(1))
    mean = weights.double() @ hidden[0].double() / weights.sum(1, keepdim=True)
    torch.testing.assert_close(found.rows[0].double(), mean, atol=1e-5, rtol=1e-5)


def _groups(hidden: Tensor, kept: list[int]) -> Tensor:
    unit = hidden.double() / hidden.double().norm(dim=1, keepdim=True)
    owner = [kept.index(i) if i in kept else int((unit[kept] @ unit[i]).argmax()) for i in range(len(hidden))]
    return torch.tensor(owner) == torch.arange(len(kept))[:, None]


def test_sizes_pass_through_a_selection_and_into_a_merge() -> None:
    """Of two segments that share a budget labels are told apart, and sizes are left as they are."""
    labels, sizes = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[3, 1, 2, 5]])
    hidden = torch.tensor([[9.0, 1, 2, 3, 4]]).unsqueeze(2)
    key = torch.tensor([[0.0, 1, 2, 4, 3]])[:, None, :, None]  # least norms are those of the first two
    settings: dict[str, Any] = {"incoming": (2, 2), "options": {}, "site": {}, "counted": 1}
    visual = torch.tensor([[1, 2, 3, 4]])
    kept = prune_tokens(hidden, visual, (labels, sizes), None, key, None, None, policy="keep_lowest", tokens=(3,), **settings)
    assert kept[3].tolist() == [[0, 1, 3]] and kept[-1].tolist() == [[3, 1, 5]]
    given_ = (hidden, visual, (labels, sizes), None, key, None, None)
    merged = prune_tokens(*given_, policy="merge_to_means", tokens=(2,), **settings)
    # Each image's cluster becomes one: (3 * 1 + 1 * 2) / 4 and (2 * 3 + 5 * 4) / 7.
    assert merged[-1].tolist() == [[4, 7]]
    torch.testing.assert_close(merged[0].flatten(), torch.tensor([9, 5 / 4, 26 / 7]))
