"""Calibration: attention that counts a merged token as often as tokens are in it, against stock layers weighed by hand."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import families
import gemma
import models
import naive
import numpy as np
import pytest
import torch
from graphs import calls, copy
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGE, PATCHES, exhaustive, slow
from naive_merges import attend
from reference_calibrated import NOWHERE, FamilyWeighing, LlavaWeighing, see_tome, see_visionzip, see_vitcop
from reference_llava import Settings
from torch import Tensor
from vitcop_compile.export import EngineModel
from vitcop_compile.passes import extend_passes, prefill_passes, rewrite
from vitcop_compile.passes.attach_cache import attend_apart, write_numbers
from vitcop_compile.passes.prune import prune, prune_tokens

from vitcop_compile import ConfigError, RewriteError, UnsupportedError, ViTCoPConfig, attention
from vitcop_compile.attention import ANCHOR, sdpa_cached, sdpa_marked, weighed, weighed_before, weighed_cached
from vitcop_compile.layout import Layout
from vitcop_compile.methods import Calibrated, Downsample, FastV, ToMe, Uniform, VisionZip, VScan, method_of
from vitcop_compile.ops import mean_by_cluster, merge_by_cluster
from vitcop_compile.policies import POLICIES, Choice, Policy, Site
from vitcop_compile.schedule import ModelShape, Schedule, Stage

LAYERS, NEAR = 4, 1e-5
COUNTS: dict[str, Any] = {"shallow_layer": 1, "deep_layer": 3, "scale_layers": False}
VITCOP = ViTCoPConfig(budgets=(30, 12, 7, 5), **COUNTS)
BY_HAND = Settings(30, 5, 12, 7, 2, 1, 3, "original")
PLAIN = Settings(PATCHES, 1, 1, 1, 2, NOWHERE, NOWHERE, "original")
SEEING = {
    "visionzip": (VisionZip(tokens=20, contextual=0.25), PLAIN, see_visionzip(15, 5)),
    "vitcop": (VITCOP, BY_HAND, see_vitcop(BY_HAND)),
    "tome": (ToMe(tokens=22), PLAIN, see_tome((50, 36, 22))),
}
TOLD: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TURNS = (1, 0, 2)  # images of each


@cache
def optimized(method: Any, backend: str = "eager", layers: int = LAYERS) -> Any:
    return models.optimize(models.shared(layers), method, backend=backend)


def turn_ids(images: int, seed: int) -> list[int]:
    words = models.text(4 + 5 * images + seed % 3, seed)
    ids = words[:3]
    for i in range(images):
        ids = [*ids, *[IMAGE] * PATCHES, *words[3 + 5 * i : 3 + 5 * i + (seed + i) % 5]]
    return [*ids, *words[-2:]]


def check(cache: Any, told: Any, sample: int = 0, near: float = NEAR) -> None:
    """Keys and values of every layer, and how many tokens each row of theirs stands for."""
    for layer, stock in enumerate(told.cache.layers):
        rows = stock.keys.shape[2]
        for ours, theirs in zip(cache.buffers[2 * layer : 2 * layer + 2], (stock.keys, stock.values), strict=True):
            torch.testing.assert_close(ours[sample, :, :rows], theirs[0], atol=near, rtol=near)


def check_sizes(fast: Any, cache: Any, told: Any, sample: int = 0) -> None:
    plan = fast.schedule
    held = dict(zip(plan.told, cache.held_buffers.numbers, strict=True))
    for layer, group in enumerate(plan.groups):
        sizes = told.sizes[layer]
        if group in held:
            assert held[group][sample, : len(sizes)].tolist() == sizes
        else:
            assert set(sizes) == {1}


def talk(fast: Any, name: str, batch: int = 1, near: float = NEAR, turns: tuple[int, ...] = TURNS) -> None:
    """Turns with so many images, each of three tokens said."""
    _, settings, see = SEEING[name]
    told = [LlavaWeighing(fast.model, settings, see) for _ in range(batch)]
    whole, mask = torch.empty(batch, 0, dtype=torch.int64), torch.empty(batch, 0, dtype=torch.int64)
    cache, unfed = None, [[] for _ in range(batch)]
    for turn, images in enumerate(turns):
        prompts = [turn_ids(images, 7 * turn + sample) for sample in range(batch)]
        ids, real = models.pad([torch.tensor([prompt]) for prompt in prompts], "left")
        new = [models.pixels(images, 10 * turn + sample) if images else None for sample in range(batch)]
        whole, mask = torch.cat((whole, ids), 1), torch.cat((mask, real), 1)
        sent: dict[str, Any] = {"pixel_values": torch.cat([part for part in new if part is not None])} if images else {}
        out = fast.generate(
            whole, attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True,
            past_key_values=cache, **sent,
        )  # fmt: skip
        cache, said = out["past_key_values"], out.sequences[:, whole.shape[1] :]
        for sample in range(batch):
            logits = told[sample].turn([*unfed[sample], *prompts[sample]], new[sample], said[sample].tolist())
            torch.testing.assert_close(torch.stack(out.logits)[:, sample], logits, atol=near, rtol=near)
            check(cache, told[sample], sample, near)
            check_sizes(fast, cache, told[sample], sample)
            unfed[sample] = said[sample, -1:].tolist()
        if images:
            kept = [PATCHES * i + patch for i, of in enumerate(told[0].kept) for patch in of]
            assert cache.selection.kept[0].tolist() == kept
        whole, mask = out.sequences, torch.cat((mask, torch.ones_like(said)), 1)
    assert max(map(max, told[0].sizes)) > 2, "something has merged"


@pytest.mark.parametrize(
    ("name", "turns", "layers"), [("visionzip", (1, 1), 2), *(slow(name, TURNS, LAYERS) for name in SEEING)]
)
def test_stock_layers_weighed_by_hand(name: str, turns: tuple[int, ...], layers: int) -> None:
    talk(optimized(Calibrated(SEEING[name][0]), layers=layers), name, turns=turns)


@pytest.mark.slow
def test_a_batch_whose_samples_differ() -> None:
    """One image, text alone, two images, decoded together."""
    method, settings, see = SEEING["vitcop"]
    fast, counts = optimized(Calibrated(method)), (1, 0, 2)
    prompts = [turn_ids(count, seed) for seed, count in enumerate(counts)]
    ids, mask = models.pad([torch.tensor([prompt]) for prompt in prompts], "left")
    pixels = [models.pixels(count, seed) if count else None for seed, count in enumerate(counts)]
    out = fast.generate(
        ids, attention_mask=mask, pixel_values=torch.cat([part for part in pixels if part is not None]), max_new_tokens=3,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    for sample, prompt in enumerate(prompts):
        told = LlavaWeighing(models.shared(LAYERS), settings, see)
        logits = told.turn(prompt, pixels[sample], out.sequences[sample, ids.shape[1] :].tolist())
        torch.testing.assert_close(torch.stack(out.logits)[:, sample], logits, atol=NEAR, rtol=NEAR)
        check(out["past_key_values"], told, sample)
        check_sizes(fast, out["past_key_values"], told, sample)


# Tokens that are put together behind their encoder, positions of three coordinates


def family_talk(method: Any, hand: FamilyWeighing, parts: list[list[Any]]) -> None:
    fast = models.optimize(families.model("qwen2_5_vl"), Calibrated(method))
    cache, unfed, whole = None, [], []
    for turn, part in enumerate(parts):
        ids, given = families.prompt("qwen2_5_vl", part, turn)
        whole += ids
        prompt = torch.tensor([whole])
        out = fast.generate(
            prompt, attention_mask=torch.ones_like(prompt), **given, **families.types(prompt), max_new_tokens=3,
            do_sample=False, return_dict_in_generate=True, output_logits=True, past_key_values=cache,
            suppress_tokens=[families.IMAGE, families.VIDEO],
        )  # fmt: skip
        cache, said = out["past_key_values"], out.sequences[0, len(whole) :].tolist()
        logits = hand.turn([*unfed, *ids], given or None, said)
        torch.testing.assert_close(torch.cat(out.logits), logits, atol=NEAR, rtol=NEAR)
        check(cache, hand)
        check_sizes(fast, cache, hand)
        unfed, whole = said[-1:], out.sequences[0].tolist()
    assert max(map(max, hand.sizes)) > 2, "something has merged"


@pytest.mark.parametrize("turns", [[[2, (4, 8), 3]], slow([[2, (4, 8), 3, (4, 8), 1], [4], [2, (4, 8), 1]])])
def test_packed_tokens_pooled_behind_the_projector(turns: list[list[Any]]) -> None:
    book = families.KINDS["qwen2_5_vl"].book
    every = FamilyWeighing(
        families.model("qwen2_5_vl"), book, lambda n: Settings(n, 1, 1, 1, 1, NOWHERE, NOWHERE, "original"), pool=(2, 3)
    )  # fmt: skip
    family_talk(Downsample(tokens=6), every, turns)


@pytest.mark.slow
def test_packed_tokens_merged_in_the_decoder() -> None:
    book = families.KINDS["qwen2_5_vl"].book
    hand = FamilyWeighing(families.model("qwen2_5_vl"), book, lambda _: Settings(8, 3, 4, 3, 1, 1, 3, "original"))
    family_talk(ViTCoPConfig(budgets=(8, 4, 3, 3), **COUNTS), hand, [[3, (3, 4), 4], [5], [2, (4, 4), 3, (3, 4), 2]])


# What calibration is for


@cache
def alike(layers: int = LAYERS) -> Any:
    """A model to which all patches of an image of one color are alike, wherever they stand."""
    model = models.llava(layers, seed=3)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.zero_()
        model.model.language_model.rotary_emb.inv_freq.zero_()
    return model


MERGING = {
    "downsample": Downsample(tokens=16),  # cells that do not overlap: none is in two
    "visionzip": VisionZip(tokens=9, contextual=0.5),
    "tome": ToMe(tokens=22),
    "vscan": VScan(tokens=9, last=1.0),
    "vitcop": ViTCoPConfig(budgets=(PATCHES, 9, 9, 5), **COUNTS),
}


ALIKE = torch.tensor([[IMAGE] * PATCHES + models.text(6)])


def one_color() -> Tensor:
    return models.pixels()[:, :, :1, :1].expand(1, 3, models.SIDE, models.SIDE).contiguous()


@pytest.mark.parametrize(("name", "layers"), [("tome", 2), *(slow(name, LAYERS) for name in MERGING)])
def test_alike_tokens_that_merge_change_nothing(name: str, layers: int) -> None:
    """The image comes first: what is alike sees the same then."""
    stock, fast = alike(layers), models.optimize(alike(layers), Calibrated(MERGING[name]))
    asked = {"pixel_values": one_color(), "attention_mask": torch.ones_like(ALIKE), "max_new_tokens": 4} | TOLD
    expected, found = (model.generate(ALIKE, **asked) for model in (stock, fast))
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGING)
def test_alike_tokens_in_a_second_turn_and_in_beams(name: str) -> None:
    """And without calibration the same tokens change much."""
    stock, color, ids = alike(), one_color(), ALIKE
    fast, plain = (models.optimize(stock, method) for method in (Calibrated(MERGING[name]), Kept(Calibrated(MERGING[name]))))
    said = {"max_new_tokens": 4} | TOLD
    asked = {"pixel_values": color, "attention_mask": torch.ones_like(ids)} | said
    expected, found, off = (model.generate(ids, **asked) for model in (stock, fast, plain))
    assert (off.logits[0] - expected.logits[0]).abs().max() > 1e-2
    more = torch.cat((expected.sequences, torch.tensor([models.text(5, 1)])), 1)
    asked = {"attention_mask": torch.ones_like(more)} | said
    turns = ((stock, expected), (fast, found))
    after = [model.generate(more, past_key_values=out["past_key_values"], **asked) for model, out in turns]
    torch.testing.assert_close(*(torch.cat(out.logits) for out in after), atol=1e-4, rtol=0)
    asked = {"pixel_values": color, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert fast.generate(ids, num_beams=3, **asked).tolist() == stock.generate(ids, num_beams=3, **asked).tolist()


@dataclass(frozen=True)
class Kept:
    """A calibrated method whose tokens count once."""

    method: Calibrated

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        return tuple(dataclasses.replace(stage, weighs=False) for stage in self.method.stages(shape, layout))

    def to_json(self) -> str:
        raise NotImplementedError


@pytest.mark.slow
def test_sizes_of_one_change_nothing() -> None:
    """Nothing takes part in what is kept: the graphs weigh, and everything weighs the same."""
    method = Calibrated(VisionZip(tokens=20, contextual=0.0))
    ids, pixels = torch.tensor([turn_ids(1, 0)]), models.pixels()
    said = {"max_new_tokens": 3} | TOLD
    found, expected = (
        optimized(of).generate(ids, pixel_values=pixels, **said) for of in (method, Kept(method))
    )  # fmt: skip
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=NEAR, rtol=NEAR)
    assert optimized(method).schedule.told == (0,) and optimized(Kept(method)).schedule.told == ()
    sizes = found["past_key_values"].held_buffers.numbers[0]
    assert set(sizes[0, : ids.shape[1] - PATCHES + 20 + 2].tolist()) == {1}


# Attention


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 5))
def test_attention_against_one_head_at_a_time(seed: int, shared: int, held: int, new: int, free: int) -> None:
    """Of a prompt, causal and not; of rows in caches; and of rows that never enter them."""
    generator = torch.Generator().manual_seed(seed)
    batch, groups, width = 2, 2, 4
    query = torch.randn(batch, groups * shared, held + new, width, generator=generator)
    key, value = torch.randn(2, batch, groups, held + new, width, generator=generator)
    sizes = torch.randint(1, 9, (batch, held + new), generator=generator)
    if new == 1:  # a step of decoding
        sizes[:, -1] = 1
    scale = 0.3

    def by_hand(causal: bool) -> Tensor:
        heads = [
            [
                attend(
                    query[b, h].numpy(), key[b, h // shared].numpy(), value[b, h // shared].numpy(), scale, causal,
                    sizes[b].tolist(),
                )
                for h in range(groups * shared)
            ]
            for b in range(batch)
        ]  # fmt: skip
        return torch.tensor(heads, dtype=torch.float32)

    for causal in (True, False):
        found = sdpa_marked(query, key, value, scale, weighed(sizes, causal, torch.float32))
        torch.testing.assert_close(found, by_hand(causal), atol=1e-5, rtol=1e-5)
        anchor = ANCHOR(query, key, value, scale, causal, None, None, 0, sizes)
        torch.testing.assert_close(anchor, by_hand(causal), atol=1e-5, rtol=1e-5)
    expected, query = by_hand(True)[:, :, held:], query[:, :, held:]
    at = torch.arange(held, held + new).expand(batch, new)
    rows = torch.nn.functional.pad(sizes, (0, free))  # what is not written yet stands for nothing
    caches = [torch.nn.functional.pad(tensor, (0, 0, 0, free)) for tensor in (key, value)]
    found = sdpa_cached(query, *caches, scale, at, weighed_cached(at, rows, torch.float32))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    parts = [tensor[:, :, held:] for tensor in (key, value)]
    masks = weighed(sizes[:, held:], True, torch.float32), weighed_before(at, rows)
    found = attend_apart(query, *caches, *parts, scale, at, *masks)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# Merging


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.booleans(), st.data())
def test_means_of_clusters_against_loops(seed: int, n: int, counted: bool, data: st.DataObject) -> None:
    """What merges is what merges in the published stage; a row is the mean of all that stand in it."""
    rng, budget = np.random.default_rng(seed), data.draw(st.integers(1, n))
    hidden, labels = rng.integers(-20, 20, (2, n, 3)).astype(np.float32), rng.integers(-1, 3, (2, n))
    saliency = rng.permutation(2 * n).reshape(2, n).astype(np.float32)
    counts = rng.integers(1, 9, (2, n)) if counted else np.ones((2, n), dtype=int)
    given_ = [torch.from_numpy(values) for values in (hidden, saliency, labels)]
    rows, index, sizes = mean_by_cluster(*given_, budget, 1, torch.from_numpy(counts) if counted else None)
    assert torch.equal(index, merge_by_cluster(*given_, budget)[1])
    for b in range(2):
        merged, where = naive.merge_by_cluster(np.eye(n), saliency[b].tolist(), labels[b].tolist(), budget)
        assert index[b].tolist() == where
        for k, i in enumerate(where):
            group = [j for j in range(n) if merged[k, j] - (i == j) > 0] or [i]
            assert sizes[b, k] == sum(counts[b, j] for j in group)
            mean = sum(counts[b, j] * hidden[b, j].astype(float) for j in group) / sum(counts[b, j] for j in group)
            np.testing.assert_allclose(rows[b, k], mean, atol=1e-5)


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.data())
def test_means_of_clusters_of_several_images(seed: int, each: int, data: st.DataObject) -> None:
    """Images that share a budget: as one image whose clusters are told apart."""
    rng, images = np.random.default_rng(seed), 3
    n = images * each
    budget = data.draw(st.integers(1, n))
    hidden, labels = rng.normal(size=(2, n, 3)).astype(np.float32), rng.integers(-1, 3, (2, n))
    saliency = torch.from_numpy(rng.permutation(2 * n).reshape(2, n).astype(np.float32))
    counts = torch.from_numpy(rng.integers(1, 9, (2, n)))
    apart = torch.from_numpy(labels + 10 * (np.arange(n) // each))
    found = mean_by_cluster(torch.from_numpy(hidden), saliency, torch.from_numpy(labels), budget, images, counts)
    expected = mean_by_cluster(torch.from_numpy(hidden), saliency, apart, budget, 1, counts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_mean_of_two_by_hand() -> None:
    """Two of three merge, at the middle member, the second; published, that is it and the mean of both."""
    hidden, saliency, labels = torch.tensor([[[2.0], [4.0], [9.0]]]), torch.tensor([[5.0, 6.0, 1.0]]), torch.zeros(1, 3).long()
    rows, index, sizes = mean_by_cluster(hidden, saliency, labels, 2)
    assert (rows.flatten().tolist(), index.tolist(), sizes.tolist()) == ([3, 9], [[1, 2]], [[2, 1]])
    assert merge_by_cluster(hidden, saliency, labels, 2)[0].flatten().tolist() == [7, 9]
    rows, _, sizes = mean_by_cluster(hidden, saliency, labels, 2, 1, torch.tensor([[3, 1, 5]]))
    assert (rows.flatten().tolist(), sizes.tolist()) == ([2.5, 9], [[4, 5]])


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["dominant_and_contextual", "local_and_global", "downsample"]))
def test_what_has_merged_merges_again(seed: int, name: str) -> None:
    """A merge of candidates that stand for several is the merge of as many copies of each: in total, and in every mean."""
    rng, n = np.random.default_rng(seed), 12
    hidden = torch.from_numpy(rng.normal(size=(1, n, 5)).astype(np.float32))
    counts = torch.from_numpy(rng.integers(1, 6, (1, n)))
    places = torch.stack((torch.arange(n) // 4 / 4, torch.arange(n) % 4 / 4), -1)[None]
    score = torch.from_numpy(rng.normal(size=(1, n, 2) if name == "local_and_global" else (1, n)).astype(np.float32))
    options: dict[str, Any] = {
        "dominant_and_contextual": {"contextual": 2, "heads": 1, "doubled": False},
        "local_and_global": {"window": 2},
        "downsample": {"cells": (3, 2)},
    }[name]
    given_ = {"at": torch.arange(n)[None], "hidden": hidden, "score": score, "features": hidden, "places": places}
    plain, found = (POLICIES[name].choose(Site(**given_, counts=c), 6, **options) for c in (None, counts))
    assert torch.equal(plain.index, found.index)
    # Which candidates are in a row: what becomes of unit vectors, where means are of rows alone.
    units = torch.eye(n)[None]
    if name == "local_and_global":  # which merges by the rows themselves
        shares = _groups(hidden[0], plain.index[0].tolist())
    else:
        shares = POLICIES[name].choose(Site(**given_ | {"hidden": units}), 6, **options).rows[0] > 0
    weights = shares * counts[0]
    assert torch.equal(found.state[-1][0], weights.sum(1))
    mean = weights.double() @ hidden[0].double() / weights.sum(1, keepdim=True)
    torch.testing.assert_close(found.rows[0].double(), mean, atol=1e-5, rtol=1e-5)


def _groups(hidden: Tensor, kept: list[int]) -> Tensor:
    unit = hidden.double() / hidden.double().norm(dim=1, keepdim=True)
    owner = [kept.index(i) if i in kept else int((unit[kept] @ unit[i]).argmax()) for i in range(len(hidden))]
    return torch.tensor(owner) == torch.arange(len(kept))[:, None]


def test_sizes_pass_through_a_selection_and_into_a_merge() -> None:
    """Of two segments that share a budget labels are told apart, and sizes are left as they are."""
    labels, sizes = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[3, 1, 2, 5]])
    hidden = torch.tensor([[9.0, 1, 2, 3, 4]]).unsqueeze(2)
    key = torch.tensor([[0.0, 1, 2, 4, 3]])[:, None, :, None]  # least norms are those of the first two
    settings: dict[str, Any] = {"incoming": (2, 2), "options": {}, "site": {}, "counted": 1}
    visual = torch.tensor([[1, 2, 3, 4]])
    kept = prune_tokens(hidden, visual, (labels, sizes), None, key, None, None, policy="keep_lowest", tokens=(3,), **settings)
    assert kept[3].tolist() == [[0, 1, 3]] and kept[-1].tolist() == [[3, 1, 5]]
    given_ = (hidden, visual, (labels, sizes), None, key, None, None)
    merged = prune_tokens(*given_, policy="merge_to_means", tokens=(2,), **settings)
    # Each image's cluster becomes one: (3 * 1 + 1 * 2) / 4 and (2 * 3 + 5 * 4) / 7.
    assert merged[-1].tolist() == [[4, 7]]
    torch.testing.assert_close(merged[0].flatten(), torch.tensor([9, 5 / 4, 26 / 7]))


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


# Other backends


@pytest.mark.parametrize(
    ("name", "backend"),
    [slow("visionzip", "onnxruntime"), slow("vitcop", "onnxruntime"), exhaustive("vitcop", "inductor"),
     exhaustive("visionzip", "inductor")],
)  # fmt: skip
def test_other_backends(name: str, backend: str) -> None:
    talk(optimized(Calibrated(SEEING[name][0]), backend), name, 2, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "opset", "buckets"), [("visionzip", 18, (32,)), ("vitcop", 23, (32,)), ("tome", 18, (32,))])
def test_a_folder(name: str, opset: int, buckets: tuple[int, ...] | None, tmp_path: Path) -> None:
    """Two turns from a folder, whose programs return rows and sizes."""
    fast = optimized(Calibrated(SEEING[name][0]))
    fast.export(
        tmp_path / "f", opset=opset, prompt_buckets=buckets, later_images=True, max_text_len=32, max_new_tokens=64
    )  # fmt: skip
    engine = EngineModel.from_pretrained(tmp_path / "f")
    first, then = torch.tensor([turn_ids(1, 0)]), torch.tensor([turn_ids(1, 1)])
    found = []
    for model in (fast, engine):
        said = {"max_new_tokens": 4} | TOLD
        before = model.generate(first, pixel_values=models.pixels(), **said)
        whole = torch.cat((before.sequences, then), 1)
        held = before["past_key_values"]
        after = model.generate(whole, pixel_values=models.pixels(seed=1), past_key_values=held, **said)
        numbers = [sizes[:, : held.held[group]] for sizes, group in zip(held.held_buffers.numbers, fast.schedule.told)]
        found.append(([torch.cat(out.logits) for out in (before, after)], numbers))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert all(int(sizes.max()) > 2 for sizes in found[0][1])


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
        out = fast(input_ids=torch.tensor([turn_ids(1, 0)]), pixel_values=models.pixels())
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
