"""Conversations by the book in which attention counts a merged token as often as tokens are in it: stock layers, to whose
masks log sizes are added; tokens are merged, and counted, by plain loops. Shares no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import naive_merges
import numpy as np
import reference_llava as book
import torch
from naive_methods import best, cosine, top
from reference_families import FamilyConversation
from reference_turns import Conversation
from torch import Tensor

NOWHERE = -1  # a layer that no model has


class Entered(NamedTuple):
    """What enters the language model of an image: index, of its candidates, ascending; rows [n, D]; sizes, of how many
    candidates each is made; labels, their clusters, if somebody asks."""

    index: list[int]
    rows: Tensor
    sizes: list[int]
    labels: list[int]


class Weighing:
    """Put before a `Conversation`: `entered` are the sizes of the turn's images by row of each, `sizes` those of all rows by
    layer."""

    def __init__(self, model: Any, *given: Any):
        super().__init__(model, *given)
        self.layers = self.model.model.language_model.layers
        self.sizes: list[list[int]] = [[] for _ in self.layers]
        self.now: list[int] = [1]
        self.entered: list[list[int]] = []

    def _prefill(self, hidden: Tensor, spans: list[list[int]], *given: Any) -> Tensor:
        self.now = [1] * hidden.shape[1]
        for span, sizes in zip(spans, self.entered, strict=True):
            for row, size in zip(span, sizes, strict=True):
                self.now[row] = size
        hidden = super()._prefill(hidden, spans, *given)
        self.now = [1]
        return hidden

    def _layer(self, index: int, hidden: Tensor, positions: list[Any]) -> Tensor:
        assert hidden.shape[1] == len(self.now)
        self.sizes[index] += self.now
        logs = torch.tensor([math.log(size) for size in self.sizes[index]])

        def weigh(_: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, named | {"attention_mask": named["attention_mask"] + logs}

        hook = self.layers[index].register_forward_pre_hook(weigh, with_kwargs=True)
        try:
            return super()._layer(index, hidden, positions)
        finally:
            hook.remove()

    def _choose(
        self, hidden: Tensor, spans: list[list[int]], labels: list[list[int]], index: int
    ) -> tuple[list[list[int]], list[list[Tensor]]]:
        """ViTCoP's two stages, where what merges becomes its mean."""
        norms = self._norms(index, spans, hidden.shape[1])
        chosen, rows, left = [], [], [[size] for size in self.now]
        for span, saliency, of, settings in zip(spans, norms, labels, self.own, strict=True):
            if index == settings.shallow:
                groups = clusters(saliency, of, settings.merged)
            else:
                groups = {i: [i] for i in sorted(sorted(range(len(span)), key=saliency.__getitem__)[: settings.kept])}
            for row in span:
                left[row] = []
            for i, group in groups.items():
                left[span[i]] = [sum(self.now[span[j]] for j in group)]
            chosen.append(list(groups))
            rows.append([hidden[0, [span[j] for j in group]].mean(0) for group in groups.values()])
        self.now = [size for sizes in left for size in sizes]
        return chosen, rows


def clusters(saliency: list[float], labels: list[int], budget: int) -> dict[int, list[int]]:
    """ViTCoP's shallow stage: which tokens become one, by where that stands; read off what becomes of unit vectors."""
    merged, where = book.merge(torch.eye(len(labels)), saliency, labels, budget)
    groups = {}
    for row, i in zip(merged, where, strict=True):
        row[i] -= 1
        groups[i] = row.nonzero().flatten().tolist() or [i]
    return groups


class LlavaWeighing(Weighing, Conversation):
    """see(model, pixels [1, 3, H, W]) -> what enters the language model; every token keeps its position."""

    def __init__(self, model: Any, settings: book.Settings, see: Callable[[Any, Tensor], Entered]):
        super().__init__(model, settings)
        self.see = see
        self.columns: list[int] = []

    def _embed(self, ids: list[int], pixels: Tensor | None) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        embed = self.model.get_input_embeddings()
        parts, spans, labels, self.kept, self.entered, self.columns = [], [], [], [], [], []
        at = 0
        while at < len(ids):
            if ids[at] != self.model.config.image_token_id:
                parts.append(embed(torch.tensor([ids[at]])))
                self.columns.append(at)
                at += 1
                continue
            assert pixels is not None
            found = self.see(self.model, pixels[len(spans)][None])
            spans.append(list(range(len(self.columns), len(self.columns) + len(found.index))))
            self.columns += [at + i for i in found.index]
            parts.append(found.rows)
            labels.append(found.labels or [0] * len(found.index))
            self.kept.append(found.index)
            self.entered.append(found.sizes)
            at += 64
        self.own = [self.settings] * len(spans)
        return torch.cat(parts)[None], spans, labels

    def _positions(self, ids: list[int], rows: int) -> tuple[list[Any], int]:
        return [self.start + column for column in self.columns], self.start + len(ids)


class FamilyWeighing(Weighing, FamilyConversation):
    """pool: (rows, columns) of cells to which every image is pooled behind the projector, None to leave it."""

    def __init__(self, *given: Any, pool: tuple[int, int] | None = None):
        super().__init__(*given)
        self.pool = pool

    def _embed(self, ids: list[int], pixels: Any) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        hidden, spans, labels = super()._embed(ids, pixels)
        self.entered = [[1] * len(span) for span in spans]
        if self.pool is None or not spans:
            return hidden, spans, labels
        parts: list[Tensor] = []
        columns, new, at = [], [], 0
        for number, (span, (_, high, wide)) in enumerate(zip(spans, pixels["image_grid_thw"].tolist(), strict=True)):
            assert span == list(range(span[0], span[0] + high * wide // 4)), "all tokens of an image, one after another"
            index, rows = naive_merges.downsample((high // 2, wide // 2), self.pool, hidden[0, span].numpy())
            # Of a table of ones that is pooled, a mean says nothing: cells are counted along either axis.
            sides = zip((high // 2, wide // 2), self.pool, strict=True)
            down, across = ([-(-(i + 1) * n // m) - i * n // m for i in range(m)] for n, m in sides)
            parts += [hidden[0, at : span[0]], torch.tensor(rows, dtype=hidden.dtype)]
            columns += self.columns[at : span[0]] + [self.columns[span[i]] for i in index]
            new.append(list(range(len(columns) - len(index), len(columns))))
            self.kept[number], self.entered[number] = index, [a * b for a in down for b in across]
            at = span[-1] + 1
        self.columns = columns + self.columns[at:]
        return torch.cat([*parts, hidden[0, at:]])[None], new, labels


# How LLaVA's images enter


def see_vitcop(settings: book.Settings) -> Callable[[Any, Tensor], Entered]:
    def see(model: Any, pixels: Tensor) -> Entered:
        found = book.Result()
        rows = book._see(model, pixels, settings, found)[0]
        return Entered(found.kept, rows, [1] * len(found.kept), found.labels)

    return see


def see_visionzip(dominant: int, contextual: int, layer: int = 2) -> Callable[[Any, Tensor], Entered]:
    def see(model: Any, pixels: Tensor) -> Entered:
        tower = model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for block in tower.encoder.layers[:layer]:
            hidden = block(hidden, None)
        block = tower.encoder.layers[layer]
        normed, heads = block.layer_norm1(hidden)[0], block.self_attn.num_heads
        query, key = block.self_attn.q_proj(normed), block.self_attn.k_proj(normed)
        hidden = block(hidden, None)[0, 1:]
        score = book._cls_attention(query[0], key, heads).tolist()
        keys = key[1:].unflatten(1, (heads, -1)).mean(1).numpy()
        index, rows = naive_merges.visionzip(score, keys, hidden.numpy(), dominant, contextual, doubled=False)
        targets = [i for i in index if i not in top(score, dominant)]
        sizes = dict.fromkeys(index, 1)
        for i in range(len(keys)):
            if i not in sizes:
                sizes[targets[best([cosine(keys[i], keys[target]) for target in targets])]] += 1
        features = model.model.multi_modal_projector(torch.tensor(rows, dtype=hidden.dtype)[None])[0]
        return Entered(index, features, [sizes[i] for i in index], [])

    return see


def see_tome(counts: Sequence[int]) -> Callable[[Any, Tensor], Entered]:
    """counts: tokens behind each block. Blocks behind a merge count by sizes as well."""

    def see(model: Any, pixels: Tensor) -> Entered:
        tower = model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        sizes, index = [1.0] * hidden.shape[1], list(range(hidden.shape[1]))
        for block, count in zip(tower.encoder.layers, counts):
            key = block.self_attn.k_proj(block.layer_norm1(hidden))[0]
            keys = key.unflatten(1, (block.self_attn.num_heads, -1)).mean(1).numpy()
            mask = torch.tensor([[[[math.log(size) for size in sizes]]]]).expand(1, 1, len(sizes), -1)
            hidden = block(hidden, mask)
            rows, sizes, owner = naive_merges.tome(keys, hidden[0].numpy(), sizes, len(sizes) - 1 - count, protected=1)
            hidden = torch.tensor(np.array(rows), dtype=hidden.dtype)[None]
            # Who stays is of odd number, or alone.
            groups = [[i for i, own in enumerate(owner) if own == k] for k in range(len(rows))]
            index = [index[max(group, key=lambda i: i % 2)] for group in groups]
        features = model.model.multi_modal_projector(hidden[:, 1:])[0]
        return Entered([i - 1 for i in index[1:]], features, [round(size) for size in sizes[1:]], [])

    return see
