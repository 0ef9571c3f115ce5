"""Selections of methods by the book, as tests ask for them: of one image, of numbers from wherever; see `naive_methods`.

Shares no code with the package.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import naive_merges as merges
import naive_methods as book
import numpy as np


class Told(NamedTuple):
    """index: what stays of an image; rows and sizes, where tokens merge."""

    index: list[int]
    rows: Any = None
    sizes: list[int] | None = None


@dataclass
class Image:
    """What is known of an image before the decoder. hidden: [n, D]; score, early: [n], of a layer and of an earlier one; keys:
    [n, heads, hd], or of CLS as well [1 + n, heads, hd]; sizes: [n], what tokens stand for."""

    grid: tuple[int, int]
    hidden: np.ndarray
    score: Sequence[float] = ()
    early: Sequence[float] = ()
    keys: np.ndarray = field(default_factory=lambda: np.zeros((0, 1, 1)))
    sizes: Sequence[int] = ()


@dataclass
class Rows:
    """What is known in front of a decoder layer, of one sample. hidden, entry, before: [t, D]; query, key: [heads, t, hd] of
    the layer before, as it multiplies them; text: the rows behind all images; last: that of the last token."""

    hidden: np.ndarray
    entry: np.ndarray
    before: np.ndarray
    query: np.ndarray
    key: np.ndarray
    scale: float
    text: list[int]
    last: int


OfImage = Callable[[Image, int], Told]
OfRows = Callable[[Rows, list[int], int], list[int]]


# The vision side: (image, budget) -> what stays


def uniform(image: Image, budget: int) -> Told:
    return Told(book.uniform(image.grid, budget))


def downsample(cells: tuple[int, int]) -> OfImage:
    def ask(image: Image, budget: int) -> Told:
        index, rows = merges.downsample(image.grid, cells, image.hidden)
        # Of tokens that are each an axis, the mean of a group names its members.
        _, members = merges.downsample(image.grid, cells, np.eye(len(image.hidden)))
        return Told(index, rows, np.count_nonzero(members, axis=1).tolist())

    return ask


def divprune(image: Image, budget: int) -> Told:
    return Told(book.divprune(image.hidden, budget))


def scope(alpha: float = 1.0) -> OfImage:
    return lambda image, budget: Told(book.scope(image.score, image.hidden, budget, alpha))


def holov(crops: int) -> OfImage:
    return lambda image, budget: Told(book.holov(image.score, image.hidden, crops, budget))


def visionzip(contextual: int, doubled: bool = True) -> OfImage:
    def ask(image: Image, budget: int) -> Told:
        given = image.score, image.keys[len(image.keys) - len(image.hidden) :].mean(1)
        counts = budget - contextual, contextual
        index, rows = merges.visionzip(*given, image.hidden, *counts, doubled)
        _, members = merges.visionzip(*given, np.eye(len(image.hidden)), *counts, False)
        return Told(index, rows, np.count_nonzero(members, axis=1).tolist())

    return ask


def vscan(window: int) -> OfImage:
    def ask(image: Image, budget: int) -> Told:
        hidden = image.hidden
        index, rows = merges.vscan(image.early, image.score, hidden, image.grid, window, budget)
        nearest = [index[book.best([book.cosine(token, hidden[k]) for k in index])] for token in hidden]
        owner = Counter(i if i in index else near for i, near in enumerate(nearest))
        return Told(index, rows, [owner[i] for i in index])

    return ask


def tome(image: Image, budget: int) -> Told:
    n = len(image.hidden)
    prefix = len(image.keys) - n
    hidden = np.concatenate((np.zeros((prefix, image.hidden.shape[1])), image.hidden))
    counts = [1.0] * prefix + [float(size) for size in image.sizes or [1] * n]
    rows, sizes, owner = merges.tome(image.keys.mean(1), hidden, counts, n - budget, prefix)
    # Of a row of several, the odd token is the one that the others went to.
    stay = [i - prefix for i in range(prefix, prefix + n) if owner.count(owner[i]) == 1 or i % 2]
    return Told(stay, rows[prefix:], [int(size) for size in sizes[prefix:]])


# The decoder: (rows, those of one image, budget) -> which of them stay


def fastv(rows: Rows, image: list[int], budget: int) -> list[int]:
    attention = np.array(book.last_row(rows.query[:, rows.last], rows.key, rows.scale, rows.last))
    return book.fastv(attention[:, image], budget)


def sparsevlm(rows: Rows, image: list[int], budget: int) -> list[int]:
    return book.sparsevlm(rows.query, rows.key, rows.scale, rows.text, image, rows.entry, budget)


def v2drop(rows: Rows, image: list[int], budget: int) -> list[int]:
    return book.v2drop(rows.before[image], rows.hidden[image], budget)


def cdpruner(rows: Rows, image: list[int], budget: int) -> list[int]:
    features = rows.hidden[image]
    return book.cdpruner(features, book.relevance(features, rows.hidden[rows.text]), budget)


def zspaprune(core: float) -> OfRows:
    def ask(rows: Rows, image: list[int], budget: int) -> list[int]:
        number = min(budget, max(1, round(core * budget)))
        return book.zspaprune(rows.hidden[image], rows.hidden[rows.text], budget, number)

    return ask


def dart(visual: int, text: int) -> OfRows:
    def ask(rows: Rows, image: list[int], budget: int) -> list[int]:
        keys = rows.key.transpose(1, 0, 2).reshape(rows.key.shape[1], -1)
        given = keys[image], keys[rows.text], rows.hidden[image], rows.hidden[rows.text]
        return book.dart(*given, budget, visual, text)

    return ask
