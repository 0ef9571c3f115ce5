"""Images that are cut into tiles beside an overview, and packed again with a line break behind every row: LLaVA-NeXT's
"anyres" (Liu et al. 2024), which LLaVA-OneVision follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..host import Images, Pack, blank, check_pixels, check_size, grid_places
from ..layout import Layout, Segment
from ..schedule import ModelShape
from .registry import Call

# What is kept of a segment is rounded up to a multiple of this, so that images of many sizes share programs.
MULTIPLE = 16

# Stock packing: (features [tiles, patches, C], (height, width), a line break [C], whether to leave the resolution as it is)
# -> [tokens, C].
Packing = Callable[[Tensor, tuple[int, int], Tensor, bool], Tensor]


@dataclass(frozen=True)
class TiledImages:
    """An overview of an image, and tiles of it at the best of the resolutions `pinpoints`, side by side without their padding.

    packing: the model's own, which is asked where tokens come from, so that nothing of it is repeated here; alone: whether
    only an image that is alone in its prompt is cut into tiles.
    """

    shape: ModelShape
    token_id: int
    pixel_shape: tuple[int, ...]
    pinpoints: tuple[tuple[int, int], ...]
    packing: Packing
    alone: bool = False
    fixed = False
    tables = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """One."""
        return (self.token_id,)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Pixels and sizes, and where it matters how many images each prompt has."""
        return ("pixel_values", "image_sizes", *(("batch_num_images",) if self.alone else ()))

    @property
    def layout(self) -> Layout:
        """That of a square image of two tiles by two, or of the largest resolution if that is smaller."""
        side = self.pixel_shape[-1]
        height, width = min(
            self.pinpoints, key=lambda size: (abs(size[0] * size[1] - 4 * side * side), abs(size[0] - size[1]))
        )
        return self.layout_of(height, width)

    def layout_of(self, height: int, width: int, images: int = 1) -> Layout:
        """An overview and the tiles."""
        check_size(height, width)
        return _laid(self, height, width, images == 1 or not self.alone)

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images of `pixel_values` [images, most tiles, channels, height, width], the tiles of each followed by padding,
        or [tiles, channels, height, width] without it, and `image_sizes` [images, 2], height and width before
        preprocessing."""
        sizes = sizes_of(given.get("image_sizes"))
        tiled = self._tiled(given.get("batch_num_images"), len(sizes))
        found = [_packed(self, *size, cut) for size, cut in zip(sizes, tiled, strict=True)]
        layouts = tuple(layout for layout, _ in found)
        counts = [sum(segment.tiles for segment in layout) for layout in layouts]
        pixels = given["pixel_values"]
        if isinstance(pixels, Tensor) and pixels.dim() == 5:
            if pixels.shape[0] != len(sizes):
                raise InputError(
                    f"{pixels.shape[0]} images in pixel_values, {len(sizes)} in image_sizes: pass as many of both"
                )
            if max(counts) > pixels.shape[1]:
                raise InputError(
                    f"an image has {pixels.shape[1]} tiles in pixel_values, its size asks for {max(counts)}: pass what the "
                    "processor made of it, pixel_values and image_sizes together"
                )
            pixels = torch.cat([image[:count] for image, count in zip(pixels, counts, strict=True)])
        elif isinstance(pixels, Tensor) and pixels.dim() == 4 and pixels.shape[0] != sum(counts):
            raise InputError(
                f"pixel_values has {pixels.shape[0]} tiles, the images of image_sizes have {sum(counts)}: pass what the "
                "processor made of them"
            )
        pixels = check_pixels(pixels, self.pixel_shape, device, dtype)
        return Images(pixels, layouts, tuple(packs for _, packs in found))

    def blank(self, layouts: Sequence[Layout], device: torch.device, dtype: torch.dtype) -> Images:
        """As `Host.blank`."""
        return blank(layouts, self, device, dtype)

    def positions(self, words: np.ndarray, about: Sequence[Any]) -> np.ndarray:
        """One after another."""
        return np.arange(len(words))[None]

    def _tiled(self, counts: Any, images: int) -> list[bool]:
        """Whether each image is cut into tiles."""
        if not self.alone or counts is None:
            return [True] * images
        values = [int(count) for count in counts]
        if sum(values) != images:
            raise InputError(f"batch_num_images counts {sum(values)} images, image_sizes {images}: pass as many of both")
        return [count == 1 for count in values for _ in range(count)]


def with_breaks(embedding: nn.Module, line_break: nn.Parameter) -> Call:
    """`embedding`, in which the id behind its vocabulary is a line break of packed images."""

    def embed(m: Any, ids: Tensor) -> Tensor:
        last = m.embedding.num_embeddings - 1
        rows = m.embedding(ids.clamp(max=last))
        return torch.where((ids > last).unsqueeze(-1), m.line_break, rows)

    return Call(embed, embedding=embedding, line_break=line_break)


def sizes_of(sizes: Any) -> list[tuple[int, int]]:
    """(height, width) of every image. Raises InputError."""
    if sizes is None:
        raise InputError("image_sizes is missing: pass the processor's, the height and width of every image")
    values = sizes.tolist() if isinstance(sizes, Tensor) else [list(size) for size in sizes]
    if not values or not all(isinstance(size, list) and len(size) == 2 for size in values):
        raise InputError(f"image_sizes is {values}: pass [images, 2], the height and width of every image")
    for height, width in values:
        check_size(height, width)
    return [(height, width) for height, width in values]


@lru_cache(maxsize=8192)
def _laid(host: TiledImages, height: int, width: int, cut: bool) -> Layout:
    """The segments of an image."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches  # loaded for its users alone

    rows, columns = host.shape.grid
    patches = rows * columns
    tiles = image_size_to_num_patches((height, width), [list(p) for p in host.pinpoints], host.pixel_shape[-1]) if cut else 1
    told = _numbers(host, height, width, tiles, as_it_is=False)
    if tiles == 1:
        return (Segment("image", (1, rows, columns), len(told), tuple(told.isnan().nonzero()[:, 0].tolist())),)
    if len(told) == patches:  # an image so narrow that no patch of its tiles is without padding
        return (Segment("image", (1, rows, columns), patches, tiles=tiles),)
    high, wide = len(_grid(told[patches:])), _grid(told[patches:]).shape[1] - 1
    breaks = tuple(range(wide, high * (wide + 1), wide + 1))
    whole = patches + high * wide
    same = len(told) == len(_numbers(host, height, width, tiles, as_it_is=True))
    return (
        Segment("image", (1, rows, columns), patches, whole=whole),
        Segment("image", (1, high, wide), high * (wide + 1), breaks, tiles - 1, 1 if same else 4, whole),
    )


@lru_cache(maxsize=1024)
def _packed(host: TiledImages, height: int, width: int, cut: bool) -> tuple[Layout, tuple[Pack, ...]]:
    """The segments of an image, and where their candidates come from."""
    layout = _laid(host, height, width, cut)
    rows, columns = host.shape.grid
    patches = rows * columns
    tiles = sum(segment.tiles for segment in layout)
    told = _numbers(host, height, width, tiles, as_it_is=True)
    overview = Pack(told[:patches].long().unsqueeze(1), None, grid_places(rows, columns))
    if len(layout) == 1:
        return layout, (overview,)
    grid = _grid(told[patches:])[:, :-1].long()
    index, weight = grid.reshape(-1, 1), None
    if layout[1].taps > 1:
        at = host.packing(_coordinates(grid, tiles * patches).reshape(tiles, patches, 2), (height, width), _breaks(2), False)
        index, weight = _blend(_grid(at[patches:])[:, :-1], grid)
    return layout, (overview, Pack(index, weight, grid_places(*layout[1].grid[1:])))


def _numbers(host: TiledImages, height: int, width: int, tiles: int, as_it_is: bool) -> Tensor:
    """float64 [tokens]: what the packing makes of patches that say their numbers, and of line breaks that say they are
    none."""
    patches = host.shape.patches
    numbers = torch.arange(tiles * patches, dtype=torch.float64).reshape(tiles, patches, 1)
    return host.packing(numbers, (height, width), _breaks(1), as_it_is)[:, 0]


def _breaks(width: int) -> Tensor:
    return torch.full((width,), torch.nan, dtype=torch.float64)


def _grid(told: Tensor) -> Tensor:
    """Rows [rows * columns, ...] as [rows, columns, ...]: a column of line breaks is the last."""
    columns = int(told.reshape(len(told), -1)[:, 0].isnan().nonzero()[0]) + 1
    return told.reshape(-1, columns, *told.shape[1:])


def _coordinates(grid: Tensor, patches: int) -> Tensor:
    """float64 [patches, 2]: the row and column in `grid` of every patch that it holds."""
    columns = grid.shape[1]
    out = torch.zeros(patches, 2, dtype=torch.float64)
    order = torch.arange(grid.numel())
    out[grid.reshape(-1)] = torch.stack((order // columns, order % columns), 1).double()
    return out


def _blend(where: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """(index [N, 4], weight [N, 4]) of tokens that are blended at (row, column) `where` [h, w, 2] of a grid of patches."""
    low = where.floor().long()
    part = (where - low).reshape(-1, 2)
    limit = torch.tensor(grid.shape) - 1
    corners, shares = [], []
    for down in (0, 1):
        for right in (0, 1):
            at = torch.minimum(low + torch.tensor([down, right]), limit).reshape(-1, 2)
            corners.append(grid[at[:, 0], at[:, 1]])
            shares.append((part[:, 0] if down else 1 - part[:, 0]) * (part[:, 1] if right else 1 - part[:, 1]))
    return torch.stack(corners, 1), torch.stack(shares, 1).float()
