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
from types import SimpleNamespace
from typing import Any

import reference_llava as book
import torch
from reference_turns import Conversation
from torch import Tensor
from transformers import AttentionInterface

_SEEN: list[tuple[Any, Tensor, Tensor]] = []


def _remembering(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any) -> Any:
    """Attention spelled out; the encoders have no mask but the segments that they cut themselves, or one of zeros."""
    assert attention_mask is None or not attention_mask.any()
    _SEEN.append((module, query, key))
    scale = more.get("scaling") or query.shape[-1] ** -0.5
    weights = torch.softmax(query @ key.transpose(-1, -2) * scale, -1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("by_the_book", _remembering)


@dataclass(frozen=True)
class Book:
    """What the reference must know of a family.

    features(model, given) -> [tokens, D] of each segment, by the stock model, and in further columns what its decoder adds
    behind each of its first `added` layers; layers(model) -> the attention modules of the encoder, in order; keys(module, its
    input) -> the keys [rows, K] of these rows before rotation; tokens(model, grid) -> by token of a segment the rows of its
    frame that it is made of; grids(given) -> (rows, columns) of every segment in patches; cls: rows before the patches; norms:
    "rotated", "raw" or "centered"; three: whether positions have three coordinates; decoder: what the model calls it.
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
    added: int = 0
    decoder: str = "language_model"


class FamilyConversation(Conversation):
    """settings_of(candidates) -> Settings of a segment with so many. `turn` takes what the processor gave as its pixels."""

    def __init__(self, model: Any, about: Book, settings_of: Callable[[int], book.Settings], pooled: bool = False):
        super().__init__(renamed(model, language_model=getattr(model.model, about.decoder)), settings_of(1000), pooled)
        self.stock, self.about, self.settings_of = model, about, settings_of
        self.columns: list[int] = []  # of the prompt, by row
        self.candidates: list[int] = []  # of each segment of the turn
        self.added: list[Tensor] = []  # by layer, while a turn is read: [1, rows, D], zeros for text
        self.given: dict[str, Any] = {}
        assert not about.added or self.settings.shallow >= about.added, "rows must be whole while features are added"

    def _embed(self, ids: list[int], pixels: Any) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        config, embed = self.model.config, self.model.get_input_embeddings()
        tokens = {config.image_token_id, getattr(config, "video_token_id", None)}
        parts: list[Tensor] = []
        spans, labels = [], []
        self.kept, self.own, self.columns, self.candidates, self.given = [], [], [], [], pixels or {}
        seen, left = iter(self._see(pixels) if pixels is not None else ()), 0
        for at, word in enumerate(ids):
            if word not in tokens:
                row = embed(torch.tensor([word]))
                parts.append(torch.cat((row, row.new_zeros(1, self.about.added * row.shape[1])), 1))
                self.columns.append(at)
                continue
            if not left:  # text may stand within a segment, so that its placeholders are counted
                features, keys, scores, (high, wide) = next(seen)
                left, settings = len(scores), self.settings_of(len(scores))
                kept = sorted(sorted(range(left), key=lambda i: -scores[i])[: settings.n])
                places = [(i // wide / max(high, wide), i % wide / max(high, wide)) for i in kept]
                labels.append(book.cluster(keys[kept], places, settings.centers, settings.density_width, settings.reach))
                self.kept.append(kept)
                self.own.append(settings)
                self.candidates.append(left)
                spans.append([])
            token = self.candidates[-1] - left
            left -= 1
            if token in self.kept[-1]:
                spans[-1].append(len(parts))
                parts.append(features[token : token + 1])
                self.columns.append(at)
        assert not left and next(seen, None) is None
        hidden, *self.added = torch.cat(parts)[None].chunk(1 + self.about.added, -1)
        return hidden, spans, labels

    def _prefill(self, *given: Any) -> Tensor:
        hidden = super()._prefill(*given)
        self.added = []
        return hidden

    def _see(self, given: dict[str, Any]) -> list[tuple[Tensor, Tensor, list[float], tuple[int, int]]]:
        """By segment: features [tokens, D], keys [tokens, K], scores, (rows, columns) of tokens."""
        about, side = self.about, self.about.merge
        inputs: list[Tensor] = []
        scored = about.layers(self.stock)[self.settings.vision]
        with _remembered(self.stock), _inputs_of(scored, inputs):
            features = about.features(self.stock, given)
            seen = [(query, key) for module, query, key in _SEEN if module is scored]
        grids = about.grids(self.stock, given)
        scores = [_received(query[i], key[i], about.cls) for query, key in seen for i in range(len(query))]
        keys = torch.cat([about.keys(scored, x)[..., about.cls :, :].flatten(0, -2) for x in inputs])
        found, first = [], 0
        for part, score, (high, wide) in zip(features, scores, grids, strict=True):
            own = keys[first : first + high * wide]
            first += high * wide
            groups = about.tokens(self.stock, (high, wide))
            means = [sum(score[i] for i in group) / len(group) for group in groups]
            found.append((part, torch.stack([own[group].mean(0) for group in groups]), means, (high // side, wide // side)))
        return found

    def _positions(self, ids: list[int], rows: int) -> tuple[list[Any], int]:
        if not self.about.three:
            return super()._positions(ids, rows)
        config = self.model.config
        words = torch.tensor([ids])
        kinds = (words == config.image_token_id).int() + 2 * (words == config.video_token_id).int()
        if "image_grid_thw" not in self.given:
            kinds[kinds > 0] = 2  # frames of videos may have the placeholders of images
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        grids = {name: self.given[name] for name in names if self.given.get(name) is not None}
        if grids:
            dense = self.stock.model.get_rope_index(words, mm_token_type_ids=kinds, **grids)[0][:, 0]
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
        if self.about.three:
            places = [entry if isinstance(entry, tuple) else (entry,) * 3 for entry in positions]
            hidden = book._layer(self.model, index, hidden, torch.tensor(places).T[:, None], self.cache)
        else:
            hidden = super()._layer(index, hidden, positions)
        return hidden + self.added[index] if index < len(self.added) else hidden

    def _norms(self, index: int, spans: list[list[int]], rows: int) -> list[list[float]]:
        if self.about.norms == "rotated":
            return super()._norms(index, spans, rows)
        parts = [self.raw[span] for span in spans]
        if self.about.norms == "centered":
            # Segments that share a budget are one once they have been reduced together.
            one = self.pooled and index == self.settings.deep
            parts = [part - (torch.cat(parts) if one else part).mean(0) for part in parts]
        return [part.norm(dim=-1).tolist() for part in parts]


def renamed(model: Any, **parts: Any) -> Any:
    """What the reference asks of a model, with `parts` under the names that LLaVA has for them."""
    return SimpleNamespace(
        config=model.config,
        lm_head=model.lm_head,
        get_input_embeddings=model.get_input_embeddings,
        model=SimpleNamespace(**parts),
    )


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
