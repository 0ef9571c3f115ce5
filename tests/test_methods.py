"""Methods: their schedules, texts and errors. But for `CustomMethod` no tensor is made here."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import naive
import pytest
from configs import SMALL

from vitcop_compile import ConfigError, ModelShape, ViTCoPConfig, methods
from vitcop_compile.layout import Segment
from vitcop_compile.methods import METHODS, CustomMethod, load_method, method_of
from vitcop_compile.policies import POLICIES, tap_of
from vitcop_compile.schedule import Schedule, Stage

IMAGE = ModelShape().image
TILES = (Segment("image", (1, 24, 24), 576), Segment("image", (1, 12, 24), 292, (100, 150, 200, 291)), IMAGE)
PACKED = dataclasses.replace(
    ModelShape(), packed=True, position_dims=3, layers=28, saliency="attention_received", scored_layers=(7, 15, 23),
    vision_layers=32, feature_layer=31, multiple=8,
)  # fmt: skip
TEXT = 7
# Of each its settings beside the target, none of which is the default.
OTHERS: dict[str, dict[str, Any]] = {
    "random": {"seed": 3}, "uniform": {}, "downsample": {}, "fastv": {"layer": 3}, "pyramiddrop": {"layers": (4, 9)},
    "sparsevlm": {"layers": (4, 20)}, "v2drop": {"layers": (5,)}, "visionzip": {"contextual": 0.5, "merge": "mean"},
    "divprune": {}, "cdpruner": {}, "dart": {"layer": 3, "visual_pivots": 2, "text_pivots": 5},
    "holov": {"crops": 4, "alpha": 0.5}, "scope": {"alpha": 2.0}, "zspaprune": {"core": 0.25}, "tome": {},
    "vscan": {"early": 3, "window": 4, "middle": 9, "last": 0.5},
}  # fmt: skip
# (side, decoder layers or encoder layer) of the only stage, on a model of 32 layers and an encoder of 24.
ONE_STAGE = {
    "random": ("encoder", 22), "uniform": ("encoder", 22), "visionzip": ("encoder", 22), "scope": ("encoder", 22),
    "downsample": ("entry", 22), "divprune": ("entry", 22), "holov": ("entry", 22), "fastv": ("decoder", 2),
    "dart": ("decoder", 2), "cdpruner": ("decoder", 0), "zspaprune": ("decoder", 0),
}  # fmt: skip
STAGED = {"pyramiddrop": (8, 16, 24), "sparsevlm": (3, 7, 16), "v2drop": (3, 17, 22)}
NAMES = pytest.mark.parametrize("name", OTHERS)


def made(name: str, **settings: Any) -> Any:
    return METHODS[name](**settings)


def test_every_method_is_here() -> None:
    assert set(METHODS) == {*OTHERS, "custom"} == {*ONE_STAGE, *STAGED, "vscan", "tome", "custom"}
    assert all(METHODS[name].name == name and METHODS[name].__doc__ for name in METHODS)


# Schedules


@pytest.mark.parametrize("retention", [1 / 3, 2 / 9, 1 / 9])
@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_makes_the_mean(name: str, retention: float) -> None:
    """192, 128 and 64 of 576 tokens, mean over the layers, as tables have it."""
    side, layer = ONE_STAGE[name]
    schedule = made(name, retention=retention).schedule()
    (stage,) = schedule.stages
    first = layer if side == "decoder" else 0
    kept = round((retention * 32 - first) / (32 - first) * 576)
    if name == "downsample":
        # So many cells as fit in a shape like the grid's.
        assert kept * 0.9 < stage.total <= kept
        kept = stage.total
    assert (stage.side, stage.layer, stage.tokens) == (side, layer, (kept,))
    assert stage.positions == ("index" if side != "decoder" else "kept")
    assert schedule.visual_tokens() == (576,) * first + (kept,) * (32 - first)
    assert schedule.kv_rows(TEXT, 2) == tuple(9 + tokens for tokens in schedule.visual_tokens())
    assert schedule.mean_visual_tokens() == pytest.approx(retention * 576, abs=0.5 if name != "downsample" else 12)
    assert schedule.prompt_tokens(TEXT) == TEXT + (576 if side == "decoder" else kept)
    assert made(name, tokens=kept).schedule().stages[0].tokens == (kept,)


def test_published_counts() -> None:
    """FastV at K=2: 2 * 576 + 30 k = 32 * 192, 32 * 128, 32 * 64."""
    found = [methods.FastV(retention=r).schedule().stages[0].total for r in (1 / 3, 2 / 9, 1 / 9)]
    assert found == [166, 98, 30]
    # VScan has 96, 192, 288 leave the vision side, a third of which stays from the middle on.
    for mean, kept in ((192, 288), (128, 192), (64, 96)):
        schedule = methods.VScan(retention=mean / 576).schedule()
        assert [(stage.side, stage.layer, stage.total) for stage in schedule.stages] == [
            ("entry", 22, kept), ("decoder", 16, kept // 3),
        ]  # fmt: skip
        assert schedule.mean_visual_tokens() == mean
    scanned = methods.VScan(tokens=288).schedule().stages[0]
    assert (*scanned.also, scanned.layer) == (6, 22)
    # VisionZip's 10, 20 and 30 contextual tokens of 64, 128 and 192.
    options = [methods.VisionZip(tokens=tokens).schedule().vision.option("contextual") for tokens in (64, 128, 192)]
    assert options == [(10,), (20,), (30,)]


@pytest.mark.parametrize("name", STAGED)
def test_stages_drop_a_share_each(name: str) -> None:
    """n s, n s^2, n s^3, whose mean is the retention, or whose last is a count."""
    layers = STAGED[name]
    spans = [stop - start for start, stop in itertools.pairwise((0, *layers, 32))]
    for retention in (0.9, 0.5, 0.3):
        schedule = made(name, retention=retention).schedule()
        assert [stage.layer for stage in schedule.stages] == list(layers)
        assert schedule.mean_visual_tokens() == pytest.approx(retention * 576, abs=1)
        counts = [576, *(stage.total for stage in schedule.stages)]
        share = counts[1] / 576
        assert counts == [pytest.approx(576 * share**i, abs=2) for i in range(4)]
        assert sum(span * count for span, count in zip(spans, counts, strict=True)) == sum(schedule.visual_tokens())
    # The published 288, 144, 72.
    assert [stage.total for stage in made(name, tokens=72).schedule().stages] == [288, 144, 72]
    assert [stage.total for stage in made(name, tokens=576).schedule().stages] == [576] * 3


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("pyramiddrop", 28, (7, 14, 21)), ("pyramiddrop", 4, (1, 2, 3)), ("sparsevlm", 28, (3, 6, 14)),
        ("sparsevlm", 4, (1, 2, 3)), ("v2drop", 28, (3, 15, 19)), ("v2drop", 80, (8, 42, 55)), ("vscan", 28, (14,)),
        ("vscan", 2, (1,)),
    ],
)  # fmt: skip
def test_layers_are_in_proportion_to_the_depth(name: str, layers: int, expected: tuple[int, ...]) -> None:
    shape = dataclasses.replace(ModelShape(), layers=layers)
    assert tuple(stage.layer for stage in made(name, tokens=9).schedule(shape).decoder_stages) == expected


def test_tome_takes_equally_many_in_every_block() -> None:
    schedule = methods.ToMe(retention=1 / 9).schedule()
    counts = [576, *(stage.total for stage in schedule.stages)]
    assert [stage.layer for stage in schedule.stages] == list(range(23)) and counts[-1] == 64
    assert {a - b for a, b in itertools.pairwise(counts)} == {22, 23} and counts[0] - counts[-1] == 512
    assert schedule.vision_stages == schedule.stages and schedule.image_tokens == 64


@NAMES
def test_several_segments_have_budgets_of_their_own(name: str) -> None:
    """As each alone: tiles, one smaller and with tokens that are protected."""
    method = made(name, retention=0.5)
    whole, alone = method.schedule(layout=TILES), [method.schedule(layout=(segment,)) for segment in TILES]
    for number, stage in enumerate(whole.stages):
        own = [each.stages[number] for each in alone]
        assert stage.tokens == tuple(each.total for each in own)
        assert [stage.of_segment(i) for i in range(3)] == [each.of_segment(0) for each in own]
    assert whole.patches == 576 + 288 + 576 and whole.segment_tokens == tuple(each.image_tokens for each in alone)
    assert whole.visual_tokens() == tuple(map(sum, zip(*(each.visual_tokens() for each in alone), strict=True)))
    # Number, sides, layers and policies are those of any prompt.
    for layout in ((IMAGE,), TILES[1:]):
        plain = [dataclasses.replace(stage, tokens=(), options=()) for stage in method.schedule(layout=layout).stages]
        assert plain == [dataclasses.replace(stage, tokens=(), options=()) for stage in whole.stages]
    assert [stage.tokens for stage in method.schedule(layout=()).stages] == [()] * len(whole.stages)
    assert all(stage.policy in POLICIES for stage in whole.stages)


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "tome"])
def test_where_tokens_are_put_together_behind_the_encoder(name: str) -> None:
    """What was in the encoder is behind it, scored by a layer in which patches attend to their whole image; positions are
    kept, and counts that leave the vision side are multiples."""
    schedule = made(name, retention=0.5).schedule(PACKED)
    sides = {"random": "merge", "uniform": "merge"}
    for stage in schedule.vision_stages:
        assert (stage.side, stage.layer, stage.positions) == (sides.get(name, "entry"), 23, "kept")
        if name != "downsample":
            assert stage.total % 8 == 0
        if name in ("visionzip", "scope", "holov", "vscan"):
            assert stage.tap == "attention_received"
    if name == "vscan":
        assert schedule.vision is not None and schedule.vision.also == (7,)


@NAMES
def test_all_tokens_may_stay(name: str) -> None:
    """A retention of 1, and as many tokens as there are, is every token in every layer."""
    more = {"last": 1.0} if name == "vscan" else {}
    for method in (made(name, retention=1.0, **more), made(name, tokens=576, **more)):
        schedule = method.schedule()
        assert schedule.visual_tokens() == (576,) * 32 and schedule.flop_ratio(TEXT) == 1


# FLOPs by hand


def flops(schedule: Schedule, encoder: list[int], projector: int, decoder: list[int]) -> None:
    """Patches in each encoder layer, rows in the projector, visual tokens in each decoder layer."""
    shape = SMALL
    sides = (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate)
    assert schedule.prefill_flops(TEXT) == tuple(naive.decoder_layer_flops(TEXT + tokens, *sides) for tokens in decoder)
    width = shape.vision_hidden
    layers = sum(naive.encoder_layer_flops(1 + patches, width, shape.vision_intermediate) for patches in encoder)
    embedding = 2 * 12 * shape.patch_features * width
    between = 2 * projector * (width * shape.hidden + shape.hidden * shape.hidden)
    assert schedule.vision_flops() == embedding + layers + between


def test_flops_are_those_of_the_tokens_that_are_left() -> None:
    """Of 12 tokens 4 stay: four encoder layers are run, and scores are those of the last of them."""
    flops(methods.DivPrune(tokens=4).schedule(SMALL), [12] * 4, 12, [4] * 6)
    flops(methods.VisionZip(tokens=4).schedule(SMALL), [12] * 4, 4, [4] * 6)
    flops(methods.CDPruner(tokens=4).schedule(SMALL), [12] * 4, 12, [4] * 6)
    flops(methods.FastV(tokens=4, layer=2).schedule(SMALL), [12] * 4, 12, [12] * 2 + [4] * 4)
    # Two tokens in each block.
    flops(methods.ToMe(tokens=4).schedule(SMALL), [12, 10, 8, 6], 4, [4] * 6)
    custom = CustomMethod(score=abs, side="encoder", layer=0, tokens=4)
    flops(custom.schedule(SMALL), [12, 4, 4, 4], 4, [4] * 6)


# Texts


@NAMES
def test_a_text_gives_back_an_equal_method(name: str, tmp_path: Path) -> None:
    for target in ({"tokens": 9}, {"retention": 0.25}):
        method = made(name, **target, **OTHERS[name])
        again = method_of(method.to_json())
        assert again == method and type(again) is type(method) and hash(again) == hash(method)
        values = json.loads(method.to_json())
        assert values["method"] == name and values["version"] == 1
        (tmp_path / "m.json").write_text(method.to_json())
        assert load_method(tmp_path / "m.json") == method


@NAMES
def test_methods_that_differ_are_not_equal(name: str) -> None:
    every = [made(name, tokens=90), made(name, tokens=80), made(name, retention=0.5)]
    every += [made(name, tokens=90, **{field: value}) for field, value in OTHERS[name].items()]
    every += [made(other, tokens=90) for other in OTHERS if other != name]
    assert len(set(every)) == len(every) and made(name, tokens=90) == every[0]
    assert made(name, tokens=90).schedule() == every[0].schedule()


def test_texts_of_vitcop_are_read_as_well() -> None:
    config = ViTCoPConfig.preset("2/9")
    assert method_of(config.to_json()) == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a JSON text"),
        ('{"method": "fastest", "version": 1}', "method 'fastest' is unknown: use one of vitcop, "),
        ('{"method": "fastv", "version": 2, "tokens": 3}', "fastv: version 2 cannot be read: this package reads 1"),
        ('{"method": "fastv", "tokens": 3}', "fastv: version None cannot be read"),
        ('{"method": "fastv", "version": 1, "tokens": 3, "depth": 4}', r"fastv: unknown settings ['depth']: remove them or"),
        ('{"method": "fastv", "version": 1}', "fastv: exactly one target is needed, set tokens or retention"),
        (
            '{"method": "custom", "version": 1, "tokens": 3, "policy": "keep_lowest"}',
            "policy='keep_lowest' is none of its own",
        ),
    ],
)
def test_texts_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        method_of(text)


# Errors: the value, what is wrong with it, and what to do


@NAMES
@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "exactly one target is needed, set tokens or retention"),
        ({"tokens": 3, "retention": 0.5}, "exactly one target is needed, set tokens or retention"),
        ({"tokens": 0}, "tokens=0 is not a count of 1 or more"),
        ({"tokens": True}, "tokens=True is not a count of 1 or more"),
        ({"tokens": 2.0}, "tokens=2.0 is not a count of 1 or more"),
        ({"retention": 0}, "retention=0 is out of range: choose a ratio in (0, 1]"),
        ({"retention": 1.1}, "retention=1.1 is out of range: choose a ratio in (0, 1]"),
        ({"retention": "half"}, "retention='half' is out of range: choose a ratio in (0, 1]"),
        ({"retention": math.nan}, "retention=nan is out of range: choose a ratio in (0, 1]"),
    ],
)
def test_targets_out_of_range(name: str, target: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name}: {words}")):
        made(name, **target)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("random", {"seed": -1}, "seed=-1 is no whole number of 0 or more: choose one"),
        ("visionzip", {"contextual": 1.0}, "contextual=1.0 is out of range: choose a share in [0, 1)"),
        ("visionzip", {"merge": "sum"}, "merge='sum' is unknown: use 'published' or 'mean'"),
        ("dart", {"visual_pivots": 0}, "visual_pivots=0 is no whole number of 1 or more: choose one"),
        ("dart", {"text_pivots": 1.5}, "text_pivots=1.5 is no whole number of 1 or more: choose one"),
        ("holov", {"crops": 0}, "crops=0 is no whole number of 1 or more: choose one"),
        ("holov", {"alpha": -0.1}, "alpha=-0.1 is out of range: choose a weight of 0 or more"),
        ("scope", {"alpha": "1"}, "alpha='1' is out of range: choose a power of 0 or more"),
        ("zspaprune", {"core": 0}, "core=0 is out of range: choose a ratio in (0, 1]"),
        ("vscan", {"window": 0}, "window=0 is no whole number of 1 or more: choose one"),
        ("vscan", {"last": 1.5}, "last=1.5 is out of range: choose a share of 0 to 1"),
        ("vscan", {"early": -1}, "early=-1 is no whole number of 0 or more: choose one"),
        ("pyramiddrop", {"layers": ()}, "layers=() are no decoder layers: choose a tuple that ascends from 1"),
        ("pyramiddrop", {"layers": (0, 4)}, "layers=(0, 4) are no decoder layers"),
        ("v2drop", {"layers": (8, 4)}, "layers=(8, 4) are no decoder layers"),
        ("sparsevlm", {"layers": [4, 8]}, "layers=[4, 8] are no decoder layers"),
        ("custom", {"side": "middle"}, "side='middle' is unknown: use one of encoder, entry, decoder"),
        ("custom", {"needs": ("hidden", "labels")}, "needs=['labels'] are no fields of a site: use some of before, entry"),
        ("custom", {"score": 3}, "score=3 cannot be called: pass a function or a module"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name}: {words}")):
        made(name, tokens=3, **settings)


CLIP = Segment("video", (2, 24, 12), 576)


@pytest.mark.parametrize(
    ("method", "layout", "words"),
    [
        (methods.FastV(tokens=300), TILES, "fastv: tokens=300 exceeds the 288 of a segment: lower it, or set retention"),
        (methods.PyramidDrop(tokens=300), TILES, "pyramiddrop: tokens=300 exceeds the 288 of a segment: lower it"),
        (
            methods.FastV(retention=0.0625),
            (IMAGE,),
            "retention=0.0625 leaves 0 of 576 tokens, as the first 2 of 32 layers see all: choose more than 0.0641",
        ),
        (methods.DivPrune(retention=0.0001), (IMAGE,), "leaves 0 of 576 tokens"),
        (
            methods.PyramidDrop(retention=0.25),
            (IMAGE,),
            "retention=0.25 cannot be met, as the first 8 of 32 layers see all: choose more than 0.2500, or earlier",
        ),
        (
            methods.VScan(retention=0.8),
            (IMAGE,),
            "retention=0.8 cannot be met, as 0.3333 of the tokens are left from layer 16 of 32 on: choose 0.6667 or less",
        ),
        (methods.FastV(tokens=3, layer=0), (IMAGE,), "fastv: layer=0 is out of range for 32 decoder layers: choose 1 to 31"),
        (methods.FastV(tokens=3, layer=32), (IMAGE,), "layer=32 is out of range for 32 decoder layers: choose 1 to 31"),
        (methods.Dart(tokens=3, layer=0), (IMAGE,), "dart: layer=0 is out of range for 32 decoder layers: choose 1 to 31"),
        (methods.ToMe(tokens=1), (dataclasses.replace(IMAGE, grid=(1, 64, 96), tokens=2**23),), "half is the most: raise"),
        (methods.Downsample(tokens=3), (CLIP,), "a clip is no grid of two dimensions: give frames budgets of their own"),
        (methods.VScan(tokens=3), (CLIP,), "a clip is no grid of two dimensions: give frames budgets of their own"),
        (
            CustomMethod(score=abs, tokens=3, layer=40),
            (IMAGE,),
            "layer=40 is out of range for 32 decoder layers: choose 0 to 31",
        ),
        (
            CustomMethod(score=abs, tokens=3, layer=0, needs=("query",)),
            (IMAGE,),
            "layer=0 is out of range for 32 decoder layers: choose 1 to 31",
        ),
        (
            CustomMethod(score=abs, tokens=3, side="encoder", layer=23),
            (IMAGE,),
            "layer=23 is out of range: choose an encoder layer of 0 to 22",
        ),
        (
            CustomMethod(score=abs, tokens=3, needs=("hidden", "score")),
            (IMAGE,),
            "needs=['score'] cannot be met on side 'decoder' of this model: they are of an encoder",
        ),
        (
            CustomMethod(score=abs, tokens=3, side="entry", needs=("key", "text")),
            (IMAGE,),
            "needs=['key', 'text'] cannot be met on side 'entry' of this model: use hidden, score and features",
        ),
        (
            CustomMethod(score=abs, tokens=3, side="encoder", needs=("last",)),
            (IMAGE,),
            "needs=['last'] cannot be met on side 'encoder' of this model: an encoder knows of no prompt",
        ),
    ],
)
def test_what_a_model_and_its_images_cannot_meet(method: Any, layout: tuple[Segment, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        method.schedule(layout=layout)


def test_what_other_models_cannot_meet() -> None:
    with pytest.raises(ConfigError, match="tome: this model's tokens are put together behind its encoder"):
        methods.ToMe(tokens=3).schedule(PACKED)
    with pytest.raises(ConfigError, match=re.escape("needs=['hidden'] cannot be met on side 'encoder' of this model: its")):
        CustomMethod(score=abs, tokens=3, side="encoder").schedule(PACKED)
    with pytest.raises(ConfigError, match=re.escape("pyramiddrop: layers (1, 2, 3) do not fit a decoder of 3: choose fewer")):
        methods.PyramidDrop(tokens=3).schedule(dataclasses.replace(ModelShape(), layers=3))


# CustomMethod


def test_a_custom_method_has_a_name_of_its_own() -> None:
    one, other = (CustomMethod(score=abs, tokens=3) for _ in "ab")
    assert one == one and one != other and len({one, other}) == 2
    (stage,) = one.schedule().stages
    assert stage == Stage("decoder", 2, one.policy, (3,)) and POLICIES[one.policy].needs == {"hidden"}
    (scored,) = CustomMethod(score=abs, tokens=3, side="entry", needs=("score", "features")).schedule().stages
    assert (scored.side, scored.layer, scored.tap) == ("entry", 22, "cls_attention")


def test_the_policy_of_a_custom_method_goes_with_it() -> None:
    """And not with an equal one that was read from a file, as long as either is there."""
    method = CustomMethod(score=lambda site: site.score, tokens=3)
    name, text = method.policy, method.to_json()
    again = method_of(text)
    assert name in POLICIES and tap_of(again.schedule().stages[0]) is None
    del method
    gc.collect()
    assert name in POLICIES
    del again
    gc.collect()
    assert name not in POLICIES


def test_a_text_of_a_custom_method_tells_its_budgets() -> None:
    """What a folder of programs needs: the stages are those, under the names that they had; it cannot be traced."""
    method = CustomMethod(score=abs, retention=0.5, needs=("score",), side="entry")
    before = dict(POLICIES)
    again = method_of(method.to_json())
    assert isinstance(again, CustomMethod) and again.score is None
    assert again.schedule(layout=TILES) == method.schedule(layout=TILES) and again.to_json() == method.to_json()
    assert before == POLICIES
