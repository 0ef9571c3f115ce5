"""Schedules: tokens, rows, bytes and FLOPs, for prompts of any images. No tensor is made here."""

import dataclasses
import itertools
import re
from typing import Any

import naive
import pytest
from configs import SMALL, configs, stages, vision_of
from hypothesis import assume, given
from hypothesis import strategies as st

from vitcop_compile import ConfigError, ModelShape, ViTCoPConfig
from vitcop_compile.layout import Layout, Segment
from vitcop_compile.schedule import Schedule, Stage, resolve

IMAGE = ModelShape().image
HALF = Segment("image", (1, 12, 24), 288)
TALL = Segment("video", (2, 24, 12), 576)
TEXT = 7


def pooled(config: ViTCoPConfig) -> ViTCoPConfig:
    return dataclasses.replace(config, scope="pooled")


# Images


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["1/3", "1/9"])
def test_every_image_has_its_own_budgets(name: str, images: int) -> None:
    config = ViTCoPConfig.preset(name)
    one, several = config.schedule(), config.schedule(layout=(IMAGE,) * images)
    assert [stage.tokens for stage in several.stages] == [stage.tokens * images for stage in one.stages]
    assert vision_of(several)[1] == vision_of(one)[1] * images
    # Number, sides, layers, policies and positions of stages are those of any prompt.
    alike = [dataclasses.replace(stage, tokens=(), options=()) for stage in one.stages]
    assert [dataclasses.replace(stage, tokens=(), options=()) for stage in several.stages] == alike
    assert several.segment_tokens == (one.image_tokens,) * images and several.patches == 576 * images
    assert several.groups == one.groups
    assert several.group_tokens() == tuple(images * tokens for tokens in one.group_tokens())
    assert several.visual_tokens() == tuple(images * tokens for tokens in one.visual_tokens())
    assert several.removed_rows() == tuple(images * rows for rows in one.removed_rows())
    assert several.kv_rows(TEXT, 2) == tuple(TEXT + 2 + images * tokens for tokens in one.visual_tokens())
    assert several.prompt_tokens(TEXT) == TEXT + images * one.image_tokens
    assert several.mean_visual_tokens() == pytest.approx(images * one.mean_visual_tokens())


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["1/3", "2/9", "1/9"])
def test_images_may_share_the_budgets_of_the_decoder(name: str, images: int) -> None:
    """The published formula on the tokens of all images together; the encoder sees each image alone."""
    config = pooled(ViTCoPConfig.preset(name))
    one, several = config.schedule(), config.schedule(layout=(IMAGE,) * images)
    assert vision_of(several) == tuple(values * images for values in vision_of(one))
    n = images * one.image_tokens
    assert config.retention is not None
    merged, kept = naive.budgets(config.retention, config.vision_ratio, 2, 22, 32, n)
    expected = [(merged,), (kept,)] if images else [(), ()]
    assert [stage.tokens for stage in several.decoder_stages] == expected
    assert several.group_tokens() == (n, merged, kept)
    assert several.removed_rows() == (0,) * 2 + (n - merged,) * 20 + (n - kept,) * 10


def test_pooling_rounds_once() -> None:
    """Where the two scopes differ: three images keep 15 tokens each, or 46 together."""
    layout = (IMAGE,) * 3
    config = ViTCoPConfig.preset("1/9")
    apart, together = (value.schedule(layout=layout).group_tokens() for value in (config, pooled(config)))
    assert apart == (516, 231, 45) and together == (516, 231, 46)


@pytest.mark.parametrize("config", [ViTCoPConfig.preset("1/9"), ViTCoPConfig(budgets=(90, 40, 9)), ViTCoPConfig.dense()])
def test_one_image_has_one_scope(config: ViTCoPConfig) -> None:
    assert (
        pooled(config).schedule()
        == config.schedule()
        == config.schedule(layout=(IMAGE,))
        == resolve(config, ModelShape(), (IMAGE,))
    )


def test_images_of_different_sizes() -> None:
    config, layout = ViTCoPConfig.preset("1/9"), (HALF, IMAGE, TALL)
    schedule = config.schedule(layout=layout)
    alone = [config.schedule(layout=(segment,)) for segment in layout]
    for stage, *of_one in zip(schedule.stages, *(each.stages for each in alone)):
        assert stage.tokens == tuple(each.total for each in of_one)
    assert schedule.stages[0].tokens == (86, 172, 172) and vision_of(schedule)[1] == (10, 20, 20)
    assert schedule.segment_tokens == (86, 172, 172) and schedule.patches == 288 + 2 * 576
    assert schedule.vision_flops() == sum(each.vision_flops() for each in alone)
    together = pooled(config).schedule(layout=layout)
    assert stages(together) == list(zip((2, 22), naive.budgets(0.1111, 0.3, 2, 22, 32, 430)))


def test_only_candidates_count() -> None:
    """Tokens that are never pruned have no part in a budget."""
    packed = dataclasses.replace(IMAGE, tokens=580, protected=(100, 200, 300, 579))
    assert packed.candidates == 576 and IMAGE.candidates == 576
    config = ViTCoPConfig.preset("1/3")
    assert config.schedule(layout=(packed,)).stages == config.schedule().stages


def test_targets_of_several_images() -> None:
    layout = (IMAGE,) * 2
    explicit = ViTCoPConfig(budgets=(90, 40, 9))
    assert [stage.tokens for stage in explicit.schedule(layout=layout).stages] == [(90, 90), (40, 40), (9, 9)]
    assert [stage.tokens for stage in pooled(explicit).schedule(layout=layout).stages] == [(90, 90), (80,), (18,)]
    # A mean is that of an image.
    mean = ViTCoPConfig.for_mean_tokens(64)
    for config in (mean, pooled(mean)):
        assert config.schedule(layout=layout).mean_visual_tokens() == pytest.approx(128, abs=2)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (ViTCoPConfig(budgets=(300, 40, 9)), (IMAGE, HALF), "budgets.vision=300 exceeds the 288 patches of an image"),
        (ViTCoPConfig.for_mean_tokens(300, vision_ratio=0.9), (IMAGE, HALF), "mean_tokens=300 exceeds the 288 patches"),
        (
            ViTCoPConfig.preset("1/9", scope="pooled", mean_tokens=600),
            (IMAGE,) * 2,
            "mean_tokens=600 exceeds the 576 patches of an image",
        ),
        (
            ViTCoPConfig(0.01, retention=0.01),
            (IMAGE, Segment("image", (1, 5, 5), 25)),
            "vision_ratio=0.01 keeps none of the 25 patches: choose at least 0.04",
        ),
        (ViTCoPConfig(0.5, retention=0.9, scope="pooled"), (IMAGE,) * 2, "asks for 1456 tokens after layer 2, but the vision"),
    ],
)
def test_what_a_layout_cannot_meet_is_refused(config: ViTCoPConfig, layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.schedule(layout=layout)


def test_text_alone() -> None:
    schedule = ViTCoPConfig.preset("1/9").schedule(layout=())
    assert schedule.groups == ViTCoPConfig.preset("1/9").schedule().groups
    assert schedule.group_tokens() == (0, 0, 0) and schedule.removed_rows() == (0,) * 32
    assert schedule.kv_rows(TEXT) == (TEXT,) * 32 and schedule.flop_ratio(TEXT) == schedule.decode_ratio(TEXT) == 1
    assert schedule.vision_flops() == schedule.dense_vision_flops() == 0


# What always holds


@st.composite
def problems(draw: st.DrawFn) -> tuple[ViTCoPConfig, ModelShape]:
    """A shape, and a configuration that has a fair chance on it."""
    vision_layers = draw(st.integers(1, 12))
    shape = dataclasses.replace(
        SMALL,
        layers=draw(st.integers(3, 48)),
        grid=(draw(st.integers(2, 24)), draw(st.integers(2, 24))),
        vision_layers=vision_layers,
        feature_layer=draw(st.integers(0, vision_layers - 1)),
        kv_heads=draw(st.sampled_from([1, 2, 4])),
    )
    shallow = draw(st.integers(1, shape.layers - 2))
    deep = draw(st.integers(shallow + 1, shape.layers - 1))
    config = draw(configs())
    if not config.prune:
        return config, shape
    # A target that leaves `share` of the tokens after the shallow stage, and now and then more than there are.
    share, divisor = draw(st.floats(0.05, 1.05)), config.deep_divisor
    mean = config.vision_ratio * (share * (deep - shallow + (shape.layers - deep) / divisor) + shallow) / shape.layers
    target: dict[str, Any] = {"retention": min(mean, 1)} if draw(st.booleans()) else {"mean_tokens": mean * shape.patches}
    if config.budgets is not None:
        target = {"budgets": config.budgets}
    changes = {"retention": None, "mean_tokens": None, "budgets": None} | target
    layers = {"shallow_layer": shallow, "deep_layer": deep, "scale_layers": False}
    vision_layer = draw(st.integers(0, shape.feature_layer)) - draw(st.sampled_from([0, vision_layers]))
    return dataclasses.replace(config, vision_layer=vision_layer, **changes, **layers), shape


@st.composite
def layouts(draw: st.DrawFn, image: Segment) -> Layout:
    """One unpruned image, or up to three of any sizes."""
    if draw(st.booleans()):
        return (image,)
    grids = draw(st.lists(st.tuples(st.integers(2, 24), st.integers(2, 24)), max_size=3))
    return tuple(Segment("image", (1, *grid), grid[0] * grid[1]) for grid in grids)


@given(problems(), st.integers(0, 40), st.data())
def test_whatever_resolves_only_shrinks(problem: tuple[ViTCoPConfig, ModelShape], text: int, data: st.DataObject) -> None:
    config, shape = problem
    layout = data.draw(layouts(shape.image))
    try:
        schedule = config.schedule(shape, layout)
    except ConfigError:
        assume(False)
    patches = [segment.tokens for segment in layout]
    assert schedule.patches == sum(patches) and schedule.layout == layout
    if not config.prune:
        assert schedule.image_tokens == schedule.patches and schedule.segment_tokens == tuple(patches)
        return
    tokens, centers = vision_of(schedule)
    assert all(1 <= kept <= all_ for kept, all_ in zip(tokens, patches, strict=True))
    assert all(1 <= count <= kept for count, kept in zip(centers, tokens, strict=True))
    assert schedule.vision is not None and 0 <= schedule.vision.layer <= shape.feature_layer
    first, second = (stage.tokens for stage in schedule.decoder_stages)
    if config.scope == "pooled" and layout:
        assert len(first) == len(second) == 1 and sum(tokens) >= first[0] >= second[0] >= 1
    else:
        assert all(a >= b >= c >= 1 for a, b, c in zip(tokens, first, second, strict=True))
    check_figures(schedule, text)


def check_figures(schedule: Schedule, text: int) -> None:
    """What follows from two decoder stages."""
    shape, ((shallow, merged), (deep, kept)) = schedule.shape, stages(schedule)
    assert 1 <= shallow < deep < shape.layers
    rows, visual = schedule.kv_rows(text), schedule.visual_tokens()
    assert len(rows) == len(visual) == shape.layers
    assert all(a >= b for a, b in itertools.pairwise(rows))
    assert all(row == text + count for row, count in zip(rows, visual))
    assert rows[0] == schedule.prompt_tokens(text) == text + schedule.image_tokens
    assert set(visual[:shallow]) == {schedule.image_tokens}
    assert set(visual[shallow:deep]) == {merged} and set(visual[deep:]) == {kept}
    assert schedule.groups == (0,) * shallow + (1,) * (deep - shallow) + (2,) * (shape.layers - deep)
    assert schedule.removed_rows() == tuple(rows[0] - row for row in rows)
    assert [shape_[2] for shape_ in schedule.cache_shapes(1, [text + t for t in schedule.group_tokens()])] == list(rows)
    assert schedule.mean_visual_tokens() == sum(visual) / shape.layers
    assert schedule.flop_ratio(text) >= 1 and schedule.decode_ratio(text) >= 1
    assert schedule.kv_bytes(text) <= schedule.dense_kv_bytes(text)
    assert schedule.vision_flops() <= schedule.dense_vision_flops()


def test_flops_are_those_counted_one_by_one() -> None:
    config = ViTCoPConfig(budgets=(7, 5, 2), vision_layer=1, shallow_layer=2, deep_layer=4)
    schedule = config.schedule(SMALL)
    widths = (SMALL.hidden, SMALL.heads, SMALL.kv_heads, SMALL.head_dim, SMALL.intermediate)
    pruned = [naive.decoder_layer_flops(3 + visual, *widths) for visual in (7, 7, 5, 5, 2, 2)]
    dense = [naive.decoder_layer_flops(3 + 12, *widths)] * 6
    head = 2 * SMALL.hidden * SMALL.vocab
    assert list(schedule.prefill_flops(3)) == pruned
    assert list(schedule.dense_prefill_flops(3)) == dense
    assert schedule.head_flops() == head
    assert schedule.flop_ratio(3) == (sum(dense) + head) / (sum(pruned) + head)

    def vision(tokens: list[int], projected: int) -> int:
        embedding = 2 * 12 * SMALL.patch_features * SMALL.vision_hidden
        projector = 2 * projected * (SMALL.vision_hidden * SMALL.hidden + SMALL.hidden * SMALL.hidden)
        return (
            embedding
            + projector
            + sum(naive.encoder_layer_flops(t, SMALL.vision_hidden, SMALL.vision_intermediate) for t in tokens)
        )

    # The scoring layer still sees every patch; layers behind the feature layer do not run.
    assert schedule.vision_flops() == vision([13, 13, 8, 8], 7)
    assert schedule.dense_vision_flops() == vision([13] * 4, 12)
    # Every image goes through the encoder for itself.
    three = config.schedule(SMALL, (SMALL.image,) * 3)
    assert three.vision_flops() == 3 * schedule.vision_flops()
    assert three.dense_vision_flops() == 3 * schedule.dense_vision_flops()


def test_kv_bytes() -> None:
    schedule = ViTCoPConfig(budgets=(7, 5, 2), shallow_layer=2, deep_layer=4).schedule(SMALL)
    rows = 2 * (3 + 7) + 2 * (3 + 5) + 2 * (3 + 2)
    row = 2 * SMALL.kv_heads * SMALL.head_dim * SMALL.element_bytes
    assert schedule.kv_bytes(3) == rows * row
    assert schedule.kv_bytes(3, 4) == (rows + 4 * 6) * row
    assert schedule.dense_kv_bytes(3, 4) == 6 * (3 + 12 + 4) * row


def test_decode_ratio() -> None:
    """Every step reads the matrices and the head, whatever was pruned, and the rows of every sequence of the batch."""
    schedule = ViTCoPConfig(budgets=(7, 5, 2), shallow_layer=2, deep_layer=4).schedule(SMALL)
    heads, keys = SMALL.heads * SMALL.head_dim, SMALL.kv_heads * SMALL.head_dim
    layer = SMALL.hidden * (2 * heads + 2 * keys + 3 * SMALL.intermediate)
    weights = SMALL.element_bytes * (SMALL.layers * layer + SMALL.hidden * SMALL.vocab)
    assert schedule.weight_bytes() == weights
    dense, pruned = schedule.dense_kv_bytes(3, 4), schedule.kv_bytes(3, 4)
    assert schedule.decode_ratio(3, 4, 5) == (weights + 5 * dense) / (weights + 5 * pruned)
    assert schedule.decode_ratio(3) == (weights + schedule.dense_kv_bytes(3)) / (weights + schedule.kv_bytes(3))


# Where stages can stand


@dataclasses.dataclass(frozen=True)
class Staged:
    """A method of stages on these sides."""

    sides: tuple[str, ...]

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        return tuple(Stage(side, 1, "uniform", (9,) * len(layout)) for side in self.sides)

    def to_json(self) -> str:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("packed", "sides", "message"),
    [
        (True, ("encoder",), "'uniform' has a stage in the encoder, and this model's tokens are put together behind it: use"),
        (False, ("merge",), "of side 'merge', and this model puts no tokens together behind its encoder: use side 'encoder'"),
        (True, ("merge", "entry", "decoder"), "2 stages stand between encoder and decoder: there is place for 1"),
        (False, ("entry", "entry"), "2 stages stand between encoder and decoder: there is place for 1"),
        (False, ("encoder", "entry"), "stages inside the encoder and behind it: .* use either"),
        (False, ("decoder", "encoder"), "stages of sides decoder, encoder are out of order: the encoder's come first"),
        (False, ("tower",), "side 'tower' is none: use one of encoder, merge, entry, decoder"),
    ],
)
def test_stages_that_no_program_has_a_place_for(packed: bool, sides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(Staged(sides), dataclasses.replace(SMALL, packed=packed), (SMALL.image,))
