"""Random sites of policies, for every candidate of which a reference can be asked: numbers of any kind, or such that tie.

What ties has exact arithmetic: rows of length 2 with four entries of 1 or -1, or of zeros, so that lengths, products and sums
are the same in whichever order, in fp32 as in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from reference_methods import Image, Rows
from torch import Tensor

from vitcop_compile.policies import Site

WIDTH, HEADS, KV_HEADS, HEAD = 24, 4, 2, 6
GRIDS = ((3, 4), (4, 4), (1, 5), (5, 2), (2, 2), (3, 5), (1, 1))


def alike_rows(rng: np.random.Generator, *shape: int, width: int = WIDTH, zeros: float = 0.1) -> np.ndarray:
    """fp64 [*shape, width]: rows of length 2, of few different ones, or of zeros."""
    out = np.zeros((int(np.prod(shape)), width))
    for row in out:
        if rng.random() >= zeros:
            row[rng.permutation(5)[:4]] = rng.choice([1, 1, -1], 4)
    return out.reshape(*shape, width)


@dataclass
class Vision:
    """b images of n candidates each, before the decoder, and the budget. score, early: [b, n]; keys: [b, n, heads, hd];
    padded: how many rows of padding a program has behind the candidates."""

    grid: tuple[int, int]
    budget: int
    hidden: np.ndarray
    score: np.ndarray
    early: np.ndarray
    keys: np.ndarray
    padded: int = 0

    @property
    def n(self) -> int:
        return self.grid[0] * self.grid[1]

    def image(self, i: int) -> Image:
        return Image(self.grid, self.hidden[i], self.score[i].tolist(), self.early[i].tolist(), self.keys[i])

    def site(self, exact: bool = True) -> Site:
        """As a program sees it: padding has anything for features, and a score below all."""
        batch, n, rng = len(self.hidden), self.n, np.random.default_rng(self.n)
        index = np.arange(n)
        places = np.stack((index // self.grid[1], index % self.grid[1]), -1) / max(self.grid)

        def filled(values: np.ndarray, fill: float | None = None) -> Tensor:
            pad = rng.normal(0, 3, (batch, self.padded, *values.shape[2:]))
            pad = pad if fill is None else np.full_like(pad, fill)
            return torch.from_numpy(np.concatenate((values, pad), 1)).float()

        scores = filled(np.stack((self.early, self.score), -1), -np.inf)
        return Site(
            at=torch.arange(n + self.padded).expand(batch, -1),
            hidden=filled(self.hidden),
            score=scores[..., 1],
            features=filled(self.keys.reshape(batch, n, -1)),
            places=filled(np.broadcast_to(places, (batch, n, 2)), 0.0),
            grid=self.grid,
            real=(torch.arange(n + self.padded) < n).expand(batch, -1) if self.padded else None,
            exact=exact,
        )

    def scanned(self, exact: bool = True) -> Site:
        """With the score of an early layer in front."""
        site = self.site(exact)
        assert site.score is not None
        early = torch.full_like(site.score, -torch.inf)
        early[:, : self.n] = torch.from_numpy(self.early).float()
        return Site(**(vars(site) | {"score": torch.stack((early, site.score), -1)}))


def vision(seed: int, ties: bool) -> Vision:
    """One of them: with and without padding, one to three images, budgets of 1, of all, and between."""
    rng = np.random.default_rng([seed, ties])
    grid = GRIDS[seed % len(GRIDS)]
    n, batch = grid[0] * grid[1], 1 + seed % 3
    budget = (1, n, int(rng.integers(1, n + 1)), int(rng.integers(1, n + 1)))[seed // len(GRIDS) % 4]
    padded = int(rng.integers(1, 5)) if seed % 2 else 0
    if ties:
        hidden, keys = alike_rows(rng, batch, n), alike_rows(rng, batch, n, 1, width=HEAD).repeat(HEADS, 2)
        score, early = rng.integers(0, 4, (2, batch, n)) / 4
    else:
        hidden, keys = rng.normal(size=(batch, n, WIDTH)), rng.normal(size=(batch, n, HEADS, HEAD))
        score, early = rng.random((2, batch, n)) / n
    # What a program is told is fp32.
    return Vision(grid, budget, *(x.astype(np.float32).astype(np.float64) for x in (hidden, score, early, keys)), padded)


@dataclass
class Prompts:
    """B prompts whose images lie between text, padded behind it to t rows, in front of a decoder layer.

    hidden, entry, before: [B, t, D]; query, key: [B, heads, t, hd]; visual: [B][n] rows; last: [B]; text: by sample the rows
    behind its images; incoming, tokens: by image.
    """

    hidden: np.ndarray
    entry: np.ndarray
    before: np.ndarray
    query: np.ndarray
    key: np.ndarray
    visual: list[list[int]]
    last: list[int]
    text: list[list[int]]
    incoming: tuple[int, ...]
    tokens: tuple[int, ...]
    scale: float = 0.5

    def parts(self, sample: int) -> list[list[int]]:
        """Rows of each image."""
        rows = iter(self.visual[sample])
        return [[next(rows) for _ in range(count)] for count in self.incoming]

    def rows(self, i: int) -> Rows:
        arrays = (self.hidden[i], self.entry[i], self.before[i], self.query[i], self.key[i])
        return Rows(*arrays, self.scale, self.text[i], self.last[i])

    def arguments(self, needs: frozenset[str]) -> tuple[Any, ...]:
        """Those of `prune_tokens` that come by position."""
        text = torch.zeros(self.hidden.shape[:2], dtype=torch.bool)
        for sample, rows in enumerate(self.text):
            text[sample, rows] = True
        more = {
            "entry": _fp32(self.entry),
            "before": _fp32(self.before),
            "text": text,
            "last": torch.tensor(self.last),
        }
        given = [_fp32(self.query), _fp32(self.key), None, self.scale]
        wired = [item if name in needs else None for name, item in zip(("query", "key", "value", "scale"), given)]
        return (
            _fp32(self.hidden),
            torch.tensor(self.visual),
            (),
            *wired,
            {name: item for name, item in more.items() if name in needs},
        )


def prompts(seed: int, ties: bool) -> Prompts:
    """One to three images, of the same size or not, and one to six tokens of text behind the last."""
    rng = np.random.default_rng([seed, ties, 1])
    images, batch = 1 + seed % 3, 1 + seed // 3 % 2
    incoming = tuple(int(x) for x in rng.integers(1, 9, images))
    if seed % 4 < 2:
        incoming = incoming[:1] * images
    kind = seed // 2 % 4
    tokens = tuple((1, n, int(rng.integers(1, n + 1)), -(-n // 2))[kind] for n in incoming)
    visual, last, text = [], [], []
    for _ in range(batch):
        rows, at = [], int(rng.integers(0, 3))
        for count in incoming:
            rows += range(at, at + count)
            at += count + int(rng.integers(0, 3))
        behind = int(rng.integers(1, 7)) if not ties else int(rng.choice([1, 2, 4]))
        at = rows[-1] + 1
        visual.append(rows)
        text.append(list(range(at, at + behind)))
        last.append(at + behind - 1)
    t = max(last) + 1 + seed % 3
    if ties:
        hidden, entry, before = (alike_rows(rng, batch, t) for _ in range(3))
        for sample, rows in enumerate(text):
            hidden[sample, rows] = alike_rows(rng, 1, zeros=0.0)
        # Few different tokens, whose keys are whole numbers.
        kinds = rng.integers(-2, 3, (KV_HEADS, 3, HEAD))
        key = np.stack([kinds[:, rng.integers(0, 3, t)] for _ in range(batch)]).astype(float)
        query = rng.integers(-1, 2, (batch, HEADS, t, HEAD)).astype(float)
    else:
        hidden, entry, before = rng.normal(size=(3, batch, t, WIDTH))
        query, key = rng.normal(size=(batch, HEADS, t, HEAD)), rng.normal(size=(batch, KV_HEADS, t, HEAD))
    arrays = (x.astype(np.float32).astype(np.float64) for x in (hidden, entry, before, query, key))
    return Prompts(*arrays, visual, last, text, incoming, tokens)


def _fp32(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).float()


def steady(ask: Callable[..., Any], *values: np.ndarray) -> bool:
    """Whether an answer is the same for values that are off by as much as fp32 rounds, and some more: no near tie."""
    rng = np.random.default_rng(0)
    off = [value * (1 + 3e-6 * rng.normal(size=value.shape)) for value in values]
    return ask(*values) == ask(*off)
