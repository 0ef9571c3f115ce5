"""What the runtime knows of a family's images, from a configuration alone: no weights, and nothing on a device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError, InputError
from .layout import Layout, Segment
from .schedule import ModelShape


@dataclass(frozen=True)
class Pack:
    """Where the N candidates of a segment come from. index: int64 [N, taps], patches of its image counted through the image's
    tiles; weight: fp32 [N, taps], None where nothing is blended; places: fp32 [N, 2], (row, column) in units of the longer
    side of the segment's grid, or of a clip whose frames are one segment [N, 3], (time, row, column): a step of time counts
    as far as a token's side."""

    index: Tensor
    weight: Tensor | None
    places: Tensor


@dataclass(frozen=True)
class Tile:
    """How the patches of one input of an encoder of any size lie in it. order: int64 [slots], the row of its pixels that each
    slot of its program takes, -1 for padding; tables: what the encoder must know of each slot, [slots, ...]."""

    order: Tensor
    tables: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Rows of pixels."""
        return int((self.order >= 0).sum())


@dataclass(frozen=True)
class Images:
    """The images and videos of a request, in the order of the prompt.

    pixels: [tiles, channels, height, width] of all of them, or [patches, features] of tiles that `cut` describes; layouts: the
    segments of each image; packs: those of each segment, () where an image is one tile as it is; cut: of every tile, () where
    all are alike; about: of each image, whatever its family's positions depend on.
    """

    pixels: Tensor
    layouts: tuple[Layout, ...]
    packs: tuple[tuple[Pack, ...], ...] = ()
    cut: tuple[Tile, ...] = ()
    about: tuple[Any, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Placeholders of each image."""
        return tuple(sum(segment.tokens for segment in layout) for layout in self.layouts)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles of each image."""
        return tuple(sum(segment.tiles for segment in layout) for layout in self.layouts)

    def take(self, index: Sequence[int]) -> Images:
        """Some of the images."""
        if list(index) == list(range(len(self.layouts))):
            return self
        own = _split(range(sum(self.tiles)), self.tiles)
        rows = [sum(self.cut[tile].rows for tile in tiles) for tiles in own] if self.cut else self.tiles
        parts = self.pixels.split(list(rows))

        def chosen(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[i] for i in index) if values else ()

        cut = tuple(self.cut[tile] for i in index for tile in own[i]) if self.cut else ()
        pixels = torch.cat([parts[i] for i in index])
        return Images(pixels, chosen(self.layouts), chosen(self.packs), cut, chosen(self.about))


def _split(values: Sequence[int], counts: Sequence[int]) -> list[Sequence[int]]:
    ends = list(itertools.accumulate(counts))
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]


def in_order(ids: Tensor, sizes: Mapping[int, Sequence[int]]) -> list[int]:
    """The order in which `ids` int64 [B, T] name images and videos. sizes: placeholders of each, by the id of these; they are
    numbered through all of them. Those that are not named come last, and are refused with their tokens."""
    firsts = itertools.accumulate((len(found) for found in sizes.values()), initial=0)
    left = {token: iter(enumerate(found, first)) for (token, found), first in zip(sizes.items(), firsts, strict=False)}
    order = []
    for row in ids.cpu().tolist():
        for token, run in itertools.groupby(row):
            count = len(list(run)) if token in left else 0
            while count > 0 and (item := next(left[token], None)):
                order.append(item[0])
                count -= item[1]
    return order + [number for rest in left.values() for number, _ in rest]


class Host(Protocol):
    """The images of one family.

    shape: the model's numbers; token_id: that of an image's placeholders; token_ids: of those of images and videos;
    pixel_shape: of one input of the encoder, or of one row of it; tables: shape and type of each slot's `Tile.tables`; inputs:
    the names of what a processor gives for images, pixels first; fixed: whether all images have one layout.
    """

    @property
    def shape(self) -> ModelShape: ...

    @property
    def token_id(self) -> int: ...

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def pixel_shape(self) -> tuple[int, ...]: ...

    @property
    def tables(self) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]: ...

    @property
    def inputs(self) -> tuple[str, ...]: ...

    @property
    def fixed(self) -> bool: ...

    @property
    def layout(self) -> Layout:
        """That of the image which schedules without a prompt are told of."""
        ...

    def layout_of(self, height: int, width: int, images: int = 1) -> Layout:
        """That of an image of so many pixels, in a prompt of so many images. Raises InputError for sizes below 1."""
        ...

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images of a request with `ids` int64 [B, T], checked. Raises InputError."""
        ...

    def blank(self, layouts: Sequence[Layout], device: torch.device, dtype: torch.dtype) -> Images:
        """Black images of given layouts, one each: a request to warm programs up with."""
        ...

    def positions(self, words: np.ndarray, about: Sequence[Any]) -> np.ndarray:
        """int64 [dims, T]: of the tokens `words` int64 [T] of one sample with images `about` which that is, from 0 on. Asked
        where positions have several coordinates."""
        ...


@dataclass(frozen=True)
class FixedImages:
    """Images of one size: each is one input of the encoder, and its tokens are the encoder's, or made of these as `pack`
    says.

    tiles: (height, width) -> into how many such images the processor cuts one by default, None for one.
    """

    shape: ModelShape
    token_id: int
    pixel_shape: tuple[int, ...]
    inputs: tuple[str, ...] = ("pixel_values",)
    pack: Pack | None = field(default=None, compare=False)
    tiles: Callable[[int, int], int] | None = field(default=None, compare=False)
    fixed = True
    tables = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """One."""
        return (self.token_id,)

    @property
    def layout(self) -> Layout:
        """That of every tile."""
        return (self.shape.image,)

    def layout_of(self, height: int, width: int, images: int = 1) -> Layout:
        """That of each tile, whatever the size: processors resize."""
        check_size(height, width)
        return self.layout * (1 if self.tiles is None else self.tiles(height, width))

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images of `pixel_values` [images, channels, height, width]."""
        pixels = check_pixels(given["pixel_values"], self.pixel_shape, device, dtype)
        packs = () if self.pack is None else ((self.pack,),) * pixels.shape[0]
        return Images(pixels, (self.layout,) * pixels.shape[0], packs)

    def blank(self, layouts: Sequence[Layout], device: torch.device, dtype: torch.dtype) -> Images:
        """As `Host.blank`."""
        return blank(layouts, self, device, dtype)

    def positions(self, words: np.ndarray, about: Sequence[Any]) -> np.ndarray:
        """One after another."""
        return np.arange(len(words))[None]


def blank(layouts: Sequence[Layout], host: Host, device: torch.device, dtype: torch.dtype) -> Images:
    """Black images of whole tiles."""
    tiles = sum(segment.tiles for layout in layouts for segment in layout)
    blended, packed = host.shape.group == 1, host.shape.packed
    packs = tuple(tuple(_any_pack(segment, blended) for segment in layout) for layout in layouts) if packed else ()
    return Images(torch.zeros(tiles, *host.pixel_shape, device=device, dtype=dtype), tuple(layouts), packs)


def blank_words(host: Host, layouts: Sequence[Layout], text_tokens: int) -> list[int]:
    """The ids of a prompt with images of given layouts and so many text tokens, protected ones among them, one at least."""
    protected = sum(len(segment.protected) for layout in layouts for segment in layout)
    word = next(word for word in range(len(host.token_ids) + 1) if word not in host.token_ids)
    left, row = max(1, text_tokens - protected), []
    for layout in layouts:
        token = host.token_ids[-1] if layout[0].kind == "video" else host.token_id
        tokens, runs = sum(segment.tokens for segment in layout), layout[0].grid[0] if layout[0].broken else 1
        for _ in range(runs):
            # A word before each, as long as there are any: some models take images side by side for one.
            row += [word] * (left > 0)
            left -= left > 0
            row += [token] * (tokens // runs)
    return row + [word] * left


def _any_pack(segment: Segment, blended: bool) -> Pack:
    count = segment.candidates
    index = torch.zeros(count, segment.taps, dtype=torch.int64)
    weight = torch.full((count, segment.taps), 1 / segment.taps) if segment.taps > 1 and blended else None
    return Pack(index, weight, torch.zeros(count, 2 if segment.grid[0] == 1 else 3))


def grid_places(rows: int, columns: int) -> Tensor:
    """fp32 [rows * columns, 2]: the places of a grid's candidates, as a `Pack` has them."""
    order = torch.arange(rows * columns)
    return torch.stack((order // columns, order % columns), 1).float() / max(rows, columns)


def segments_of(kind: str, grid: tuple[int, int, int], taps: int, pooled: bool, broken: bool = False) -> Layout:
    """A segment for every frame of `grid` (time, rows, columns), or with `pooled` one for all; broken: whether text stands
    between frames."""
    time, rows, columns = grid
    if pooled and time > 1:
        return (Segment(kind, grid, math.prod(grid), taps=taps, tiles=time, broken=broken),)
    return (Segment(kind, (1, rows, columns), rows * columns, taps=taps),) * time


def packs_of(layout: Layout, frame: Pack, frames: int, patches: int) -> tuple[Pack, ...]:
    """Where the candidates of each segment of so many frames come from. frame: those of one, of so many `patches`; frames
    follow one another in their tower."""
    if len(layout) == frames:
        return tuple(replace(frame, index=frame.index + step * patches) for step in range(frames))
    (segment,) = layout
    steps = torch.arange(frames).repeat_interleave(len(frame.index)).unsqueeze(1)
    places = torch.cat((steps.float() / max(segment.grid[1:]), frame.places.repeat(frames, 1)), 1)
    return (Pack(frame.index.repeat(frames, 1) + steps * patches, None, places),)


def with_clips(host: Host) -> Host:
    """`host` with all frames of a video in one segment. Raises ConfigError for a model without videos of its own."""
    if not hasattr(host, "clips") or "pixel_values_videos" not in host.inputs:
        raise ConfigError(
            "clips='pooled' takes a model that is told of videos, and this one has none, or takes their frames for images: "
            "leave clips at 'per_frame', or set scope='pooled', by which the images of a prompt share the decoder's budgets"
        )
    return replace(host, clips=True)  # type: ignore[type-var]


def check_size(height: int, width: int) -> None:
    """Raises InputError for a size of an image that is not one."""
    for name, value in (("height", height), ("width", width)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"an image of {height}x{width} pixels (height x width): {name} is no count of 1 or more")


def check_pixels(pixels: object, tile: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """pixel_values as [images, *tile] in the model's dtype, or an InputError."""
    if not isinstance(pixels, Tensor):
        raise InputError(f"pixel_values is a {type(pixels).__name__}: pass the processor's tensor")
    if not pixels.is_floating_point():
        raise InputError(f"pixel_values has dtype {pixels.dtype}: pass normalised floating-point pixels")
    if pixels.dim() != len(tile) + 1 or tuple(pixels.shape[1:]) != tile:
        raise InputError(f"pixel_values has shape {tuple(pixels.shape)}: this model takes [images, *{tile}]")
    check_device(device, "pixel_values", pixels)
    # One layout for all, and no tensor of inference mode: a compiled program would compile anew for another.
    plain = pixels.detach().to(dtype).contiguous()
    return plain.clone() if plain.is_inference() else plain


def check_device(device: torch.device, name: str, tensor: Tensor) -> None:
    """Raises InputError unless `tensor` is on `device`."""
    if tensor.device.type != device.type or (device.index is not None and tensor.device.index not in (None, device.index)):
        raise InputError(f"{name} is on {tensor.device}, the model on {device}: move it with .to('{device}')")
