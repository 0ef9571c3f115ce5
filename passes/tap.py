"""Reads what a policy looks at from a layer, for a selection that happens behind the graph."""

from __future__ import annotations

import operator
from typing import cast

from torch import Tensor, fx

from ..errors import RewriteError
from ..policies import POLICIES
from ..schedule import Stage
from .raw_key import raw_key
from .token_axis import anchors, finish, output_node


def rows_of(key: Tensor) -> Tensor:
    """Keys [B, heads, t, hd] as [B, t, heads * hd]."""
    return key.transpose(1, 2).flatten(2)


def tap(module: fx.GraphModule, stage: Stage | None, prefix: int) -> fx.GraphModule:
    """Returns, behind the graph's own results, the score [B, n] and the features [B, n, K] of its candidates at `stage.layer`:
    its keys, where they are rotated as they were before that.

    prefix: rows before the candidates, which neither result has. Skipped without a stage. Raises RewriteError for a policy
    that chooses by more than these, for a layer that is not there, and for one that attends within windows.
    """
    if stage is None:
        return module
    graph = module.graph
    policy = POLICIES.get(stage.policy)
    if policy is None or policy.tap is None:
        able = ", ".join(name for name, known in POLICIES.items() if known.tap)
        raise RewriteError(f"policy {stage.policy!r} cannot choose behind the encoder: use one of {able}")
    found = anchors(graph)
    if not 0 <= stage.layer < len(found):
        raise RewriteError(f"layer {stage.layer} is out of range: the graph holds {len(found)} attention nodes")
    output, anchor = output_node(graph), found[stage.layer]
    query, key, _, scale, _, *padding = anchor.args
    hidden = cast(fx.Node, output.args[0][0])  # type: ignore[index]
    rows, batch = cast(fx.Node, key).meta["val"].shape[2], cast(fx.Node, key).meta["val"].shape[0]
    if padding and (batch, rows) != tuple(hidden.meta["val"].shape[:2]):
        raise RewriteError(f"layer {stage.layer} attends within windows of {rows} patches, whose scores cannot be compared")
    keys = raw_key(graph, anchor) if padding else key
    with graph.inserting_before(output):
        score = graph.call_function(policy.tap, (query, key, scale, prefix, padding[0] if padding else None))  # type: ignore[arg-type]
        features = graph.call_function(rows_of, (keys,))  # type: ignore[arg-type]
        if prefix:
            features = graph.call_function(operator.getitem, (features, (slice(None), slice(prefix, None))))
    output.args = ((*output.args[0], score, features),)  # type: ignore[misc]
    return finish(module)
