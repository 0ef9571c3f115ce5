"""What is known of images before any tensor exists: layouts, where tokens come from, programs by bucket, and refusals."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiled
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlavaNextConfig, LlavaOnevisionConfig, Qwen2Config
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from typer.testing import CliRunner

from vitcop_compile import ConfigError, InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.cli import app
from vitcop_compile.families.registry import host_of
from vitcop_compile.provider import candidate_bucket, tile_bucket
from vitcop_compile.schedule import resolve

HOSTS = {
    "next": host_of(LlavaNextConfig()),
    "onevision": host_of(LlavaOnevisionConfig(text_config=Qwen2Config(num_hidden_layers=28))),
}
SIDES = {"next": 336, "onevision": 384}


def by_the_processor(name: str, height: int, width: int) -> int:
    """Tokens of an image as transformers' own processor counts them."""
    host: Any = HOSTS[name]
    images = SimpleNamespace(image_grid_pinpoints=[list(size) for size in host.pinpoints])
    side = SIDES[name]
    if name == "next":
        owner = SimpleNamespace(
            image_processor=images, patch_size=14, num_additional_image_tokens=1, vision_feature_select_strategy="default"
        )
        owner._get_unpadded_features = lambda *sizes: LlavaNextProcessor._get_unpadded_features(owner, *sizes)
        return LlavaNextProcessor._get_number_of_features(owner, height, width, side, side) - 1
    owner = SimpleNamespace(image_processor=images, num_image_tokens=729, vision_aspect_ratio="anyres_max_9")
    owner._get_unpadded_features = lambda *sizes: LlavaOnevisionProcessor._get_unpadded_features(owner, *sizes)
    return LlavaOnevisionProcessor._get_number_of_features(owner, height, width, side, side)


@pytest.mark.parametrize("name", HOSTS)
@settings(max_examples=40)
@given(height=st.integers(20, 3000), width=st.integers(20, 3000))
def test_layouts_have_the_tokens_of_the_processor(name: str, height: int, width: int) -> None:
    layout = HOSTS[name].layout_of(height, width)
    assert sum(segment.tokens for segment in layout) == by_the_processor(name, height, width)
    for segment in layout:
        _, rows, columns = segment.grid
        assert segment.candidates == rows * columns
        assert segment.protected in ((), tuple(columns + row * (columns + 1) for row in range(rows)))
        assert segment.whole == sum(part.candidates for part in layout)


def test_images_that_share_a_prompt_are_a_tile_each_where_the_processor_has_them_so() -> None:
    assert [len(HOSTS[name].layout_of(700, 500, images=2)) for name in ("next", "onevision")] == [2, 1]
    (segment,) = HOSTS["onevision"].layout_of(700, 500, images=2)
    assert (segment.tokens, segment.protected, segment.tiles) == (730, (729,), 1)


def test_a_large_image_is_blended_from_four_patches_a_token() -> None:
    _, large = HOSTS["onevision"].layout_of(2304, 2304)
    assert (large.tiles, large.taps, large.grid) == (36, 4, (1, 81, 81))


@given(count=st.integers(1, 10_000))
def test_buckets_hold_what_they_are_for_and_waste_little(count: int) -> None:
    tiles, candidates = tile_bucket(count), candidate_bucket(count)
    assert count <= tiles < count * 9 / 8
    assert count <= candidates < count + 64
    assert tile_bucket(tiles) == tiles and candidate_bucket(candidates) == candidates


# Of 2,000 photos: programs of each kind at batch 1, one bucket of text and one of new tokens.
BOUNDS = {"next": {"tower": 3, "select": 41, "prefill": 32}, "onevision": {"tower": 16, "select": 163, "prefill": 98}}


@pytest.mark.parametrize("name", HOSTS)
def test_photos_of_two_thousand_sizes_share_programs(name: str) -> None:
    """Planned alone: nothing is compiled."""
    host, config, seeded = HOSTS[name], ViTCoPConfig.preset("1/9"), random.Random(0)
    found: dict[str, set[Any]] = {"layout": set(), "tower": set(), "select": set(), "prefill": set()}
    for _ in range(2000):
        height = seeded.randint(150, 3000)
        layout = host.layout_of(height, min(3000, max(150, round(height * seeded.uniform(0.4, 2.5)))))
        schedule = resolve(config, host.shape, layout)
        found["layout"].add(layout)
        tiles = tile_bucket(sum(segment.tiles for segment in layout))
        found["tower"].add(tiles)
        assert schedule.vision is not None
        for i, segment in enumerate(layout):
            key = (tiles, candidate_bucket(segment.candidates), segment.taps, schedule.vision.of_segment(i))
            found["select"].add(key)
        found["prefill"].add(schedule.key)
    counts = {kind: len(keys) for kind, keys in found.items()}
    assert all(counts[kind] <= bound for kind, bound in BOUNDS[name].items()), counts


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no sizes": ({"image_sizes": None}, "image_sizes is missing"),
    "a flat size": ({"image_sizes": torch.tensor([56, 56])}, "pass [images, 2]"),
    "no height": ({"image_sizes": torch.tensor([[0, 56]])}, "0x56"),
    "more sizes": ({"image_sizes": torch.tensor([[56, 56], [56, 56]])}, "1 images in pixel_values, 2 in image_sizes"),
    "too few tiles": ({"pixel_values": torch.zeros(1, 2, 3, 56, 56)}, "2 tiles in pixel_values, its size asks for 3"),
    "other tiles in a row": ({"pixel_values": torch.zeros(2, 3, 56, 56)}, "2 tiles, the images of image_sizes have 3"),
    "a tile of another size": ({"pixel_values": torch.zeros(1, 3, 3, 57, 57)}, "(3, 3, 57, 57)"),
    "integers": ({"pixel_values": torch.zeros(1, 3, 3, 56, 56, dtype=torch.int64)}, "torch.int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_images_that_cannot_be_are_refused(case: str) -> None:
    changed, words = REFUSED[case]
    given = tiled.images("next", (56, 56)) | changed
    with pytest.raises(InputError, match=None) as error:
        host_of(tiled.model("next").config).read(given, torch.zeros(1, 1).long(), torch.device("cpu"), torch.float32)
    assert words in str(error.value)


def test_the_number_of_images_is_that_of_their_sizes() -> None:
    given = tiled.images("onevision", (56, 56)) | {"batch_num_images": torch.tensor([2])}
    with pytest.raises(InputError, match="counts 2 images, image_sizes 1"):
        host_of(tiled.model("onevision").config).read(given, torch.zeros(1, 1).long(), torch.device("cpu"), torch.float32)


def test_variants_that_are_not_captured_are_refused() -> None:
    for config, words in (
        (LlavaNextConfig(vision_feature_select_strategy="full"), "'default'"),
        (LlavaNextConfig(vision_feature_layer=[-2, -1]), "single layer"),
        (LlavaOnevisionConfig(vision_feature_select_strategy="default"), "'full'"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            host_of(config)


def test_a_mean_of_tokens_is_that_of_the_whole_image() -> None:
    host = HOSTS["next"]
    schedule = resolve(ViTCoPConfig.for_mean_tokens(320), host.shape, host.layout_of(672, 672))
    assert schedule.patches == 2880
    assert abs(schedule.mean_visual_tokens() - 320) < 20
    with pytest.raises(ConfigError, match="exceeds the 2880 patches"):
        resolve(ViTCoPConfig.for_mean_tokens(3000), host.shape, host.layout_of(672, 672))


# Commands


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def configured(tmp_path: Path) -> Path:
    """A folder with a configuration of LLaVA-NeXT, and no weights."""
    config = LlavaNextConfig(text_config=LlamaConfig(vocab_size=32064), architectures=["LlavaNextForConditionalGeneration"])
    config.save_pretrained(tmp_path / "next")
    return tmp_path / "next"


def test_explain_of_an_image_by_its_size(configured: Path) -> None:
    """1344 pixels wide, 896 high: the overview and two tiles by two of 672 x 672, a band of each cut off."""
    said = run("explain", "--model", configured, "--image-size", "1344x896", "--text-tokens", 10).output
    layout = HOSTS["next"].layout_of(896, 1344)
    assert [segment.grid for segment in layout] == [(1, 24, 24), (1, 32, 48)]
    assert "10 text tokens + 32 protected tokens + 2112 patches of 2 segments, 32 layers" in said
    assert "by layer 22: keep 176 + 464" in said
    twice = run("explain", "--model", configured, "--image-size", "1344x896", "--image-size", "336x336").output
    assert "patches of 4 segments" in twice
    assert "576 patches" in run("explain", "--image-size", "10x10").output


@pytest.mark.parametrize("size", ["1344", "x", "10x", "axb", "-1x5", "0x5"])
def test_a_size_that_is_none(size: str) -> None:
    done = run("explain", f"--image-size={size}")
    assert done.exit_code == 2 and size.replace("0x5", "5x0") in done.output


def test_commands_for_one_size_refuse_others_before_loading(configured: Path, tmp_path: Path) -> None:
    for command, words in (
        (("export", "--model", configured, "--output-dir", tmp_path / "out"), "say which by layouts=, such as"),
        (("demo", "--model", configured), "which the demo cannot draw"),
    ):
        done = run(*command)
        assert done.exit_code == 2 and words in " ".join(done.output.split())
