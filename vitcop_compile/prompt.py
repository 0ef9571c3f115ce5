"""From a padded prompt with image placeholders to the rows that prefill takes; and every check of a user's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .ops.indexing import compact


@dataclass(frozen=True)
class ImageInput:
    """How a prompt refers to an image: the placeholder's id, the shape of one image's pixels, its patches."""

    token_id: int
    pixel_shape: tuple[int, ...]
    patches: int


class Prompt(NamedTuple):
    """Rows of equal samples: ids int64 [B, rows], right-padded, images at their pruned length; last int64 [B]: row of each
    last token; visual int64 [B, n]: the rows of the images, empty without one."""

    ids: Tensor
    last: Tensor
    visual: Tensor


class Reading(NamedTuple):
    """What a turn holds, by sample, on the host: images, and text tokens beside them."""

    images: tuple[int, ...]
    text: tuple[int, ...]


def read(ids: Tensor, mask: Tensor, image: ImageInput, vocab: int) -> Reading:
    """Counts images and text of ids int64 [B, T] with mask bool [B, T], which may be on a device: one copy to the host, before
    anything is launched.

    Raises InputError for a sample without tokens, ids outside the vocabulary, placeholders that are no whole number of images,
    and text inside an image.
    """
    words, real = ids.cpu().numpy(), mask.cpu().numpy()
    placeholder = (words == image.token_id) & real
    outside = int((((words < 0) | (words >= vocab)) & real & ~placeholder).sum())
    total, counts = real.sum(1).tolist(), placeholder.sum(1).tolist()
    if not min(total):
        raise InputError("attention_mask leaves a prompt without tokens: every prompt needs at least one")
    if outside:
        raise InputError(f"input_ids holds {outside} ids outside the vocabulary of {vocab}: tokenize for this model")
    partial = [count for count in counts if count % image.patches]
    if partial:
        raise InputError(
            f"a prompt holds {partial[0]} image tokens, one image needs {image.patches}: the processor must expand every "
            "placeholder"
        )
    if any(counts):
        _check_whole(placeholder, real, image.patches)
    images = tuple(count // image.patches for count in counts)
    return Reading(images, tuple(all_ - count for all_, count in zip(total, counts, strict=True)))


def _check_whole(placeholder: np.ndarray, real: np.ndarray, patches: int) -> None:
    """Raises InputError if a token that is no placeholder stands between two of one image. Pads are no tokens."""
    slot, rank = real.cumsum(1)[placeholder], (placeholder.cumsum(1) - 1)[placeholder]
    inside = rank[1:] % patches != 0
    if (inside & (slot[1:] != slot[:-1] + 1)).any():
        raise InputError(f"the {patches} image tokens of an image are not contiguous: text cannot stand inside an image")


def check_count(images: int, reading: Reading) -> None:
    """Raises InputError unless a turn's placeholders stand for so many images."""
    wanted = sum(reading.images)
    if images and not wanted:
        raise InputError(
            "pixel_values were given but input_ids holds no image token: put the image placeholder into the prompt"
        )
    if wanted and not images:
        raise InputError(f"input_ids holds placeholders of {wanted} images but there are no pixel_values: pass the images")
    if images != wanted:
        raise InputError(f"{images} images for placeholders of {wanted}: pass as many as the prompts name")


def align(ids: Tensor, mask: Tensor, image: ImageInput, images: int, kept: int, rows: int, vocab: int) -> Prompt:
    """Drops pads, shortens each of the samples' `images` to its first `kept` placeholders, and right-pads to `rows`.

    ids: int64 [B, T]; mask: bool [B, T]. Tensor operations only, and no index leaves its tensor, whatever the ids are.
    """
    placeholder = (ids == image.token_id) & mask
    if images:
        offset = (placeholder.cumsum(1) - 1) % image.patches
        mask = mask & ~(placeholder & (offset >= kept))
        placeholder = placeholder & mask
        ids = ids.masked_fill(placeholder, 0)
    slot = (mask.cumsum(1) - 1).clamp(0, rows - 1)
    out = ids.new_zeros(ids.shape[0], rows + 1)
    out = out.scatter(1, torch.where(mask, slot, rows), ids.clamp(0, vocab - 1))[:, :rows]
    visual = slot.gather(1, compact(placeholder, images * kept)[0]) if images else slot[:, :0]
    last = (mask.sum(1) - 1).clamp(0, rows - 1)
    return Prompt(out.contiguous(), last, visual)


def check_ids(ids: object, device: torch.device) -> Tensor:
    """`ids` as int64 [B, T] on `device`, or an InputError."""
    if not isinstance(ids, Tensor):
        raise InputError(f"input_ids is a {type(ids).__name__}: pass an integer tensor [batch, tokens]")
    if ids.dim() != 2 or 0 in ids.shape:
        raise InputError(f"input_ids has shape {tuple(ids.shape)}: pass [batch, tokens], neither of them 0")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids has dtype {ids.dtype}: pass int64 token ids")
    _on(device, "input_ids", ids)
    return ids.long()


def check_mask(mask: object, ids: Tensor) -> Tensor:
    """The attention mask as bool [B, T]; None is all ones."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"attention_mask is {shape}: pass a 2D mask of the shape of input_ids, {tuple(ids.shape)}")
    _on(ids.device, "attention_mask", mask)
    return mask != 0


def check_pixels(pixels: object, image: ImageInput, device: torch.device, dtype: torch.dtype) -> Tensor:
    """pixel_values as [images, channels, height, width] in the model's dtype, or an InputError."""
    if not isinstance(pixels, Tensor):
        raise InputError(f"pixel_values is a {type(pixels).__name__}: pass the processor's tensor")
    if not pixels.is_floating_point():
        raise InputError(f"pixel_values has dtype {pixels.dtype}: pass normalised floating-point pixels")
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != image.pixel_shape:
        raise InputError(f"pixel_values has shape {tuple(pixels.shape)}: this model takes [images, *{image.pixel_shape}]")
    _on(device, "pixel_values", pixels)
    # One layout for all, and no tensor of inference mode: a compiled program would compile anew for another.
    plain = pixels.detach().to(dtype).contiguous()
    return plain.clone() if plain.is_inference() else plain


def finite(pixels: Tensor) -> Tensor:
    """Whether all pixels are finite, as a bool tensor where they are: `refuse_pixels` reads it."""
    # NaN carries through to both ends: one pass in place of the five that isfinite takes.
    return torch.isfinite(torch.stack(pixels.aminmax())).all()


def refuse_pixels(found: Tensor) -> None:
    """Raises InputError for what `finite` found not to be."""
    if not found:
        raise InputError("pixel_values holds NaN or infinite values: check the image and its normalisation")


def check_vocabulary(ids: Tensor, vocab: int) -> None:
    """Raises InputError for token ids [B, 1] outside the vocabulary."""
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise InputError(f"input_ids holds ids outside the vocabulary of {vocab}: tokenize for this model")


def _on(device: torch.device, name: str, tensor: Tensor) -> None:
    if tensor.device.type != device.type or (device.index is not None and tensor.device.index not in (None, device.index)):
        raise InputError(f"{name} is on {tensor.device}, the model on {device}: move it with .to('{device}')")
