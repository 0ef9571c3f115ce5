"""ViTCoP by the book: one prompt, eager, stock transformers modules called layer by layer, plain loops elsewhere.

Written from the description of the method alone; shares no code with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration

PRESETS = {"1/3": (0.5, 0.18, 0.3333), "2/9": (0.4, 0.15, 0.2222), "1/9": (0.3, 0.12, 0.1111)}


@dataclass(frozen=True)
class Settings:
    """Counts and layers of one pruned model; layers are 0-based, `vision` is the scoring layer of the encoder."""

    n: int
    centers: int
    merged: int
    kept: int
    vision: int
    shallow: int
    deep: int
    positions: str = "published"
    density_width: float = 8.0
    reach: float = 0.6


@dataclass
class Result:
    """Tokens fed or chosen, logits of every step, the patches that left each stage, and the KV cache per layer."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    stages: list[list[int]] = field(default_factory=list)
    cache: DynamicCache | None = None
    scores: Tensor | None = None
    saliency: list[Tensor] = field(default_factory=list)


def preset(name: str, patches: int, layers: int, shallow: int, deep: int, vision: int, **others) -> Settings:
    """The published formulas, with 32 replaced by the number of layers."""
    v, p, r = PRESETS[name]
    n = int(v * patches)
    merged = round((layers * r / v - shallow) / (deep - shallow + (layers - deep) / 5) * n)
    return Settings(n, max(1, int(p * n)), merged, round(merged / 5), vision, shallow, deep, **others)


@torch.no_grad()
def run(
    model: LlavaForConditionalGeneration,
    ids: Tensor,
    pixels: Tensor,
    settings: Settings,
    steps: int,
    pick: Callable[[Tensor, int], int] | None = None,
) -> Result:
    """Prefill of ids [1, T] and `steps` tokens, each chosen by pick(logits [vocab], step): greedy by default."""
    pick = pick or (lambda logits, step: int(logits.argmax()))
    result = Result()
    features = _see(model, pixels, settings, result)
    image = (ids[0] == model.config.image_token_id).nonzero().flatten().tolist()
    first, last = image[0], image[-1]
    embed = model.get_input_embeddings()
    hidden = torch.cat((embed(ids[:, :first]), features, embed(ids[:, last + 1 :])), 1)
    start = hidden.shape[1]

    cache = result.cache = DynamicCache()
    hidden = _prefill(model, hidden, first, settings, cache, result)
    for step in range(steps):
        logits = model.lm_head(model.model.language_model.norm(hidden[:, -1]))[0]
        result.logits.append(logits)
        result.tokens.append(pick(logits, step))
        if step + 1 < steps:
            hidden = embed(torch.tensor([[result.tokens[-1]]]))
            for index in range(len(model.model.language_model.layers)):
                hidden = _layer(model, index, hidden, torch.tensor([[start + step]]), cache)
    return result


def _see(model, pixels: Tensor, settings: Settings, result: Result) -> Tensor:
    """Projected features [1, n, D] of the kept patches."""
    tower = model.model.vision_tower
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    layers = tower.encoder.layers
    feature = model.config.vision_feature_layer
    for index in range(feature + len(layers) + 1 if feature < 0 else feature):
        layer = layers[index]
        if index == settings.vision:
            normed = layer.layer_norm1(hidden)
            query, key = layer.self_attn.q_proj(normed)[0], layer.self_attn.k_proj(normed)[0]
        hidden = layer(hidden, None)
        if index == settings.vision:
            result.scores = _cls_attention(query[0], key, layer.self_attn.num_heads)
            ranked = sorted(range(side * side), key=lambda patch: -result.scores[patch].item())
            result.kept = sorted(ranked[: settings.n])
            result.labels = cluster(
                key[1:][result.kept].float(),
                [(patch // side / side, patch % side / side) for patch in result.kept],
                settings.centers,
                settings.density_width,
                settings.reach,
            )
            hidden = torch.cat((hidden[:, :1], hidden[:, 1:][:, result.kept]), 1)
    return model.model.multi_modal_projector(hidden[:, 1:])


def _cls_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Softmax attention of one query [C] over keys [1 + patches, C], summed over heads, patches only."""
    width = key.shape[1] // heads
    total = torch.zeros(key.shape[0] - 1)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        total += torch.softmax(key[:, part] @ query[part] / math.sqrt(width), 0)[1:]
    return total


def cluster(
    features: Tensor, places: list[tuple[float, float]], centers: int, density_width: float, reach: float
) -> list[int]:
    """Density peaks among spatial neighbours; -1 for points whose chain never reaches a center."""
    n = len(places)
    distance = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            if i != j:
                distance[i][j] = math.sqrt(float(((features[i] - features[j]) ** 2).sum()) + 1e-8)
    rho = [sum(math.exp(-((d / density_width) ** 2)) for d in row) for row in distance]
    delta, nearest = [math.inf] * n, [0] * n
    for i in range(n):
        for j in range(n):
            if j != i and rho[j] >= rho[i] and math.dist(places[i], places[j]) <= reach and distance[i][j] < delta[i]:
                delta[i], nearest[i] = distance[i][j], j
    ranked = sorted(range(n), key=lambda i: -delta[i] * rho[i])
    labels = [-1] * n
    for label, center in enumerate(ranked[:centers]):
        labels[center] = label
    peaks, before = set(ranked[:centers]), None
    while before != labels:
        before = list(labels)
        labels = [labels[i] if i in peaks else before[nearest[i]] for i in range(n)]
    return labels


def merge(hidden: Tensor, saliency: list[float], labels: list[int], budget: int) -> tuple[Tensor, list[int]]:
    """(rows [budget, D], where each sits): hidden [n, D] merged cluster by cluster."""
    clusters: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        clusters.setdefault(label, []).append(i)
    total = {label: sum(saliency[i] for i in members) for label, members in clusters.items()}
    ascending = sorted(clusters, key=total.__getitem__)
    n, count = len(labels), len(clusters)
    plain, groups = [], []
    if count > budget:
        groups = [clusters[label] for label in ascending[: budget - 1]]
        groups.append(sorted(i for label in ascending[budget - 1 :] for i in clusters[label]))
    else:
        quota = {}
        for label, members in clusters.items():
            share = np.float32(len(members) - 1) / np.float32(max(n - count, 1)) * np.float32(budget - count)
            quota[label] = min(int(np.round(share)), len(members) - 1)
        difference = budget - count - sum(quota.values())
        for label in ascending if difference > 0 else reversed(ascending):
            if difference > 0 and quota[label] < len(clusters[label]) - 1:
                quota[label], difference = quota[label] + 1, difference - 1
            elif difference < 0 and quota[label] > 0:
                quota[label], difference = quota[label] - 1, difference + 1
        for label, members in clusters.items():
            ranked = sorted(members, key=lambda i: saliency[i])
            plain += ranked[: quota[label]]
            groups.append(sorted(ranked[quota[label] :]))
    rows = {i: hidden[i] for i in plain}
    for group in groups:
        middle = group[len(group) // 2]
        rows[middle] = hidden[middle] + hidden[group].mean(0)
    where = sorted(rows)
    return torch.stack([rows[i] for i in where]), where


def _prefill(model, hidden: Tensor, first: int, settings: Settings, cache: DynamicCache, result: Result) -> Tensor:
    """Hidden state [1, t, D] that leaves the last layer; `first` is the first visual row."""
    positions = list(range(hidden.shape[1]))
    patches, labels = result.kept, result.labels
    for index in range(len(model.model.language_model.layers)):
        if index in (settings.shallow, settings.deep):
            rows = slice(first, first + len(patches))
            key = cache.layers[index - 1].keys[0, :, rows]
            saliency = key.mean(0).norm(dim=-1)
            result.saliency.append(saliency)
            values = saliency.tolist()
            visual = hidden[0, rows]
            if index == settings.shallow:
                visual, where = merge(visual, values, labels, settings.merged)
            else:
                where = sorted(sorted(range(len(values)), key=values.__getitem__)[: settings.kept])
                visual = visual[where]
            hidden = torch.cat((hidden[:, :first], visual[None], hidden[:, rows.stop :]), 1)
            if index == settings.deep and settings.positions == "published":
                positions = list(range(len(positions)))
            positions = positions[:first] + [positions[first + i] for i in where] + positions[rows.stop :]
            patches, labels = [patches[i] for i in where], [labels[i] for i in where]
            result.stages.append(patches)
        hidden = _layer(model, index, hidden, torch.tensor([positions]), cache)
    return hidden


def _layer(model, index: int, hidden: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """One stock decoder layer: rows of `hidden` see the cache and, causally, each other."""
    decoder = model.model.language_model
    seen, new = cache.get_seq_length(index), hidden.shape[1]
    mask = torch.full((new, seen + new), -torch.inf, dtype=hidden.dtype).triu(seen + 1)
    return decoder.layers[index](
        hidden,
        attention_mask=mask[None, None],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        position_embeddings=decoder.rotary_emb(hidden, position_ids=positions),
    )
