"""From a padded prompt with image placeholders to the rows that prefill takes; and every check of a user's inputs."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Prompt:
    """ids int64 [B, rows], right-padded, images at their pruned length; last int64 [B]: row of each last token; visual int64
    [B, n]: the rows of the image, None without one."""

    ids: Tensor
    last: Tensor
    visual: Tensor | None


def align(ids: Tensor, mask: Tensor, image_token: int, image_tokens: int, rows: int, image: bool, vocab: int) -> Prompt:
    """Drops pads, shortens every image to its first `image_tokens` placeholders, and right-pads to `rows`.

    ids: int64 [B, T]; mask: bool [B, T]. Tensor operations only: nothing is read back to the host. Values that a later check
    will refuse are bounded, so that no index leaves its tensor until then.
    """
    placeholder = (ids == image_token) & mask
    kept = mask & ~(placeholder & (placeholder.cumsum(1) > image_tokens)) if image else mask
    slot = (kept.cumsum(1) - 1).clamp(0, rows - 1)
    text = (ids.masked_fill(placeholder, 0) if image else ids).clamp(0, vocab - 1)
    out = ids.new_zeros(ids.shape[0], rows + 1)
    out = out.scatter(1, torch.where(kept, slot, rows), text)[:, :rows]
    visual = None
    if image:
        visual = slot.gather(1, compact(placeholder & kept, image_tokens)[0])
    last = (kept.sum(1) - 1).clamp(image_tokens - 1 if image else 0, rows - 1)
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


def check_pixels(pixels: object, image: ImageInput, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """pixel_values as [B, channels, height, width] in the model's dtype, or an InputError."""
    if not isinstance(pixels, Tensor):
        raise InputError(f"pixel_values is a {type(pixels).__name__}: pass the processor's tensor")
    if not pixels.is_floating_point():
        raise InputError(f"pixel_values has dtype {pixels.dtype}: pass normalised floating-point pixels")
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != image.pixel_shape:
        raise InputError(f"pixel_values has shape {tuple(pixels.shape)}: this model takes [images, *{image.pixel_shape}]")
    if pixels.shape[0] != batch:
        raise InputError(
            f"{pixels.shape[0]} images for {batch} prompts: exactly one image per prompt is supported; split the request"
        )
    _on(device, "pixel_values", pixels)
    # One layout for all, and no tensor of inference mode: a compiled program would compile anew for another.
    plain = pixels.detach().to(dtype).contiguous()
    return plain.clone() if plain.is_inference() else plain


def facts(ids: Tensor, mask: Tensor, pixels: Tensor | None, image_token: int, vocab: int) -> Tensor:
    """What only the data can tell, as int64 [6] on the device of `ids`: `refuse` reads it."""
    placeholder = (ids == image_token) & mask
    count = placeholder.sum(1)
    rank = placeholder.cumsum(1)
    first = ((rank == 0) & ~placeholder).sum(1)
    last = ids.shape[1] - 1 - (placeholder.flip(1).cumsum(1) == 0).sum(1)
    gaps = ((last - first + 1 != count) & (count > 0)).sum()
    outside = ((ids < 0) | (ids >= vocab)) & mask & ~placeholder
    finite = gaps.new_ones(())
    if pixels is not None:
        # NaN carries through to both ends: one pass in place of the five that isfinite takes.
        finite = torch.isfinite(torch.stack(pixels.aminmax())).all().long()
    return torch.stack([count.min(), count.max(), gaps, outside.sum(), mask.sum(1).min(), finite])


def refuse(found: Tensor, image: bool, patches: int, vocab: int) -> None:
    """Raises InputError for `facts` of inputs that the programs cannot take; image: whether there were pixels.

    Token ids in the vocabulary; no empty prompt; one contiguous run of placeholders per prompt if there are pixels and none
    otherwise; finite pixels. A single read from the device.
    """
    least, most, gaps, outside, shortest, finite = found.tolist()
    if shortest == 0:
        raise InputError("attention_mask leaves a prompt without tokens: every prompt needs at least one")
    if outside:
        raise InputError(f"input_ids holds {outside} ids outside the vocabulary of {vocab}: tokenize for this model")
    if not finite:
        raise InputError("pixel_values holds NaN or infinite values: check the image and its normalisation")
    if not image:
        if most:
            raise InputError(f"input_ids holds {most} image tokens but there are no pixel_values: pass the image")
        return
    if most == 0:
        raise InputError(
            "pixel_values were given but input_ids holds no image token: put the image placeholder into the prompt"
        )
    if least == 0:
        raise InputError("some prompts of the batch have an image and some have none: run them as two batches")
    if least != patches or most != patches:
        count = least if least != patches else most
        raise InputError(
            f"a prompt holds {count} image tokens, one image needs {patches}: exactly one image per prompt is supported, "
            "and the processor must expand its placeholder"
        )
    if gaps:
        raise InputError(f"the {patches} image tokens of a prompt are not contiguous: text cannot stand inside an image")


def check_vocabulary(ids: Tensor, vocab: int) -> None:
    """Raises InputError for token ids [B, 1] outside the vocabulary."""
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocab:
        raise InputError(f"input_ids holds ids outside the vocabulary of {vocab}: tokenize for this model")


def _on(device: torch.device, name: str, tensor: Tensor) -> None:
    if tensor.device.type != device.type or (device.index is not None and tensor.device.index not in (None, device.index)):
        raise InputError(f"{name} is on {tensor.device}, the model on {device}: move it with .to('{device}')")
