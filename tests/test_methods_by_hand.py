"""Methods from end to end: what they keep, logits, keys and values are those of stock layers pruned by their references."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import families
import models
import pytest
import reference_methods as book
import torch
from models import IMAGE, PATCHES, slow
from reference_method_turns import FamilyTurns, LlavaTurns, MethodTurns, Plan
from reference_methods import Image, OfImage, Rows, Told
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vitcop_compile import methods
from vitcop_compile.methods import CustomMethod

NEAR = 1e-4
KEPT, FEW = 20, 7  # of an image of LLaVA's 64 tokens, and of Qwen's
CORE = 0.5


def some(number: int) -> Callable[[int], int]:
    return lambda n: number


def shares(kept: int, stages: int = 3) -> list[Callable[[int], int]]:
    """What PyramidDrop's stages leave of n: n s, n s^2, .. kept."""
    return [lambda n, i=i: round(n * (kept / n) ** (i / stages)) if i < stages else kept for i in range(1, 1 + stages)]


def staged(ask: Any, kept: int) -> Plan:
    """Before each layer of four but the first."""
    return Plan(decoder={1 + i: (ask, count) for i, count in enumerate(shares(kept))})


def first_channel(values: Any) -> Any:
    return values[..., 0].float()


def by_first_channel(rows: Rows, image: list[int], budget: int) -> list[int]:
    return sorted(sorted(range(len(image)), key=lambda i: (-rows.hidden[image[i], 0], i))[:budget])


def by_first_channel_of_image(image: Image, budget: int) -> Told:
    return Told(sorted(sorted(range(len(image.hidden)), key=lambda i: (-image.hidden[i, 0], i))[:budget]))


def mean_score(ask: OfImage, heads: int) -> OfImage:
    """As HoloV and VScan have it: attention of CLS, mean over heads."""

    def of_means(image: Image, budget: int) -> Told:
        score, early = ([value / heads for value in values] for values in (image.score, image.early))
        return ask(Image(image.grid, image.hidden, score, early, image.keys), budget)

    return of_means


# Both on decoders of four layers: what stands before 8, 16 and 24 of 32 is before 1, 2 and 3.
DECODER: dict[str, tuple[Callable[[int], Any], Callable[[int], Plan]]] = {
    "fastv": (lambda k: methods.FastV(layer=2, tokens=k), lambda k: Plan(decoder={2: (book.fastv, some(k))})),
    "pyramiddrop": (lambda k: methods.PyramidDrop(tokens=k), lambda k: staged(book.fastv, k)),
    "sparsevlm": (lambda k: methods.SparseVLM(tokens=k), lambda k: staged(book.sparsevlm, k)),
    "v2drop": (lambda k: methods.V2Drop(tokens=k), lambda k: staged(book.v2drop, k)),
    "dart": (lambda k: methods.Dart(layer=2, tokens=k), lambda k: Plan(decoder={2: (book.dart(4, 4), some(k))})),
    "cdpruner": (lambda k: methods.CDPruner(tokens=k), lambda k: Plan(decoder={0: (book.cdpruner, some(k))})),
    "zspaprune": (
        lambda k: methods.ZSPAPrune(tokens=k, core=CORE),
        lambda k: Plan(decoder={0: (book.zspaprune(CORE), some(k))}),
    ),
    "custom": (
        lambda k: CustomMethod(score=lambda site: first_channel(site.hidden), layer=3, tokens=k),
        lambda k: Plan(decoder={3: (by_first_channel, some(k))}),
    ),
}
# The encoder has four layers of four heads, the last of which reads what the one before leaves; VScan's early layer of six of
# 24 is its second.
LLAVA: dict[str, tuple[Callable[[], Any], Plan]] = {
    "uniform": (lambda: methods.Uniform(tokens=KEPT), Plan(encoder={2: (book.uniform, some(KEPT))})),
    "downsample": (lambda: methods.Downsample(tokens=KEPT), Plan(entry=(book.downsample((4, 5)), some(KEPT)))),
    # A share of .16 of 20.
    "visionzip": (lambda: methods.VisionZip(tokens=KEPT), Plan(encoder={2: (book.visionzip(3), some(KEPT))})),
    "visionzip, mean": (
        lambda: methods.VisionZip(tokens=KEPT, merge="mean", contextual=0.5),
        Plan(encoder={2: (book.visionzip(10, doubled=False), some(KEPT))}),
    ),
    "divprune": (lambda: methods.DivPrune(tokens=KEPT), Plan(entry=(book.divprune, some(KEPT)))),
    "holov": (lambda: methods.HoloV(tokens=KEPT), Plan(entry=(mean_score(book.holov(9), 4), some(KEPT)))),
    "scope": (lambda: methods.Scope(tokens=KEPT), Plan(encoder={2: (book.scope(), some(KEPT))})),
    "vscan": (
        lambda: methods.VScan(tokens=KEPT, window=3),
        Plan(entry=(mean_score(book.vscan(3), 4), some(KEPT)), decoder={2: (book.fastv, some(KEPT // 3 + 1))}),
    ),
    # From 64 to 20 in four blocks, 11 each.
    "tome": (
        lambda: methods.ToMe(tokens=KEPT),
        Plan(encoder={block: (book.tome, some(64 - 11 * (block + 1))) for block in range(4)}),
    ),
    "custom in the encoder": (
        lambda: CustomMethod(score=lambda site: first_channel(site.hidden), side="encoder", layer=1, tokens=KEPT),
        Plan(encoder={1: (by_first_channel_of_image, some(KEPT))}),
    ),
    "custom behind the projector": (
        lambda: CustomMethod(score=lambda site: first_channel(site.hidden), side="entry", tokens=KEPT),
        Plan(entry=(by_first_channel_of_image, some(KEPT))),
    ),
} | {name: (lambda make=make: make(KEPT), plan(KEPT)) for name, (make, plan) in DECODER.items()}
# Full attention is in the first and the third of four layers.
QWEN: dict[str, tuple[Callable[[], Any], Plan]] = {
    "uniform": (lambda: methods.Uniform(tokens=FEW), Plan(entry=(book.uniform, some(FEW)), early=0)),
    "downsample": (lambda: methods.Downsample(tokens=6), Plan(entry=(book.downsample((2, 3)), some(6)), early=0)),
    "visionzip": (
        lambda: methods.VisionZip(tokens=FEW, contextual=0.4),
        Plan(entry=(book.visionzip(3), some(FEW)), early=0),
    ),
    "divprune": (lambda: methods.DivPrune(tokens=FEW), Plan(entry=(book.divprune, some(FEW)), early=0)),
    "holov": (lambda: methods.HoloV(tokens=FEW, crops=4), Plan(entry=(book.holov(4), some(FEW)), early=0)),
    "scope": (lambda: methods.Scope(tokens=FEW), Plan(entry=(book.scope(), some(FEW)), early=0)),
    "vscan": (
        lambda: methods.VScan(tokens=FEW, window=2),
        Plan(entry=(book.vscan(2), some(FEW)), decoder={2: (book.fastv, some(2))}, early=0),
    ),
    "custom behind the projector": (
        lambda: CustomMethod(score=lambda site: first_channel(site.hidden), side="entry", tokens=FEW),
        Plan(entry=(by_first_channel_of_image, some(FEW)), early=0),
    ),
} | {name: (lambda make=make: make(FEW), plan(FEW)) for name, (make, plan) in DECODER.items()}
QUICK = {"llava": ("sparsevlm",), "qwen": ("vscan", "cdpruner")}


def of(family: str, methods: Sequence[str]) -> Any:
    return pytest.mark.parametrize("name", [name if name in QUICK[family] else slow(name) for name in methods])


@cache
def llava() -> Any:
    return models.llava(layers=4, kv_heads=2, vision_feature_layer=-1)


@cache
def qwen() -> Any:
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64,
        "fullatt_block_indexes": [0, 2], "window_size": 56, "tokens_per_second": 2,
    }  # fmt: skip
    text = families.TEXT | {"rope_parameters": families._THREE}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **families.IDS)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    models.randomize(model, 0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.25)
    return model


def told_of(family: str, plan: Plan) -> MethodTurns:
    if family == "llava":
        return LlavaTurns(llava(), plan)
    return FamilyTurns(qwen(), families.KINDS["qwen2_5_vl"].book, plan, heads=2, whole=(0, 2))


@cache
def optimized(family: str, name: str) -> Any:
    return models.optimize(llava() if family == "llava" else qwen(), (LLAVA if family == "llava" else QWEN)[name][0]())


def generate(fast: Any, rows: Sequence[list[int]], given: dict[str, Any], steps: int = 3, **more: Any) -> Any:
    """Of prompts padded on the left; none of what is said is a placeholder."""
    ids, mask = models.pad([torch.tensor([row]) for row in rows], "left")
    return fast.generate(
        ids, attention_mask=mask, **given, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, suppress_tokens=list(range(families.START, models.VOCAB)), **more,
    )  # fmt: skip


def check(found: Any, told: MethodTurns, logits: Tensor, sample: int = 0, near: float = NEAR) -> None:
    """What stays, logits, and the keys and values of every layer, of one sample."""
    cache = found.past_key_values
    firsts = list(itertools.accumulate(told.candidates, initial=0))[:-1]

    def through(parts: list[list[int]]) -> list[int]:
        return [first + i for first, own in zip(firsts, parts, strict=True) for i in own]

    early = bool(told.plan.encoder or told.plan.entry)
    assert (cache.selection.kept is not None) == early
    wanted = [told.kept] * early + (told.stages or [[] for _ in told.plan.decoder])
    stages = [*([cache.selection.kept] if early else []), *cache.selection.stages]
    for stage, expected in zip(stages, wanted, strict=True):
        assert stage[sample][stage[sample] >= 0].tolist() == through(expected)
    torch.testing.assert_close(torch.stack([step[sample] for step in found.logits]), logits, rtol=near, atol=near)
    assert len(cache.buffers) == 2 * len(told.cache.layers)
    for layer, expected in enumerate(told.cache.layers):
        for ours, theirs in zip(cache.buffers[2 * layer : 2 * layer + 2], (expected.keys, expected.values), strict=True):
            torch.testing.assert_close(ours[sample, :, : theirs.shape[2]], theirs[0], rtol=near, atol=near)


def said(found: Any, sample: int = 0) -> list[int]:
    return found.sequences[sample, -len(found.logits) :].tolist()


def llava_prompt(images: int, seed: int) -> tuple[list[int], Tensor | None]:
    """Text around and between so many images."""
    words = models.text(6 + 3 * images + seed, seed)
    ids = words[:2]
    for i in range(images):
        ids = [*ids, *[IMAGE] * PATCHES, *words[2 + 3 * i : 4 + 3 * i]]
    return [*ids, *words[3 * images :]], models.pixels(images, seed) if images else None


@pytest.mark.covers("pruned by hand", "batch", "several", family="llava")
@of("llava", list(LLAVA))
def test_a_batch_of_llava_is_pruned_by_hand(name: str) -> None:
    """One image, none, and two."""
    samples = [llava_prompt(images, seed) for seed, images in enumerate((1, 0, 2))]
    pixels = torch.cat([own for _, own in samples if own is not None])
    found = generate(optimized("llava", name), [ids for ids, _ in samples], {"pixel_values": pixels})
    for sample, (ids, own) in enumerate(samples):
        told = told_of("llava", LLAVA[name][1])
        check(found, told, told.turn(ids, own, said(found, sample)), sample)


@pytest.mark.covers("pruned by hand", family="qwen2_5_vl")
@of("qwen", list(QWEN))
def test_images_of_qwen_of_two_sizes_are_pruned_by_hand(name: str) -> None:
    ids, given = families.prompt("qwen2_5_vl", [2, (5, 6), 3, (3, 4), 5])
    found = generate(optimized("qwen", name), [ids], given | families.types(torch.tensor([ids])))
    told = told_of("qwen", QWEN[name][1])
    check(found, told, told.turn(ids, given, said(found)))


@pytest.mark.covers("turns", family="llava")
@pytest.mark.parametrize("name", [slow("fastv"), slow("visionzip"), slow("cdpruner")])
def test_later_turns_of_text_and_of_an_image(name: str) -> None:
    """Attention, and what is text, is that of the turn."""
    fast, told, found, before = optimized("llava", name), told_of("llava", LLAVA[name][1]), None, []
    for seed, images in enumerate((1, 0, 2)):
        ids, pixels = llava_prompt(images, seed)
        more = {} if found is None else {"past_key_values": found.past_key_values}
        given = {} if pixels is None else {"pixel_values": pixels}
        found = generate(fast, [before + ids], given, **more)
        # The last token of a turn is fed with the next.
        logits = told.turn(before[-1:] + ids, pixels, said(found))
        if images:
            check(found, told, logits)
        else:
            torch.testing.assert_close(torch.cat(found.logits), logits, rtol=NEAR, atol=NEAR)
        before = found.sequences[0].tolist()


@pytest.mark.slow
def test_random_tokens_are_pruned_by_hand() -> None:
    """Of those that it says it kept."""
    ids, pixels = llava_prompt(2, 0)
    found = generate(models.optimize(llava(), methods.Random(tokens=KEPT)), [ids], {"pixel_values": pixels})
    kept = found.past_key_values.selection.kept[0].tolist()
    first = kept[:KEPT]
    assert kept[KEPT:] == [PATCHES + i for i in first] and len(set(first)) == KEPT
    told = told_of("llava", Plan(encoder={2: (lambda image, budget: Told(first), some(KEPT))}))
    check(found, told, told.turn(ids, pixels, said(found)))


@pytest.mark.covers("batch", family="llava")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cdpruner", "fastv", "visionzip", "vscan"])
def test_samples_of_one_layout_have_choices_and_positions_of_their_own(name: str) -> None:
    """They go through programs together, of text of other lengths."""
    samples = [llava_prompt(1, seed) for seed in (0, 3)]
    pixels = torch.cat([own for _, own in samples if own is not None])
    found = generate(optimized("llava", name), [ids for ids, _ in samples], {"pixel_values": pixels})
    for sample, (ids, own) in enumerate(samples):
        told = told_of("llava", LLAVA[name][1])
        check(found, told, told.turn(ids, own, said(found, sample)), sample)


def test_another_choice_would_be_seen() -> None:
    """A control: the reference takes the most salient tokens, and then the least."""
    ids, pixels = llava_prompt(1, 0)

    def least(image: Image, budget: int) -> Told:
        return book.visionzip(3)(Image(image.grid, image.hidden, [-s for s in image.score], [], image.keys), budget)

    found, told = (
        generate(optimized("llava", "visionzip"), [ids], {"pixel_values": pixels}),
        told_of("llava", LLAVA["visionzip"][1]),
    )
    check(found, told, told.turn(ids, pixels, said(found)))
    told = told_of("llava", Plan(encoder={2: (least, some(KEPT))}))
    assert (torch.cat(found.logits) - told.turn(ids, pixels, said(found))).abs().max() > 100 * NEAR
