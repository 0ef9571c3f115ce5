"""Reads what a policy looks at from a layer, for a selection that happens behind the graph."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import cast

import torch
from torch import fx

from ..errors import RewriteError
from ..policies import NAMED, POLICIES, behind, tap_of
from ..schedule import Stage
from .raw_key import raw_key, rows_of
from .token_axis import anchors, finish, output_node


def tap(module: fx.GraphModule, stage: Stage | None, prefix: int) -> fx.GraphModule:
    """Returns, behind the graph's own results, the score [B, n] and the features [B, n, K] of its candidates at `stage.layer`:
    its keys, where they are rotated as they were before that.

    With layers in `stage.also` as well, the score is [B, n, layers], that of `stage.layer` last. prefix: rows before the
    candidates, which neither result has. Skipped without a stage, and for one that looks at no layer. Raises RewriteError for
    a policy that chooses by more of a layer than these, for a layer that is not there, and for one that attends within
    windows."""
    if stage is None:
        return module
    graph = module.graph
    if stage.policy not in POLICIES or not behind(stage):
        able = ", ".join(name for name in NAMED if behind(replace(stage, policy=name)))
        raise RewriteError(f"policy {stage.policy!r} cannot choose behind the encoder: use one of {able}")
    score_of = tap_of(stage)
    if score_of is None:
        return module
    found = anchors(graph)
    for layer in (*stage.also, stage.layer):
        if not 0 <= layer < len(found):
            raise RewriteError(f"layer {layer} is out of range: the graph holds {len(found)} attention nodes")
    output, anchor = output_node(graph), found[stage.layer]
    hidden = cast(fx.Node, output.args[0][0])  # type: ignore[index]
    scores = []
    for layer in (*stage.also, stage.layer):
        query, key, _, scale, _, *padding = found[layer].args
        rows, batch = cast(fx.Node, key).meta["val"].shape[2], cast(fx.Node, key).meta["val"].shape[0]
        if padding and (batch, rows) != tuple(hidden.meta["val"].shape[:2]):
            raise RewriteError(f"layer {layer} attends within windows of {rows} patches, whose scores cannot be compared")
        with graph.inserting_before(output):
            real = padding[0] if padding else None
            scores.append(graph.call_function(score_of, (query, key, scale, prefix, real)))  # type: ignore[arg-type]
    keys = raw_key(graph, anchor) if padding else key
    with graph.inserting_before(output):
        score = scores[0] if len(scores) == 1 else graph.call_function(torch.stack, (scores, -1))
        features = graph.call_function(rows_of, (keys,))  # type: ignore[arg-type]
        if prefix:
            features = graph.call_function(operator.getitem, (features, (slice(None), slice(prefix, None))))
    output.args = ((*output.args[0], score, features),)  # type: ignore[misc]
    return finish(module)
