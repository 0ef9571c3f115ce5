"""The pruned KV cache: static buffers, a different number of rows in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from .errors import InputError


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
    each sequence as layer 0 sees them; `selection` tells which visual tokens stayed.
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

    def fill(
        self,
        *,
        shapes: list[tuple[int, ...]],
        caches: list[Tensor],
        length: Tensor,
        offsets: Tensor,
        seen: int,
        room: int,
        rows: int,
    ) -> None:
        """Takes prefill's keys and values into buffers of `shapes`, one per layer.

        length: int64 [B], each prompt's rows; offsets: decode's input of that name; seen: tokens of `input_ids`; room: new
        tokens that fit; rows: rows of layer 0's buffers.
        """
        self._seen, self._room, self.rows, self.offsets = seen, room, rows, offsets
        self.length = length.clone()
        self.token = length.new_zeros(length.shape[0], 1)
        for i, cache in enumerate(caches):
            buffer = cache.new_zeros(shapes[i // 2])
            buffer[:, :, : cache.shape[2]] = cache
            self.buffers.append(buffer)
        if self.buffers[0].is_cuda:
            for tensor in (*self.buffers, self.length, self.token, self.offsets):
                torch._dynamo.mark_static_address(tensor)

    def advance(self) -> None:
        """Accounts for the token that decode has written. Raises InputError when the cache is full."""
        self.length.add_(1)
        self._seen += 1
        self._room -= 1

    def check_room(self) -> None:
        """Raises InputError when no row is left for another token."""
        if self._room < 1:
            raise InputError(
                f"the KV cache is full after {self._seen} tokens: generate with a larger max_new_tokens, which sizes it"
            )

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
