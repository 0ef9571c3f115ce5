"""A small shape, settings at random, and what schedules of them say."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vitcop_compile import Budgets, ModelShape, ViTCoPConfig
from vitcop_compile.config import PRESETS
from vitcop_compile.schedule import Schedule

SMALL = ModelShape(
    layers=6,
    hidden=8,
    intermediate=12,
    heads=4,
    kv_heads=2,
    head_dim=3,
    vocab=11,
    grid=(3, 4),
    vision_layers=5,
    feature_layer=3,
    vision_hidden=7,
    vision_intermediate=9,
    patch_features=5,
    element_bytes=4,
)


def stages(schedule: Schedule) -> list[tuple[int, int]]:
    """(layer, tokens of all images together) of the decoder's stages."""
    return [(stage.layer, stage.total) for stage in schedule.decoder_stages]


def vision_of(schedule: Schedule) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(tokens, centers) of the vision stage, by image."""
    assert schedule.vision is not None
    return schedule.vision.tokens, schedule.vision.option("centers")


@st.composite
def configs(draw: st.DrawFn) -> ViTCoPConfig:
    ratio = st.floats(1e-3, 1)
    shallow = draw(st.integers(1, 12))
    vision = draw(st.integers(1, 300))
    target = draw(st.sampled_from(["retention", "mean_tokens", "budgets", "preset", "dense"]))
    if target == "dense":
        return ViTCoPConfig.dense()
    merged = draw(st.integers(1, vision))
    kept = draw(st.integers(1, merged))
    values: dict[str, Any] = {
        "retention": {"retention": draw(ratio)},
        "mean_tokens": {"mean_tokens": draw(st.floats(1, 400) | st.integers(1, 400))},
        "budgets": {"budgets": Budgets(vision, merged, kept, draw(st.none() | st.integers(1, vision)))},
        "preset": {"retention": draw(st.sampled_from([preset[2] for preset in PRESETS.values()]))},
    }[target]
    return ViTCoPConfig(
        vision_ratio=draw(ratio),
        center_ratio=draw(ratio),
        vision_layer=draw(st.integers(-6, 4)),
        shallow_layer=shallow,
        deep_layer=draw(st.integers(shallow + 1, 30)),
        deep_divisor=draw(st.floats(1, 10)),
        positions=draw(st.sampled_from(["published", "original"])),
        density_width=draw(st.floats(0.1, 100)),
        reach=draw(st.floats(0.01, 2)),
        scale_layers=draw(st.sampled_from([None, True, False])),
        scope=draw(st.sampled_from(["per_image", "pooled"])),
        **values,
    )
