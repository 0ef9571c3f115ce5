"""The references of published methods against answers worked out on paper: an oracle has to be trusted before it judges."""

import math

import numpy as np
import pytest
import torch
from naive_merges import attend, downsample, local_scan, tome, visionzip, vscan
from naive_methods import (
    cdpruner,
    cosine,
    crop_runs,
    dart,
    divprune,
    fastv,
    holov,
    last_row,
    pyramid,
    pyramiddrop,
    raters,
    relevance,
    scope,
    sparsevlm,
    top,
    uniform,
    v2drop,
    zspaprune,
)

# Of length 5, whose cosines to (1, 0) are 4/5 and 3/5, and to each other 24/25.
FLAT, STEEP = (4.0, 3.0), (3.0, 4.0)


def rows(*values):
    """Of tuples, or of numbers as rows of one."""
    return np.array([value if isinstance(value, tuple) else (value,) for value in values], float)


def test_ties_and_zeros():
    """The lower index first; a row of zeros is like nothing."""
    assert top([1, 3, 3, 2, 3], 2) == [1, 2]
    assert top([1, 3, 3, 2, 3], 4) == [1, 2, 3, 4]
    assert top([5, 1, 1, 1], 2, [3, 1, 2]) == [1, 2]
    assert cosine((3, 4), (4, 3)) == 0.96
    assert cosine((0, 0), (1, 2)) == 0


def test_uniform():
    """6 tokens: thirds have their middles at 1 and 4; (i + 1/2) 6/4 = .75, 2.25, 3.75, 5.25."""
    assert uniform((2, 3), 2) == [1, 4]
    assert uniform((2, 3), 4) == [0, 2, 3, 5]
    assert uniform((2, 3), 6) == [0, 1, 2, 3, 4, 5]
    assert uniform((24, 24), 1) == [288]


def test_downsample_by_hand():
    """2 x 3 to 1 x 2: columns 0-1 and 1-2, that of the middle in both."""
    assert downsample((2, 3), (1, 2), rows(0, 1, 2, 3, 4, 5)) == ([0, 1], [[2], [3]])
    assert downsample((3, 3), (1, 1), rows(*range(9))) == ([4], [[4]])
    assert downsample((2, 2), (2, 2), rows(5, 6, 7, 8)) == ([0, 1, 2, 3], [[5], [6], [7], [8]])


@pytest.mark.parametrize(("grid", "cells"), [((24, 24), (8, 8)), ((7, 5), (3, 2)), ((5, 9), (4, 7)), ((6, 4), (6, 1))])
def test_downsample_as_pooling(grid, cells):
    """Its cells are those of adaptive average pooling, and where they stand is within them, ascending and distinct."""
    hidden = np.random.default_rng(0).normal(size=(grid[0] * grid[1], 3))
    index, pooled = downsample(grid, cells, hidden)
    expected = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(hidden.T.reshape(1, 3, *grid).copy()), cells)
    np.testing.assert_allclose(np.array(pooled).T.reshape(1, 3, *cells), expected.numpy(), rtol=0, atol=1e-12)
    assert index == sorted(set(index))


def test_last_row():
    """exp 0 : exp ln 3 is 1 : 3; both query heads share the key head; what comes later, or is padding, is not seen."""
    keys = np.array([[[0.0], [1.0], [5.0]]])
    query = np.array([[0.0], [math.log(9)]])
    half, thirds = last_row(query, keys, 0.5, 1)
    assert half == [0.5, 0.5, 0]
    np.testing.assert_allclose(thirds, [0.25, 0.75, 0], rtol=1e-15)
    assert last_row(query, keys, 0.5, 1, first=1) == [[0, 1, 0], [0, 1, 0]]
    # Four query heads on two key heads: 0 and 1 on the first, 2 and 3 on the second.
    keys = np.array([[[1.0], [0.0]], [[0.0], [1.0]]])
    assert [row.index(max(row)) for row in last_row(np.ones((4, 1)), keys, 1, 1)] == [0, 0, 1, 1]


def test_fastv():
    """Means .2, .3, .3, .2."""
    attention = np.array([[0.1, 0.4, 0.4, 0.1], [0.3, 0.2, 0.2, 0.3]])
    assert [fastv(attention, k) for k in (1, 2, 3)] == [[1], [1, 2], [0, 1, 2]]
    assert pyramiddrop(attention, 3) == [0, 1, 2]


def test_pyramid():
    """The published stages; 99 halves to 49.5, 24.75 and 12.375 of the original number."""
    assert pyramid(576) == [(8, 288), (16, 144), (24, 72)]
    assert pyramid(99, layers=28) == [(7, 49), (14, 24), (21, 12)]
    assert pyramid(100, layers=6, stages=2, keep=0.25) == [(3, 25)]


def test_raters():
    """Shares of 1/4 and 3/4; equal ones, also by two tokens that disagree; two of three; one."""
    assert raters(rows(1, 1, 0, math.log(3)), [2, 3], [0, 1]) == [3]
    assert raters(rows(1, 1, 7, 7), [2, 3], [0, 1]) == [2, 3]
    assert raters(rows(1, -1, 0, math.log(3)), [2, 3], [0, 1]) == [2, 3]
    assert raters(rows(math.log(4), 0, math.log(4), 1), [1, 2, 3], [0]) == [2, 3]
    assert raters(rows(1, 0), [1], [0]) == [1]
    assert raters(rows(1, *[2] * 49), list(range(1, 50)), [0]) == list(range(1, 50))


def test_sparsevlm():
    """Row 0 text, 1-3 visual, 4 and 5 text. Row 5 sees 1 : 1 : 2 : 4 : 1 : 1, row 4 sees 1 : 1 : 1/2 : 1/4 : 1, so that the
    visual tokens have .1, .2, .4 of the one, 4/15, 2/15, 1/15 of the other, and 11/30, 10/30, 14/30 of both."""
    key = np.array([[[0], [0], [math.log(2)], [math.log(4)], [0], [0]]])
    query = np.array([[[9], [9], [9], [9], [-1], [1]]], float)
    one = rows(0, 1, 1, 1, 0, math.log(3))
    other = rows(0, 1, 1, 1, math.log(3), 0)
    both = rows(0, 1, 1, 1, 0, 0)
    assert sparsevlm(query, key, 1, [4, 5], [1, 2, 3], one, 2) == [1, 2]
    assert sparsevlm(query, key, 1, [4, 5], [1, 2, 3], other, 2) == [0, 1]
    assert sparsevlm(query, key, 1, [4, 5], [1, 2, 3], both, 2) == [0, 2]
    # Row 4 sees 1 : 1/4 : 1/16 : 1 of what is not padding, row 5 1 : 2 : 4 : 1 : 1: .43 + .11, .11 + .22, .03 + .44. If row 0,
    # which takes all of row 4, counted, the last visual token would be first.
    key[0, 0], query[0, 4] = -50, -2
    assert sparsevlm(query, key, 1, [4, 5], [1, 2, 3], both, 1, first=1) == [0]
    assert sparsevlm(query, key, 1, [4, 5], [1, 2, 3], both, 1) == [2]


def test_divprune():
    """Right angles and a copy: the first is 1, whose nearest is as far as 2's, and then 0, 2 and the copy of 0."""
    features = rows((1, 0), (0, 1), (-1, 0), (1, 0))
    assert [divprune(features, k) for k in (1, 2, 3, 4)] == [[1], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    assert [divprune(rows((1, 0), FLAT, STEEP), k) for k in (1, 2)] == [[0], [0, 2]]
    assert divprune(rows((2, 0), (5, 0), (1, 0)), 2) == [0, 1]
    assert divprune(rows((2, 0)), 1) == [0]


def test_relevance():
    """Cosines 1, 0, .6 to one word; to two words .5, .5, .7, of which 1e-6 / .2 is left of the least."""
    features = rows((1, 0), (0, 1), STEEP)
    np.testing.assert_allclose(relevance(features, rows((2, 0))), [1 + 1e-6, 1e-6, 0.6 + 1e-6], rtol=0, atol=1e-15)
    np.testing.assert_allclose(
        relevance(features, rows((2, 0)), negative=True), [1e-6, 1 + 1e-6, 0.4 + 1e-6], rtol=0, atol=1e-15
    )
    np.testing.assert_allclose(relevance(features, rows((2, 0), (0, 1))), [5e-6, 5e-6, 1 + 5e-6], rtol=0, atol=1e-15)
    assert relevance(rows((1, 0), (3, 0)), rows((1, 1))) == [1, 1]


def test_cdpruner():
    """At right angles relevance alone; a copy adds nothing; else the gain is r^2 (1 - cos^2): .36 of FLAT, .64 of STEEP."""
    assert [cdpruner(np.eye(3), [1, 2, 3], k) for k in (1, 2, 3)] == [[2], [1, 2], [0, 1, 2]]
    assert cdpruner(rows((1, 0), (2, 0), (0, 1)), [3, 3, 1], 2) == [0, 2]
    features = rows((1, 0), FLAT, STEEP)
    assert cdpruner(features, [1, 1, 1], 2) == [0, 2]
    assert cdpruner(features, [1, 1, 0.7], 2) == [0, 1]  # .49 * .64 < .36
    assert cdpruner(features, [1, 2, 1], 2) == [0, 1]  # After FLAT: .36 of the first, .0784 of STEEP.
    assert cdpruner(rows((1, 0), (1, 0), (1, 0)), [1, 1, 1], 2) == [0, 1]


def test_cdpruner_as_cholesky():
    """The incremental form of Chen et al. picks the same: the gain of a candidate is its row's last pivot, squared."""
    generator = np.random.default_rng(1)
    for _ in range(20):
        features, r = generator.normal(size=(30, 16)), generator.uniform(0.1, 1, 30)
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        kernel = r[:, None] * (unit @ unit.T) * r
        chosen = []
        for _ in range(10):
            inverse = np.linalg.inv(kernel[np.ix_(chosen, chosen)])
            gain = [kernel[i, i] - kernel[i, chosen] @ inverse @ kernel[chosen, i] for i in range(30)]
            chosen.append(max(set(range(30)) - set(chosen), key=lambda i: gain[i]))
        assert cdpruner(features, r, 10) == sorted(chosen)


def test_dart():
    """L1 norms 6, 5, 1, 2, 4 (by L2 the pivot would be 1); the text pivot is the second."""
    keys, text_keys = rows((3, -3), (5, 0), (0, 1), (1, 1), (4, 0)), rows((0, 1), (2, 0))
    visual, text = rows((1, 0), (1, 0), (0, 1), (-1, 0), STEEP), rows((1, 0), (0, 1))
    # (1, 0) has cosines 1, 0, -1, .6 to the others and takes 3, then 2; (0, 1) has 0, 1, 0, .8 and takes 1.
    assert dart(keys, text_keys, visual, text, 1, 1, 1) == [0]
    assert dart(keys, text_keys, visual, text, 2, 1, 1) == [0, 3]
    assert dart(keys, text_keys, visual, text, 3, 1, 1) == [0, 1, 3]
    assert dart(keys, text_keys, visual, text, 4, 1, 1) == [0, 1, 2, 3]
    assert dart(keys, text_keys, visual, text, 3, 1, 0) == [0, 2, 3]
    # Pivots 0 and 1 are alike: each takes the best of what is left, and there are no more of them than budget.
    assert dart(keys, text_keys, visual, text, 4, 2, 0) == [0, 1, 2, 3]
    assert dart(keys, text_keys, visual, text, 2, 4, 4) == [0, 1]
    # More pivots than text tokens.
    assert dart(keys, text_keys, visual, text, 5, 1, 4) == [0, 1, 2, 3, 4]


def test_scope():
    """Two that are alike cover 2, the third 1; then a copy covers nothing more."""
    features = rows((1, 0), (1, 0), (0, 1))
    assert [scope([1, 1, 1], features, k) for k in (1, 2, 3)] == [[0], [0, 2], [0, 1, 2]]
    assert scope([1, 1, 3], features, 1) == [2]
    assert scope([1, 1, 3], features, 1, alpha=0.5) == [0]  # 2 > sqrt 3.
    # An opposite counts for nothing, not against: all cover 1.
    assert scope([1, 1, 1], rows((1, 0), (-1, 0), (0, 1)), 1) == [0]
    # After FLAT (1 + .8 + .96) the first would add .2, STEEP .04.
    assert scope([1, 1, 1], rows((1, 0), FLAT, STEEP), 2) == [0, 1]


def test_v2drop():
    """L2 5, 6, sqrt 32 (L1 7, 6, 8); a tie of 5 and 5."""
    assert v2drop(rows((1, 1), (1, 1), (1, 1)), rows((4, 5), (1, 7), (5, 5)), 1) == [1]
    assert v2drop(rows((1, 1), (1, 1), (1, 1)), rows((4, 5), (1, 7), (5, 5)), 2) == [1, 2]
    assert v2drop(np.zeros((3, 2)), rows((0, 1), (3, 4), (5, 0)), 1) == [1]


def test_zspaprune():
    """Cosines 1, .8, 0, -1 to the prompt. After 0 and 3 the nearest of 1 is at .2, that of 2 at 1."""
    features, text = rows((1, 0), FLAT, (0, 1), (-1, 0)), rows((1, 0), (3, 0))
    assert zspaprune(features, text, 1, 1) == [0]
    assert zspaprune(features, text, 2, 1) == [0, 3]
    assert zspaprune(features, text, 3, 1) == [0, 2, 3]
    assert zspaprune(features, text, 3, 2) == [0, 1, 3]
    assert zspaprune(features, text, 3, 3) == [0, 1, 2]
    # The mean is of the embeddings, not of their directions.
    assert zspaprune(rows((0, 1), (1, 0)), rows((3, 0), (0, 1)), 1, 1) == [1]
    with pytest.raises(ValueError, match="core: 0"):
        zspaprune(features, text, 2, 0)


def test_holov_budgets():
    """Shares of 3 and 1; 1.8 and 1.2, where the one left goes to the first; 3.67 and .33, where the crop has but 3."""
    assert crop_runs(7, 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert crop_runs(2, 3) == [[0], [1]]
    features = np.random.default_rng(0).normal(size=(6, 4))
    assert holov([0.5, 0.3, 0.1, 0.05, 0.2, 0.05], features, 2, 4) == [0, 1, 2, 4]
    assert holov([0.3, 0.3, 0.2, 0.2], features[:4], 2, 3) == [0, 1, 2]
    assert holov([0.5, 0.4, 0.2, 0.05, 0.03, 0.02], features, 2, 4) == [0, 1, 2, 3]
    assert holov([0.1] * 6, features, 2, 6) == [0, 1, 2, 3, 4, 5]
    assert holov([0.1, 0.4, 0.2], features[:3], 3, 2) == [1, 2]
    with pytest.raises(ValueError, match="budget: 7"):
        holov([0.1] * 6, features, 2, 7)


def test_holov_scores():
    """Of two that are alike and one at a right angle, contexts are .375, .375, 0, scaled to 1.5, 1.5, 0 times mean attention;
    .09 of which makes up for a tenth of attention, not for two."""
    features = rows((1, 0), (1, 0), (0, 1))
    assert holov([0.1, 0.1, 0.11], features, 1, 1) == [2]
    assert holov([0.1, 0.1, 0.11], features, 1, 1, scored=True) == [0]
    assert holov([0.1, 0.1, 0.12], features, 1, 1, scored=True) == [2]
    assert holov([0.1, 0.1, 0.12], features, 1, 1, alpha=0.2, scored=True) == [0]


def test_visionzip():
    """0 and 2 dominate; of 1, 3, 4, 5 every second is a target: 1 and 4. 3 goes to 4, 5 to 1."""
    score = [9, 1, 8, 1, 1, 1]
    keys = rows((0, 0), (1, 0), (0, 0), STEEP, (0, 1), FLAT)
    hidden = rows(0, 10, 20, 30, 40, 50)
    assert visionzip(score, keys, hidden, 2, 2) == ([0, 1, 2, 4], [[0], [10 + 50], [20], [40 + 30]])
    assert visionzip(score, keys, hidden, 2, 2, doubled=False) == ([0, 1, 2, 4], [[0], [30], [20], [35]])
    # On a tie to the first; the other is alone then, and not doubled.
    keys[3] = 1, 1
    assert visionzip(score, keys, hidden, 2, 2) == ([0, 1, 2, 4], [[0], [10 + 40], [20], [40]])
    # 4 // 3 = 1: the first three.
    assert visionzip(score, keys, hidden, 2, 3)[0] == [0, 1, 2, 3, 4]
    assert visionzip(score, keys, hidden, 2, 0) == ([0, 2], [[0], [20]])
    assert visionzip(score, keys, hidden, 3, 0)[0] == [0, 1, 2]


def test_local_scan():
    """The last of each 2 x 2 window; two of them; windows of 2 and 3 columns with 2 each at most; ties."""
    assert local_scan(range(16), (4, 4), 2, 4) == [5, 7, 13, 15]
    assert local_scan(range(16), (4, 4), 2, 2) == [13, 15]
    assert local_scan(range(15), (3, 5), 2, 3) == [11, 13, 14]
    assert local_scan([0] * 15, (3, 5), 2, 3) == [0, 1, 2]
    # A grid smaller than a window is one window.
    assert local_scan(range(4), (2, 2), 6, 3) == [1, 2, 3]


def test_vscan():
    """Windows of one: local takes 1, whole the best of the others, 2. (4, 3) is nearer to (5, 0), (3, 4) to (0, 2)."""
    hidden = rows(FLAT, (0, 2), (5, 0), STEEP)
    assert vscan([0, 5, 1, 1], [1, 9, 3, 2], hidden, (2, 2), 1, 2) == ([1, 2], [[1.5, 3], [4.5, 1.5]])
    # Of an odd budget the smaller half is local.
    assert vscan([4, 5, 1, 1], [1, 9, 3, 3], hidden, (2, 2), 1, 3)[0] == [1, 2, 3]
    assert vscan([0, 5, 1, 1], [1, 9, 3, 2], hidden, (2, 2), 1, 1)[0] == [1]
    assert vscan([9, 5, 1, 1], [9, 1, 3, 2], hidden, (2, 2), 1, 2)[0] == [0, 2]


def test_tome():
    """0 is like 3 by .8, 2 by .96."""
    keys, hidden = rows((1, 0), (0, 1), STEEP, FLAT), rows(0, 1, 2, 3)
    assert tome(keys, hidden, [1, 1, 1, 1], 1) == ([[0], [1], [2.5]], [1, 1, 2], [0, 1, 2, 2])
    assert tome(keys, hidden, [1, 1, 3, 1], 1) == ([[0], [1], [2.25]], [1, 1, 4], [0, 1, 2, 2])
    assert tome(keys, hidden, [1, 1, 1, 1], 2) == ([[1], [5 / 3]], [1, 3], [1, 0, 1, 1])
    assert tome(keys, hidden, [1, 1, 1, 1], 9, protected=1) == ([[0], [1], [2.5]], [1, 1, 2], [0, 1, 2, 2])
    # Token 0 is most like 3 of all, unless it is CLS.
    alike = rows(FLAT, (0, 1), STEEP, FLAT)
    assert tome(alike, hidden, [1, 1, 1, 1], 1)[2] == [2, 0, 1, 2]
    assert tome(alike, hidden, [1, 1, 1, 1], 1, protected=1)[2] == [0, 1, 2, 2]
    assert tome(keys, hidden, [1, 1, 1, 1], 0)[2] == [0, 1, 2, 3]
    # All alike: the first edge, to the first.
    assert tome(np.ones((5, 2)), rows(*range(5)), [1] * 5, 1) == ([[0.5], [2], [3], [4]], [2, 1, 1, 1], [0, 0, 1, 2, 3])
    assert tome(np.ones((1, 2)), rows(7), [4], 1) == ([[7]], [4], [0])


def test_attend():
    """3 : 1 of 0 and 4 is 1; a causal row sees nothing later; merged copies weigh what they weighed."""
    nothing, value = np.zeros((2, 1)), rows(0, 4)
    np.testing.assert_allclose(attend(nothing, nothing, value, 1, False, [3, 1]), [[1], [1]], rtol=1e-15)
    np.testing.assert_allclose(attend(nothing, nothing, value, 1, True, [3, 1]), [[0], [1]], rtol=1e-15)
    np.testing.assert_allclose(attend(nothing[:1], nothing, value, 1, True, [3, 1]), [[1]], rtol=1e-15)
    generator = np.random.default_rng(2)
    query, key, value = (generator.normal(size=(4, 3)) for _ in range(3))
    copies = [0, 0, 0, 1, 2, 2, 3]
    np.testing.assert_allclose(
        attend(query, key, value, 0.7, False, [3, 1, 2, 1]),
        attend(query, key[copies], value[copies], 0.7, False, [1] * 7),
        rtol=1e-12,
    )
    plain = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (query, key, value)), scale=0.7, is_causal=True
    )
    np.testing.assert_allclose(attend(query, key, value, 0.7, True, [1] * 4), plain.numpy(), rtol=1e-12)
