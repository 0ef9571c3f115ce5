"""The operations and formulas of ViTCoP by the book: plain loops over one sample, for comparison.

Arrays in, lists and floats out, float64 except where the rounding of fp32 is part of the method.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


def cls_saliency(query: np.ndarray, key: np.ndarray, scale: float, prefix: int = 1) -> list[float]:
    """query, key [heads, tokens, head_dim] -> attention of row 0 to every patch, summed over heads."""
    heads, tokens, width = key.shape
    scores = [0.0] * (tokens - prefix)
    for h in range(heads):
        logits = [scale * sum(float(query[h, 0, c]) * float(key[h, t, c]) for c in range(width)) for t in range(tokens)]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        for patch in range(tokens - prefix):
            scores[patch] += weights[prefix + patch] / math.fsum(weights)
    return scores


def key_norm(key: np.ndarray) -> list[float]:
    """key [kv_heads, n, head_dim] -> norm of the mean over heads."""
    heads, n, width = key.shape
    return [
        math.sqrt(sum((sum(float(key[h, i, c]) for h in range(heads)) / heads) ** 2 for c in range(width))) for i in range(n)
    ]


def keep_lowest(saliency: Sequence[float], budget: int) -> list[int]:
    """Indices of the `budget` least values, ascending; ties go to the lower index."""
    return sorted(sorted(range(len(saliency)), key=lambda i: (saliency[i], i))[:budget])


class Peaks(NamedTuple):
    """Labels and what led to them. margin: least relative gap between two different values that were ranked."""

    labels: list[int]
    rho: list[float]
    delta: list[float]
    nearest: list[int]
    margin: float


def density_peaks(
    features: np.ndarray, positions: np.ndarray | None, centers: int, density_width: float, reach: float
) -> Peaks:
    """features [n, d], positions [n, 2] or None."""
    features = features.astype(np.float64)
    n = len(features)
    distance = [
        [0.0 if i == j else math.sqrt(float(((features[i] - features[j]) ** 2).sum()) + 1e-8) for j in range(n)]
        for i in range(n)
    ]
    rho = [math.fsum(math.exp(-((d / density_width) ** 2)) for d in row) for row in distance]
    delta, nearest, margin = [], [], _gap(rho)
    for i in range(n):
        candidates = [j for j in range(n) if j != i and rho[j] >= rho[i]]
        if positions is not None:
            candidates = [j for j in candidates if math.dist(positions[i], positions[j]) <= reach]
        delta.append(min((distance[i][j] for j in candidates), default=math.inf))
        nearest.append(next((j for j in candidates if distance[i][j] == delta[i]), 0))
        margin = min(margin, _gap([distance[i][j] for j in candidates]))
    gamma = [a * b for a, b in zip(delta, rho)]
    margin = min(margin, _gap(gamma))

    labels = [-1] * n
    for label, peak in enumerate(sorted(range(n), key=lambda i: (-gamma[i], i))[:centers]):
        labels[peak] = label
    changed = True
    while changed:
        changed = False
        for i in range(n):
            if labels[i] == -1 and labels[nearest[i]] != -1:
                labels[i] = labels[nearest[i]]
                changed = True
    return Peaks(labels, rho, delta, nearest, margin)


def _gap(values: Sequence[float]) -> float:
    ranked = sorted({value for value in values if math.isfinite(value)})
    return min(((b - a) / b for a, b in itertools.pairwise(ranked)), default=math.inf)


class Clusters(NamedTuple):
    """Clusters in the order of least summed saliency: members, ascending, and the quota each keeps."""

    members: list[list[int]]
    quotas: list[int]


def quotas(saliency: Sequence[float], labels: Sequence[int], budget: int) -> Clusters:
    """How many tokens each cluster keeps as they are, when there are no more clusters than budget."""
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    ranked = sorted(members.values(), key=lambda group: (math.fsum(float(saliency[i]) for i in group), group[0]))
    n, count = len(labels), len(ranked)
    if count > budget or n == count:
        return Clusters(ranked, [0] * count)
    quota = []
    for group in ranked:
        share = np.float32(len(group) - 1) / np.float32(n - count) * np.float32(budget - count)
        quota.append(min(int(np.rint(share)), len(group) - 1))
    difference = budget - count - sum(quota)
    order = list(range(count))
    if difference < 0:
        # Descending by saliency; on a tie the cluster that starts first goes first here as well.
        order.sort(key=lambda c: (-math.fsum(float(saliency[i]) for i in ranked[c]), ranked[c][0]))
    for c in order:
        if difference > 0 and quota[c] < len(ranked[c]) - 1:
            quota[c] += 1
            difference -= 1
        elif difference < 0 and quota[c] > 0:
            quota[c] -= 1
            difference += 1
    return Clusters(ranked, quota)


def merge_by_cluster(
    hidden: np.ndarray, saliency: Sequence[float], labels: Sequence[int], budget: int
) -> tuple[np.ndarray, list[int]]:
    """hidden [n, D] -> (rows [budget, D], where each sits)."""
    clusters = quotas(saliency, labels, budget)
    rows: dict[int, np.ndarray] = {}
    groups = []
    if len(clusters.members) > budget:
        groups = clusters.members[: budget - 1]
        groups.append(sorted(i for group in clusters.members[budget - 1 :] for i in group))
    else:
        for group, quota in zip(clusters.members, clusters.quotas):
            ranked = sorted(group, key=lambda i: (saliency[i], i))
            for i in ranked[:quota]:
                rows[i] = hidden[i].astype(np.float64)
            groups.append(sorted(ranked[quota:]))
    for group in groups:
        middle = group[len(group) // 2]
        total = np.zeros(hidden.shape[1])
        for i in group:
            total += hidden[i]
        rows[middle] = hidden[middle] + total / len(group)
    return np.stack([rows[i] for i in sorted(rows)]), sorted(rows)


def budgets(retention: float, vision: float, shallow: int, deep: int, layers: int, n: int, divisor: float = 5):
    """(R, RD) of the published formula."""
    share = (layers * retention / vision - shallow) / (deep - shallow + (layers - deep) / divisor)
    merged = round(share * n)
    return merged, round(merged / divisor)


def decoder_layer_flops(tokens: int, hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> int:
    """One decoder layer, counted multiply-add by multiply-add over tokens; causal attention, gated MLP."""
    count = 0
    for token in range(tokens):
        count += hidden * heads * head_dim  # query
        count += 2 * hidden * kv_heads * head_dim  # key, value
        for _ in range(token + 1):
            count += 2 * heads * head_dim  # a logit, and a row of values weighed
        count += heads * head_dim * hidden  # output
        count += 2 * hidden * intermediate + intermediate * hidden  # gate, up, down
    return 2 * count


def encoder_layer_flops(tokens: int, width: int, intermediate: int) -> int:
    """One encoder layer: full attention over `width`, plain MLP."""
    count = 0
    for _ in range(tokens):
        count += 4 * width * width  # query, key, value, output
        for _ in range(tokens):
            count += 2 * width
        count += width * intermediate + intermediate * width
    return 2 * count
