"""Reads what a policy looks at from a layer, for a selection that happens behind the graph."""

from __future__ import annotations

import operator

from torch import fx

from ..errors import RewriteError
from ..policies import POLICIES
from ..schedule import Stage
from .token_axis import anchors, finish, output_node


def tap(module: fx.GraphModule, stage: Stage | None, prefix: int) -> fx.GraphModule:
    """Returns, behind the graph's own results, the score [B, n] and the features [B, n, K] of its candidates at `stage.layer`.

    prefix: rows before the candidates, which neither result has. Skipped without a stage. Raises RewriteError for a policy
    that chooses by more than these, and for a layer that is not there.
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
    output = output_node(graph)
    with graph.inserting_before(output):
        query, key, _, scale = found[stage.layer].args[:4]
        read = graph.call_function(policy.tap, (query, key, scale, prefix))  # type: ignore[arg-type]
        score = graph.call_function(operator.getitem, (read, 0))
        features = graph.call_function(operator.getitem, (read, 1))
        if prefix:
            features = graph.call_function(operator.getitem, (features, (slice(None), slice(prefix, None))))
    output.args = ((*output.args[0], score, features),)  # type: ignore[misc]
    return finish(module)
