"""Gives a captured decoder static KV caches: to fill, or to extend by more tokens."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..attention import visible, visible_cached, weighed, weighed_before, weighed_cached, within
from ..errors import RewriteError
from .token_axis import anchors, finish, marks_of, output_node, placeholder, sizes_of


def cache_rows(length: Tensor, removed: Tensor, group: int, key: Tensor) -> Tensor:
    """int64 [B, s]: where the s rows of key [B, kv_heads, s, hd] belong in the caches of a group of layers.

    length: int64 [B], tokens before these, as layer 0 counts them; removed: int64 [groups, B], rows that each group lacks.
    """
    start = length - removed[group]
    return start.unsqueeze(1) + torch.arange(key.shape[2], device=key.device)


def write_rows(cache: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """Writes rows [B, kv_heads, s, hd] into cache [B, kv_heads, r, hd] at rows `at` int64 [B, s], in place; returns cache.

    As an index_put: inductor keeps that one in place, and would copy the whole cache out and back around a scatter.
    """
    batch = torch.arange(cache.shape[0], device=cache.device)[:, None, None]
    heads = torch.arange(cache.shape[1], device=cache.device)[None, :, None]
    return cache.index_put_((batch, heads, at[:, None]), rows)


def fill_rows(cache: Tensor, rows: Tensor) -> None:
    """Makes rows [B, kv_heads, s, hd] the first of cache [B, kv_heads, r, hd], in place, and zeros the others.

    What an earlier request left might not be finite, and even what no query attends to is multiplied. One kernel that writes
    every row once.
    """
    cache.copy_(F.pad(rows, (0, 0, 0, cache.shape[2] - rows.shape[2])))


fx.node.has_side_effect(fill_rows)


def numbers_of(told: Tensor) -> Tensor:
    """int64 [B, s]: what caches hold of each row: the positions in marks [B, 2, 1, s], or sizes [B, s]."""
    return told[:, 1, 0] if told.dim() == 4 else told


def ones_of(key: Tensor) -> Tensor:
    """int64 [B, s] of keys [B, kv_heads, s, hd]: the sizes of tokens of which each stands for itself."""
    return key.new_ones((key.shape[0], key.shape[2]), dtype=torch.int64)


def write_numbers(held: Tensor, told: Tensor, at: Tensor) -> Tensor:
    """Writes `numbers_of(told)` into held int64 [B, r] at rows `at` int64 [B, s], in place; returns held."""
    batch = torch.arange(held.shape[0], device=held.device)[:, None]
    return held.index_put_((batch, at), numbers_of(told))


def fill_numbers(held: Tensor, told: Tensor) -> None:
    """Makes `numbers_of(told)` the first of held int64 [B, r], in place, and zeros the others."""
    held.copy_(F.pad(numbers_of(told), (0, held.shape[1] - told.shape[-1])))


fx.node.has_side_effect(fill_numbers)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, at: Tensor, mask: Tensor | None = None) -> Tensor:
    """Marks attention of queries that stand in rows `at` [B, s], each over all rows up to its own, or by mask [B, 1, s, r],
    bool or what is added to logits; `lower_attention` gives it its kernel."""
    raise RewriteError("a graph over caches is run before its attention is lowered: apply lower_attention")


attend.is_mark = True  # type: ignore[attr-defined]


def attend_apart(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    at: Tensor,
    mask: Tensor | None = None,
    held: Tensor | None = None,
) -> Tensor:
    """Attention of queries [B, heads, s, hd] over what caches [B, kv_heads, r, hd] hold before row at[:, 0], or the rows of
    held bool [B, 1, s, r], and over the new rows up to their own, or those of mask bool [B, 1, s, s]. Of type fp32 either is
    added to logits, held then [B, 1, 1, r]. A row that is alone sees itself, and stands for itself.

    The new keys and values [B, kv_heads, s, hd] never enter the caches, which are only read: a program without mutation
    copies no cache. The scores of both parts share one softmax, in fp32.
    """
    batch, heads, count, width = query.shape
    groups, rows = key.shape[1], key_cache.shape[2]
    shared = heads // groups
    grouped = _in_groups(query, groups) * scale
    if held is None:
        held = torch.arange(rows, device=query.device) < at[:, :1, None, None]
    elif held.shape[2] != 1:
        held = held.repeat(1, 1, shared, 1)
    old = _masked((grouped @ key_cache.transpose(-1, -2)).float(), held)
    new = (grouped @ key.transpose(-1, -2)).float()
    if count != 1:
        order = torch.arange(count, device=query.device)
        before = order <= order.unsqueeze(1) if mask is None else mask
        before = before.repeat(*(1,) * (before.dim() - 2), shared, 1)
        new = _masked(new, before)
    weights = torch.cat((old, new), -1).softmax(-1).to(query.dtype)
    out = weights[..., :rows] @ value_cache + weights[..., rows:] @ value
    if shared == 1 or isinstance(count, int):
        return out.reshape(batch, heads, count, width)
    return torch.stack([out[:, :, i * count : (i + 1) * count] for i in range(shared)], 2).flatten(1, 2)


def _masked(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores fp32 with a mask, bool or what is added to them."""
    return scores + mask if mask.is_floating_point() else torch.where(mask, scores, torch.finfo(torch.float32).min)


def _in_groups(query: Tensor, groups: int) -> Tensor:
    """Queries [B, heads, s, hd], those that share a key behind one another: [B, groups, shared * s, hd]."""
    batch, heads, count, width = query.shape
    shared = heads // groups
    if shared == 1:
        return query
    if isinstance(count, int):
        return query.reshape(batch, groups, shared * count, width)
    # To know whether it could be a view, `reshape` would fix an axis that is to vary.
    return torch.cat(query.unflatten(1, (groups, shared)).unbind(2), 2)


def attach_cache(
    module: fx.GraphModule,
    groups: tuple[int, ...],
    *,
    filled: bool,
    in_place: bool = True,
    blocks: bool = True,
    sized: tuple[int, ...] = (),
) -> fx.GraphModule:
    """Adds the inputs key_l, value_l of every layer, [B, kv_heads, r_l, hd], and runs attention over them.

    filled: the caches hold tokens, and those of the graph follow them. The graph then gets the inputs `length` (int64 [B]:
    tokens before these, as layer 0 counts them) and `removed` (int64 [groups, B]) in front of the caches; layer l writes from
    row length - removed[groups[l]] on. Otherwise attention is that of the graph alone, and the caches are filled from row 0.

    Where anchors have marks, inputs places_g, int64 [B, r], of every group stand in front of those of layers, and hold the
    positions of its rows; blocks says whether any of the graph's tokens may be of one: without, they attend to what is before
    them. In groups of `sized` inputs sizes_g hold how many tokens each row stands for: as the sizes of anchors say, one
    without, and what is added to logits is made of them once a group. Not `in_place`, caches are only read, those to be filled
    are no input, and the new rows, int64 [B, s] of each group and k0, v0, k1, v1, ... [B, kv_heads, s_l, hd], are returned
    behind the graph's results. Runs after `prune`, so that s_l is what a layer really attends to. Raises RewriteError if there
    is not one group per layer.
    """
    graph = module.graph
    found = anchors(graph)
    if len(groups) != len(found):
        raise RewriteError(f"{len(groups)} groups were given for {len(found)} layers: one per layer is needed")
    rows = [cast(fx.Node, tensor) for anchor in found for tensor in anchor.args[1:3]]
    firsts = {group: anchor for group, anchor in zip(reversed(groups), reversed(found))}
    told = {group: node for group in sorted(firsts) if (node := _told(graph, firsts[group], group in sized)) is not None}
    if filled:
        _extend(graph, found, groups, told, in_place, blocks, sized)
    elif in_place:
        held, caches = _held(graph, told, sized), _caches(graph, len(found))
        for group, old in held.items():
            with graph.inserting_before(firsts[group]):
                graph.call_function(fill_numbers, (old, told[group]))
        for i, anchor in enumerate(found):
            with graph.inserting_before(anchor):
                for cache, tensor in zip(caches[i], rows[2 * i : 2 * i + 2], strict=True):
                    graph.call_function(fill_rows, (cache, tensor))
    if not in_place:
        output = output_node(graph)
        with graph.inserting_before(output):
            numbers = [graph.call_function(numbers_of, (own,)) for own in told.values()]
        output.args = ((*output.args[0], *numbers, *rows),)  # type: ignore[misc]
    return finish(module)


def _told(graph: fx.Graph, anchor: fx.Node, sized: bool) -> fx.Node | None:
    """The marks, or sizes, of which caches hold numbers of the rows of a group. anchor: the group's first."""
    if (marks := marks_of(anchor)) is not None:
        return marks[0]
    sizes = sizes_of(anchor)
    if sizes is None and sized:
        with graph.inserting_before(anchor):
            return graph.call_function(ones_of, (anchor.args[1],))
    return sizes


def _extend(
    graph: fx.Graph,
    found: list[fx.Node],
    groups: tuple[int, ...],
    told: dict[int, fx.Node],
    in_place: bool,
    blocks: bool,
    sized: tuple[int, ...],
) -> None:
    length, removed = placeholder(graph, "length"), placeholder(graph, "removed")
    held, caches = _held(graph, told, sized), _caches(graph, len(found))
    rows: dict[int, fx.Node] = {}
    masks: dict[tuple[Any, ...], tuple[fx.Node, ...]] = {}  # layers of a group with one window share them
    for anchor, group, cache in zip(found, groups, caches, strict=True):
        query, key, value, scale = anchor.args[:4]
        with graph.inserting_before(anchor):
            if group not in rows:
                rows[group] = graph.call_function(cache_rows, (length, removed, group, key))
                if group in told and in_place:
                    held[group] = graph.call_function(write_numbers, (held[group], told[group], rows[group]))
            at, marks = rows[group], marks_of(anchor)
            if (group, marks) not in masks:
                if marks is not None:
                    made = _masks(graph, at, *marks, held[group], in_place, blocks)
                elif group in told:
                    made = _weights(graph, at, told[group], held[group], in_place, anchor.meta["val"].dtype)
                else:
                    made = ()
                masks[group, marks] = made
            mask = masks[group, marks]
            if in_place:
                written = [graph.call_function(write_rows, (old, new, at)) for old, new in zip(cache, (key, value))]
                step = graph.call_function(attend, (query, *written, scale, at, *mask))
            else:
                step = graph.call_function(attend_apart, (query, *cache, key, value, scale, at, *mask))
        step.meta["val"] = anchor.meta["val"]
        anchor.replace_all_uses_with(step)
        graph.erase_node(anchor)


def _masks(
    graph: fx.Graph, at: fx.Node, marks: fx.Node, window: int, places: fx.Node, in_place: bool, blocks: bool
) -> tuple[fx.Node, ...]:
    """What `attend`, or `attend_apart`, takes as masks: none where attention is plainly causal."""
    if not window and not blocks:
        return ()
    if in_place:
        return (graph.call_function(visible_cached, (at, marks, places, window, blocks)),)
    new = graph.call_function(visible, (marks, window))
    return (new, graph.call_function(within, (at, marks, places, window))) if window else (new,)


def _weights(
    graph: fx.Graph, at: fx.Node, sizes: fx.Node, held: fx.Node, in_place: bool, dtype: torch.dtype
) -> tuple[fx.Node, ...]:
    """What `attend`, or `attend_apart`, takes as masks, where rows stand for so many tokens."""
    if in_place:
        return (graph.call_function(weighed_cached, (at, held, dtype)),)
    new = graph.call_function(weighed, (sizes, True, torch.float32))
    return new, graph.call_function(weighed_before, (at, held))


def _held(graph: fx.Graph, told: dict[int, fx.Node], sized: tuple[int, ...]) -> dict[int, fx.Node]:
    return {group: placeholder(graph, f"{'sizes' if group in sized else 'places'}_{group}") for group in told}


def _caches(graph: fx.Graph, layers: int) -> list[tuple[fx.Node, fx.Node]]:
    return [(placeholder(graph, f"key_{i}"), placeholder(graph, f"value_{i}")) for i in range(layers)]
