"""Turns the captured decoder into the decode step: one token against a static KV cache per layer."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..errors import RewriteError
from .token_axis import anchors, finish, placeholder


def write_row(cache: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """Writes row [B, kv_heads, 1, hd] into cache [B, kv_heads, rows, hd] at slot int64 [B], in place; returns cache."""
    index = slot[:, None, None, None].expand(-1, cache.shape[1], 1, cache.shape[3])
    return cache.scatter_(2, index, row)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, slot: Tensor) -> Tensor:
    """Marks attention of one query per sample over rows 0 to slot [B]; `lower_attention` gives it its kernel."""
    raise RewriteError("a decode graph is run before its attention is lowered: apply lower_attention")


def decode_cache(module: fx.GraphModule, deltas: tuple[int, ...]) -> fx.GraphModule:
    """Adds the inputs `length` (int64 [B]: tokens before this one, as layer 0 counts them) and key_l, value_l of every
    layer [B, kv_heads, rows_l, hd], which are updated in place at row length - deltas[l].

    Raises RewriteError if there is not one delta per layer.
    """
    graph = module.graph
    found = anchors(graph)
    if len(deltas) != len(found):
        raise RewriteError(f"{len(deltas)} offsets were given for {len(found)} layers: one per layer is needed")
    length = placeholder(graph, "length")
    caches = [(placeholder(graph, f"key_{i}"), placeholder(graph, f"value_{i}")) for i in range(len(found))]
    slots: dict[int, fx.Node] = {}
    for anchor, delta, (key_cache, value_cache) in zip(found, deltas, caches, strict=True):
        query, key, value, scale = anchor.args[:4]
        with graph.inserting_before(anchor):
            if delta not in slots:
                slots[delta] = graph.call_function(torch.sub, (length, delta))
            slot = slots[delta]
            keys = graph.call_function(write_row, (key_cache, key, slot))
            values = graph.call_function(write_row, (value_cache, value, slot))
            step = graph.call_function(attend, (query, keys, values, scale, slot))
        step.meta["val"] = anchor.meta["val"]
        anchor.replace_all_uses_with(step)
        graph.erase_node(anchor)
    return finish(module)
