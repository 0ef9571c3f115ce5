"""Calibration: where it stands in schedules and graphs, its texts, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

import gemma
import models
import pytest
import torch
from calibrated import LAYERS, VITCOP, optimized
from graphs import calls, copy
from models import PATCHES
from vitcop_compile.passes import extend_passes, prefill_passes, rewrite
from vitcop_compile.passes.attach_cache import attend_apart, write_numbers
from vitcop_compile.passes.prune import prune

from vitcop_compile import ConfigError, RewriteError, UnsupportedError, ViTCoPConfig, attention
from vitcop_compile.attention import ANCHOR, sdpa_marked, weighed, weighed_before, weighed_cached
from vitcop_compile.layout import Layout
from vitcop_compile.methods import Calibrated, FastV, ToMe, Uniform, VisionZip, VScan, method_of
from vitcop_compile.policies import POLICIES, Choice, Policy, Site
from vitcop_compile.schedule import ModelShape, Schedule, Stage

# Graphs


def test_weights_are_made_once_for_a_group_and_not_without_calibration() -> None:
    captured = models.captured(models.shared(LAYERS))
    weighing, plain = optimized(Calibrated(VITCOP)).programs.schedule, optimized(VITCOP).programs.schedule
    assert weighing.told == weighing.sized == (1, 2) and plain.told == ()
    made = rewrite(captured.decoder, prefill_passes(weighing, states=1))
    assert (len(calls(made, weighed)), len(calls(made, sdpa_marked)), len(calls(made, attention.sdpa))) == (2, 3, 1)
    for step in (extend_passes(weighing), prefill_passes(weighing, states=1, filled=True)):
        assert (len(calls(made := rewrite(captured.decoder, step), weighed_cached)), len(calls(made, write_numbers))) == (2, 2)
    apart = rewrite(captured.decoder, extend_passes(weighing, in_place=False))
    assert (len(calls(apart, weighed_before)), len(calls(apart, attend_apart))) == (2, LAYERS)
    for step in (prefill_passes(plain, states=1), extend_passes(plain), extend_passes(plain, in_place=False)):
        module = rewrite(captured.decoder, step)
        assert not any(calls(module, of) for of in (weighed, weighed_cached, weighed_before, write_numbers, sdpa_marked))
        assert not any("sizes" in node.name for node in module.graph.nodes)


def test_an_encoder_counts_behind_its_first_merge() -> None:
    method = Calibrated(ToMe(tokens=22))
    plan = optimized(method).schedule
    module = optimized(method).programs.captured.encoder
    made = prune(copy(module), tuple(stage.of_segment(0) for stage in plan.vision_stages), (PATCHES,), prefix=1)
    told = [len(node.args) > 5 for node in calls(made, ANCHOR)]
    assert told[:3] == [False, True, True]


# Schedules, settings and what is refused


@pytest.mark.parametrize("method", [VITCOP, VisionZip(tokens=20), ToMe(tokens=22), VScan(tokens=12), FastV(tokens=9)])
def test_stages_weigh_where_something_merges(method: Any) -> None:
    shape = optimized(VITCOP).schedule.shape
    stages = Calibrated(method).schedule(shape).stages
    assert {stage.positions for stage in stages} == {"kept"}
    assert [stage.weighs for stage in stages] == [POLICIES[stage.policy].merges for stage in stages]
    inner = dataclasses.replace(method, merge="mean") if hasattr(method, "merge") else method
    plain = [dataclasses.replace(stage, positions="kept", weighs=False) for stage in stages]
    assert plain == [
        dataclasses.replace(stage, positions="kept") for stage in inner.schedule(optimized(VITCOP).schedule.shape).stages
    ]


def test_groups_that_are_told() -> None:
    shape = optimized(VITCOP).schedule.shape
    told = {
        name: Calibrated(method).schedule(shape).told
        for name, method in {"vitcop": VITCOP, "vscan": VScan(tokens=12), "fastv": FastV(tokens=9)}.items()
    }
    assert told == {"vitcop": (1, 2), "vscan": (0, 1), "fastv": ()}
    # At the decoder's entry there is no layer before the stage, nor a group.
    stages = (Stage("decoder", 0, "merge_to_means", (4,), weighs=True), Stage("decoder", 2, "keep_lowest", (2,)))
    assert Schedule(shape, (shape.image,), stages).told == (1, 2)
    assert Schedule(dataclasses.replace(shape, marks=True), (shape.image,), stages[1:]).told == (0, 1)


@pytest.mark.parametrize(
    "method", [VITCOP, ViTCoPConfig.preset("1/9", clips="pooled", merge="mean"), VisionZip(tokens=9), Uniform(retention=0.5)]
)
def test_json_round_trip(method: Any) -> None:
    found = method_of(Calibrated(method).to_json())
    assert found == Calibrated(method) and hash(found) == hash(Calibrated(method))
    assert found.clips == getattr(method, "clips", "per_frame")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": {}}, "config version None cannot be read"),
        ({"of": {"method": "zip"}}, "method 'zip' is unknown: use one of vitcop, "),
        ({"layer": 3}, "calibrated: settings ['layer', 'of'] are not those of one method, in 'of'"),
        ({"version": 7}, "calibrated: version 7 cannot be read: this package reads 1"),
    ],
)
def test_texts_that_are_none_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        method_of(json.dumps(json.loads(Calibrated(VITCOP).to_json()) | change))


@dataclass(frozen=True)
class Silent:
    """A method whose policy merges and says nothing of it."""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        return (Stage("decoder", 1, "merge_by_cluster", (4,) * len(layout)),)

    def to_json(self) -> str:
        raise NotImplementedError


def test_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="calibrated already"):
        Calibrated(Calibrated(VITCOP))
    for wrong in (VisionZip, "visionzip", None):
        with pytest.raises(ConfigError, match="is no method: pass a ViTCoPConfig"):
            Calibrated(wrong)
    with pytest.raises(ConfigError, match="policy 'merge_by_cluster' merges tokens and does not say how many each stands for"):
        models.optimize(models.shared(LAYERS), Calibrated(Silent()))
    with pytest.raises(ConfigError, match="attend to each other both ways in this model, by masks of their own"):
        models.optimize(gemma.model(), Calibrated(VisionZip(tokens=9)))
    with pytest.raises(ConfigError, match="merge='twice' is unknown: use 'published' or 'mean'"):
        ViTCoPConfig.preset("1/9", merge="twice")
    monkeypatch.setattr("vitcop_compile.pipeline.check_lowering", lambda *_: None)
    with pytest.raises(
        UnsupportedError, match="'flash_attention_2' adds nothing to logits, and a calibrated method adds log si"
    ):
        models.optimize(models.shared(LAYERS), Calibrated(VITCOP), attn_implementation="flash_attention_2")
    stage = Stage("decoder", 1, "keep_lowest", (4,), weighs=True)
    with pytest.raises(RewriteError, match="policy 'keep_lowest' does not say how many tokens each that it leaves stands for"):
        prune(copy(models.captured(models.shared(LAYERS)).decoder), (stage,), (PATCHES,))


@pytest.mark.slow
def test_a_policy_of_the_user_may_weigh() -> None:
    """Pairs of neighbours, merged before a decoder layer, behind a merge in the encoder: the sum counts."""

    def pairs(site: Site, budget: int) -> Choice:
        first, second = site.hidden[:, ::2], site.hidden[:, 1::2]
        counts = torch.ones_like(site.at) if site.counts is None else site.counts
        one, two = counts[:, ::2], counts[:, 1::2]
        rows = (first * one.unsqueeze(2) + second * two.unsqueeze(2)) / (one + two).unsqueeze(2)
        return Choice(torch.arange(0, 2 * budget, 2).expand(len(first), budget), rows, (one + two,))

    POLICIES["pairs"] = Policy(pairs, frozenset(("hidden",)), merges=True, adds=1)
    try:
        fast = models.optimize(models.shared(LAYERS), Calibrated(Pairs()))
        out = fast(input_ids=torch.tensor([models.turn_ids(1, 0)]), pixel_values=models.pixels())
        entering, paired = out["past_key_values"].held_buffers.numbers
        assert entering[0, 3:19].sum() == PATCHES and entering.max() > 1
        assert paired[0, 3:11].tolist() == (entering[0, 3:19:2] + entering[0, 4:19:2]).tolist()
        assert set(paired[0, 11:15].tolist()) == {1}
    finally:
        del POLICIES["pairs"]


@dataclass(frozen=True)
class Pairs:
    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        first = VisionZip(tokens=16, contextual=0.5, merge="mean").stages(shape, layout)
        return (*first, Stage("decoder", 2, "pairs", (8,) * len(layout)))

    def to_json(self) -> str:
        raise NotImplementedError
