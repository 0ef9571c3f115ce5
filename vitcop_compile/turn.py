"""One turn through the programs: samples that are alike go through them together, whatever else is in their batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache import Buffers, PrunedCache, Selection
from .prompt import Reading, align
from .schedule import Schedule


class Turn(NamedTuple):
    """ids int64 [B, T] and mask bool [B, T], which say what is new; pixels: of its images, None without; reading: what that
    is; text: text rows of the programs; filled: whether the caches hold an earlier turn."""

    ids: Tensor
    mask: Tensor
    pixels: Tensor | None
    reading: Reading
    text: int
    filled: bool


class Seen(NamedTuple):
    """The images of a turn after the vision program, [I, n, D] and [I, n] each."""

    features: Tensor
    kept: Tensor | None
    state: tuple[Tensor, ...]


def run_turn(provider: Any, schedules: dict[int, Schedule], turn: Turn, cache: PrunedCache) -> Tensor:
    """Logits [B, 1, vocab] of the last tokens; keys and values, counts and the selection go into `cache`.

    provider: as in `runtime.Provider`; schedules: by number of images. Samples with as many images share their programs; each
    set of them runs on the rows of the caches that are theirs.
    """
    seen = None
    if turn.pixels is not None:
        features, *selection = provider.vision(turn.pixels.shape[0])(turn.pixels)
        seen = Seen(features, selection[0] if selection else None, tuple(selection[1:]))
    buffers = cache.held_buffers
    if len(schedules) == 1:
        (count,) = schedules
        logits, stages = _run_alike(provider, schedules[count], turn, buffers, seen, count)
        if seen is not None:
            cache.selection = _selection(seen, stages, count, provider.image.patches)
        return logits
    found: list[tuple[list[int], Tensor, Selection]] = []
    firsts = [sum(turn.reading.images[:sample]) for sample in range(len(turn.reading.images))]
    for count, schedule in schedules.items():
        at = [sample for sample, images in enumerate(turn.reading.images) if images == count]
        part = Part(buffers, at)
        own = None
        if seen is not None and count:
            own = _take(seen, [firsts[sample] + i for sample in at for i in range(count)])
        inputs = turn._replace(ids=turn.ids[at], mask=turn.mask[at], pixels=None)
        logits, stages = _run_alike(provider, schedule, inputs, part, own, count)
        part.put_back()
        chosen = Selection() if own is None else _selection(own, stages, count, provider.image.patches)
        found.append((at, logits.clone(), chosen))
    order = torch.tensor([sample for at, *_ in found for sample in at]).argsort().to(buffers.length.device)
    if seen is not None:
        cache.selection = _joined([chosen for _, _, chosen in found], [len(at) for at, *_ in found], order)
    return torch.cat([logits for _, logits, _ in found]).index_select(0, order)


def _run_alike(
    provider: Any, schedule: Schedule, turn: Turn, buffers: Buffers | Part, seen: Seen | None, images: int
) -> tuple[Tensor, list[Tensor]]:
    """(logits [B, 1, vocab], index of each stage) of samples with `images` each, whose caches are `buffers`."""
    batch, kept = turn.ids.shape[0], schedule.segment_tokens[0] if images else 0
    tokens = turn.text + schedule.image_tokens
    prompt = align(turn.ids, turn.mask, provider.image, images, kept, tokens, schedule.shape.vocab)
    length, position, removed = buffers.length, buffers.position, buffers.removed
    if not turn.filled:
        buffers.reset()
    if seen is None:
        program = provider.extend(batch, turn.text, buffers.rows)
        logits, *stages = program(prompt.ids, prompt.last, length, position, removed, *buffers.layers)
    else:
        positions = position.unsqueeze(1) + torch.arange(tokens, device=position.device)
        positions = positions.expand(provider.position_dims, batch, tokens)
        features = seen.features.reshape(batch, schedule.image_tokens, -1)
        state = [values.reshape(batch, -1) for values in seen.state] if schedule.decoder_stages else []
        program = provider.prefill(batch, turn.text, images, buffers.rows, turn.filled)
        places = (length, removed) if turn.filled else ()
        given = (prompt.ids, prompt.last, positions.contiguous(), features, prompt.visual, *state, *places, *buffers.layers)
        logits, *stages = program(*given)
    rows = prompt.last + 1
    torch._foreach_add_([length, position], [rows, rows])
    if schedule.decoder_stages and images:
        removed.add_(_removed(schedule, removed))
    return logits, stages


def _removed(schedule: Schedule, like: Tensor) -> Tensor:
    """int64 [groups, 1]: rows that a turn of `schedule` lacks, by group."""
    entering, *after = schedule.group_tokens()
    # Filled by kernels: a tensor made of numbers would be copied from the host, which waits for the device.
    out = like.new_zeros(1 + len(after), 1)
    for group, tokens in enumerate(after, start=1):
        out[group].fill_(entering - tokens)
    return out


class Part:
    """Some samples' share of a set of buffers: a view of them where they stand together, else a copy to be put back."""

    def __init__(self, buffers: Buffers, at: Sequence[int]):
        self.rows, self._buffers = buffers.rows, buffers
        self._index: Tensor | None = None
        if list(at) == list(range(at[0], at[0] + len(at))):
            stop = at[0] + len(at)
            self.layers = [layer[at[0] : stop] for layer in buffers.layers]
            self.length, self.position = buffers.length[at[0] : stop], buffers.position[at[0] : stop]
        else:
            self._index = torch.tensor(at, device=buffers.length.device)
            self.layers = [layer.index_select(0, self._index) for layer in buffers.layers]
            self.length, self.position = (t.index_select(0, self._index) for t in (buffers.length, buffers.position))
        self._columns = torch.tensor(at, device=buffers.length.device)
        self.removed = buffers.removed.index_select(1, self._columns)  # contiguous, as programs want it

    def reset(self) -> None:
        """As `Buffers.reset`."""
        torch._foreach_zero_([self.length, self.position, self.removed])

    def put_back(self) -> None:
        """Writes what programs have changed to where it came from."""
        self._buffers.removed.index_copy_(1, self._columns, self.removed)
        if self._index is None:
            return
        for whole, part in zip(self._buffers.layers, self.layers, strict=True):
            whole.index_copy_(0, self._index, part)
        self._buffers.length.index_copy_(0, self._index, self.length)
        self._buffers.position.index_copy_(0, self._index, self.position)


def _take(seen: Seen, at: list[int]) -> Seen:
    """The images `at` of those seen."""
    index = torch.tensor(at, device=seen.features.device)
    kept = None if seen.kept is None else seen.kept.index_select(0, index)
    return Seen(seen.features.index_select(0, index), kept, tuple(values.index_select(0, index) for values in seen.state))


def _selection(seen: Seen, stages: list[Tensor], images: int, patches: int) -> Selection:
    """What stayed, counted through the images of each sample: stages count within the one before, patches within an image."""
    if seen.kept is None:
        return Selection()
    first = (torch.arange(seen.kept.shape[0], device=seen.kept.device) % images * patches).unsqueeze(1)
    kept = (seen.kept + first).reshape(-1, images * seen.kept.shape[1])
    labels = seen.state[0].clone().reshape(kept.shape) if seen.state else None
    found, current = [], kept
    for index in stages:
        current = current.gather(1, index)
        found.append(current)
    return Selection(kept, labels, tuple(found))


def _joined(parts: list[Selection], sizes: list[int], order: Tensor) -> Selection:
    """One selection of several, rows ending in -1 where there is less."""
    whole = [part for part in parts if part.kept is not None]
    if not whole:
        return Selection()

    def join(pick: Any) -> Tensor:
        values = [None if part.kept is None else pick(part) for part in parts]
        width = max(value.shape[1] for value in values if value is not None)
        like = next(value for value in values if value is not None)
        rows = [
            like.new_full((size, width), -1)
            if value is None
            else torch.nn.functional.pad(value, (0, width - value.shape[1]), value=-1)
            for value, size in zip(values, sizes, strict=True)
        ]
        return torch.cat(rows).index_select(0, order)

    stages = tuple(join(lambda part, i=i: part.stages[i]) for i in range(len(whole[0].stages)))
    labels = join(lambda part: part.labels) if whole[0].labels is not None else None
    return Selection(join(lambda part: part.kept), labels, stages)
