"""Finds the key of an attention as its projection left it: before rotation, and before a norm of single heads."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

_PROJECTIONS = (torch.ops.aten.linear.default, torch.ops.aten.addmm.default, torch.ops.aten.mm.default)


def as_heads(key: Tensor, like: Tensor) -> Tensor:
    """The rows of `key`, [B * t, ...] in whatever shape, as [B, kv_heads, t, hd] of `like`."""
    batch, heads, tokens, width = like.shape
    return key.reshape(batch, tokens, heads, width).transpose(1, 2)


def rows_of(key: Tensor) -> Tensor:
    """Keys [B, heads, t, hd] as [B, t, heads * hd]."""
    return key.transpose(1, 2).flatten(2)


def raw_key(graph: fx.Graph, anchor: fx.Node) -> fx.Node:
    """A new node, in front of `anchor`, of its key [B, kv_heads, t, hd] before rotation and before a norm.

    That is the first ancestor of the key with as many elements, not beyond a projection, that is computed from the graph's
    first input: tables are not. What a projection leaves has its tokens before its heads, as everywhere in transformers.
    """
    key = cast(fx.Node, anchor.args[1])
    order = {node: i for i, node in enumerate(graph.nodes)}
    content = {next(node for node in graph.nodes if node.op == "placeholder")}
    for node in order:
        if not content.isdisjoint(node.all_input_nodes):
            content.add(node)
    first, stack, seen = key, [key], {key}
    while stack:
        node = stack.pop()
        if _elements(node) == _elements(key) and order[node] < order[first]:
            first = node
        if node.target in _PROJECTIONS:
            continue
        # Indices by which a table was shortened lead to earlier layers.
        before = [source for source in node.all_input_nodes if source in content and _elements(source) and source not in seen]
        seen.update(before)
        stack += before
    with graph.inserting_before(anchor):
        raw = graph.call_function(as_heads, (first, key))
    raw.meta["val"] = key.meta["val"]
    return raw


def _elements(node: fx.Node) -> object:
    """The number of elements of a floating-point value; symbols compare as expressions."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    count = value.numel()
    return count.node.expr if isinstance(count, torch.SymInt) else count
