"""From a padded prompt with image placeholders to the rows that prefill takes; and every check of a user's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .host import check_device
from .layout import Layout
from .ops.indexing import compact
from .schedule import ModelShape, Schedule


class Prompt(NamedTuple):
    """Rows of equal samples: ids int64 [B, rows], right-padded, images at their pruned length; last int64 [B]: row of each
    last token; visual int64 [B, n]: the rows of the images, empty without one; source int64 [B, rows]: the column that each
    row comes from, 0 for pads, where positions have to be looked up."""

    ids: Tensor
    last: Tensor
    visual: Tensor
    source: Tensor | None = None


class Reading(NamedTuple):
    """What a turn holds, by sample, on the host.

    images: the number of its images; layouts: their segments; text: tokens that are no candidates for pruning, protected
    tokens of images among them; words int64 [B, T], real and placeholder bool [B, T]: the ids, and which of them are tokens
    and placeholders.
    """

    images: tuple[int, ...]
    layouts: tuple[Layout, ...]
    text: tuple[int, ...]
    words: np.ndarray
    real: np.ndarray
    placeholder: np.ndarray


def read(
    ids: Tensor,
    mask: Tensor,
    token_ids: Sequence[int],
    vocab: int,
    images: Sequence[Layout],
    fixed: int | None = None,
    beams: int = 1,
) -> Reading:
    """Reads ids int64 [B, T] with mask bool [B, T], which may be on a device: one copy to the host, before anything is
    launched.

    images: the segments of every image that came with them, which samples take in order, by their placeholders, which are
    `token_ids`; fixed: placeholders of an image, where all have as many; beams: samples in a row that are one prompt, and
    share its images. Raises InputError for a sample without tokens, ids outside the vocabulary, placeholders that are not
    those of the images, and text inside an image.
    """
    words, real = ids.cpu().numpy(), mask.cpu().numpy()
    placeholder = np.logical_or.reduce([words == token for token in token_ids]) & real
    outside = int((((words < 0) | (words >= vocab)) & real & ~placeholder).sum())
    total, counts = real.sum(1).tolist(), placeholder.sum(1).tolist()
    if not min(total):
        raise InputError("attention_mask leaves a prompt without tokens: every prompt needs at least one")
    if outside:
        raise InputError(f"input_ids holds {outside} ids outside the vocabulary of {vocab}: tokenize for this model")
    sizes = [sum(segment.tokens for segment in layout) for layout in images]
    taken = assign(counts[::beams], sizes, fixed)
    firsts = np.cumsum([0, *taken]).tolist()
    own = [list(range(first, first + count)) for first, count in zip(firsts, taken) for _ in range(beams)]
    for row, images_of in enumerate(own):
        if images_of:
            _check_whole(placeholder[row], real[row], [images[i] for i in images_of])
    layouts = tuple(tuple(segment for i in images_of for segment in images[i]) for images_of in own)
    candidates = [sum(segment.candidates for segment in layout) for layout in layouts]
    text = tuple(all_ - count for all_, count in zip(total, candidates, strict=True))
    return Reading(tuple(map(len, own)), layouts, text, words, real, placeholder)


def assign(counts: Sequence[int], sizes: Sequence[int], fixed: int | None = None) -> list[int]:
    """How many of the images each sample takes, in order, until its placeholders are used up.

    counts: placeholders of each sample; sizes: of each image; fixed: of every image, where all have as many. Raises
    InputError where they do not come out even.
    """
    if fixed is not None:
        partial = [count for count in counts if count % fixed]
        if partial:
            raise InputError(
                f"a prompt holds {partial[0]} image tokens, one image needs {fixed}: the processor must expand every "
                "placeholder"
            )
    if sizes and not any(counts):
        raise InputError(
            "pixel_values were given but input_ids holds no image token: put the image placeholder into the prompt"
        )
    if not sizes and any(counts):
        held = f"placeholders of {sum(counts) // fixed} images" if fixed else f"{sum(counts)} image tokens"
        raise InputError(f"input_ids holds {held} but there are no pixel_values: pass the images")
    if fixed is not None and sum(counts) != sum(sizes):
        raise InputError(f"{len(sizes)} images for placeholders of {sum(counts) // fixed}: pass as many as the prompts name")
    taken, image = [], 0
    for count in counts:
        first, left = image, count
        while left > 0 and image < len(sizes):
            left, image = left - sizes[image], image + 1
        if left:
            raise InputError(
                f"a prompt holds {count} image tokens, its images need {', '.join(map(str, sizes[first:image])) or 'none'}: "
                "the processor must expand every placeholder, and images follow each other as their prompts do"
            )
        taken.append(image - first)
    if image != len(sizes):
        raise InputError(f"{len(sizes)} images for placeholders of {image}: pass as many as the prompts name")
    return taken


def _check_whole(placeholder: np.ndarray, real: np.ndarray, images: list[Layout]) -> None:
    """Raises InputError if a token that is no placeholder stands between two of one image, unless its segment may be broken.
    Pads are no tokens."""
    at = placeholder.nonzero()[0]
    if at[-1] - at[0] == len(at) - 1:  # nothing at all stands between them
        return
    slot = real.cumsum()[placeholder]
    apart = slot[1:] != slot[:-1] + 1
    sizes = [sum(segment.tokens for segment in layout) for layout in images]
    apart[np.cumsum(sizes)[:-1] - 1] = False
    apart &= ~np.concatenate([np.full(segment.tokens, segment.broken) for layout in images for segment in layout])[:-1]
    if apart.any():
        end = np.cumsum(sizes)
        size = sizes[int(np.searchsorted(end, int(apart.argmax()) + 1, side="right"))]
        raise InputError(f"the {size} image tokens of an image are not contiguous: text cannot stand inside an image")


class Places(NamedTuple):
    """The P placeholders of a sample. stays: bool [P], those that no selection is asked about; special: bool [P], protected
    ones that are tokens of their own; candidates: int64 [N], the others."""

    stays: Tensor
    special: Tensor
    candidates: Tensor


@lru_cache(maxsize=256)
def places_of(schedule: Schedule, device: torch.device) -> Places:
    """Those of a sample of `schedule`."""
    stays: list[bool] = []
    special: list[bool] = []
    candidates: list[int] = []
    for segment in schedule.layout:
        candidates += [len(stays) + offset for offset in segment.offsets()]
        protected = set(segment.protected)
        stays += [offset in protected for offset in range(segment.tokens)]
        special += [offset in protected and offset >= segment.lead for offset in range(segment.tokens)]
    return Places(*(torch.tensor(values, device=device) for values in (stays, special, candidates)))


@lru_cache(maxsize=256)
def _standing(schedule: Schedule) -> np.ndarray | None:
    """bool [P]: the placeholders of a sample whose rows those that stay can take, whichever stay; None if that cannot be
    told, as protected tokens or text stand between candidates not all of which stay."""
    stays: list[bool] = []
    for segment, kept in zip(schedule.layout, schedule.segment_tokens, strict=True):
        lead = segment.lead
        if len(segment.protected) != lead or (segment.broken and kept < segment.candidates):
            return None
        stays += [True] * (lead + kept) + [False] * (segment.tokens - lead - kept)
    return np.array(stays, dtype=bool)


@lru_cache(maxsize=256)
def _candidates(schedule: Schedule) -> np.ndarray:
    """int64 [N]: which placeholders of a sample are candidates."""
    first, found = 0, []
    for segment in schedule.layout:
        found += [first + offset for offset in segment.offsets()]
        first += segment.tokens
    return np.array(found, dtype=np.int64)


def align(
    reading: Reading,
    samples: Sequence[int],
    schedule: Schedule,
    kept: Tensor | None,
    rows: int,
    device: torch.device,
) -> Prompt:
    """Drops pads and the placeholders of tokens that are not kept, and right-pads to `rows`.

    samples: those of `reading` to align, all of one `schedule`; kept: int64 [B, n], the candidates that stay, counted through
    all segments, None where all do. Rows do not depend on which candidates stay, unless protected tokens or text stand between
    them: the host tells them then, where a device would need some thirty small kernels.
    """
    stays = _standing(schedule)
    if stays is None:
        given = (reading.words, reading.real, reading.placeholder)
        own, mask, at = (torch.from_numpy(values[samples]).to(device) for values in given)
        return _align_among(own, mask, at, schedule, kept, rows)
    batch, spliced = len(samples), int(stays.sum())
    ids = np.zeros((batch, rows), dtype=np.int64)
    visual = np.empty((batch, spliced), dtype=np.int64)
    last = np.empty(batch, dtype=np.int64)
    placed = schedule.placed
    source, candidates = np.zeros_like(ids if placed else ids[:0]), np.empty((batch, schedule.patches), dtype=np.int64)
    for row, sample in enumerate(samples):
        placeholder, stay = reading.placeholder[sample], reading.real[sample]
        if spliced:
            stay = stay.copy()
            stay[placeholder] = stays
            spots = placeholder[stay]
            visual[row] = spots.nonzero()[0]
            if placed:
                candidates[row] = placeholder.nonzero()[0][_candidates(schedule)]
        words = reading.words[sample][stay]
        ids[row, : len(words)] = words
        if placed:
            source[row, : len(words)] = stay.nonzero()[0]
        last[row] = len(words) - 1
    np.put_along_axis(ids, visual, 0, axis=1)
    prompt = Prompt(*(torch.from_numpy(values).to(device, non_blocking=True) for values in (ids, last, visual)))
    if not placed:
        return prompt
    found, columns = (torch.from_numpy(values).to(device, non_blocking=True) for values in (source, candidates))
    if kept is not None:
        found = found.scatter(1, prompt.visual, columns.gather(1, kept))
    return prompt._replace(source=found)


def _align_among(ids: Tensor, mask: Tensor, placeholder: Tensor, schedule: Schedule, kept: Tensor | None, rows: int) -> Prompt:
    """`align` where protected tokens stand among the candidates: on the device, as `kept` is.

    A protected token that the encoder does not know, such as a line break, becomes the id behind the vocabulary. Tensor
    operations only, and no index leaves its tensor, whatever the ids are.
    """
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    vocab, spliced = schedule.shape.vocab, schedule.image_tokens + schedule.lead
    places = places_of(schedule, ids.device)
    rank = (placeholder.cumsum(1) - 1).clamp(0, places.stays.shape[0] - 1)
    chosen = (places.candidates if kept is None else places.candidates[kept]).expand(ids.shape[0], -1)
    stays = places.stays.expand(ids.shape[0], -1).scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool)).gather(1, rank)
    mask = mask & (~placeholder | stays)
    special = placeholder & mask & places.special[rank]
    placeholder = placeholder & mask & ~special
    words = ids.masked_fill(placeholder, 0).clamp(0, vocab - 1).masked_fill(special, vocab)
    slot = (mask.cumsum(1) - 1).clamp(0, rows - 1)
    out = ids.new_zeros(ids.shape[0], rows + 1)
    out = out.scatter(1, torch.where(mask, slot, rows), words)[:, :rows]
    visual = slot.gather(1, compact(placeholder, spliced)[0])
    source = None
    if schedule.placed:
        source = ids.new_zeros(ids.shape[0], rows + 1).scatter(1, torch.where(mask, slot, rows), columns)[:, :rows]
    last = (mask.sum(1) - 1).clamp(0, rows - 1)
    return Prompt(out.contiguous(), last, visual, source)


def among(ids: Tensor, tokens: Sequence[int]) -> Tensor:
    """bool: which ids are one of `tokens`."""
    return torch.stack([ids == token for token in tokens]).any(0)


def check_ids(ids: object, device: torch.device) -> Tensor:
    """`ids` as int64 [B, T] on `device`, or an InputError."""
    if not isinstance(ids, Tensor):
        raise InputError(f"input_ids is a {type(ids).__name__}: pass an integer tensor [batch, tokens]")
    if ids.dim() != 2 or 0 in ids.shape:
        raise InputError(f"input_ids has shape {tuple(ids.shape)}: pass [batch, tokens], neither of them 0")
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(f"input_ids has dtype {ids.dtype}: pass int64 token ids")
    check_device(device, "input_ids", ids)
    return ids.long()


def check_mask(mask: object, ids: Tensor) -> Tensor:
    """The attention mask as bool [B, T]; None is all ones."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"attention_mask is {shape}: pass a 2D mask of the shape of input_ids, {tuple(ids.shape)}")
    check_device(ids.device, "attention_mask", mask)
    return mask != 0


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


def check_length(shape: ModelShape, prompt: tuple[int, int], new_tokens: int) -> None:
    """Raises InputError where a model of `shape` has no place for a prompt and `new_tokens`.

    prompt: (rows, positions) that its sequences reach; tokens that were pruned have positions too where all keep theirs."""
    rows, positions = prompt
    if rows + new_tokens > shape.most_tokens:
        limit = f"{shape.max_positions}" if shape.most_tokens == shape.max_positions else f"a window of {shape.window}"
        raise InputError(
            f"a prompt of {rows} rows and {new_tokens} new tokens need {rows + new_tokens} positions, the model has "
            f"{limit}: shorten the prompt or lower max_new_tokens"
        )
    if positions + new_tokens > shape.max_positions:
        raise InputError(
            f"a prompt of {positions} positions, which pruned tokens keep, and {new_tokens} new tokens need "
            f"{positions + new_tokens}, the model has {shape.max_positions}: shorten the prompt or lower max_new_tokens"
        )
