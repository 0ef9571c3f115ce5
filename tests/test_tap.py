"""The pass that reads what a policy looks at, for a selection behind the encoder."""

from __future__ import annotations

import models
import pytest
import tiled
import torch
from graphs import calls
from models import captured
from vitcop_compile.passes import rewrite, tap, tower_passes

from vitcop_compile import RewriteError, ViTCoPConfig
from vitcop_compile.families import family_of
from vitcop_compile.policies import POLICIES
from vitcop_compile.schedule import Stage, resolve


@pytest.mark.parametrize("name", ["next", "onevision"])
def test_a_tower_has_one_tap_and_prunes_nothing(name: str) -> None:
    model = tiled.model(name)
    host = family_of(model).host
    schedule = resolve(ViTCoPConfig(budgets=(12, 8, 3), vision_layer=0), host.shape, host.layout)
    assert schedule.vision is not None
    graph = rewrite(captured(model).encoder, tower_passes(schedule))
    policy = POLICIES[schedule.vision.policy]
    (node,) = calls(graph, policy.tap)
    assert node.args[3] == host.shape.prefix_tokens
    hidden, score, features = graph(torch.randn(3, host.shape.prefix_tokens + 16, host.shape.vision_hidden))
    assert (hidden.shape, score.shape, features.shape) == ((3, 16, 32), (3, 16), (3, 16, 32))


def test_without_a_stage_nothing_is_read() -> None:
    model = models.shared()
    graph = rewrite(captured(model).encoder, ())
    before = len(graph.graph.nodes)
    assert len(tap(graph, None, 1).graph.nodes) == before


@pytest.mark.parametrize(
    "policy, layer, words",
    [
        ("keep_lowest", 1, "cannot choose behind the encoder: use one of cls_attention, attention_received"),
        ("nothing", 1, "cannot choose behind the encoder"),
        ("cls_attention", 4, "layer 4 is out of range: the graph holds 4 attention nodes"),
    ],
)
def test_what_cannot_be_read_is_refused(policy: str, layer: int, words: str) -> None:
    graph = rewrite(captured(models.shared()).encoder, ())
    with pytest.raises(RewriteError, match=words):
        tap(graph, Stage("merge", layer, policy, (4,)), 1)
