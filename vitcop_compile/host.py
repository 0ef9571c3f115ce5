"""What the runtime knows of a family's images, from a configuration alone: no weights, and nothing on a device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import InputError
from .layout import Layout, Segment
from .schedule import ModelShape


@dataclass(frozen=True)
class Pack:
    """Where the N candidates of a segment come from. index: int64 [N, taps], patches of its image counted through the image's
    tiles; weight: fp32 [N, taps], None where there is one tap; places: fp32 [N, 2], (row, column) in units of the longer side
    of the segment's grid."""

    index: Tensor
    weight: Tensor | None
    places: Tensor


@dataclass(frozen=True)
class Images:
    """The images of a request, in order. pixels: [tiles, channels, height, width] of all of them; layouts: the segments of
    each; packs: those of each segment, () where an image is one tile as it is."""

    pixels: Tensor
    layouts: tuple[Layout, ...]
    packs: tuple[tuple[Pack, ...], ...] = ()

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
        parts = self.pixels.split(self.tiles)
        packs = tuple(self.packs[i] for i in index) if self.packs else ()
        return Images(torch.cat([parts[i] for i in index]), tuple(self.layouts[i] for i in index), packs)


class Host(Protocol):
    """The images of one family.

    shape: the model's numbers; token_id: that of an image's placeholders; pixel_shape: of one input of the encoder; inputs:
    the names of what a processor gives for images, pixels first; fixed: whether all images have one layout.
    """

    @property
    def shape(self) -> ModelShape: ...

    @property
    def token_id(self) -> int: ...

    @property
    def pixel_shape(self) -> tuple[int, ...]: ...

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

    def read(self, given: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Images:
        """The images of a request, checked. Raises InputError."""
        ...


@dataclass(frozen=True)
class FixedImages:
    """Images of one size: each is one input of the encoder, and its tokens are the encoder's."""

    shape: ModelShape
    token_id: int
    pixel_shape: tuple[int, ...]
    inputs: tuple[str, ...] = ("pixel_values",)
    fixed = True

    @property
    def layout(self) -> Layout:
        """The only one."""
        return (self.shape.image,)

    def layout_of(self, height: int, width: int, images: int = 1) -> Layout:
        """The only one, whatever the size: processors resize."""
        check_size(height, width)
        return self.layout

    def read(self, given: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> Images:
        """The images of `pixel_values` [images, channels, height, width]."""
        pixels = check_pixels(given["pixel_values"], self.pixel_shape, device, dtype)
        return Images(pixels, (self.layout,) * pixels.shape[0])


def blank(layouts: Sequence[Layout], host: Host, device: torch.device, dtype: torch.dtype) -> Images:
    """Black images of given layouts, one each: a request to warm programs up with."""
    tiles = sum(segment.tiles for layout in layouts for segment in layout)
    packs = () if host.fixed else tuple(tuple(_any_pack(segment) for segment in layout) for layout in layouts)
    return Images(torch.zeros(tiles, *host.pixel_shape, device=device, dtype=dtype), tuple(layouts), packs)


def _any_pack(segment: Segment) -> Pack:
    count = segment.candidates
    index = torch.zeros(count, segment.taps, dtype=torch.int64)
    weight = torch.full((count, segment.taps), 1 / segment.taps) if segment.taps > 1 else None
    return Pack(index, weight, torch.zeros(count, 2))


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
