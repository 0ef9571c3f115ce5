"""Turns the captured decoder into the decode step: one token against a static KV cache per layer."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from ..errors import RewriteError
from .token_axis import anchors, finish, output_node, placeholder


def write_row(cache: Tensor, row: Tensor, slot: Tensor) -> Tensor:
    """Writes row [B, kv_heads, 1, hd] into cache [B, kv_heads, rows, hd] at slot int64 [B], in place; returns cache.

    As an index_put: inductor keeps that one in place, and would copy the whole cache out and back around a scatter.
    """
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None]
    heads = torch.arange(cache.shape[1], device=cache.device)[None]
    return cache.index_put_((batch, heads, slot[:, None]), row[:, :, 0])


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, slot: Tensor) -> Tensor:
    """Marks attention of one query per sample over rows 0 to slot [B]; `lower_attention` gives it its kernel."""
    raise RewriteError("a decode graph is run before its attention is lowered: apply lower_attention")


def attend_apart(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, scale: float, slot: Tensor
) -> Tensor:
    """Attention of one query [B, heads, 1, hd] over rows 0 to slot - 1 of caches [B, kv_heads, rows, hd] and one row more.

    The new key and value [B, kv_heads, 1, hd] never enter the caches, which are only read: a program without mutation
    copies no cache. The scores of both parts share one softmax, in fp32.
    """
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    rows = key_cache.shape[2]
    grouped = query.reshape(batch, groups, heads // groups, width) * scale
    valid = torch.arange(rows, device=query.device) < slot[:, None, None, None]
    old = (grouped @ key_cache.transpose(-1, -2)).float()
    old = torch.where(valid, old, torch.finfo(torch.float32).min)
    new = (grouped @ key.transpose(-1, -2)).float()
    weights = torch.cat((old, new), -1).softmax(-1).to(query.dtype)
    out = weights[..., :rows] @ value_cache + weights[..., rows:] @ value
    return out.reshape(batch, heads, 1, width)


def offset_groups(deltas: tuple[int, ...]) -> tuple[int, ...]:
    """The distinct offsets among `deltas`, in the order of the layers: what the `offsets` input of a decode graph holds."""
    return tuple(dict.fromkeys(deltas))


def decode_cache(module: fx.GraphModule, deltas: tuple[int, ...], in_place: bool = True) -> fx.GraphModule:
    """Adds the inputs `length` (int64 [B]: tokens before this one, as layer 0 counts them), `offsets` (int64 [groups]) and
    key_l, value_l of every layer [B, kv_heads, rows_l, hd]. Layer l writes at row length - offsets[group of deltas[l]].

    Offsets are an input so that prompts without an image, which lose no row, run through the same program with zeros. With
    `in_place` caches are updated; otherwise they are only read and each layer's new key and value [B, kv_heads, 1, hd] are
    returned behind the hidden state. Raises RewriteError if there is not one delta per layer.
    """
    graph = module.graph
    found = anchors(graph)
    if len(deltas) != len(found):
        raise RewriteError(f"{len(deltas)} offsets were given for {len(found)} layers: one per layer is needed")
    length = placeholder(graph, "length")
    offsets = placeholder(graph, "offsets")
    caches = [(placeholder(graph, f"key_{i}"), placeholder(graph, f"value_{i}")) for i in range(len(found))]
    groups = offset_groups(deltas)
    slots: dict[int, fx.Node] = {}
    rows: list[fx.Node] = []
    for anchor, delta, cache in zip(found, deltas, caches, strict=True):
        query, key, value, scale = anchor.args[:4]
        with graph.inserting_before(anchor):
            if delta not in slots:
                offset = graph.call_function(operator.getitem, (offsets, groups.index(delta)))
                slots[delta] = graph.call_function(torch.sub, (length, offset))
            slot = slots[delta]
            if in_place:
                written = [graph.call_function(write_row, (old, new, slot)) for old, new in zip(cache, (key, value))]
                step = graph.call_function(attend, (query, *written, scale, slot))
            else:
                step = graph.call_function(attend_apart, (query, *cache, key, value, scale, slot))
                rows += [key, value]  # type: ignore[list-item]
        step.meta["val"] = anchor.meta["val"]
        anchor.replace_all_uses_with(step)
        graph.erase_node(anchor)
    output = output_node(graph)
    output.args = ((*output.args[0], *rows),)  # type: ignore[misc]
    return finish(module)
