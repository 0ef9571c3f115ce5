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
        return _through_encoders(provider, images, counts)
    towers, starts = _through_towers(provider, images)
    wanted, where = _wanted(images, counts, schedules, starts)
    parts = []
    for (tower, candidates, taps, stage, axes), entries in wanted.items():
        seen = towers[tower]
        tiles, slots = seen[0].shape[:2]
        timed = () if axes == 2 else (axes,)  # a third axis is time, which clips alone have
        program = provider.select(tiles, slots, len(entries), candidates, taps, stage, *timed)
        features, *selection = program(*seen, *_tables(entries, candidates, stage is not None, images.pixels.device))
        parts.append(Part(features, selection[0] if selection else None, tuple(selection[1:])))
    return Seen(tuple(parts), where)


def _through_encoders(provider: Any, images: Images, counts: Sequence[int]) -> Seen:
    """Images that are a tile each, and frames of videos that have an encoder of their own."""
    framed = [layout[0].kind == "video" for layout in images.layouts]
    parts: list[Part] = []
    at: dict[int, tuple[int, int]] = {}
    for kind in dict.fromkeys(framed):
        own = [i for i, frame in enumerate(framed) if frame == kind]
        program = provider.frames(len(own)) if kind else provider.vision(len(own))
        features, *selection = program(_rows(images.pixels, own))
        at |= {image: (len(parts), row) for row, image in enumerate(own)}
        parts.append(Part(features, selection[0] if selection else None, tuple(selection[1:])))
    ends = itertools.accumulate(counts)
    return Seen(
        tuple(parts), tuple(tuple(at[i] for i in range(end - count, end)) for end, count in zip(ends, counts, strict=True))
    )


def _through_towers(provider: Any, images: Images) -> tuple[list[tuple[Tensor, ...]], list[tuple[int, int]]]:
    """(what each tower program says, for every image which of them has its tiles, and its first patch among theirs)."""
    if not images.cut:
        tiles = images.pixels.shape[0]
        pixels = F.pad(images.pixels, (0, 0) * (images.pixels.dim() - 1) + (0, tile_bucket(tiles) - tiles))
        slots = provider.host.shape.patches
        ends = itertools.accumulate(images.tiles)
        starts = [(0, (end - count) * slots) for end, count in zip(ends, images.tiles, strict=True)]
        return [provider.tower(len(pixels), slots)(pixels)], starts
    sizes = [len(tile.order) for tile in images.cut]
    rows = list(itertools.accumulate((tile.rows for tile in images.cut), initial=0))
    towers: list[tuple[Tensor, ...]] = []
    at: dict[int, tuple[int, int]] = {}
    for size in dict.fromkeys(sizes):
        own = [i for i, found in enumerate(sizes) if found == size]
        at |= {tile: (len(towers), place * size) for place, tile in enumerate(own)}
        tiles = tile_bucket(len(own))
        order = [torch.where(images.cut[i].order < 0, -1, images.cut[i].order + rows[i]) for i in own]
        given = [_stacked(order, tiles, -1)]
        given += [_stacked(tables, tiles, 0) for tables in zip(*(images.cut[i].tables for i in own), strict=True)]
        slot, *tables = (table.to(images.pixels.device) for table in given)
        pixels = images.pixels.index_select(0, slot.clamp_min(0).flatten()).unflatten(0, slot.shape)
        towers.append(provider.tower(tiles, size)(pixels, slot >= 0, *tables))
    firsts = itertools.accumulate(images.tiles, initial=0)
    return towers, [at[first] for first, _ in zip(firsts, images.layouts)]


def _stacked(rows: Sequence[Tensor], tiles: int, fill: int) -> Tensor:
    """Tensors [slots, ...] as one [tiles, slots, ...], tiles that are missing filled."""
    return F.pad(torch.stack(list(rows)), (0, 0) * rows[0].dim() + (0, tiles - len(rows)), value=fill)


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
    images: Images, counts: Sequence[int], schedules: Sequence[Schedule], starts: list[tuple[int, int]]
) -> tuple[dict[tuple[int, int, int, Stage | None, int], list[tuple[int, Pack]]], tuple[tuple[tuple[int, int], ...], ...]]:
    """Segments by the tower that saw them and the program that selects from them, each with the first patch of its image among
    all of the tower; and where each sample finds its own."""
    wanted: dict[tuple[int, int, int, Stage | None, int], list[tuple[int, Pack]]] = {}
    where, image = [], 0
    for count, schedule in zip(counts, schedules, strict=True):
        own: list[tuple[int, int]] = []
        stage = schedule.vision
        for _ in range(count):
            tower, first = starts[image]
            for segment, pack in zip(images.layouts[image], images.packs[image], strict=True):
                key = (
                    tower,
                    candidate_bucket(segment.candidates) if stage else segment.candidates,
                    segment.taps,
                    stage.of_segment(len(own)) if stage else None,
                    pack.places.shape[1] if stage else 2,
                )
                entries = wanted.setdefault(key, [])
                own.append((list(wanted).index(key), len(entries)))
                entries.append((first, pack))
            image += 1
        where.append(tuple(own))
    return wanted, tuple(where)


def _tables(entries: list[tuple[int, Pack]], candidates: int, chosen: bool, device: torch.device) -> list[Tensor]:
    """index [S, candidates, taps], -1 for padding, weight likewise if there are several taps, places [S, candidates, 2 or 3]
    if something is chosen."""

    def stacked(values: list[Tensor], fill: float) -> Tensor:
        padded = [F.pad(value, (0, 0, 0, candidates - value.shape[0]), value=fill) for value in values]
        return torch.stack(padded).to(device)

    found = [stacked([pack.index + first for first, pack in entries], -1)]
    if entries[0][1].weight is not None:
        found.append(stacked([pack.weight for _, pack in entries if pack.weight is not None], 0.0))
    if chosen:
        found.append(stacked([pack.places for _, pack in entries], 0.0))
    return found
