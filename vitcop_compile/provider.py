"""Where programs come from, as the runtime asks for them: what a turn needs, and what it gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .errors import InputError
from .host import Host
from .layout import Layout
from .schedule import Schedule, Stage

# Selections are padded to multiples of this.
CANDIDATES = 64


class Ask(NamedTuple):
    """What a turn needs. batch: sequences; text: text tokens of the longest; images: of the one with most; new: tokens to be
    generated, None if nobody knows; held: rows that the caches hold by group, () before the first turn; rows: those they have;
    visual: visual tokens by group of layers, the most of any, () without; layouts: those of the samples, each once."""

    batch: int
    text: int
    images: int
    new: int | None
    held: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    visual: tuple[int, ...] = ()
    layouts: tuple[Layout, ...] = ()


class Plan(NamedTuple):
    """text: text rows of the programs that take the turn; rows: those of the KV caches by group of layers."""

    text: int
    rows: tuple[int, ...]


class Provider(Protocol):
    """Where programs come from: compiled on demand, or loaded from a folder of engines.

    vision(pixels) -> (features, kept, state...) or (features,). Where images are packed from tiles, in its place tower(pixels
    [, real, tables...]) -> (patches, score, features) or (patches,), and select of these, index, [weight,] [places] -> as of
    vision. prefill(ids, last, positions, features, visual, state..., [length, removed,] caches...) -> (logits, index per
    stage...); extend(ids, last, length, position, removed, caches...) -> (logits,). Caches are updated in place. A
    provider for videos has more: `frames(count)` as vision, where they have an encoder of their own, and where the frames of a
    clip are one segment select with a last argument, 3, the coordinates of a candidate's place.
    """

    position_dims: int
    device: torch.device
    dtype: torch.dtype

    @property
    def host(self) -> Host: ...

    def schedule_of(self, layout: Layout) -> Schedule: ...

    def plan(self, ask: Ask) -> Plan: ...

    def vision(self, images: int) -> Callable[..., Any]: ...

    def tower(self, tiles: int, slots: int) -> Callable[..., Any]: ...

    def select(
        self, tiles: int, slots: int, segments: int, candidates: int, taps: int, stage: Stage | None
    ) -> Callable[..., Any]: ...

    def prefill(
        self, batch: int, text: int, schedule: Schedule, rows: tuple[int, ...], filled: bool
    ) -> Callable[..., Any]: ...

    def extend(self, batch: int, tokens: int, rows: tuple[int, ...]) -> Callable[..., Any]: ...


def bucket(count: int, buckets: Sequence[int], what: str) -> int:
    """The least of `buckets` that holds `count`. Raises InputError beyond the largest."""
    for size in buckets:
        if count <= size:
            return size
    raise InputError(f"{count} {what} exceed the largest bucket, {buckets[-1]}: ask for fewer, or build with larger buckets")


def tile_bucket(tiles: int) -> int:
    """Inputs of a tower program for so many tiles: sixteenths of a power of two, less than an eighth more than
    asked for."""
    step = 1 << max(0, (tiles - 1).bit_length() - 4)
    return -(-tiles // step) * step


def slot_bucket(slots: int, unit: int) -> int:
    """Patches of a tile that a tower program takes, for one of so many, in steps of `unit` and as `tile_bucket`."""
    return tile_bucket(-(-slots // unit)) * unit


def candidate_bucket(candidates: int) -> int:
    """Rows of a selection program for so many candidates."""
    return -(-candidates // CANDIDATES) * CANDIDATES
