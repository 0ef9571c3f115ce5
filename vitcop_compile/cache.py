"""The pruned KV cache: static buffers, a different number of rows in every layer, used again from request to request."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .errors import InputError

# What transformers calls a cache among arguments and results: it was renamed in 5.24.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
# Lengths of prompts whose views of a set of buffers are kept.
_MOST_PARTS = 16


@dataclass(frozen=True)
class Selection:
    """Which visual tokens stayed. Every entry is int64 [B, ...]; None or empty where nothing was pruned.

    kept: [B, n] patches (raster indices) that left the vision stage; labels: [B, n], their clusters; stages: for each decoder
    stage [B, tokens] the patches (raster indices) that left it.
    """

    kept: Tensor | None = None
    labels: Tensor | None = None
    stages: tuple[Tensor, ...] = ()


class PrunedCache(Cache):
    """KV cache of one `generate` call, filled by prefill and updated in place by decode.

    `get_seq_length()` is logical: the tokens of `input_ids` seen so far, image placeholders included, as transformers' loop
    expects. `buffers` holds key_0, value_0, key_1, ...: [B, kv_heads, rows_l, hd]; `length` int64 [B] counts the tokens of
    each sequence as layer 0 sees them; `selection` tells which visual tokens stayed. When the cache is gone, its buffers
    serve another request: clone what has to outlive it.
    """

    def __init__(self, max_length: int | None = None):
        super().__init__(layers=[])
        self.max_length = max_length
        self.buffers: list[Tensor] = []
        self.length = torch.empty(0, dtype=torch.int64)
        self.token = torch.empty(0, dtype=torch.int64)
        self.selection = Selection()
        self.offsets = torch.empty(0, dtype=torch.int64)
        self.rows = 0
        self._seen = 0
        self._room = 0
        self._check: Callable[[], None] | None = None
        self._strays: Tensor | None = None

    def fill(self, buffers: Buffers, caches: list[Tensor], *, length: Tensor, offsets: Tensor, seen: int, room: int) -> None:
        """Takes prefill's keys and values into `buffers`, which are its own from now on.

        length: int64 [B], each prompt's rows; offsets: decode's input of that name; seen: tokens of `input_ids`; room: new
        tokens that fit.
        """
        self._seen, self._room, self.rows = seen, room, buffers.rows
        self.buffers, self.length, self.token, self.offsets = buffers.layers, buffers.length, buffers.token, buffers.offsets
        buffers.write(caches)
        self.length.copy_(length)
        self.offsets.copy_(offsets)

    def advance(self) -> None:
        """Accounts for the token that decode has written."""
        self.length.add_(1)
        self._seen += 1
        self._room -= 1

    def check_room(self) -> None:
        """Raises InputError when no row is left for another token."""
        if self._room < 1:
            raise InputError(
                f"the KV cache is full after {self._seen} tokens: generate with a larger max_new_tokens, which sizes it"
            )

    def expect(self, check: Callable[[], None]) -> None:
        """Postpones a check of the prompt's values to the first time the host waits for the device anyway."""
        self._check = check

    def verify(self) -> None:
        """Raises InputError if values of the prompt, or tokens after it, were not what programs take. Waits for the device.

        Where values live on a GPU, reading them back before the first token would stall it: those of the prompt are checked
        by the next `forward` on this cache, and all when `generate` returns. Whoever calls `forward` alone may call this.
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
    def filled(self) -> bool:
        """Whether a prompt is in."""
        return bool(self.buffers)

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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follows the surviving beams, in place: the buffers keep their addresses."""
        for tensor in (*self.buffers, self.length):
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))

    def layer_rows(self) -> list[int]:
        """Rows of each layer's buffers."""
        return [buffer.shape[2] for buffer in self.buffers[::2]]

    def __repr__(self) -> str:
        return f"PrunedCache(seen={self._seen}, room={self._room}, rows={self.layer_rows()})"


class Buffers:
    """The tensors of one cache: `layers` key_0, value_0, ...; `length` int64 [B], `token` int64 [B, 1], `offsets` int64.

    rows: rows of layer 0. Compiled programs are told that their addresses hold, so that CUDA graphs copy none of them.
    """

    def __init__(self, shapes: list[tuple[int, ...]], like: Tensor, groups: int):
        batch, self.rows = shapes[0][0], shapes[0][2]
        with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside of it
            self.layers = [like.new_zeros(shape) for shape in shapes for _ in "kv"]
            self.length = like.new_zeros(batch, dtype=torch.int64)
            self.token = like.new_zeros(batch, 1, dtype=torch.int64)
            self.offsets = like.new_zeros(groups, dtype=torch.int64)
        self._parts: dict[tuple[int, ...], tuple[list[Tensor], list[Tensor]]] = {}
        if like.is_cuda:
            for tensor in (*self.layers, self.length, self.token, self.offsets):
                # Without a guard: other addresses record another graph, they do not compile another program.
                torch._dynamo.mark_static_address(tensor, guard=False)

    def write(self, caches: list[Tensor]) -> None:
        """Copies the rows of `caches` in and clears those behind them: what an earlier request left might not be finite, and
        even what no query attends to is multiplied."""
        # By the rows of every layer: a prompt with an image and one without may agree in layer 0 and nowhere else.
        sizes = tuple(cache.shape[2] for cache in caches)
        if sizes not in self._parts:
            if len(self._parts) >= _MOST_PARTS:  # an engine with a dynamic text axis has a length for every prompt
                self._parts.clear()
            heads = [layer[:, :, :size] for layer, size in zip(self.layers, sizes, strict=True)]
            self._parts[sizes] = heads, [layer[:, :, size:] for layer, size in zip(self.layers, sizes, strict=True)]
        heads, tails = self._parts[sizes]
        torch._foreach_copy_(heads, caches)
        torch._foreach_zero_(tails)


class BufferPool:
    """Buffers by shape, lent to one cache at a time and taken back when it is garbage.

    A request then allocates nothing that an earlier one has allocated, and CUDA graphs find their caches where they were
    when recorded. At most `idle` sets wait to be used again; the one that has waited longest goes first.
    """

    def __init__(self, idle: int = 4):
        self._idle = idle
        self._free: list[tuple[tuple, Buffers]] = []
        self._lock = threading.RLock()  # a cache may be collected while its own thread is in here

    def lend(self, cache: PrunedCache, shapes: list[tuple[int, ...]], like: Tensor, groups: int) -> Buffers:
        """Buffers of `shapes`, in the type and on the device of `like`, until `cache` is garbage."""
        key = (*shapes, groups, like.dtype, like.device)
        with self._lock:
            fitting = [i for i, (shapes, _) in enumerate(self._free) if shapes == key]
            buffers = self._free.pop(fitting[-1])[1] if fitting else None  # the latest is the likeliest to be in a CUDA graph
        buffers = buffers or Buffers(shapes, like, groups)
        weakref.finalize(cache, self._take_back, key, buffers).atexit = False
        return buffers

    def _take_back(self, key: tuple, buffers: Buffers) -> None:
        with self._lock:
            self._free.append((key, buffers))
            del self._free[: -self._idle]
