"""Prunes visual tokens behind layers of either side: the one pass that selects."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import RewriteError
from ..ops.indexing import compact, take_along, take_rows
from ..policies import NAMED, POLICIES, Site, tap_of
from ..schedule import Stage
from .raw_key import raw_key, rows_of
from .token_axis import (
    anchors,
    content_beside,
    finish,
    first_input,
    give_sizes,
    layer_exit,
    output_node,
    placeholder,
    reroute,
    standing,
)


def prune_tokens(
    hidden: Tensor,
    visual: Tensor | int,
    state: tuple[Tensor, ...],
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    scale: float | None,
    more: dict[str, Any] | None = None,
    *,
    policy: str,
    incoming: tuple[int, ...],
    tokens: tuple[int, ...],
    options: dict[str, Any],
    site: dict[str, Any],
    tap: str | None = None,
    counted: int | None = None,
) -> tuple[Tensor, ...]:
    """Reduces the visual tokens of every sample to `tokens`; no other row is touched.

    hidden: [B, t, D]; visual: int64 [B, n], the visual rows, ascending, or where a run of them starts; state: [B, n] each;
    query, key, value: [B, heads, t, hd] of the layer before, with `scale` on its logits; more: of `before`, [B, t, D],
    `entry`, `text` and `last` of `Site` those that the policy needs, and `also`, (query, key) of further layers; incoming: the
    n by segment; tokens: what each segment keeps, or one number for all of them; options: of the policy; site: further fields
    of `Site`; tap: the policy whose tap scores the candidates by queries and keys, by default its own; counted: which of the
    state says how many tokens each candidate stands for, None where that is one.

    Returns (hidden [B, t', D], keep int64 [B, t']: the rows that stay, visual int64 [B, tokens]: the visual rows of the new
    sequence, index int64 [B, tokens]: which of the n they are, state [B, tokens] each...).
    """
    batch, length, _ = hidden.shape
    if isinstance(visual, int):
        visual = torch.arange(visual, visual + sum(incoming), device=hidden.device).expand(batch, sum(incoming))
    given = {"hidden": hidden, "whole": hidden, "query": query, "key": key, "value": value, "scale": scale} | (more or {})
    found = _by_segment(policy, visual, state, given, incoming, tokens, options, site, tap, counted)
    index, rows = found[0], found[1]
    chosen = visual.gather(1, index)
    keep, slot = _remaining(visual, chosen, length)
    new_visual = slot.gather(1, chosen)
    if rows is None:
        return take_rows(hidden, keep), keep, new_visual, index, *found[2]
    # Merged rows stand behind the old ones for a moment, so that every row is moved once.
    source = keep.scatter(
        1, new_visual, torch.arange(length, length + chosen.shape[1], device=keep.device).expand_as(new_visual)
    )
    return take_rows(torch.cat((hidden, rows), 1), source), keep, new_visual, index, *found[2]


def row_sizes(hidden: Tensor, visual: Tensor, sizes: Tensor) -> Tensor:
    """int64 [B, t]: how many tokens each row of hidden [B, t, D] stands for: rows `visual`, int64 [B, n], for `sizes`, others
    for one."""
    return torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device).scatter(1, visual, sizes)


def _remaining(visual: Tensor, chosen: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(keep int64 [B, t'], slot int64 [B, t]): the rows that are not visual, or chosen, and the new row of each."""
    mask = torch.ones(visual.shape[0], length, dtype=torch.bool, device=visual.device)
    mask = mask.scatter(1, visual, torch.zeros_like(visual, dtype=torch.bool))
    mask = mask.scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    return compact(mask, length - visual.shape[1] + chosen.shape[1])


def _by_segment(
    policy: str,
    visual: Tensor,
    state: tuple[Tensor, ...],
    given: dict[str, Any],
    incoming: tuple[int, ...],
    tokens: tuple[int, ...],
    options: dict[str, Any],
    site: dict[str, Any],
    tap: str | None,
    counted: int | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """(index [B, tokens], rows [B, tokens, D] or None, state) of a policy, segment by segment; equal ones run as a batch."""
    chosen = POLICIES[policy]
    parts = []
    scored: dict[str, Any] = {}
    score_of = POLICIES[tap or policy].tap
    if score_of is not None:
        scales, prefix = given["scale"], site.get("prefix", 0)
        scores = [
            score_of(query, key, scales, prefix, None)
            for query, key in (*given.get("also", ()), (given["query"], given["key"]))
        ]
        scored = {"score": scores[0] if len(scores) == 1 else torch.stack(scores, -1), "features": rows_of(given["key"])}
    for start, number, size, kept, blocks in runs(incoming, tokens):
        stop = start + number * size
        at = visual[:, start:stop].reshape(-1, size)
        wired: dict[str, Any] = {name: item for name, item in given.items() if name in chosen.needs} | scored
        for name in ("hidden", "before"):
            if name in wired:
                rows_in = take_rows(wired[name], visual[:, start:stop])
                wired[name] = rows_in.reshape(-1, size, rows_in.shape[-1])
        held = tuple(values[:, start:stop].reshape(-1, size) for values in state)
        if counted is not None:
            wired["counts"] = held[counted]
        if blocks != 1:  # segments that share a budget, and are one from here on: their clusters stay different clusters
            owner = torch.cat([torch.full((count,), i, device=at.device) for i, count in enumerate(incoming)])
            held = tuple(v if i == counted else v * len(incoming) + owner for i, v in enumerate(held))
        sizes = (size // blocks,) * blocks if blocks else incoming
        choice = chosen.choose(Site(at=at, state=held, blocks=blocks or 1, sizes=sizes, **wired, **site), kept, **options)
        index, rows = choice.index, choice.rows
        kept_state = (() if chosen.renews else tuple(values.gather(1, index) for values in held)) + choice.state
        batch = visual.shape[0]
        first = (torch.arange(number, device=at.device) * size + start).reshape(1, number, 1)
        parts.append(
            (
                (index.reshape(batch, number, kept) + first).reshape(batch, number * kept),
                None if rows is None else rows.reshape(batch, number * kept, -1),
                tuple(values.reshape(batch, number * kept) for values in kept_state),
            )
        )
    if len(parts) == 1:
        return parts[0]
    index, states = torch.cat([part[0] for part in parts], 1), zip(*(part[2] for part in parts), strict=True)
    merged = None if parts[0][1] is None else torch.cat([part[1] for part in parts], 1)  # type: ignore[misc]
    return index, merged, tuple(torch.cat(values, 1) for values in states)


def runs(incoming: tuple[int, ...], tokens: tuple[int, ...]) -> list[tuple[int, int, int, int, int]]:
    """(first candidate, problems, candidates of each, what each keeps, equal segments in each; 0 if they are unequal).

    One number in `tokens` for several segments is a budget that they share.
    """
    if len(tokens) != len(incoming):
        if len(tokens) != 1:
            raise RewriteError(f"{len(tokens)} budgets for {len(incoming)} segments: give one each, or one for all")
        equal = len(set(incoming)) == 1
        return [(0, 1, sum(incoming), tokens[0], len(incoming) if equal else 0)]
    found: list[tuple[int, int, int, int, int]] = []
    start = 0
    for size, kept in zip(incoming, tokens, strict=True):
        if found and found[-1][2:4] == (size, kept):
            first, number, *rest = found[-1]
            found[-1] = (first, number + 1, rest[0], rest[1], 1)
        else:
            found.append((start, 1, size, kept, 1))
        start += size
    return found


def prune(
    module: fx.GraphModule,
    stages: tuple[Stage, ...],
    incoming: tuple[int, ...],
    *,
    prefix: int | None = None,
    states: int = 0,
    site: dict[str, Any] | None = None,
    counted: int | None = None,
) -> fx.GraphModule:
    """Inserts one `prune_tokens` node behind the layer of each stage and moves the rest of the graph onto the shorter axis.

    A stage of the encoder prunes what leaves its layer, one of the decoder what enters it; the layer left last is the one that
    is scored. incoming: candidates by segment. With a `prefix` they follow so many other rows; without it the graph gets an
    input `visual`, int64 [B, n], so many inputs `state_i`, [B, n], as `states` says, and of `last`, int64 [B], and `text`,
    bool [B, t], those that a policy needs. site: further fields of `Site`; counted: which of these states says how many tokens
    each candidate stands for, None where that is one. Where it is not, and behind stages that weigh, anchors get sizes.

    Returned behind the graph's own result are the index of each stage, and then, with a `prefix`, the state. Skipped without
    stages and sizes. Raises RewriteError if a stage's layer is not inside the graph or has no single exit, if stages do not
    ascend, for an unknown policy, and where tokens would be merged that carry more than the hidden state.
    """
    if not stages and counted is None:
        return module
    graph = module.graph
    _check_places(stages, len(anchors(graph)))
    embeddings = first_input(graph)
    visual: fx.Node | int = placeholder(graph, "visual") if prefix is None else prefix
    state = tuple(placeholder(graph, f"state_{i}") for i in range(states))
    wanted = [name for name in ("last", "text") if any(name in POLICIES[stage.policy].needs for stage in stages)]
    told = {"entry": embeddings} | {name: placeholder(graph, name) for name in wanted}
    # Found and checked before anything is inserted: a pruned table depends on content.
    cuts = [_exit(graph, _scored(stage)) for stage in stages]
    befores = [_exit(graph, _scored(stage) - 1) if "before" in POLICIES[stage.policy].needs else None for stage in stages]
    for stage, cut in zip(stages, cuts, strict=True):
        _check_merge(graph, stage, cut)
    sizes: dict[int, fx.Node] = {}  # by the first layer whose rows have them
    if counted is not None:
        with graph.inserting_after(standing(graph, embeddings)):
            sizes[0] = graph.call_function(row_sizes, (embeddings, visual, state[counted]))
    selections: list[fx.Node] = []
    pruned_at: dict[fx.Node, fx.Node] = {}
    for stage, cut, before in zip(stages, cuts, befores, strict=True):
        policy = POLICIES[stage.policy]
        needs = policy.needs | (frozenset(("query", "key", "scale")) if tap_of(stage) else frozenset())
        wired: list[Any] = [None] * 4
        if _scored(stage) >= 0:
            names = ("query", "key", "value", "scale")
            found = zip(names, anchors(graph)[_scored(stage)].args[:4])
            wired = [item if name in needs else None for name, item in found]
        if stage.keys != "rotated" and wired[1] is not None:
            wired[1] = raw_key(graph, anchors(graph)[_scored(stage)])
        more: dict[str, Any] = {name: node for name, node in told.items() if name in needs}
        if before is not None:
            more["before"] = pruned_at.get(before, before)
        if stage.also:
            more["also"] = tuple(anchors(graph)[layer].args[:2] for layer in stage.also)
        settings: dict[str, Any] = {
            "policy": stage.policy,
            "incoming": incoming,
            "tokens": stage.tokens,
            "options": {name: of_one(value) for name, value in stage.options},
            "site": (site or {}) | ({"centered": True} if stage.keys == "centered" else {}),
        }
        settings |= ({"tap": stage.tap} if stage.tap else {}) | ({} if counted is None else {"counted": counted})
        with graph.inserting_after(standing(graph, cut)):
            arguments = (cut, visual, state, *wired, *([more] if more else []))
            pruned = graph.call_function(prune_tokens, arguments, settings)  # type: ignore[arg-type]
        added = policy.adds + (0 if policy.renews else len(state))
        hidden, keep, visual, index, *rest = _parts(graph, pruned, 4 + added)
        hidden.meta["val"] = cut.meta["val"]
        reroute(graph, cut, hidden, keep, renumber=stage.positions == "index")
        told = _moved(graph, told, keep, sum(incoming) - stage.total, index)
        state, incoming = tuple(rest), stage.tokens
        counted = len(state) - 1 if stage.weighs else None if policy.renews else counted
        if counted is not None:
            with graph.inserting_after(rest[-1]):
                sizes[_scored(stage) + 1] = graph.call_function(row_sizes, (hidden, visual, state[counted]))
        pruned_at[cut] = hidden
        selections.append(index)
    for layer, anchor in enumerate(anchors(graph)):
        if given := [first for first in sizes if first <= layer]:
            give_sizes(anchor, sizes[max(given)])
    output = output_node(graph)
    output.args = ((*output.args[0], *selections, *(state if prefix is not None else ())),)  # type: ignore[misc]
    return finish(module)


def _moved(graph: fx.Graph, told: dict[str, fx.Node], keep: fx.Node, fewer: int, after: fx.Node) -> dict[str, fx.Node]:
    """What policies are told of rows, of those that are left; dead code where no later stage asks for it."""
    with graph.inserting_after(after):
        found = {name: graph.call_function(take_along, (node, keep, 1)) for name, node in told.items() if name != "last"}
        if "last" in told:
            found["last"] = graph.call_function(operator.sub, (told["last"], fewer))
    return found


def _exit(graph: fx.Graph, layer: int) -> fx.Node:
    """The hidden state that leaves `layer`; that of -1 is what enters the first."""
    return first_input(graph) if layer < 0 else layer_exit(graph, layer)


def _scored(stage: Stage) -> int:
    return stage.layer if stage.side == "encoder" else stage.layer - 1


def of_one(value: Any) -> Any:
    """An option that has a value for each segment, for segments that are all alike."""
    if not isinstance(value, tuple):
        return value
    if len(set(value)) != 1:
        raise RewriteError(f"segments of one program differ in an option: {value}")
    return value[0]


def _check_places(stages: tuple[Stage, ...], layers: int) -> None:
    before = -1 - any(stage.side == "decoder" for stage in stages)
    for stage in stages:
        if stage.policy not in POLICIES:
            raise RewriteError(f"policy {stage.policy!r} is unknown: use one of {', '.join(NAMED)}")
        if stage.weighs and not (POLICIES[stage.policy].merges and POLICIES[stage.policy].adds):
            raise RewriteError(f"policy {stage.policy!r} does not say how many tokens each that it leaves stands for")
        if not all(0 <= layer < stage.layer for layer in stage.also):
            raise RewriteError(f"layers {stage.also} that a stage looks at as well are to be below its own, {stage.layer}")
        if not before < _scored(stage) < layers - (stage.side == "decoder"):
            first = before + 1 + (stage.side == "decoder")
            raise RewriteError(
                f"stage at layer {stage.layer} is out of place: stages ascend between layer {first} and {layers - 1}"
            )
        if _scored(stage) < 0 and (keys := POLICIES[stage.policy].needs & {"query", "key", "value", "before"}):
            raise RewriteError(
                f"policy {stage.policy!r} looks at {', '.join(sorted(keys))} of a layer before: none is before layer 0"
            )
        before = _scored(stage)


def _check_merge(graph: fx.Graph, stage: Stage, cut: fx.Node) -> None:
    if not POLICIES[stage.policy].merges:
        return
    beside = content_beside(graph, cut)
    if beside:
        names = ", ".join(node.name for node in beside)
        raise RewriteError(
            f"layer {_scored(stage)} has no single exit: {names} cross beside {cut.name}, and {stage.policy} merges "
            "tokens of the hidden state only"
        )


def _parts(graph: fx.Graph, node: fx.Node, number: int) -> list[fx.Node]:
    parts, after = [], node
    for i in range(number):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (node, i))
        parts.append(after)
    return parts
