"""Images through the programs of the vision side: one for images that are a tile each, else a tower and selections."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .host import Images, Pack
from .provider import candidate_bucket, tile_bucket
from .schedule import Schedule, Stage


class Part(NamedTuple):
    """Segments that are alike, S of them: features [S, n, D], kept int64 [S, n], None where all candidates stay, and the state
    of the vision stage, [S, n] each."""

    features: Tensor
    kept: Tensor | None
    state: tuple[Tensor, ...]


class Seen(NamedTuple):
    """The images of a turn. where: for every sample and each of its segments, (part, row of it)."""

    parts: tuple[Part, ...]
    where: tuple[tuple[tuple[int, int], ...], ...]


def see(provider: Any, images: Images, counts: Sequence[int], schedules: Sequence[Schedule]) -> Seen:
    """Runs the vision programs of `provider` on the images of samples, `counts` each in order, by their `schedules`."""
    if not images.packs:
        features, *selection = provider.vision(len(images.layouts))(images.pixels)
        part = Part(features, selection[0] if selection else None, tuple(selection[1:]))
        ends = itertools.accumulate(counts)
        return Seen((part,), tuple(tuple((0, i) for i in range(e - n, e)) for e, n in zip(ends, counts, strict=True)))
    tiles = images.pixels.shape[0]
    padded = tile_bucket(tiles)
    pixels = F.pad(images.pixels, (0, 0) * (images.pixels.dim() - 1) + (0, padded - tiles))
    seen = provider.tower(padded)(pixels)
    wanted, where = _wanted(images, counts, schedules, seen[0].shape[1])
    parts = []
    for (candidates, taps, stage), entries in wanted.items():
        program = provider.select(padded, len(entries), candidates, taps, stage)
        features, *selection = program(*seen, *_tables(entries, candidates, stage is not None, pixels.device))
        parts.append(Part(features, selection[0] if selection else None, tuple(selection[1:])))
    return Seen(tuple(parts), where)


def gather(seen: Seen, samples: Sequence[int]) -> Part:
    """The segments of samples that are alike, one sample a row: features [B, n of all segments, D], and so on. `kept` counts
    within each segment."""
    columns = list(zip(*(seen.where[sample] for sample in samples), strict=True))
    parts = [seen.parts[column[0][0]] for column in columns]
    rows = [[row for _, row in column] for column in columns]
    in_order = [row for sample in zip(*rows, strict=True) for row in sample] == list(range(parts[0].features.shape[0]))
    if len(set(map(id, parts))) == 1 and in_order:
        (part, batch) = parts[0], len(samples)
        kept = None if part.kept is None else part.kept.reshape(batch, -1)
        features = part.features.reshape(batch, -1, part.features.shape[-1])
        return Part(features, kept, tuple(values.reshape(batch, -1) for values in part.state))

    def joined(values: Sequence[Tensor]) -> Tensor:
        return torch.cat([_rows(value, at) for value, at in zip(values, rows, strict=True)], 1)

    kept = None if parts[0].kept is None else joined([part.kept for part in parts])  # type: ignore[misc]
    state = tuple(joined(values) for values in zip(*(part.state for part in parts), strict=True))
    return Part(joined([part.features for part in parts]), kept, state)


def _rows(values: Tensor, at: list[int]) -> Tensor:
    if at == list(range(values.shape[0])):
        return values
    return values.index_select(0, torch.tensor(at, device=values.device))


def _wanted(
    images: Images, counts: Sequence[int], schedules: Sequence[Schedule], patches: int
) -> tuple[dict[tuple[int, int, Stage | None], list[tuple[int, Pack]]], tuple[tuple[tuple[int, int], ...], ...]]:
    """Segments by the program that selects from them, each with its first patch among all tiles; and where each sample finds
    its own."""
    wanted: dict[tuple[int, int, Stage | None], list[tuple[int, Pack]]] = {}
    where, image, first = [], 0, 0
    for count, schedule in zip(counts, schedules, strict=True):
        own: list[tuple[int, int]] = []
        stage = schedule.vision
        for _ in range(count):
            for segment, pack in zip(images.layouts[image], images.packs[image], strict=True):
                key = (
                    candidate_bucket(segment.candidates) if stage else segment.candidates,
                    segment.taps,
                    stage.of_segment(len(own)) if stage else None,
                )
                entries = wanted.setdefault(key, [])
                own.append((list(wanted).index(key), len(entries)))
                entries.append((first, pack))
            first += images.tiles[image] * patches
            image += 1
        where.append(tuple(own))
    return wanted, tuple(where)


def _tables(entries: list[tuple[int, Pack]], candidates: int, chosen: bool, device: torch.device) -> list[Tensor]:
    """index [S, candidates, taps], -1 for padding, weight likewise if there are several taps, places [S, candidates, 2] if
    something is chosen."""

    def stacked(values: list[Tensor], fill: float) -> Tensor:
        padded = [F.pad(value, (0, 0, 0, candidates - value.shape[0]), value=fill) for value in values]
        return torch.stack(padded).to(device)

    found = [stacked([pack.index + first for first, pack in entries], -1)]
    if entries[0][1].weight is not None:
        found.append(stacked([pack.weight for _, pack in entries if pack.weight is not None], 0.0))
    if chosen:
        found.append(stacked([pack.places for _, pack in entries], 0.0))
    return found
