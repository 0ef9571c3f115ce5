"""Conversations by the book with methods: stock layers one by one, in plain PyTorch, pruned by the selections of references.

On top of `reference_turns` and `reference_families`; shares no code with the package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import reference_families
import torch
from reference_families import Book, FamilyConversation
from reference_llava import Settings
from reference_methods import Image, OfImage, OfRows, Rows
from reference_turns import Conversation
from torch import Tensor
from transformers import AttentionInterface

_ROWS: list[tuple[Tensor, Tensor, float]] = []


def _remembering(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **more: Any
) -> Any:
    """Causal attention spelled out, whose query heads share key heads in groups."""
    _ROWS.append((query[0], key[0], scaling))
    shared = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    weights = torch.softmax(query @ keys.transpose(-1, -2) * scaling + attention_mask, -1)
    return (weights @ values).transpose(1, 2), None


AttentionInterface.register("rows_by_the_book", _remembering)

# What stays of an image of so many candidates.
Count = Callable[[int], int]


@dataclass(frozen=True)
class Plan:
    """What is pruned where, each with what stays. encoder: behind these of its layers; entry: behind the projector; decoder:
    at the entry of these layers; scored, early: layers of the encoder whose scores are told."""

    encoder: dict[int, tuple[OfImage, Count]] = field(default_factory=dict)
    entry: tuple[OfImage, Count] | None = None
    decoder: dict[int, tuple[OfRows, Count]] = field(default_factory=dict)
    scored: int = 2
    early: int = 1


def doubles(values: Tensor) -> np.ndarray:
    return values.detach().double().numpy()


class MethodTurns(Conversation):
    """`kept` is what of each image of the last turn enters the decoder, `stages` what leaves each of its stages."""

    plan: Plan
    columns: list[int]
    candidates: list[int]

    def _embed(self, ids: list[int], pixels: Any) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        config, embed = self.model.config, self.model.get_input_embeddings()
        tokens = {config.image_token_id, getattr(config, "video_token_id", None)}
        images = self._images(pixels) if pixels is not None else iter(())
        parts: list[Tensor] = []
        spans: list[list[int]] = []
        self.kept, self.columns, self.candidates = [], [], []
        at = 0
        while at < len(ids):
            if ids[at] not in tokens:
                parts.append(embed(torch.tensor([ids[at]])))
                self.columns.append(at)
                at += 1
                continue
            features, kept, count = next(images)
            spans.append(list(range(len(self.columns), len(self.columns) + len(kept))))
            parts.append(features)
            self.columns += [at + i for i in kept]
            self.kept.append(kept)
            self.candidates.append(count)
            at += count
        assert next(images, None) is None
        return torch.cat(parts)[None], spans, []

    def _images(self, pixels: Any) -> Iterator[tuple[Tensor, list[int], int]]:
        """Of each image: features [k, D] of what enters the decoder, which of its tokens that is, and how many there are."""
        raise NotImplementedError

    def _entering(self, features: Tensor, image: Callable[[np.ndarray], Image], kept: list[int]) -> tuple[Tensor, list[int]]:
        if self.plan.entry is None:
            return features, kept
        ask, count = self.plan.entry
        told = ask(image(doubles(features)), count(len(features)))
        rows = features[told.index] if told.rows is None else torch.tensor(told.rows, dtype=features.dtype)
        return rows, [kept[i] for i in told.index]

    def _prefill(self, hidden: Tensor, spans: list[list[int]], labels: Any, positions: list[Any]) -> Tensor:
        entry, before = hidden, hidden
        patches, self.stages = [list(kept) for kept in self.kept], []
        for index in range(len(self.model.model.language_model.layers)):
            if spans and index in self.plan.decoder:
                (ask, count), rows = self.plan.decoder[index], self._rows(hidden, entry, before, spans)
                chosen = [ask(rows, span, count(n)) for span, n in zip(spans, self.candidates, strict=True)]
                stay = [{span[i] for i in own} for span, own in zip(spans, chosen, strict=True)]
                gone = {row for span in spans for row in span} - set.union(*stay)
                keep = [row for row in range(hidden.shape[1]) if row not in gone]
                spans = [[at for at, row in enumerate(keep) if row in own] for own in stay]
                hidden, entry, positions = hidden[:, keep], entry[:, keep], [positions[row] for row in keep]
                patches = [[of[i] for i in own] for of, own in zip(patches, chosen, strict=True)]
                self.stages.append(patches)
            before, hidden = hidden, self._layer(index, hidden, positions)
        return hidden

    def _rows(self, hidden: Tensor, entry: Tensor, before: Tensor, spans: list[list[int]]) -> Rows:
        rows = hidden.shape[1]
        query, key, scale = _ROWS[-1] if _ROWS else (torch.zeros(1, 0, 1), torch.zeros(1, 0, 1), 1.0)
        arrays = map(doubles, (hidden[0], entry[0], before[0], query, key[:, key.shape[1] - rows :]))
        return Rows(*arrays, scale, list(range(spans[-1][-1] + 1, rows)), rows - 1)

    def _layer(self, index: int, hidden: Tensor, positions: list[Any]) -> Tensor:
        config = self.model.model.language_model.layers[index].self_attn.config
        name = config._attn_implementation
        _ROWS.clear()
        try:
            config._attn_implementation = "rows_by_the_book"
            return super()._layer(index, hidden, positions)
        finally:
            config._attn_implementation = name


class LlavaTurns(MethodTurns):
    """An encoder with a CLS token, layer by layer."""

    def __init__(self, model: Any, plan: Plan):
        super().__init__(model, None)  # type: ignore[arg-type]
        self.plan = plan

    def _images(self, pixels: Tensor) -> Iterator[tuple[Tensor, list[int], int]]:
        for image in pixels:
            yield self._see(image[None])

    def _see(self, pixels: Tensor) -> tuple[Tensor, list[int], int]:
        tower, config = self.model.model.vision_tower, self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        feature, sizes, kept = config.vision_feature_layer, [1] * side**2, list(range(side**2))
        scores: dict[int, list[float]] = {}
        keys: dict[int, np.ndarray] = {}
        for index in range(feature + len(tower.encoder.layers) + 1):
            layer = tower.encoder.layers[index]
            normed, heads = layer.layer_norm1(hidden)[0], layer.self_attn.num_heads
            query, key = (proj(normed).unflatten(-1, (heads, -1)) for proj in (layer.self_attn.q_proj, layer.self_attn.k_proj))
            logits = torch.einsum("hd,thd->ht", query[0], key) / key.shape[-1] ** 0.5
            scores[index], keys[index] = torch.softmax(logits, -1)[:, 1:].sum(0).tolist(), doubles(key)
            hidden = layer(hidden, None)
            if index in self.plan.encoder:
                ask, count = self.plan.encoder[index]
                early = scores.get(self.plan.early, [])
                image = Image((side, side), doubles(hidden[0, 1:]), scores[index], early, keys[index], sizes)
                told = ask(image, count(side**2))
                kept, sizes = [kept[i] for i in told.index], told.sizes or [1] * len(told.index)
                rows = hidden[0, 1:][told.index] if told.rows is None else torch.tensor(told.rows, dtype=hidden.dtype)
                hidden = torch.cat((hidden[:, :1], rows[None]), 1)
        features = self.model.model.multi_modal_projector(hidden[:, 1:])[0]

        def image_of(rows: np.ndarray) -> Image:
            scored, early = self.plan.scored, self.plan.early
            return Image((side, side), rows, scores[scored], scores[early], keys[scored])

        return *self._entering(features, image_of, kept), side**2


class FamilyTurns(MethodTurns, FamilyConversation):
    """A family whose tokens are put together behind its encoder, several patches each, which no CLS token is told of; heads:
    of the encoder; whole: its layers in which patches attend to their whole image."""

    def __init__(self, model: Any, about: Book, plan: Plan, heads: int, whole: tuple[int, ...]):
        FamilyConversation.__init__(self, model, about, lambda _: Settings(1, 1, 1, 1, plan.scored, 1, 2))
        self.plan, self.heads, self.whole = plan, heads, whole

    def _images(self, given: dict[str, Any]) -> Iterator[tuple[Tensor, list[int], int]]:
        self.given, about, inputs = given, self.about, []
        layers = about.layers(self.stock)
        with reference_families._remembered(self.stock), reference_families._inputs_of(layers[self.plan.scored], inputs):
            features = about.features(self.stock, given)
            seen = list(reference_families._SEEN)

        def scores(layer: int) -> Iterator[list[float]]:
            own = [(query, key) for module, query, key in seen if module is layers[layer]]
            return iter([reference_families._received(query[i], key[i], 0) for query, key in own for i in range(len(query))])

        late = scores(self.plan.scored)
        early = scores(self.plan.early) if self.plan.early in self.whole else itertools.repeat([])
        keys = torch.cat([about.keys(layers[self.plan.scored], x).flatten(0, -2) for x in inputs])
        first = 0
        for rows, (high, wide) in zip(features, about.grids(self.stock, given), strict=True):
            groups = about.tokens(self.stock, (high, wide))
            own = keys[first : first + high * wide]
            first += high * wide
            scores_of = (next(late), next(early))
            means = [[sum(score[i] for i in group) / 4 for group in groups] if score else [] for score in scores_of]
            heads = doubles(torch.stack([own[group].mean(0) for group in groups]).unflatten(-1, (self.heads, -1)))

            def image_of(
                values: np.ndarray, means: list = means, heads: np.ndarray = heads, grid: tuple = (high // 2, wide // 2)
            ) -> Image:
                return Image(grid, values, *means, heads)

            yield *self._entering(rows, image_of, list(range(len(rows)))), len(rows)

    def _embed(self, ids: list[int], pixels: Any) -> Any:
        self.given, self.added = pixels or {}, []
        return MethodTurns._embed(self, ids, pixels)

    def _prefill(self, *given: Any) -> Tensor:
        return MethodTurns._prefill(self, *given)
