"""The passes, in the order they run. Each is one file: `(graph module, settings) -> graph module`, in place.

    encoder   clean -> truncate_encoder -> prune_encoder -> lower_attention
    prefill   clean -> prune_decoder -> return_kv -> lower_attention
    decode    clean -> decode_cache -> lower_attention

The backends inductor and aotinductor end with one more on every exported program: lower_linear.
"""

from __future__ import annotations

import copy

from torch import fx

from ..schedule import Schedule
from .clean import clean
from .decode_cache import decode_cache
from .lower_attention import lower_attention
from .lower_linear import lower_linear
from .prune_decoder import prune_decoder
from .prune_encoder import prune_encoder
from .return_kv import return_kv
from .truncate_encoder import truncate_encoder

__all__ = [
    "clean",
    "decode_cache",
    "lower_attention",
    "lower_linear",
    "prune_decoder",
    "prune_encoder",
    "return_kv",
    "rewrite_decode",
    "rewrite_encoder",
    "rewrite_prefill",
    "truncate_encoder",
]


def rewrite_encoder(
    captured: fx.GraphModule, schedule: Schedule, attention: str = "sdpa", exact: bool = True
) -> fx.GraphModule:
    """hidden [B, prefix + patches, C] -> (patches [B, n, C], kept int64 [B, n], labels int64 [B, n])."""
    shape = schedule.shape
    module = clean(_copy(captured))
    module = truncate_encoder(module, shape.feature_layer)
    module = prune_encoder(module, schedule.vision, shape.grid, shape.prefix_tokens, exact)
    return lower_attention(module, attention)


def rewrite_prefill(captured: fx.GraphModule, schedule: Schedule, attention: str = "sdpa") -> fx.GraphModule:
    """(embeddings [B, t, D], positions, visual, labels) -> (hidden [B, t', D], index per stage..., k0, v0, k1, v1, ...)."""
    module = clean(_copy(captured))
    module = prune_decoder(module, schedule.stages)
    module = return_kv(module)
    return lower_attention(module, attention)


def rewrite_decode(
    captured: fx.GraphModule, schedule: Schedule, attention: str = "sdpa", in_place: bool = True
) -> fx.GraphModule:
    """(embeddings [B, 1, D], positions [B, 1], length [B], offsets, key_0, value_0, ...) -> (hidden [B, 1, D],).

    Not `in_place`, the new rows k0, v0, k1, v1, ... [B, kv_heads, 1, hd] follow the hidden state, and attention stays
    spelled out.
    """
    module = clean(_copy(captured))
    module = decode_cache(module, schedule.removed_rows(), in_place)
    return lower_attention(module, attention) if in_place else module


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same parameters, free to be rewritten."""
    memo: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, memo)
    graph.output(result)
    for old, new in memo.items():
        new.meta = copy.copy(old.meta)
    return fx.GraphModule(module, graph)
