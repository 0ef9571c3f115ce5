"""The selections of published token reduction methods by the book: plain loops over one image of one sample, for comparison.

float64 throughout. An index is a list of ints, ascending, among the n visual tokens of the image in raster order. On a tie the
lower index goes first, everywhere: where the published code has another order, or none (a `topk` promises none), its function
says so. Sums are correctly rounded, so that what is equal on paper ties. The cosine of anything with a row of zeros is 0.

"Published code" is the authors' repository; where it and the paper differ, the docstring says which is followed. Budgets are
counts known beforehand: how a paper derives them from the data is never part of a selection. Methods that also merge are in
`naive_merges.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np


def dot(a: Iterable[float], b: Iterable[float]) -> float:
    """Correctly rounded."""
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def cosine(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """0 if either is all zeros."""
    length = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / length if length else 0.0


def cosines(rows: np.ndarray, others: np.ndarray) -> list[list[float]]:
    """rows [n, D], others [m, D] -> [n][m]."""
    # As `cosine`, with each length worked out once.
    left, right = rows.tolist(), others.tolist()
    lengths = [math.sqrt(dot(other, other)) for other in right]
    table = []
    for row in left:
        length = math.sqrt(dot(row, row))
        table.append([dot(row, other) / (length * far) if length * far else 0.0 for other, far in zip(right, lengths)])
    return table


def softmax(logits: Sequence[float]) -> list[float]:
    """One row."""
    greatest = max(logits)
    weights = [math.exp(logit - greatest) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def best(values: Sequence[float], among: Iterable[int] | None = None) -> int:
    """The index of the greatest value, the lower index on a tie."""
    return min(range(len(values)) if among is None else among, key=lambda i: (-values[i], i))


def top(values: Sequence[float], budget: int, among: Iterable[int] | None = None) -> list[int]:
    """Indices of the `budget` greatest values, ascending."""
    return sorted(sorted(range(len(values)) if among is None else among, key=lambda i: (-values[i], i))[:budget])


def uniform(grid: tuple[int, int], budget: int) -> list[int]:
    """Every k-th token of the raster, in the middle of its share: floor((i + 1/2) n / budget). A floor, of no paper."""
    n = grid[0] * grid[1]
    return [(2 * i + 1) * n // (2 * budget) for i in range(budget)]


def last_row(query: np.ndarray, keys: np.ndarray, scale: float, last: int, first: int = 0) -> list[list[float]]:
    """What row `last` attends to, of a causal layer whose query heads share key heads in groups (query head h uses key head h
    // (heads / kv_heads)). query [heads, hd], of that row; keys [kv_heads, t, hd], both as the layer multiplies them, that is
    after rotation; first: rows before it are padding -> [heads][t], zero outside first..last."""
    group = len(query) // len(keys)
    rows = []
    for h in range(len(query)):
        seen = softmax([scale * dot(query[h], keys[h // group, t]) for t in range(first, last + 1)])
        rows.append([0.0] * first + seen + [0.0] * (keys.shape[1] - last - 1))
    return rows


def fastv(attention: np.ndarray | Sequence[Sequence[float]], budget: int) -> list[int]:
    """FastV (arXiv 2403.06764, section 4.1): the tokens that the last prompt token attends to most, mean over heads.

    attention [heads, n]: its visual columns, of a softmax over all rows that it may see (`last_row`), of the layer before the
    one at whose entry tokens go (K=2: layer index 1). The paper's text speaks of attention received from all tokens; the
    published code takes the last row alone, and so does this. The code keeps a token's position. Not here: K=0, which
    is a random choice there.
    """
    heads, n = len(attention), len(attention[0])
    return top([math.fsum(float(attention[h][i]) for h in range(heads)) / heads for i in range(n)], budget)


def pyramiddrop(attention: np.ndarray | Sequence[Sequence[float]], budget: int) -> list[int]:
    """PyramidDrop (arXiv 2410.17247, section 3): FastV's score, at the end of each stage, by the last instruction token.

    attention [heads, n of this stage]: the published code computes it with query and key of the layer at whose *entry* tokens
    go, FastV with those of the layer before. The code renumbers positions after each drop. Not here: training.
    """
    return fastv(attention, budget)


def pyramid(tokens: int, layers: int = 32, stages: int = 4, keep: float = 0.5) -> list[tuple[int, int]]:
    """PyramidDrop's schedule: (layer at whose entry tokens go, how many stay), stages - 1 of them. The published settings are
    layers 8, 16, 24 of 32 and a half each; other depths in proportion, rounded down. Counts are int(tokens * keep**s), of the
    original number, as in the published code."""
    return [(layers * s // stages, int(tokens * keep**s)) for s in range(1, stages)]


def raters(hidden: np.ndarray, text_rows: Sequence[int], visual_rows: Sequence[int]) -> list[int]:
    """SparseVLM's text raters (arXiv 2410.04417, section 3.2): rows of text whose relevance to the image, the mean over visual
    tokens of softmax over text of H_v H_q^T (no scale), is at or above the mean relevance.

    hidden [t, D]: what enters the language model. The published code asks for more than the mean, the paper for no less; this
    follows the paper, and so never returns none. As a softmax sums to 1, the mean is 1 / len(text_rows). text_rows are the
    rows after the image in the published code; padding is not text.
    """
    share = [0.0] * len(text_rows)
    for v in visual_rows:
        for i, weight in enumerate(softmax([dot(hidden[v], hidden[q]) for q in text_rows])):
            share[i] += weight / len(visual_rows)
    # 1e-12: equal shares are at the mean, however their sum was rounded.
    return [row for row, part in zip(text_rows, share) if part >= 1 / len(text_rows) - 1e-12]


def sparsevlm(
    query: np.ndarray,
    key: np.ndarray,
    scale: float,
    text_rows: Sequence[int],
    visual_rows: Sequence[int],
    hidden: np.ndarray,
    budget: int,
    first: int = 0,
) -> list[int]:
    """SparseVLM (arXiv 2410.04417, section 3.2 and after): the visual tokens that the raters attend to most, mean over heads
    and raters, of a softmax over all that a rater may see.

    query [heads, t, hd], key [kv_heads, t, hd] after rotation, of the layer after which tokens go; hidden [t, D]: what enters
    the language model (the raters are chosen once, before layer 0); first: rows before it are padding. Not here: the budget of
    a layer by the rank of the attention matrix (the published code has fixed lists, too), and recycling, which clusters 30 %
    of what is pruned into extra tokens. Nor SparseVLM+: attention without rotation, the better half of the heads.
    """
    chosen = raters(hidden, text_rows, visual_rows)
    score = [0.0] * len(visual_rows)
    for row in chosen:
        for weights in last_row(query[:, row], key, scale, row, first):
            for i, v in enumerate(visual_rows):
                score[i] += weights[v] / (len(query) * len(chosen))
    return top(score, budget)


def divprune(features: np.ndarray, budget: int) -> list[int]:
    """DivPrune (arXiv 2503.02175, algorithm 1): greedy max-min diversity on 1 - cosine.

    features [n, D]: what enters the language model. First the token whose nearest other is farthest; then, one by one, the
    token whose nearest chosen one is farthest. Unlike the published code this never takes a token twice: there, once only
    copies of chosen tokens are left, the first of all comes again.
    """
    similar = cosines(features, features)
    n = len(features)
    chosen = [best([min((1 - similar[i][j] for j in range(n) if j != i), default=0.0) for i in range(n)])]
    return sorted(_farthest(similar, chosen, budget))


def _farthest(similar: list[list[float]], chosen: list[int], budget: int) -> list[int]:
    """chosen, and after it, one by one, the token whose nearest chosen one is farthest, in that order."""
    while len(chosen) < budget:
        distance = [min(1 - similar[i][j] for j in chosen) for i in range(len(similar))]
        chosen = [*chosen, best(distance, set(range(len(similar))) - set(chosen))]
    return chosen


def relevance(features: np.ndarray, text: np.ndarray, negative: bool = False) -> list[float]:
    """CDPruner's relevance of a token to the prompt (arXiv 2506.10967, section 3): mean over text of the cosine, scaled to the
    range of the image: (r - min + 1e-6) / (max - min). All ones where every token is as relevant (0 / 0 in the published
    code).

    features [n, D], text [m, D], of one space. For LLaVA the published code has CLIP's own text tower and projection, one row
    for each 77 tokens of prompt, and negates the cosine (negative=True); a language vision model does not contain that tower.
    The variant for models without one compares what the projector gives with the language model's embeddings of the prompt,
    one row a token, and does not negate.
    """
    sign = -1 if negative else 1
    raw = [sign * math.fsum(cosine(row, word) for word in text) / len(text) for row in features]
    low, high = min(raw), max(raw)
    return [(r - low + 1e-6) / (high - low) if high > low else 1.0 for r in raw]


def cdpruner(features: np.ndarray, relevant: Sequence[float], budget: int) -> list[int]:
    """CDPruner (arXiv 2506.10967, section 3): greedy MAP of a determinantal point process whose kernel is
    diag(r) S diag(r), S the cosines of features, r the relevance.

    features [n, D]: what enters the language model. The published code has the incremental Cholesky of Chen et al. (arXiv
    1709.05135); here each candidate's determinant is computed afresh. Once the chosen span all features nothing is gained
    any more: the published code then divides by nothing, this takes the lower index. Near there the choice is noise: keep
    budgets below the rank in tests.
    """
    similar = cosines(features, features)
    n = len(features)
    kernel = [[float(relevant[i]) * similar[i][j] * float(relevant[j]) for j in range(n)] for i in range(n)]
    chosen: list[int] = []
    while len(chosen) < budget:
        volume = []
        for i in range(n):
            rows = [*chosen, i]
            sign, logarithm = np.linalg.slogdet(np.array([[kernel[a][b] for b in rows] for a in rows]))
            volume.append(float(logarithm) if sign > 0 else -math.inf)
        chosen.append(best(volume, set(range(n)) - set(chosen)))
    return sorted(chosen)


def dart(
    visual_keys: np.ndarray,
    text_keys: np.ndarray,
    visual: np.ndarray,
    text: np.ndarray,
    budget: int,
    visual_pivots: int = 4,
    text_pivots: int = 4,
) -> list[int]:
    """DART (arXiv 2502.11494, section 3): a few pivots, and the tokens least like them.

    visual_keys [n, K], text_keys [m, K]: of the layer before the one at whose entry tokens go (K=2: layer index 1), heads
    side by side, as cached, that is after rotation: the norm is L1, to which rotation matters. visual [n, D], text [m, D]: the
    hidden states there (the published code compares them after the model's last norm, of which the paper has nothing;
    the caller decides). Text is what comes after the image.

    Pivots are the visual and the text tokens of greatest norm. The visual pivots stay. Then each pivot in turn takes the
    tokens least like it, by cosine, of those nobody took. Two things are fixed here that the published code leaves to
    chance or to rounding: pivots take turns in the order visual before text, ascending (there it is the order of a Python
    set), and all shares together are exactly what the budget leaves, the first pivots taking one more (there each
    takes int(budget / pivots), beside the visual pivots).
    """
    kept = top([math.fsum(abs(float(x)) for x in row) for row in visual_keys], min(visual_pivots, budget))
    asking = top([math.fsum(abs(float(x)) for x in row) for row in text_keys], text_pivots)
    pivots = [visual[i] for i in kept] + [text[i] for i in asking]
    left = budget - len(kept)
    for turn, pivot in enumerate(pivots):
        share = left // len(pivots) + (1 if turn < left % len(pivots) else 0)
        free = set(range(len(visual))) - set(kept)
        kept = kept + top([-cosine(pivot, row) for row in visual], share, free)
    return sorted(kept)


def scope(saliency: Sequence[float], features: np.ndarray, budget: int, alpha: float = 1.0) -> list[int]:
    """SCOPE (arXiv 2510.24214): greedily the token of greatest coverage gain times saliency**alpha.

    saliency [n]: attention of CLS, summed over heads, of the last layer but one; features [n, D]: what leaves that layer. The
    coverage of a token is its greatest cosine to a chosen one, at first 0; the gain of a candidate is the sum over all tokens
    of what it would add, never less than 0. CLS is not among the tokens kept.
    """
    similar = cosines(features, features)
    n = len(features)
    covered = [0.0] * n
    chosen: list[int] = []
    while len(chosen) < budget:
        gain = [
            math.fsum(max(0.0, similar[i][j] - covered[i]) for i in range(n)) * float(saliency[j]) ** alpha for j in range(n)
        ]
        chosen.append(best(gain, set(range(n)) - set(chosen)))
        covered = [max(covered[i], similar[i][chosen[-1]]) for i in range(n)]
    return sorted(chosen)


def v2drop(before: np.ndarray, after: np.ndarray, budget: int) -> list[int]:
    """V2Drop (arXiv 2509.01552): the tokens that a layer changed most, by the L2 norm of the difference.

    before, after [n, D]: what enters the layer before the one at whose entry tokens go, and what leaves it.
    """
    return top([math.sqrt(math.fsum((float(b) - float(a)) ** 2 for a, b in zip(x, y))) for x, y in zip(before, after)], budget)


def zspaprune(features: np.ndarray, text: np.ndarray, budget: int, core: int) -> list[int]:
    """ZSPAPrune (arXiv 2510.17197): `core` tokens most like the mean of the prompt's embeddings (Eq. 4), by cosine; then, one
    by one, the token least like those chosen, that is whose nearest chosen one is farthest.

    features [n, D], text [m, D]: what enters the language model. The share of the core is set for each task there. No code was
    published; that the distance to *all* chosen ones is the one to the nearest is this reading of the paper.
    """
    prompt = [math.fsum(float(word[c]) for word in text) / len(text) for c in range(text.shape[1])]
    chosen = top([cosine(row, prompt) for row in features], core)
    if not chosen:
        raise ValueError("core: 0; at least 1 token, from which the others keep away.")
    return sorted(_farthest(cosines(features, features), chosen, budget))


def holov(
    attention: Sequence[float], features: np.ndarray, crops: int, budget: int, alpha: float = 0.09, scored: bool = False
) -> list[int]:
    """HoloV (arXiv 2510.02912): a budget for each crop by its mean score, and in it the tokens of most attention.

    attention [n]: of CLS, mean over heads; features [n, D]: what leaves the projector. As in the published code
      - crops are runs of the raster, the first n % crops of them a token longer;
      - a token's context is the variance of its cosines to the others of its crop, in which its own counts as 0;
      - its score is attention * 1e3 + alpha * context, where contexts are first scaled to the crop's mean attention;
      - a crop's share is floor(budget * score / sum of scores), what is left going to the crops of most score, one each;
      - within a crop attention alone decides, not the score. scored=True: the score does.
    By the third of these the mean score is (1 + alpha) times the mean attention unless all contexts are about 0: without
    `scored` features decide next to nothing.

    There a crop of fewer tokens than its share leaves the rest of it as zeros; here it goes to the other crops, one each in
    the order of score, over again until nothing is left: the number kept is the budget. A crop of one token has no context;
    its attention is scaled as everybody's (not so in the code).
    """
    if budget > len(features):
        raise ValueError(f"budget: {budget}; at most the {len(features)} tokens there are.")
    groups = crop_runs(len(features), crops)
    score: dict[int, float] = {}
    means = []
    for group in groups:
        values = _crop_scores(attention, features, group, alpha)
        score.update(zip(group, values))
        means.append(math.fsum(values) / len(group))
    total = math.fsum(means) + 1e-6
    quota = [min(len(group), math.floor(mean / total * budget)) for group, mean in zip(groups, means)]
    left = budget - sum(quota)
    while left:
        for c in sorted(range(len(groups)), key=lambda c: (-means[c], c)):
            if left and quota[c] < len(groups[c]):
                quota[c] += 1
                left -= 1
    ranked = [score[i] if scored else float(attention[i]) for i in range(len(features))]
    return sorted(i for group, share in zip(groups, quota) for i in top(ranked, share, group))


def crop_runs(n: int, crops: int) -> list[list[int]]:
    """HoloV's crops of n tokens, the empty ones left out."""
    runs, start = [], 0
    for c in range(crops):
        size = n // crops + (1 if c < n % crops else 0)
        runs.append(list(range(start, start + size)))
        start += size
    return [run for run in runs if run]


def _crop_scores(attention: Sequence[float], features: np.ndarray, group: Sequence[int], alpha: float) -> list[float]:
    seen = [1e3 * float(attention[i]) for i in group]
    if len(group) == 1:
        return seen
    unit = [[float(x) / (math.sqrt(dot(features[i], features[i])) + 1e-6) for x in features[i]] for i in group]
    context = []
    for i in range(len(group)):
        row = [0.0 if i == j else dot(unit[i], unit[j]) for j in range(len(group))]
        mean = math.fsum(row) / (len(group) - 1)
        context.append(math.fsum((s - mean) ** 2 for s in row) / (len(group) - 1))
    factor = math.fsum(seen) / len(group) / (math.fsum(context) / len(group) + 1e-6)
    return [a + alpha * factor * v for a, v in zip(seen, context)]
