"""The pruned KV cache: static buffers, a different number of rows in every layer, used again from request to request."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .errors import InputError

# What transformers calls a cache among arguments and results: it was renamed in 5.24.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass(frozen=True)
class Selection:
    """Which visual tokens of a turn stayed. Every entry is int64 [B, ...]; None or empty where nothing was pruned there.

    Tokens are counted through all images of a sample, in raster order: with 576 patches an image, 600 is in the second. Where
    samples differ in their images, rows end in -1.

    kept: [B, n], what left the vision stage; labels: [B, n], their clusters, counted anew in each image; stages: for each
    decoder stage [B, tokens], what left it.
    """

    kept: Tensor | None = None
    labels: Tensor | None = None
    stages: tuple[Tensor, ...] = ()


class PrunedCache(Cache):
    """KV cache of a conversation: filled by prefill, extended in place by every token and turn after it.

    `get_seq_length()` is logical: the tokens of `input_ids` seen so far, image placeholders included, as transformers' loop
    expects. `buffers` holds key_0, value_0, key_1, ...: [B, kv_heads, rows_l, hd]. On the device, by sample: `length` int64
    [B], tokens as layer 0 sees them; `position` int64 [B], that of the next token; `removed` int64 [groups, B], the rows that
    each group of layers lacks. `selection` tells which visual tokens of the last turn with an image stayed. When the cache is
    gone, its buffers serve another request: clone what has to outlive it.

    max_length: of `input_ids` at the end of the turn, None if nobody knows.
    """

    def __init__(self, max_length: int | None = None):
        super().__init__(layers=[])
        self.max_length = max_length
        self.selection = Selection()
        self.images: tuple[int, ...] = ()
        self.placeholders: tuple[int, ...] = ()
        self.held: tuple[int, ...] = ()
        self._lengths: list[int] = []
        self._positions: list[int] = []
        self._removed: list[list[int]] = []
        self._buffers: Buffers | None = None
        self._seen = 0
        self._room = 0
        self._check: Callable[[], None] | None = None
        self._strays: Tensor | None = None

    @property
    def buffers(self) -> list[Tensor]:
        """key_0, value_0, key_1, ...; empty before the prompt."""
        return self._buffers.layers if self._buffers else []

    @property
    def held_buffers(self) -> Buffers:
        """The set of buffers that is this cache's. Raises InputError before the prompt."""
        if self._buffers is None:
            raise InputError("the cache is empty: pass a prompt first")
        return self._buffers

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of the buffers of each group of layers."""
        return self._buffers.rows if self._buffers else ()

    def __getattr__(self, name: str) -> Tensor:
        if name in ("length", "position", "removed", "token", "last") and self.__dict__.get("_buffers"):
            return getattr(self._buffers, name)
        raise AttributeError(name)

    def take(self, buffers: Buffers, clear: bool = True) -> None:
        """Makes `buffers` those of this cache; what an earlier set held moves along. clear: no program writes all of it."""
        if self.filled:
            buffers.copy(self.held_buffers)
        elif clear:
            buffers.clear()
        if self._buffers is not None:
            self._buffers.give_back()
        self._buffers = buffers

    def release(self) -> None:
        """Gives the buffers back before the cache is garbage; it is empty afterwards."""
        if self._buffers is not None:
            self._buffers.give_back()
        self.__init__(self.max_length)  # type: ignore[misc]

    @contextlib.contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """A turn that ends in an error within the context leaves the counts on the device as they were: it can be tried
        again."""
        held = self.held_buffers
        counts = (held.length, held.position, held.removed)
        before = [tensor.clone() for tensor in counts] if self.filled else []
        try:
            yield
        except BaseException:
            for tensor, value in zip(counts, before):
                tensor.copy_(value)
            raise

    def reaches(self, rows: list[int], positions: list[int]) -> tuple[int, int]:
        """(rows of layer 0, positions) that the longest samples reach with a turn that takes so many of each, by sample."""
        most = [max(values) for values in self._with(rows, positions)]
        return most[0], most[1]

    def _with(self, rows: list[int], positions: list[int]) -> list[list[int]]:
        held = (self._lengths or [0] * len(rows), self._positions or [0] * len(rows))
        return [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(held, (rows, positions), strict=True)]

    def account(
        self,
        columns: int,
        rows: list[int],
        removed: list[list[int]],
        images: tuple[int, ...],
        placeholders: tuple[int, ...],
        positions: list[int],
    ) -> None:
        """Counts, on the host, a turn that the programs have written.

        columns: of `input_ids`; rows: by sample, in layer 0; removed: by group and sample, rows that the turn lacks there;
        images, their placeholders, and the positions that the turn takes: by sample.
        """
        self._seen += columns
        self._lengths, self._positions = self._with(rows, positions)
        before = self._removed or [[0] * len(rows) for _ in removed]
        self._removed = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, removed, strict=True)]
        none = (0,) * len(rows)
        self.images = tuple(a + b for a, b in zip(self.images or none, images, strict=True))
        self.placeholders = tuple(a + b for a, b in zip(self.placeholders or none, placeholders, strict=True))
        # The fullest caches of each group: what a plan of the next turn has to leave alone.
        self.held = tuple(max(a - b for a, b in zip(self._lengths, group)) for group in self._removed)
        self._room = min(rows - held for rows, held in zip(self.rows, self.held, strict=True))

    def advance(self) -> None:
        """Accounts for the token that decode has written."""
        self.length.add_(1)
        self.position.add_(1)
        self._lengths = [length + 1 for length in self._lengths]
        self._positions = [position + 1 for position in self._positions]
        self.held = tuple(held + 1 for held in self.held)
        self._seen += 1
        self._room -= 1

    def check_room(self) -> None:
        """Raises InputError when no row is left for another token."""
        if self._room < 1:
            raise InputError(
                f"the KV cache is full after {self._seen} tokens: generate with a larger max_new_tokens, which sizes it"
            )

    def expect(self, check: Callable[[], None]) -> None:
        """Postpones a check of values to the first time the host waits for the device anyway."""
        self._check = check

    def verify(self) -> None:
        """Raises InputError if pixels, or tokens after the prompt, were not what programs take. Waits for the device.

        Where values live on a GPU, reading them back before the first token would stall it: pixels are checked by the next
        `forward` on this cache, and all when `generate` returns. Whoever calls `forward` alone may call this.
        """
        self.verify_prompt()
        strays, self._strays = self._strays, None
        if strays is not None and not strays.is_meta and int(strays):
            raise InputError(f"{int(strays)} input_ids were outside the vocabulary: tokenize for this model")

    def verify_prompt(self) -> None:
        """`verify` without the tokens after the prompt; waits for the device once."""
        check, self._check = self._check, None
        if check is not None and not self.length.is_meta:
            check()

    def take_token(self, ids: Tensor, vocab: int, check: bool) -> None:
        """Makes ids int64 [B, 1] the next step's `token`.

        check: count ids outside the vocabulary for `verify`. They are bounded meanwhile: on a GPU an index that leaves its
        table ends the whole process's use of the device.
        """
        if not check:
            self.token.copy_(ids)
            return
        self.token.copy_(ids.clamp(0, vocab - 1))
        found = (self.token != ids).sum()
        self._strays = found if self._strays is None else self._strays + found

    @property
    def batch(self) -> int:
        """Sequences in the cache."""
        return len(self._lengths)

    @property
    def filled(self) -> bool:
        """Whether a prompt is in."""
        return self._seen > 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self._seen + self._room

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows the surviving beams, in place: the buffers keep their addresses."""
        held = self.held_buffers
        for tensor in (*held.written, held.length, held.position):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        self.removed.copy_(self.removed.index_select(1, beam_idx.to(self.removed.device)))

    def layer_rows(self) -> list[int]:
        """Rows of each layer's buffers."""
        return [buffer.shape[2] for buffer in self.buffers[::2]]

    def __repr__(self) -> str:
        return f"PrunedCache(seen={self._seen}, room={self._room}, rows={self.layer_rows()})"


class Buffers:
    """The tensors of one cache: `layers` key_0, value_0, ... and, by sample, `length`, `position`, `last` int64 [B], `token`
    int64 [B, 1], `removed` int64 [groups, B]; `numbers` int64 [B, r] of each group in `told`, of its rows: positions, where
    masks are made of them, or how many tokens they stand for.

    rows: of each group of layers; told: as `Schedule` has it. Compiled programs are told that their addresses hold, so that
    CUDA graphs copy none of them.
    """

    def __init__(self, shapes: list[tuple[int, ...]], rows: tuple[int, ...], like: Tensor, told: tuple[int, ...] = ()):
        batch, self.rows = shapes[0][0], rows
        self.give_back: Callable[[], Any] = lambda: None
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            self.layers = [like.new_zeros(shape) for shape in shapes for _ in "kv"]
            self.length, self.position, self.last = (like.new_zeros(batch, dtype=torch.int64) for _ in range(3))
            self.token = like.new_zeros(batch, 1, dtype=torch.int64)
            self.removed = like.new_zeros(len(rows), batch, dtype=torch.int64)
            self.numbers = [like.new_zeros(batch, rows[group], dtype=torch.int64) for group in told]
        if like.is_cuda:
            for tensor in (*self.written, self.length, self.position, self.last, self.token, self.removed):
                # Without a guard: other addresses record another graph, they do not compile another program.
                torch._dynamo.mark_static_address(tensor, guard=False)

    @property
    def written(self) -> list[Tensor]:
        """What programs write rows into, in their order."""
        return [*self.numbers, *self.layers]

    def clear(self) -> None:
        """Zeros everything: what an earlier request left might not be finite, and even what no query attends to is
        multiplied."""
        torch._foreach_zero_(self.layers)
        self.reset()

    def reset(self) -> None:
        """Forgets what the rows belonged to; the rows stay."""
        torch._foreach_zero_([self.length, self.position, self.removed])

    def copy(self, other: Buffers) -> None:
        """Takes over another set, which has no more rows than this one."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine[:, :, : theirs.shape[2]].copy_(theirs)
            mine[:, :, theirs.shape[2] :].zero_()
        for mine, theirs in zip(self.numbers, other.numbers, strict=True):
            mine[:, : theirs.shape[1]].copy_(theirs)
        for name in ("length", "position", "removed"):
            getattr(self, name).copy_(getattr(other, name))


class BufferPool:
    """Buffers by shape, lent to one cache at a time and taken back when it is garbage.

    A request then allocates nothing that an earlier one has allocated, and CUDA graphs find their caches where they were
    when recorded. At most `idle` sets wait to be used again; the one that has waited longest goes first.
    """

    def __init__(self, idle: int = 4):
        self._idle = idle
        self._free: list[tuple[tuple, Buffers]] = []
        self._lock = threading.RLock()  # a cache may be collected while its own thread is in here

    def lend(
        self,
        cache: PrunedCache,
        shapes: list[tuple[int, ...]],
        rows: tuple[int, ...],
        like: Tensor,
        told: tuple[int, ...] = (),
    ) -> Buffers:
        """Buffers of `shapes`, in the type and on the device of `like`, until `cache` is garbage."""
        key = (*shapes, rows, like.dtype, like.device, told)
        with self._lock:
            fitting = [i for i, (shapes, _) in enumerate(self._free) if shapes == key]
            buffers = self._free.pop(fitting[-1])[1] if fitting else None  # the latest is the likeliest to be in a CUDA graph
        buffers = buffers or Buffers(shapes, rows, like, told)
        ending = weakref.finalize(cache, self._take_back, key, buffers)
        ending.atexit = False
        buffers.give_back = ending  # which runs once, whoever calls it first
        return buffers

    def _take_back(self, key: tuple, buffers: Buffers) -> None:
        with self._lock:
            self._free.append((key, buffers))
            del self._free[: -self._idle]
