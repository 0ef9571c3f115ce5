"""The slots of a decode batch: one set of caches of fixed rows, in which every kind of prompt is decoded together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache import Buffers
from ..isolation import plain
from ..layout import Layout
from ..prompt import Prompt
from ..runtime import CompiledModel
from ..turn import Given, Part, call, give
from ..vision import Part as Seen
from .features import Features
from .intake import Request, blanks, examine, room_of
from .requests import Sampling

# Prompts, or pictures, that go through programs which are compiled on demand for every number.
_AT_ONCE = (1, 2, 4)


class Slots:
    """`count` sequences that are decoded together by the programs of `model`, an `OptimizedModel` or `EngineModel`.

    Every slot has room for `text_tokens` of text, padded to its bucket, the visual tokens of the largest prompt and
    `max_new_tokens`: its rows are the same whatever it holds, so that text, one image and several share a program for
    decoding, and a batch. A slot that is free is decoded along, and stays where it is.

    text_tokens, max_new_tokens: 512 and 256 by default, of a folder its own; layouts: what prompts may hold beside text, as in
    `export`, by default one image where all have one size, of a folder its own; prefill_batches: numbers of prompts that go
    through prefill together, of a folder those that it was exported for; feature_bytes: what is kept at most of pictures that
    were seen, 0 for nothing.

    Raises ConfigError where the programs cannot be had for these. One thread calls everything but `examine`, within
    `isolation.plain`.
    """

    def __init__(
        self,
        model: CompiledModel,
        count: int,
        *,
        text_tokens: int | None = None,
        max_new_tokens: int | None = None,
        layouts: Sequence[Sequence[Layout]] | None = None,
        prefill_batches: Sequence[int] = _AT_ONCE,
        feature_bytes: int = 256 * 2**20,
    ):
        self.model, self.count = model, count
        self.room = room_of(model, count, text_tokens, max_new_tokens, layouts, prefill_batches)
        self.device = model.device
        ends = model.generation_config.eos_token_id
        self.ends: tuple[int, ...] = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
        manifest = getattr(model, "manifest", None)  # of a folder, whose programs are of some sizes
        self._features = Features(model.provider, feature_bytes, _AT_ONCE if manifest is None else manifest.batch_sizes)
        self._version = 0
        self._buffers = self._caches(count)
        self._stages: dict[int, Buffers] = {}
        with plain():  # a tensor of inference mode could not be written to outside of it
            self._step = torch.zeros(count, dtype=torch.int64, device=self.device)
            self._last = torch.zeros(count, 1, dtype=torch.int64)
        self._text_rows = self._padded_rows = 0

    @property
    def batches(self) -> tuple[int, ...]:
        """Numbers of prompts that go through prefill together, ascending; fewer than the first do, too."""
        return self.room.batches

    def examine(self, inputs: Mapping[str, Any], sampling: Sampling) -> Request:
        """A prompt, read and checked, from any thread. Raises InputError."""
        return examine(self.model, self.room, self.count, inputs, sampling)

    def warmup(self) -> int:
        """Makes, or loads, and runs the programs of every text bucket, batch and kind of prompt that there is room for, and of
        decoding, so that no request waits for one; how many kinds of batches that were."""
        again, count = 3 if self.device.type == "cuda" else 1, 0  # CUDA graphs are recorded in the second call
        kept, self._features = self._features, Features(self.model.provider, 0, self._features.sizes)
        with plain():
            for request in blanks(self.model, self.room, self.count):
                for size in self.batches:
                    count += 1
                    for _ in range(again):
                        self.prefill([_with_own_pictures(request, number) for number in range(size)], [[]] * size)
            for _ in range(again):
                self.decode([0] * self.count)
        self._features, self._text_rows, self._padded_rows = kept, 0, 0
        return count

    def prefill(self, requests: Sequence[Request], places: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B, vocab] of the last tokens of B prompts with one `Request.key`, each of which goes into its `places`."""
        self._begin()
        check = getattr(self.model, "check_weights", None)
        if check is not None:
            check()
        if (version := getattr(self.model, "weights_version", 0)) != self._version:  # features of the weights as they were
            self._features.clear()
            self._version = version
        first = requests[0]
        owns = self._features.of(requests)
        each = [give(of.turn, [0], of.schedule, own, self.device) for of, own in zip(requests, owns, strict=True)]
        given, staged = each[0] if len(each) == 1 else _joined(each), self._staged(len(requests))
        if given.own is None:  # what extends caches writes its own rows alone
            torch._foreach_zero_(staged.written)
        logits, _ = call(self.model.provider, first.schedule, first.turn.text, given, staged, filled=False)
        for row, slots in enumerate(places):
            for slot in slots:
                self._take(slot, staged, row)
        text = sum(request.text_tokens for request in requests)
        size = next((size for size in self.batches if size >= len(requests)), len(requests))
        self._text_rows += text
        self._padded_rows += size * first.turn.text - text
        return logits[:, -1]

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Logits [slots, vocab] behind one more token of each slot, whatever it is for those that are free."""
        self._begin()
        buffers = self._buffers
        self._last.numpy()[:, 0] = tokens
        buffers.token.copy_(self._last)
        step = self.model.provider.extend(self.count, 1, buffers.rows)
        places = (buffers.length, buffers.position, buffers.removed)
        logits, *_ = step(buffers.token, buffers.last, *places, *buffers.written)
        torch._foreach_add_([buffers.length, buffers.position], [self._step, self._step])
        return logits[:, -1]

    def free(self, slots: Sequence[int]) -> None:
        """Lets these slots go: decoding writes their first row from now on, over and over."""
        at, buffers = torch.tensor(slots, device=self.device), self._buffers
        for counts in (self._step, buffers.length, buffers.position):
            counts.index_fill_(0, at, 0)
        buffers.removed.index_fill_(1, at, 0)

    def clear(self) -> None:
        """Forgets everything but the features: after an error, caches may hold anything."""
        torch._foreach_zero_([*self._buffers.written, self._step])
        self._buffers.reset()
        self._stages.clear()

    def counts(self) -> dict[str, float]:
        """Totals since the start, see `Scheduler.counts`."""
        return {
            "padded_rows": self._padded_rows,
            "text_rows": self._text_rows,
            "feature_hits": self._features.hits,
            "feature_misses": self._features.misses,
        }

    def bytes(self) -> int:
        """Of the caches of all slots, those that prompts are prefilled in left out."""
        return sum(tensor.nbytes for tensor in self._buffers.written)

    def _begin(self) -> None:
        if self.device.type == "cuda":  # logits that were told are drawn from by now: CUDA graphs may write over them
            torch.compiler.cudagraph_mark_step_begin()

    def _caches(self, batch: int) -> Buffers:
        schedule, rows = self.model.schedule, self.room.rows
        like = torch.empty((), dtype=self.model.dtype, device=self.device)
        return Buffers(schedule.cache_shapes(batch, rows), rows, like, schedule.told)

    def _staged(self, batch: int) -> Buffers | Part:
        """Caches that `batch` prompts are prefilled in."""
        if self.device.type != "cpu":  # each number its own: CUDA graphs are recorded for addresses
            return self._stages.setdefault(batch, self._stages.get(batch) or self._caches(batch))
        most = max(self._stages, default=0)
        if most < batch:
            self._stages = {batch: self._caches(batch)}
            return self._stages[batch]
        return self._stages[most] if most == batch else Part(self._stages[most], range(batch))

    def _take(self, slot: int, staged: Buffers | Part, row: int) -> None:
        """Copies a row of sequences into a slot, with the zeros behind it: nothing is left of what the slot held."""
        buffers = self._buffers
        mine = [tensor[slot] for tensor in (*buffers.written, buffers.length, buffers.position)]
        theirs = [tensor[row] for tensor in (*staged.written, staged.length, staged.position)]
        for own, other in zip(mine, theirs, strict=True):
            own.copy_(other)
        buffers.removed[:, slot].copy_(staged.removed[:, row])
        self._step[slot].fill_(1)


def _with_own_pictures(request: Request, number: int) -> Request:
    """A blank request whose pictures are those of no other number: each would be seen once else."""
    pictures = tuple(own._replace(digest=b"%d %d" % (number, place)) for place, own in enumerate(request.pictures))
    return request._replace(pictures=pictures)


def _joined(each: Sequence[Given]) -> Given:
    """Prompts that are alike as one batch."""
    prompts, owns = [given.prompt for given in each], [given.own for given in each if given.own is not None]
    source = None if prompts[0].source is None else torch.cat([prompt.source for prompt in prompts])  # type: ignore[misc]
    ids, last, visual = (torch.cat(values) for values in zip(*(prompt[:3] for prompt in prompts), strict=True))
    own = kept = positions = None
    if owns:
        kept = None if each[0].kept is None else torch.cat([given.kept for given in each])  # type: ignore[misc]
        chosen = None if owns[0].kept is None else torch.cat([part.kept for part in owns])  # type: ignore[misc]
        state = tuple(torch.cat(values) for values in zip(*(part.state for part in owns), strict=True))
        own = Seen(torch.cat([part.features for part in owns]), chosen, state)
    if each[0].positions is not None:
        positions = torch.cat([given.positions for given in each], 1)  # type: ignore[misc]
    return Given(Prompt(ids, last, visual, source), own, kept, positions, torch.cat([given.taken for given in each]))
