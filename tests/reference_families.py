"""A conversation by the book with any stock model whose image tokens are put together behind its encoder; shares no code with
the package.

The stock encoder runs as it is, on attention spelled out that remembers its queries and keys; the stock decoder's layers run
one by one. What a family needs besides is a `Book`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import reference_llava as book
import torch
from reference_turns import Conversation
from torch import Tensor
from transformers import AttentionInterface

_SEEN: list[tuple[Any, Tensor, Tensor]] = []


def _remembering(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> Any:
    """Attention spelled out; the encoders have no mask but the segments that they cut themselves."""
    assert attention_mask is None
    _SEEN.append((module, query, key))
    scale = more.get("scaling") or query.shape[-1] ** -0.5
    weights = torch.softmax(query @ key.transpose(-1, -2) * scale, -1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("by_the_book", _remembering)


@dataclass(frozen=True)
class Book:
    """What the reference must know of a family.

    features(model, given) -> [tokens, D] of each segment, by the stock model; layers(model) -> the attention modules of the
    encoder, in order; keys(module, its input) -> the keys [rows, K] of these rows before rotation; tokens(model, grid) -> by
    token of a segment the rows of its frame that it is made of; grids(given) -> (rows, columns) of every segment in patches;
    cls: rows before the patches; norms: "rotated", "raw" or "centered"; three: whether positions have three coordinates.
    """

    features: Callable[[Any, dict[str, Any]], list[Tensor]]
    layers: Callable[[Any], list[Any]]
    keys: Callable[[Any, Tensor], Tensor]
    tokens: Callable[[Any, tuple[int, int]], list[list[int]]]
    grids: Callable[[Any, dict[str, Any]], list[tuple[int, int]]]
    merge: int = 2
    cls: int = 0
    norms: str = "rotated"
    three: bool = False


class FamilyConversation(Conversation):
    """settings_of(candidates) -> Settings of a segment with so many. `turn` takes what the processor gave as its pixels."""

    def __init__(self, model: Any, about: Book, settings_of: Callable[[int], book.Settings], pooled: bool = False):
        super().__init__(model, settings_of(1000), pooled)
        self.about, self.settings_of = about, settings_of
        self.columns: list[int] = []  # of the prompt, by row
        self.candidates: list[int] = []  # of each segment of the turn
        self.given: dict[str, Any] = {}

    def _embed(self, ids: list[int], pixels: Any) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        config, embed = self.model.config, self.model.get_input_embeddings()
        tokens = {config.image_token_id, getattr(config, "video_token_id", None)}
        parts, spans, labels = [], [], []
        self.kept, self.own, self.columns, self.candidates, self.given = [], [], [], [], pixels or {}
        seen = iter(self._see(pixels) if pixels is not None else ())
        at = rows = 0
        while at < len(ids):
            if ids[at] not in tokens:
                parts.append(embed(torch.tensor([[ids[at]]])))
                self.columns.append(at)
                at, rows = at + 1, rows + 1
                continue
            features, keys, scores, (high, wide) = next(seen)
            assert all(entry == ids[at] for entry in ids[at : at + len(scores)])
            settings = self.settings_of(len(scores))
            kept = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[: settings.n])
            places = [(i // wide / max(high, wide), i % wide / max(high, wide)) for i in kept]
            labels.append(book.cluster(keys[kept], places, settings.centers, settings.density_width, settings.reach))
            self.kept.append(kept)
            self.own.append(settings)
            self.candidates.append(len(scores))
            parts.append(features[kept][None])
            spans.append(list(range(rows, rows + len(kept))))
            self.columns += [at + i for i in kept]
            at, rows = at + len(scores), rows + len(kept)
        assert next(seen, None) is None
        return torch.cat(parts, 1), spans, labels

    def _see(self, given: dict[str, Any]) -> list[tuple[Tensor, Tensor, list[float], tuple[int, int]]]:
        """By segment: features [tokens, D], keys [tokens, K], scores, (rows, columns) of tokens."""
        about, side = self.about, self.about.merge
        inputs: list[Tensor] = []
        scored = about.layers(self.model)[self.settings.vision]
        with _remembered(self.model), _inputs_of(scored, inputs):
            features = about.features(self.model, given)
            seen = [(query, key) for module, query, key in _SEEN if module is scored]
        grids = about.grids(self.model, given)
        scores = [_received(query[i], key[i], about.cls) for query, key in seen for i in range(len(query))]
        keys = torch.cat([about.keys(scored, x)[..., about.cls :, :].flatten(0, -2) for x in inputs])
        found, first = [], 0
        for part, score, (high, wide) in zip(features, scores, grids, strict=True):
            own = keys[first : first + high * wide]
            first += high * wide
            groups = about.tokens(self.model, (high, wide))
            means = [sum(score[i] for i in group) / len(group) for group in groups]
            found.append((part, torch.stack([own[group].mean(0) for group in groups]), means, (high // side, wide // side)))
        return found

    def _positions(self, ids: list[int], rows: int) -> tuple[list[Any], int]:
        if not self.about.three:
            return super()._positions(ids, rows)
        config = self.model.config
        words = torch.tensor([ids])
        kinds = (words == config.image_token_id).int() + 2 * (words == config.video_token_id).int()
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        grids = {name: self.given[name] for name in names if self.given.get(name) is not None}
        if grids:
            dense = self.model.model.get_rope_index(words, mm_token_type_ids=kinds, **grids)[0][:, 0]
        else:
            dense = torch.arange(len(ids)).expand(3, -1)
        at = [tuple(int(value) + self.start for value in dense[:, column]) for column in self.columns]
        return at, self.start + int(dense.max()) + 1

    def _layer(self, index: int, hidden: Tensor, positions: list[Any]) -> Tensor:
        decoder = self.model.model.language_model
        if self.about.norms != "rotated":
            layer = decoder.layers[index]
            keys = layer.self_attn.k_proj(layer.input_layernorm(hidden))[0]
            self.raw = keys.unflatten(-1, (-1, layer.self_attn.head_dim)).mean(1)
        if not self.about.three:
            return super()._layer(index, hidden, positions)
        places = [entry if isinstance(entry, tuple) else (entry,) * 3 for entry in positions]
        return book._layer(self.model, index, hidden, torch.tensor(places).T[:, None], self.cache)

    def _norms(self, index: int, spans: list[list[int]], rows: int) -> list[list[float]]:
        if self.about.norms == "rotated":
            return super()._norms(index, spans, rows)
        parts = [self.raw[span] for span in spans]
        if self.about.norms == "centered":
            # Segments that share a budget are one once they have been reduced together.
            one = self.pooled and index == self.settings.deep
            parts = [part - (torch.cat(parts) if one else part).mean(0) for part in parts]
        return [part.norm(dim=-1).tolist() for part in parts]


@contextlib.contextmanager
def _remembered(model: Any) -> Iterator[None]:
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}.values()
    before = [(config, config._attn_implementation) for config in configs]
    _SEEN.clear()
    try:
        for config in configs:
            config._attn_implementation = "by_the_book"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


@contextlib.contextmanager
def _inputs_of(module: Any, found: list[Tensor]) -> Iterator[None]:
    hook = module.register_forward_pre_hook(
        lambda _, args, kwargs: found.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def _received(query: Tensor, key: Tensor, cls: int) -> list[float]:
    """Of query, key [heads, rows, hd]: attention of the first row, summed over heads, or without it that every row receives,
    mean over heads and queries."""
    total = torch.zeros(key.shape[1])
    for q, k in zip(query, key, strict=True):
        for row in q[:1] if cls else q:
            total += torch.softmax(k @ row / math.sqrt(k.shape[1]), 0)
    return (total[cls:] if cls else total / (query.shape[0] * query.shape[1])).tolist()
