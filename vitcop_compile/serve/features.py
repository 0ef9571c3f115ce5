"""Pictures through the vision side, and a cache of what it made of them, by which none is seen twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..host import Images
from ..layout import Layout
from ..schedule import Schedule, Stage
from ..vision import Part, see

if TYPE_CHECKING:
    from .intake import Request


class Picture(NamedTuple):
    """What a picture's features depend on. digest: SHA-256 of what the processor made of it, pixels and tables; layout: its
    segments; stages: by which tokens of each are chosen behind the encoder, () where the encoder does."""

    digest: bytes
    layout: Layout
    stages: tuple[Stage, ...]


def pictures_of(images: Images, schedule: Schedule) -> tuple[Picture, ...]:
    """Those of a prompt of `schedule`."""
    found, first = [], 0
    for number, layout in enumerate(images.layouts):
        stage = schedule.vision if images.packs else None
        segments = range(first, first + len(layout))
        stages = () if stage is None else tuple(stage.of_segment(segment) for segment in segments)
        found.append(Picture(_digest(images.take([number])), layout, stages))
        first += len(layout)
    return tuple(found)


def _digest(picture: Images) -> bytes:
    sha = hashlib.sha256()
    tables: list[Tensor | None] = [picture.pixels]
    tables += [table for tile in picture.cut for table in (tile.order, *tile.tables)]
    tables += [table for packs in picture.packs for pack in packs for table in (pack.index, pack.weight, pack.places)]
    for table in tables:
        if table is None:
            continue
        sha.update(f"{table.dtype}{tuple(table.shape)}".encode())
        sha.update(table.contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.digest()


class Features:
    """Features by picture, at most `limit` bytes of them; those that were used longest ago go first. hits, misses: pictures
    so far that were known, or not. sizes: how many pictures, or prompts of packed ones, may go through the vision side at
    once, ascending.
    """

    def __init__(self, provider: Any, limit: int, sizes: tuple[int, ...]):
        self._provider, self._limit, self.sizes = provider, limit, sizes
        self._held: dict[Picture, tuple[Part, ...]] = {}
        self._bytes = 0
        self.hits = self.misses = 0

    @property
    def bytes(self) -> int:
        """What is held now."""
        return self._bytes

    def of(self, requests: Sequence[Request]) -> list[Part | None]:
        """What the vision side makes of the images of each prompt, as `vision.gather` has it; None where there are none."""
        known: dict[Picture, tuple[Part, ...]] = {}
        alike: dict[tuple[Any, ...], list[tuple[Images, tuple[Picture, ...], Schedule]]] = {}
        coming: set[Picture] = set()
        for request in requests:
            new = []
            for number, picture in enumerate(request.pictures):
                if picture in self._held:
                    self._held[picture] = known[picture] = self._held.pop(picture)  # the latest is the last
                elif picture not in coming:
                    new.append(number)
            self.misses += len(new)
            self.hits += len(request.pictures) - len(new)
            images = request.turn.images
            if images is None or not new:
                continue
            # Where selections are programs of their own, there are some for the prompts that were exported alone: all of one.
            parts = [list(range(len(request.pictures)))] if images.packs else [[number] for number in new]
            for part in parts:
                own = tuple(request.pictures[number] for number in part)
                coming |= set(own)
                key = tuple((picture.layout, picture.stages) for picture in own)
                alike.setdefault(key, []).append((images.take(part), own, request.schedule))
        for units in alike.values():
            while units:
                count = max((size for size in self.sizes if size <= len(units)), default=self.sizes[0])
                # There are programs of these sizes alone: fewer units are filled up with the last.
                known |= self._seen([*units, *units[-1:] * (count - len(units))][:count])
                del units[:count]
        found = [[part for picture in request.pictures for part in known[picture]] for request in requests]
        for picture, parts_of in known.items():
            self._keep(picture, parts_of)
        return [_joined(parts_of) if parts_of else None for parts_of in found]

    def _seen(self, units: Sequence[tuple[Images, tuple[Picture, ...], Schedule]]) -> dict[Picture, tuple[Part, ...]]:
        """Runs the vision side on prompts, or pictures, that are alike."""
        images = _together([unit[0] for unit in units])
        images = Images(images.pixels.to(self._provider.device), images.layouts, images.packs, images.cut, images.about)
        seen = see(self._provider, images, [len(unit[1]) for unit in units], [unit[2] for unit in units])
        found = {}
        for (_, pictures, _), where in zip(units, seen.where, strict=True):
            segments = iter(where)
            for picture in pictures:
                found[picture] = tuple(_row(seen.parts, *next(segments)) for _ in picture.layout)
        return found

    def clear(self) -> None:
        """Forgets all of them."""
        self._held.clear()
        self._bytes = 0

    def _keep(self, picture: Picture, parts: tuple[Part, ...]) -> None:
        if picture in self._held or (size := _bytes(parts)) > self._limit:
            return
        self._held[picture] = parts
        self._bytes += size
        while self._bytes > self._limit:
            self._bytes -= _bytes(self._held.pop(next(iter(self._held))))


def _together(parts: Sequence[Images]) -> Images:
    """The images of all, in order."""
    if len(parts) == 1:
        return parts[0]
    lists = [tuple(item for part in parts for item in getattr(part, name)) for name in ("layouts", "packs", "cut", "about")]
    return Images(torch.cat([part.pixels for part in parts]), *lists)


def _row(parts: Sequence[Part], part: int, row: int) -> Part:
    """One segment of those that were seen together, in memory of its own."""
    features, kept, state = parts[part]

    def own(values: Tensor) -> Tensor:
        return values[row : row + 1].clone()

    return Part(own(features), None if kept is None else own(kept), tuple(own(values) for values in state))


def _joined(segments: Sequence[Part]) -> Part:
    """The segments of one prompt, one behind the other."""
    if len(segments) == 1:
        return segments[0]
    kept = None if segments[0].kept is None else torch.cat([part.kept for part in segments], 1)  # type: ignore[misc]
    state = tuple(torch.cat(values, 1) for values in zip(*(part.state for part in segments), strict=True))
    return Part(torch.cat([part.features for part in segments], 1), kept, state)


def _bytes(parts: Sequence[Part]) -> int:
    tensors = [tensor for part in parts for tensor in (part.features, part.kept, *part.state) if tensor is not None]
    return sum(tensor.nbytes for tensor in tensors)
