"""One turn through the programs: samples that are alike go through them together, whatever else is in their batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import vision
from .cache import Buffers, PrunedCache, Selection
from .host import Host, Images
from .layout import Layout
from .prompt import Prompt, Reading, align
from .schedule import Schedule
from .vision import Seen, gather, see


class Turn(NamedTuple):
    """images: those that are new, None without; reading: what is new; schedules: of every sample; text: text rows of the
    programs; filled: whether the caches hold an earlier turn; beams: samples in a row that are one prompt;
    positions: int64 [dims, B, T], of all tokens, from 0 on; taken: int64 [B], positions that the turn takes; both None where
    a token's position is its row."""

    images: Images | None
    reading: Reading
    schedules: tuple[Schedule, ...]
    text: int
    filled: bool
    beams: int = 1
    positions: np.ndarray | None = None
    taken: np.ndarray | None = None


def positions_of(host: Host, reading: Reading, about: Sequence[Any], beams: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [dims, B, T]: positions of all tokens of a turn, from 0 on, 0 for pads; int64 [B]: how many they take).

    As in the stock models, what follows a turn goes on behind the largest position of it."""
    batch, columns = reading.words.shape
    out = np.zeros((host.shape.position_dims, batch, columns), dtype=np.int64)
    first = 0
    for sample in range(0, batch, beams):
        count = reading.images[sample]
        for beam in range(sample, sample + beams):
            real = reading.real[beam]
            out[:, beam, real] = host.positions(reading.words[beam][real], about[first : first + count])
        first += count
    return out, out.max((0, 2)) + 1


def run_turn(provider: Any, turn: Turn, cache: PrunedCache) -> Tensor:
    """Logits [B, 1, vocab] of the last tokens; keys and values, counts and the selection go into `cache`.

    provider: as in `runtime.Provider`. Samples with the same images share their programs; each set of them runs on the rows of
    the caches that are theirs.
    """
    seen = None
    if turn.images is not None:
        each = slice(None, None, turn.beams)
        seen = see(provider, turn.images, turn.reading.images[each], turn.schedules[each])
    buffers = cache.held_buffers
    alike: dict[Layout, list[int]] = {}
    for sample, layout in enumerate(turn.reading.layouts):
        alike.setdefault(layout, []).append(sample)
    if len(alike) == 1:
        logits, chosen = _run_alike(provider, turn.schedules[0], turn, buffers, seen, list(range(len(turn.schedules))))
        if seen is not None:
            cache.selection = chosen
        return logits
    found: list[tuple[list[int], Tensor, Selection]] = []
    for at in alike.values():
        part = Part(buffers, at)
        logits, chosen = _run_alike(provider, turn.schedules[at[0]], turn, part, seen, at)
        part.put_back()
        found.append((at, logits.clone(), chosen))
    order = torch.tensor([sample for at, *_ in found for sample in at]).argsort().to(buffers.length.device)
    if seen is not None:
        cache.selection = _joined([chosen for _, _, chosen in found], [len(at) for at, *_ in found], order)
    return torch.cat([logits for _, logits, _ in found]).index_select(0, order)


class Given(NamedTuple):
    """B samples that are alike, as their programs take them. prompt: their rows; own: their images, None without; kept: int64
    [B, n], what stays before the decoder, counted through all segments, None where all do; positions: int64 [dims, B, rows],
    from 0 on, None where a token's position is its row; taken: int64 [B], positions that the turn takes."""

    prompt: Prompt
    own: vision.Part | None
    kept: Tensor | None
    positions: Tensor | None
    taken: Tensor


def give(turn: Turn, samples: list[int], schedule: Schedule, own: vision.Part | None, device: torch.device) -> Given:
    """`samples` of a turn, which have one `schedule`, with what the vision side has made of their images, None without."""
    kept = None if own is None or own.kept is None else _through(own.kept, schedule)
    prompt = align(turn.reading, samples, schedule, kept, turn.text + schedule.image_tokens, device)
    taken = prompt.last + 1
    if turn.taken is not None:
        taken = torch.from_numpy(turn.taken[samples]).to(device, non_blocking=True)
    positions = None
    if own is not None and prompt.source is not None:
        assert turn.positions is not None
        dense = torch.from_numpy(turn.positions[:, samples]).to(device, non_blocking=True)
        positions = dense.gather(2, prompt.source.expand(len(dense), -1, -1))
    return Given(prompt, own, kept, positions, taken)


def call(
    provider: Any, schedule: Schedule, text: int, given: Given, buffers: Buffers | Part, filled: bool
) -> tuple[Tensor, list[Tensor]]:
    """(logits [B, 1, vocab], what stays at each stage of the decoder) of samples with `text` text rows, whose keys and values
    go into `buffers`, behind those that are there where `filled` says so."""
    prompt, own, (batch, tokens) = given.prompt, given.own, given.prompt.ids.shape
    length, position, removed = buffers.length, buffers.position, buffers.removed
    if not filled:
        buffers.reset()
    if own is None:
        program = provider.extend(batch, text, buffers.rows)
        logits, *stages = program(prompt.ids, prompt.last, length, position, removed, *buffers.written)
    else:
        within = torch.arange(tokens, device=length.device) if given.positions is None else given.positions
        positions = (position.unsqueeze(1) + within).expand(provider.position_dims, batch, tokens)
        state = own.state if schedule.follows else ()
        places = (length, removed) if filled else ()
        program = provider.prefill(batch, text, schedule, buffers.rows, filled)
        inputs = (prompt.ids, prompt.last, positions.contiguous(), own.features, prompt.visual, *state, *places)
        logits, *stages = program(*inputs, *buffers.written)
    torch._foreach_add_([length, position], [prompt.last + 1, given.taken])
    if schedule.decoder_stages and schedule.layout:
        removed.add_(_removed(schedule, removed))
    return logits, stages


def _run_alike(
    provider: Any, schedule: Schedule, turn: Turn, buffers: Buffers | Part, seen: Seen | None, samples: list[int]
) -> tuple[Tensor, Selection]:
    """(logits [B, 1, vocab], what stayed) of `samples` of one schedule, whose caches are `buffers`."""
    own = gather(seen, [sample // turn.beams for sample in samples]) if seen is not None and schedule.layout else None
    given = give(turn, samples, schedule, own, buffers.length.device)
    logits, stages = call(provider, schedule, turn.text, given, buffers, turn.filled)
    return logits, Selection() if own is None else _selection(own, given.kept, stages)


def _through(kept: Tensor, schedule: Schedule) -> Tensor:
    """kept int64 [B, n], counted within each segment, counted through all of them."""
    if len(schedule.layout) == 1:
        return kept
    first, parts = 0, []
    for segment, count in zip(schedule.layout, schedule.segment_tokens, strict=True):
        parts.append(kept.new_zeros(count).fill_(first))
        first += segment.candidates
    return kept + torch.cat(parts)


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
            self.written = [rows[at[0] : stop] for rows in buffers.written]
            self.length, self.position = buffers.length[at[0] : stop], buffers.position[at[0] : stop]
        else:
            self._index = torch.tensor(at, device=buffers.length.device)
            self.written = [rows.index_select(0, self._index) for rows in buffers.written]
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
        for whole, part in zip(self._buffers.written, self.written, strict=True):
            whole.index_copy_(0, self._index, part)
        self._buffers.length.index_copy_(0, self._index, self.length)
        self._buffers.position.index_copy_(0, self._index, self.position)


def _selection(own: vision.Part, kept: Tensor | None, stages: list[Tensor]) -> Selection:
    """What stayed, counted through the segments of each sample: stages count within the one before."""
    if kept is None and not stages:
        return Selection()
    labels = own.state[0].clone() if own.state else None
    found, current = [], kept
    for index in stages:
        # Where all enter the decoder, its first stage counts through all.
        current = index.clone() if current is None else current.gather(1, index)
        found.append(current)
    return Selection(None if kept is None else kept.clone(), labels, tuple(found))


def _joined(parts: list[Selection], sizes: list[int], order: Tensor) -> Selection:
    """One selection of several, rows ending in -1 where there is less."""
    there = [part.kept is not None or bool(part.stages) for part in parts]
    if not any(there):
        return Selection()
    first = parts[there.index(True)]

    def join(pick: Any) -> Tensor:
        values = [pick(part) if own else None for part, own in zip(parts, there, strict=True)]
        width = max(value.shape[1] for value in values if value is not None)
        like = next(value for value in values if value is not None)
        rows = [
            like.new_full((size, width), -1)
            if value is None
            else torch.nn.functional.pad(value, (0, width - value.shape[1]), value=-1)
            for value, size in zip(values, sizes, strict=True)
        ]
        return torch.cat(rows).index_select(0, order)

    stages = tuple(join(lambda part, i=i: part.stages[i]) for i in range(len(first.stages)))
    labels = join(lambda part: part.labels) if first.labels is not None else None
    kept = join(lambda part: part.kept) if first.kept is not None else None
    return Selection(kept, labels, stages)
