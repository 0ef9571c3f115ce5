"""Methods by name: words of a command line against the classes they stand for."""

import dataclasses
from typing import Any

import pytest

from vitcop_compile import ConfigError, ViTCoPConfig
from vitcop_compile.config import Budgets
from vitcop_compile.methods import METHODS, Calibrated, Dart, FastV, HoloV, PyramidDrop, Random, ToMe, VisionZip, VScan
from vitcop_compile.methods.named import fields_of, method_from, method_named, method_names, split


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("dense", {}, ViTCoPConfig(prune=False)),
        ("vitcop", {}, ViTCoPConfig(0.3, 0.12, 0.1111)),
        ("vitcop", {"retention": "1/9-wide"}, ViTCoPConfig(0.48, 0.12, 0.1111)),
        ("vitcop", {"retention": "1/9"}, ViTCoPConfig(0.3, 0.12, 0.1111)),
        ("vitcop", {"retention": "2/9"}, ViTCoPConfig(0.4, 0.15, 0.2222)),
        ("vitcop", {"retention": "1/3", "keys": "raw"}, ViTCoPConfig(0.5, 0.18, 0.3333, keys="raw")),
        ("vitcop", {"retention": "1/8"}, ViTCoPConfig(0.3, 0.12, 0.125)),
        ("vitcop", {"retention": 0.25}, ViTCoPConfig(0.4, 0.15, 0.25)),
        ("vitcop", {"retention": "0.9"}, ViTCoPConfig(0.5, 0.18, 0.9)),
        ("vitcop", {"retention": "0.3", "vision_ratio": "0.7"}, ViTCoPConfig(0.7, 0.18, 0.3)),
        ("vitcop", {"mean_tokens": "128"}, ViTCoPConfig(0.4, 0.15, mean_tokens=128.0)),
        ("vitcop", {"budgets": "172:77:15"}, ViTCoPConfig(budgets=Budgets(172, 77, 15))),
        ("vitcop", {"budgets": "172:77:15:9", "scale_layers": "false"},
         ViTCoPConfig(budgets=Budgets(172, 77, 15, 9), scale_layers=False)),
        ("vitcop", {"vision_layer": "-3", "scale_layers": "none"}, ViTCoPConfig(0.3, 0.12, 0.1111, vision_layer=-3)),
        ("fastv", {"layer": "3", "retention": "1/9"}, FastV(layer=3, retention=1 / 9)),
        ("fastv", {"layer": 3, "tokens": 64}, FastV(layer=3, tokens=64)),
        ("fastv", {"retention": "1"}, FastV(retention=1.0)),
        ("pyramiddrop", {"layers": "4:8:12", "tokens": "20"}, PyramidDrop(layers=(4, 8, 12), tokens=20)),
        ("pyramiddrop", {"layers": "7", "tokens": "20"}, PyramidDrop(layers=(7,), tokens=20)),
        ("random", {"seed": "5", "tokens": "9", "retention": "none"}, Random(seed=5, tokens=9)),
        ("visionzip", {"merge": "mean", "contextual": "1/8", "tokens": "64"},
         VisionZip(merge="mean", contextual=0.125, tokens=64)),
        ("vscan", {"last": "1/4", "middle": "8", "tokens": "64"}, VScan(last=0.25, middle=8, tokens=64)),
        ("holov", {"alpha": "1e-1", "retention": "2/9"}, HoloV(alpha=0.1, retention=2 / 9)),
        ("dart", {"visual_pivots": "1", "tokens": "32"}, Dart(visual_pivots=1, tokens=32)),
        ("calibrated+visionzip", {"tokens": "64"}, Calibrated(VisionZip(tokens=64))),
        ("calibrated+vitcop", {"retention": "1/9"}, Calibrated(ViTCoPConfig(0.3, 0.12, 0.1111))),
    ],
)  # fmt: skip
def test_words_make_the_method(name: str, settings: dict[str, Any], expected: Any) -> None:
    found = method_named(name, settings)
    assert found == expected and type(found) is type(expected)


def test_every_method_is_known_by_name_but_the_one_that_takes_a_function() -> None:
    assert set(method_names()) == {"vitcop", "dense"} | set(METHODS) - {"custom"}
    for name in method_names():
        settings = {"retention": "0.5"} if name != "dense" else {}
        assert method_named(name, settings).to_json()
    with pytest.raises(ConfigError, match="CustomMethod"):
        method_named("custom", {"tokens": "3"})


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("fastw", {}, "'fastw' is unknown: use one of vitcop, dense, .*fastv"),
        ("dense", {"retention": "1/9"}, "dense has no settings, and retention"),
        ("calibrated+fastw", {}, "'fastw' is unknown: use one of vitcop, dense, .*fastv"),
        ("calibrated+", {}, "'' is unknown"),
        ("calibrated+dense", {}, r"calibrated\+dense: nothing is pruned, and nothing counts for several tokens: name another"),
        ("calibrated+calibrated+tome", {"tokens": "3"}, "the method is calibrated already"),
        ("calibrated+fastv", {"lair": "2", "tokens": "3"}, "fastv: unknown settings lair: use some of tokens"),
        ("fastv", {"lair": "2", "tokens": "3"}, "fastv: unknown settings lair: use some of tokens, retention, layer$"),
        ("vitcop", {"tokens": "3"}, "vitcop: unknown settings tokens: use some of vision_ratio, .*clips"),
        ("fastv", {"layer": "two", "tokens": "3"}, "fastv: layer='two' is not an integer"),
        ("fastv", {"layer": "1/2", "tokens": "3"}, "fastv: layer='1/2' is not an integer"),
        ("fastv", {"retention": "1/0"}, "fastv: retention='1/0' is not a number, such as"),
        ("fastv", {"retention": "nan"}, "fastv: retention='nan' is not a number"),
        ("fastv", {}, "exactly one target"),
        ("fastv", {"retention": "10/9"}, "out of range"),
        ("vitcop", {"retention": "1/9", "mean_tokens": "64"}, "exactly one target"),
        ("vitcop", {"scale_layers": "yes"}, "vitcop: scale_layers='yes' is neither true nor false"),
        ("vitcop", {"keys": "warm"}, "keys='warm' is unknown"),
        ("pyramiddrop", {"layers": "4:x", "tokens": "3"}, "pyramiddrop: layers='x' is not an integer"),
    ],
)
def test_what_is_wrong_is_named(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_named(name, settings)


def test_one_text_holds_name_and_settings() -> None:
    assert split("fastv:layer=2,tokens=64") == ("fastv", {"layer": "2", "tokens": "64"})
    assert split("dense") == ("dense", {})
    assert method_from("fastv:layer=3,tokens=64") == FastV(layer=3, tokens=64)
    for text in ("fastv:layer", "fastv:layer=", "fastv:=2", "fastv:layer=2,layer=3"):
        with pytest.raises(ConfigError, match="is not one setting=value"):
            method_from(text)


def test_defaults_stand_for_what_a_text_leaves_open() -> None:
    assert method_from("fastv:layer=3", retention="1/9") == FastV(layer=3, retention=1 / 9)
    assert method_from("fastv:tokens=64", retention="1/9") == FastV(tokens=64)
    assert method_from("vitcop", retention="2/9") == ViTCoPConfig.preset("2/9")
    assert method_from("vitcop:mean_tokens=64", retention="2/9") == ViTCoPConfig.for_mean_tokens(64)
    assert method_from("dense", retention="2/9") == ViTCoPConfig.dense()
    assert method_from("calibrated+tome", retention="2/9") == Calibrated(ToMe(retention=2 / 9))
    assert method_from("calibrated+visionzip:tokens=9", retention="2/9") == Calibrated(VisionZip(tokens=9))


def test_fields_are_those_that_can_be_set() -> None:
    assert fields_of("dense") == ()
    assert fields_of("fastv") == fields_of("calibrated+fastv") == ("tokens", "retention", "layer")
    assert fields_of("vitcop") == tuple(field.name for field in dataclasses.fields(ViTCoPConfig))
