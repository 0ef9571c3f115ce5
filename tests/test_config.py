"""Configurations and the schedules they resolve to. No tensor is made here."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import naive
import pytest
from configs import SMALL, configs, stages, vision_of
from hypothesis import given
from hypothesis import strategies as st

from vitcop_compile import Budgets, ConfigError, ModelShape, ViTCoPConfig, VitcopError
from vitcop_compile.config import PRESETS
from vitcop_compile.policies import POLICIES
from vitcop_compile.schedule import Stage

# The published table: name -> (n, centers, R, RD, visual tokens, mean over layers).
TABLE = {"1/3": (288, 51, 253, 51, 192.1), "2/9": (230, 34, 165, 33, 127.8), "1/9": (172, 20, 77, 15, 63.6)}

# The published settings


@pytest.mark.parametrize("name", TABLE)
def test_presets_are_the_published_settings(name: str) -> None:
    n, centers, merged, kept, mean = TABLE[name]
    schedule = ViTCoPConfig.preset(name).schedule()
    assert schedule.stages == (
        Stage(
            "encoder", 22, "cls_attention", (n,), (("centers", (centers,)), ("density_width", 8.0), ("reach", 0.6)), "index"
        ),
        Stage("decoder", 2, "merge_by_cluster", (merged,)),
        Stage("decoder", 22, "keep_lowest", (kept,), positions="index"),
    )
    assert schedule.vision is schedule.stages[0] and schedule.decoder_stages == schedule.stages[1:]
    assert all(stage.policy in POLICIES for stage in schedule.stages)
    assert round(schedule.mean_visual_tokens(), 1) == mean
    assert schedule.visual_tokens() == (n,) * 2 + (merged,) * 20 + (kept,) * 10
    assert schedule.prompt_tokens(64) == 64 + n
    assert schedule.kv_rows(64) == (64 + n,) * 2 + (64 + merged,) * 20 + (64 + kept,) * 10
    assert schedule.kv_rows(64, 7) == tuple(count + 7 for count in schedule.kv_rows(64))
    assert schedule.groups == (0,) * 2 + (1,) * 20 + (2,) * 10
    assert schedule.group_tokens() == (n, merged, kept)
    assert schedule.removed_rows() == (0,) * 2 + (n - merged,) * 20 + (n - kept,) * 10
    shapes = [(3, 32, rows, 128) for rows in (300, 200, 100)]
    assert schedule.cache_shapes(3, (300, 200, 100)) == [shapes[0]] * 2 + [shapes[1]] * 20 + [shapes[2]] * 10


def test_every_preset_is_in_the_table() -> None:
    assert set(PRESETS) == set(TABLE)


@pytest.mark.parametrize("name", PRESETS)
def test_a_wide_preset_keeps_as_many_in_the_mean(name: str) -> None:
    published, wide = ViTCoPConfig.preset(name), ViTCoPConfig.preset(f"{name}-wide")
    assert (wide.center_ratio, wide.retention) == (published.center_ratio, published.retention)
    kept = [config.schedule().group_tokens() for config in (published, wide)]
    assert kept[1][0] == int(1.6 * published.vision_ratio * 576)
    assert kept[1][1] < kept[0][1] and kept[1][2] <= kept[0][2]
    assert naive.budgets(wide.retention, 1.6 * published.vision_ratio, 2, 22, 32, kept[1][0], 5) == kept[1][1:]
    means = [config.schedule().mean_visual_tokens() for config in (published, wide)]
    assert abs(means[0] - means[1]) <= 0.6


def test_a_wide_ninth_takes_five_layers() -> None:
    """One layer sees 276 tokens: of four layers they alone are more than a ninth in the mean."""
    wide = ViTCoPConfig.preset("1/9-wide")
    with pytest.raises(ConfigError, match=r"retention=0.1111 leaves -9 tokens after layer 1 .* lower vision_ratio=0.48"):
        wide.schedule(ModelShape(layers=4))
    assert wide.schedule(ModelShape(layers=5)).group_tokens() == (276, 18, 4)


def test_positions_of_the_deep_stage() -> None:
    assert ViTCoPConfig.preset("1/9", positions="original").schedule().decoder_stages[1].positions == "kept"


def test_options_of_a_stage() -> None:
    stage = Stage("encoder", 1, "cls_attention", (3, 4), (("reach", 0.5),))
    assert stage.option("reach") == 0.5 and stage.total == 7
    with pytest.raises(KeyError):
        stage.option("centers")


def test_preset_overrides() -> None:
    config = ViTCoPConfig.preset("1/9", density_width=4.0, retention=0.15)
    assert config == ViTCoPConfig(0.3, 0.12, 0.15, density_width=4.0)
    assert ViTCoPConfig.preset("1/9", mean_tokens=80) == ViTCoPConfig(0.3, 0.12, mean_tokens=80)
    assert ViTCoPConfig.preset("1/9", budgets=(10, 5, 1)).budgets == Budgets(10, 5, 1)


@given(st.floats(0.05, 1), st.floats(0.01, 1), st.integers(1, 30), st.data(), st.floats(1, 20))
def test_budgets_follow_the_formula(vision: float, retention: float, shallow: int, data: st.DataObject, divisor: float):
    layers = data.draw(st.integers(shallow + 2, 48))
    deep = data.draw(st.integers(shallow + 1, layers - 1))
    config = ViTCoPConfig(
        vision, 0.25, retention, shallow_layer=shallow, deep_layer=deep, deep_divisor=divisor, scale_layers=False
    )
    n = int(vision * 576)
    merged, kept = naive.budgets(retention, vision, shallow, deep, layers, n, divisor)
    shape = ModelShape(layers=layers)
    if kept >= 1 and merged <= n:
        schedule = config.schedule(shape)
        assert vision_of(schedule) == ((n,), (max(1, int(0.25 * n)),))
        assert stages(schedule) == [(shallow, merged), (deep, kept)]
    else:
        with pytest.raises(ConfigError, match=f"retention={retention}.*{merged} tokens after layer {shallow}"):
            config.schedule(shape)


# Targets


@pytest.mark.parametrize(("target", "ratios"), [(192, (0.5, 0.18)), (128, (0.4, 0.15)), (64, (0.3, 0.12)), (100, (0.4, 0.15))])
def test_tokens_takes_the_ratios_of_the_nearest_preset(target: int, ratios: tuple[float, float]) -> None:
    assert ViTCoPConfig.for_mean_tokens(target) == ViTCoPConfig(*ratios, mean_tokens=target)


@given(st.floats(0.2, 0.7), st.floats(0.1, 1), st.integers(8, 48))
def test_mean_tokens_is_met_to_a_token_or_two(share: float, vision: float, layers: int) -> None:
    target = share * vision * 576
    schedule = ViTCoPConfig(vision, mean_tokens=target).schedule(ModelShape(layers=layers))
    # Rounding R and RD moves every layer by at most 0.6; truncating n moves the mean by less than `share`.
    assert abs(schedule.mean_visual_tokens() - target) <= 0.6 + share


def test_mean_tokens_is_retention_by_another_unit() -> None:
    by_count = ViTCoPConfig(0.3, 0.12, mean_tokens=0.1111 * 576).schedule()
    assert stages(by_count) == stages(ViTCoPConfig.preset("1/9").schedule())


def test_explicit_budgets_are_taken_as_they_are() -> None:
    config = ViTCoPConfig(budgets=Budgets(9, 7, 3, centers=4), shallow_layer=2, deep_layer=3, scale_layers=False)
    schedule = config.schedule(SMALL)
    assert vision_of(schedule) == ((9,), (4,))
    assert stages(schedule) == [(2, 7), (3, 3)]
    assert ViTCoPConfig(budgets=(9, 7, 3)) == ViTCoPConfig(budgets=[9, 7, 3]) == ViTCoPConfig(budgets=Budgets(9, 7, 3))
    for ratio, centers in ((0.3, 2), (0.01, 1)):
        assert vision_of(ViTCoPConfig(center_ratio=ratio, budgets=(9, 7, 3)).schedule(SMALL)) == ((9,), (centers,))


def test_dense_keeps_everything() -> None:
    schedule = ViTCoPConfig.dense().schedule(SMALL)
    assert schedule.vision is None and schedule.stages == () and schedule.removed_rows() == (0,) * 6
    assert schedule.groups == (0,) * 6 and schedule.group_tokens() == (12,)
    assert schedule.visual_tokens() == (12,) * 6 and schedule.kv_rows(5) == (17,) * 6
    assert schedule.flop_ratio(5) == 1 and schedule.decode_ratio(5, 3, 2) == 1
    assert schedule.prefill_flops(5) == schedule.dense_prefill_flops(5)
    assert schedule.kv_bytes(5, 3) == schedule.dense_kv_bytes(5, 3)
    assert schedule.vision_flops() == schedule.dense_vision_flops()


# Layers


@pytest.mark.parametrize(
    ("layers", "expected"), [(32, (2, 22)), (12, (1, 8)), (24, (2, 16)), (40, (2, 28)), (8, (1, 6)), (3, (1, 2)), (4, (1, 3))]
)
def test_default_layers_scale_with_the_depth(layers: int, expected: tuple[int, int]) -> None:
    assert ViTCoPConfig.preset("1/3").layers(layers) == expected


@pytest.mark.parametrize("layers", [12, 24, 32, 40])
def test_chosen_layers_are_taken_as_they_are(layers: int) -> None:
    assert ViTCoPConfig.preset("1/3", shallow_layer=3, deep_layer=9).layers(layers) == (3, 9)


def test_scaling_can_be_forced_or_forbidden() -> None:
    assert ViTCoPConfig.preset("1/3", shallow_layer=8, deep_layer=16, scale_layers=True).layers(16) == (4, 8)
    assert ViTCoPConfig.preset("1/3", scale_layers=True).layers(24) == (2, 16)
    assert ViTCoPConfig.preset("1/3", scale_layers=False).layers(40) == (2, 22)
    with pytest.raises(ConfigError, match=r"deep_layer=22 is out of range for 12 decoder layers: choose at most 11"):
        ViTCoPConfig.preset("1/3", scale_layers=False).layers(12)


@given(st.integers(1, 30), st.data(), st.integers(3, 90))
def test_scaled_layers_always_fit(shallow: int, data: st.DataObject, layers: int) -> None:
    deep = data.draw(st.integers(shallow + 1, 31))
    config = ViTCoPConfig.preset("1/3", shallow_layer=shallow, deep_layer=deep, scale_layers=True)
    first, second = config.layers(layers)
    assert 1 <= first < second < layers


@pytest.mark.parametrize(("chosen", "resolved"), [(-2, 3), (-5, 0), (0, 0), (2, 2), (3, 3)])
def test_vision_layer_counts_from_either_end(chosen: int, resolved: int) -> None:
    vision = ViTCoPConfig(budgets=(9, 7, 3), vision_layer=chosen).schedule(SMALL).vision
    assert vision is not None and vision.layer == resolved


# Errors: every message names the value and the bound.

TWO = {"budgets": (9, 7, 3), "scale_layers": False}
INVALID: list[tuple[dict[str, Any], str]] = [
    ({}, "exactly one target is needed, got none: set one of retention, mean_tokens, budgets"),
    ({"retention": 0.3, "mean_tokens": 64}, "exactly one target is needed, got ['retention', 'mean_tokens']"),
    ({"retention": 0.3, "budgets": (3, 2, 1)}, "exactly one target is needed, got ['retention', 'budgets']"),
    ({"retention": 0}, "retention=0 is out of range: choose a ratio in (0, 1]"),
    ({"retention": 1.01}, "retention=1.01 is out of range: choose a ratio in (0, 1]"),
    ({"retention": math.nan}, "retention=nan is not a finite number"),
    ({"retention": "0.3"}, "retention='0.3' is not a finite number"),
    ({"retention": True}, "retention=True is not a finite number"),
    ({"retention": 0.3, "vision_ratio": -0.5}, "vision_ratio=-0.5 is out of range: choose a ratio in (0, 1]"),
    ({"retention": 0.3, "vision_ratio": math.inf}, "vision_ratio=inf is not a finite number"),
    ({"retention": 0.3, "center_ratio": 0.0}, "center_ratio=0.0 is out of range: choose a ratio in (0, 1]"),
    ({"retention": 0.3, "center_ratio": 2}, "center_ratio=2 is out of range: choose a ratio in (0, 1]"),
    ({"mean_tokens": 0}, "mean_tokens=0 is not positive"),
    ({"mean_tokens": math.inf}, "mean_tokens=inf is not a finite number"),
    ({"retention": 0.3, "density_width": 0}, "density_width=0 is not positive"),
    ({"retention": 0.3, "reach": -0.1}, "reach=-0.1 is not positive"),
    ({"retention": 0.3, "deep_divisor": -5}, "deep_divisor=-5 is not positive"),
    ({"retention": 0.3, "deep_divisor": 0.9}, "deep_divisor=0.9 is below 1"),
    ({"retention": 0.3, "vision_layer": 1.5}, "vision_layer=1.5 is not an integer"),
    ({"retention": 0.3, "shallow_layer": True}, "shallow_layer=True is not an integer"),
    ({"retention": 0.3, "deep_layer": "22"}, "deep_layer='22' is not an integer"),
    ({"retention": 0.3, "shallow_layer": 0}, "shallow_layer=0 is below 1"),
    ({"retention": 0.3, "shallow_layer": 22}, "shallow_layer=22 is not before deep_layer=22: choose shallow < deep"),
    ({"retention": 0.3, "positions": "kept"}, "positions='kept' is unknown: use 'published' or 'original'"),
    ({"retention": 0.3, "scope": "image"}, "scope='image' is unknown: use 'per_image' or 'pooled'"),
    ({"budgets": (3, 0, 0)}, "budgets.shallow=0 is below 1"),
    ({"budgets": (3.0, 2, 1)}, "budgets.vision=3.0 is not an integer"),
    ({"budgets": (3, 2, True)}, "budgets.deep=True is not an integer"),
    ({"budgets": (3, 4, 1)}, "budgets 3, 4, 1 grow: no stage can keep more tokens than it receives"),
    ({"budgets": (3, 2, 3)}, "budgets 3, 2, 3 grow"),
    ({"budgets": (3, 2, 1, 4)}, "budgets.centers=4 is out of range: choose 1 to 3"),
    ({"budgets": (3, 2, 1, 0)}, "budgets.centers=0 is out of range: choose 1 to 3"),
    ({"budgets": (3, 2, 1, 1.0)}, "budgets.centers=1.0 is not an integer"),
]


@pytest.mark.parametrize(("values", "message"), INVALID)
def test_invalid_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        ViTCoPConfig(**values)
    assert isinstance(caught.value, VitcopError)


@pytest.mark.parametrize(
    "values",
    [
        {"budgets": (3, 2)},
        {"budgets": (3, 2, 1, 1, 1)},
        {"budgets": 3},
        {"mean_tokens": 10**400},
        {"retention": 0.3, "scale_layers": "no"},
        {"retention": 0.3, "prune": "no"},
    ],
)
def test_values_of_another_kind_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ViTCoPConfig(**values)


IMPOSSIBLE: list[tuple[dict[str, Any], ModelShape, str]] = [
    ({"retention": 0.9, "vision_ratio": 0.5}, ModelShape(), "retention=0.9 asks for 728 tokens after layer 2, but the vision"),
    ({"mean_tokens": 500}, ModelShape(), "mean_tokens=500 asks for 701 tokens after layer 2, but the vision stage keeps 288"),
    ({"mean_tokens": 600}, ModelShape(), "mean_tokens=600 exceeds the 576 patches of an image"),
    ({"retention": 0.01}, ModelShape(), "retention=0.01 leaves -18 tokens after layer 2 and -4 after layer 22, below 1"),
    (
        {"retention": 0.5, "vision_ratio": 0.01},
        SMALL,
        "vision_ratio=0.01 keeps none of the 12 patches: choose at least 0.08333",
    ),
    ({"budgets": (13, 2, 1)}, SMALL, "budgets.vision=13 exceeds the 12 patches of an image"),
    ({"budgets": (9, 7, 3), "vision_layer": 4}, SMALL, "vision_layer=4 is layer 4 of 5"),
    ({"budgets": (9, 7, 3), "vision_layer": -1}, SMALL, "features after layer 3: choose -5 to -2, or 0 to 3"),
    ({"budgets": (9, 7, 3), "vision_layer": -6}, SMALL, "vision_layer=-6 is layer -1 of 5"),
    (
        {**TWO, "shallow_layer": 1, "deep_layer": 6},
        SMALL,
        "deep_layer=6 is out of range for 6 decoder layers: choose at most 5",
    ),
    ({"budgets": (9, 7, 3)}, dataclasses.replace(SMALL, layers=2), "a decoder of 2 layers has no room for two stages: 3 are"),
]


@pytest.mark.parametrize(("values", "shape", "message"), IMPOSSIBLE)
def test_what_a_model_cannot_meet_is_refused(values: dict[str, Any], shape: ModelShape, message: str) -> None:
    config = ViTCoPConfig(**values)
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.schedule(shape)


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="preset '1/2' is unknown: use one of 1/3, 2/9, 1/9"):
        ViTCoPConfig.preset("1/2")


def test_tokens_refuses_what_is_no_target() -> None:
    with pytest.raises(ConfigError, match="mean_tokens=-5 is not positive"):
        ViTCoPConfig.for_mean_tokens(-5)


# Text form


@given(configs())
def test_json_round_trip(config: ViTCoPConfig) -> None:
    text = config.to_json()
    assert json.loads(text)["version"] == 2
    assert ViTCoPConfig.from_json(text) == config


def test_save_and_load(tmp_path: Path) -> None:
    config, path = ViTCoPConfig.preset("2/9", density_width=7.5), tmp_path / "config.json"
    path.write_text("an older file")
    config.save(path)
    assert ViTCoPConfig.load(path) == config
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    config.save(str(path))
    assert ViTCoPConfig.load(str(path)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "config version 1 cannot be read: this package reads 2"),
        ({"version": None}, "config version None cannot be read"),
        ({"color": 1, "aim": 2}, "unknown config fields ['aim', 'color']: remove them or upgrade vitcop-compile"),
        ({"retention": 3}, "retention=3 is out of range: choose a ratio in (0, 1]"),
        ({"retention": None, "budgets": {"vision": 3}}, "budgets: "),
        ({"retention": None, "budgets": {"vision": 3, "shallow": 2, "deep": 1, "last": 0}}, "budgets: "),
        ({"retention": None, "budgets": {"vision": 3, "shallow": 5, "deep": 1}}, "budgets 3, 5, 1 grow"),
    ],
)
def test_texts_that_are_no_config_are_refused(change: dict[str, Any], message: str) -> None:
    values = json.loads(ViTCoPConfig.preset("1/3").to_json()) | change
    with pytest.raises(ConfigError, match=re.escape(message)):
        ViTCoPConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not a JSON text"), ("[1]", "a config is a JSON object, got list"), ("{}", "config version None cannot be read")],
)
def test_malformed_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViTCoPConfig.from_json(text)


def test_a_config_is_a_value() -> None:
    assert hash(ViTCoPConfig.preset("1/3")) == hash(ViTCoPConfig(retention=0.3333))
    with pytest.raises(dataclasses.FrozenInstanceError):
        ViTCoPConfig.preset("1/3").density_width = 1  # type: ignore[misc]
