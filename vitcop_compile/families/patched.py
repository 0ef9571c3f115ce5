"""Images and videos of any size, as rows of patches with a grid beside: those of Qwen2-VL, and of the models that follow
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..host import Images, Pack, Tile, check_device, check_size, grid_places, in_order, packs_of, segments_of
from ..layout import Layout
from ..provider import slot_bucket
from ..schedule import ModelShape

# What is kept of a segment is rounded up to a multiple of this, so that images of many sizes share programs.
MULTIPLE = 16
# Patches of an encoder's input come in steps of at least this.
UNIT = 64
_KINDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}

# (rows, columns) of patches -> (order of a frame's patches in the encoder, -1 for padding; [slots, ...] for each of `tables`).
Cut = Callable[[int, int], tuple[Tensor, tuple[Tensor, ...]]]
# (words [T], kind of each, grids of images, grids of videos, seconds of each step of a video) -> [dims, T].
Positions = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class PatchedImages:
    """Images and videos as `pixel_values` [patches, features], every `group` rows one token of the language model, and
    `image_grid_thw`. A frame, which is one step of time, is one input of the encoder and one segment.

    video_token_id: that of a video's placeholders, None if they are an image's and `mm_token_type_ids` tells; frames: whether
    every frame of a video is a run of placeholders of its own, with text between, and so an image of its own; resize(height,
    width) -> what the processor makes of a size, in pixels; patch: side of a patch in pixels; cut, positions: the model's own;
    tables: what `cut` tells of every slot; unit: patches of an encoder's input come in multiples of it; clips: whether all
    frames of a video are one segment.
    """

    shape: ModelShape
    token_id: int
    video_token_id: int | None
    pixel_shape: tuple[int, ...]
    tables: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    patch: int
    resize: Callable[[int, int], tuple[int, int]] = field(compare=False)
    cut: Cut = field(compare=False)
    stock_positions: Positions = field(compare=False)
    frames: bool = False
    unit: int = UNIT
    clips: bool = False
    fixed = False
    inputs = (
        "pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids",
    )  # fmt: skip

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of images, and of videos."""
        return (self.token_id,) if self.video_token_id is None else (self.token_id, self.video_token_id)

    @property
    def layout(self) -> Layout:
        """That of an image of `shape.grid`."""
        return self.laid("image", 1, *self.shape.grid)

    def layout_of(self, height: int, width: int, images: int = 1) -> Layout:
        """That of an image as the processor resizes it by default."""
        check_size(height, width)
        height, width = self.resize(height, width)
        return self.laid("image", 1, height // self.patch, width // self.patch)

    def laid(self, kind: str, time: int, rows: int, columns: int) -> Layout:
        """A segment for every step of time, of a grid of patches, or for all of them."""
        side = math.isqrt(self.shape.group)
        grid = (time, rows // side, columns // side)
        return segments_of(kind, grid, self.shape.group, self.clips and kind == "video", broken=self.frames)

    def read(self, given: Mapping[str, Any], ids: Tensor, device: torch.device, dtype: torch.dtype) -> Images:
        """The images and videos in the order in which `ids` name them."""
        kinds = {kind: self._of_kind(kind, given, device, dtype) for kind in _KINDS}
        seconds = None if self.frames else given.get("second_per_grid_ts")
        steps = iter([1.0] * len(kinds["video"]) if seconds is None else [float(value) for value in seconds])
        sizes = [[math.prod(grid) // self.shape.group for _, grid in found] for found in kinds.values()]
        told = self._told(ids, given.get("mm_token_type_ids"), all(sizes), bool(sizes[0]))
        items = [(kind, *item) for kind, found in kinds.items() for item in found]
        items = [items[number] for number in in_order(told, dict(enumerate(sizes, start=1)))]
        laid = [(kind, grid) for kind, _, grid in items]
        if self.frames and self.clips:
            laid = _joined(laid, given.get("video_grid_thw"))
        about = tuple(self._about(kind, grid, next(steps) if kind == "video" else None) for kind, grid in laid)
        return self._images(laid, torch.cat([pixels for _, pixels, _ in items]), about)

    def blank(self, layouts: Sequence[Layout], device: torch.device, dtype: torch.dtype) -> Images:
        """As `Host.blank`."""
        side = math.isqrt(self.shape.group)
        items = [
            (layout[0].kind, (len(layout) * layout[0].grid[0], *(side * n for n in layout[0].grid[1:]))) for layout in layouts
        ]
        rows = sum(math.prod(grid) for _, grid in items)
        about = tuple(self._about(kind, grid, 1.0 if kind == "video" else None) for kind, grid in items)
        return self._images(items, torch.zeros(rows, *self.pixel_shape, device=device, dtype=dtype), about)

    def positions(self, words: np.ndarray, about: Sequence[Any]) -> np.ndarray:
        """As the stock model counts them. Raises InputError for images side by side, which it takes for one."""
        if not about:
            return np.broadcast_to(np.arange(len(words)), (self.shape.position_dims, len(words)))
        if self.frames:
            about = [(kind, (1, *grid[1:]), step) for kind, grid, step in about for _ in range(grid[0])]
        kinds = np.select([words == self.token_id, words == self.video_token_id], [1, 2], 0)
        runs = int(((kinds > 0) & (np.diff(kinds, prepend=0) != 0)).sum())
        if runs != len(about):
            raise InputError(
                f"the placeholders of {len(about)} images and videos stand in {runs} runs: put a token between two of them, "
                "as the processor does"
            )
        grids = {kind: [grid for found, grid, _ in about if found == kind] for kind in _KINDS}
        seconds = [step for *_, step in about if step is not None]
        images, videos = (torch.tensor(grids[kind]) if grids[kind] else None for kind in _KINDS)
        steps = torch.tensor(seconds) if seconds else None
        return self.stock_positions(torch.from_numpy(words), torch.from_numpy(kinds), images, videos, steps).numpy()

    def _images(self, items: Sequence[tuple[str, Sequence[int]]], pixels: Tensor, about: tuple[Any, ...]) -> Images:
        layouts, packs, cut = [], [], []
        for kind, (time, rows, columns) in items:
            layouts.append(self.laid(kind, time, rows, columns))
            tile, pack = _cut(self, rows, columns)
            # Steps of time follow one another, each in its own slots of one program.
            packs.append(packs_of(layouts[-1], pack, time, len(tile.order)))
            cut += [tile] * time
        return Images(pixels, tuple(layouts), tuple(packs), tuple(cut), about)

    def _of_kind(
        self, kind: str, given: Mapping[str, Any], device: torch.device, dtype: torch.dtype
    ) -> list[tuple[Tensor, tuple[int, ...]]]:
        """(pixels, (time, rows, columns)) of all images, or all videos."""
        name, beside = _KINDS[kind]
        pixels, grids = given.get(name), given.get(beside)
        if pixels is None:
            return []
        if not isinstance(pixels, Tensor) or not pixels.is_floating_point() or pixels.dim() != 2:
            what = f"{pixels.dtype} {tuple(pixels.shape)}" if isinstance(pixels, Tensor) else type(pixels).__name__
            raise InputError(f"{name} is {what}: pass the processor's floating-point [patches, {self.pixel_shape[0]}]")
        if pixels.shape[1:] != self.pixel_shape:
            raise InputError(f"{name} has patches of {pixels.shape[1]} values: this model takes {self.pixel_shape[0]}")
        check_device(device, name, pixels)
        if grids is None:
            raise InputError(f"{beside} is missing: pass the processor's, the grid (time, rows, columns) of every {kind}")
        found = [tuple(int(n) for n in grid) for grid in grids.tolist()]
        side = math.isqrt(self.shape.group)
        for grid in found:
            if len(grid) != 3 or min(grid) < 1 or grid[1] % side or grid[2] % side:
                raise InputError(f"{beside} holds {grid}: pass (time, rows, columns), the last two multiples of {side}")
        rows = [math.prod(grid) for grid in found]
        if sum(rows) != len(pixels):
            raise InputError(
                f"{name} has {len(pixels)} patches, {beside} counts {sum(rows)}: pass both of one processor's call"
            )
        plain = pixels.detach().to(dtype).contiguous()
        plain = plain.clone() if plain.is_inference() else plain
        if self.frames and kind == "video":
            found = [(1, *grid[1:]) for grid in found for _ in range(grid[0])]
            rows = [math.prod(grid) for grid in found]
        return list(zip(plain.split(rows), found, strict=True))

    def _about(self, kind: str, grid: tuple[int, ...], step: float | None) -> tuple[str, tuple[int, ...], float | None]:
        """What positions depend on: the kind by its placeholders."""
        return (kind, grid, step) if self.video_token_id is not None else ("image", grid, None)

    def _told(self, ids: Tensor, types: Any, both: bool, images: bool) -> Tensor:
        """The kind of every token: 0 for text, 1 for images, 2 for videos. both, images: what there is."""
        if self.video_token_id is not None:
            return 1 * (ids == self.token_id) + 2 * (ids == self.video_token_id)
        placeholder = ids == self.token_id
        if not both:
            return placeholder * (1 if images else 2)
        if not isinstance(types, Tensor) or types.shape != ids.shape:
            held = tuple(types.shape) if isinstance(types, Tensor) else type(types).__name__
            raise InputError(
                f"mm_token_type_ids is {held}: images and videos have the same placeholders, pass the processor's, of the "
                f"shape of input_ids, {tuple(ids.shape)}"
            )
        return placeholder * types.to(ids.device)


def _joined(frames: Sequence[tuple[str, tuple[int, ...]]], grids: Tensor | None) -> list[tuple[str, tuple[int, ...]]]:
    """Images and videos of (kind, grid) in the order of a prompt, in which the frames of each video are apart. grids: (time,
    rows, columns) of every video."""
    times = iter([] if grids is None else grids[:, 0].tolist())
    found: list[tuple[str, tuple[int, ...]]] = []
    left = 0  # frames to come of the video before
    for kind, grid in frames:
        if kind == "video" and left:
            left -= 1
            continue
        time = next(times) if kind == "video" else 1
        left = time - 1 if kind == "video" else left
        found.append((kind, (time, *grid[1:])))
    return found


@lru_cache(maxsize=1024)
def _cut(host: PatchedImages, rows: int, columns: int) -> tuple[Tile, Pack]:
    """How a frame of so many patches lies in the encoder, padded to its bucket, and where its tokens come from."""
    order, tables = host.cut(rows, columns)
    padding = slot_bucket(len(order), host.unit) - len(order)
    order = torch.cat((order, order.new_full((padding,), -1)))
    tables = tuple(torch.cat((table, table.new_zeros(padding, *table.shape[1:]))) for table in tables)
    slot_of = torch.empty(rows * columns, dtype=torch.int64)
    real = order >= 0
    slot_of[order[real]] = real.nonzero()[:, 0]
    side = math.isqrt(host.shape.group)
    places = grid_places(rows // side, columns // side)
    return Tile(order, tables), Pack(slot_of.reshape(-1, host.shape.group), None, places)
