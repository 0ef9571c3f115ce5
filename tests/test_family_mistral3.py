"""Mistral 3 against the stock model."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import stock_family
import torch
from stock_family import Request
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.families.registry import host_of

IMAGE, BREAK, END, VOCAB, PATCH, SIDE = 95, 94, 93, 96, 4, 2
STEP = PATCH * SIDE
SIZES = ((80, 64), (24, 40), (8, 72))


def config(**more: Any) -> Mistral3Config:
    """Patches of 4 pixels, merged two by two."""
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=96, patch_size=PATCH,
    )  # fmt: skip
    text = MistralConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=2048, sliding_window=None, bos_token_id=1, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    settings: dict[str, Any] = {"vision_config": vision, "text_config": text} | more
    return Mistral3Config(**settings, image_token_index=IMAGE, spatial_merge_size=SIDE, tie_word_embeddings=False)


@cache
def model(feature: int = -1) -> Any:
    """A float32 model in evaluation mode."""
    made = Mistral3ForConditionalGeneration(config(vision_feature_layer=feature)).eval()
    stock_family.scatter(made)
    return made


def placeholders(height: int, width: int) -> list[int]:
    """What the processor makes of an image: a token of text behind every row."""
    rows = ([IMAGE] * (width // STEP) + [BREAK]) * (height // STEP)
    return [*rows[:-1], END]


def images(*sizes: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Images of those (height, width), padded to the largest."""
    pixels = torch.zeros(len(sizes), 3, *map(max, zip(*sizes)))
    for image, (height, width) in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed + image)
        pixels[image, :, :height, :width] = torch.randn(3, height, width, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def request(*sizes: tuple[int, int], seed: int = 0) -> Request:
    """A prompt with text around its images."""
    words = [word for word in models.text(60, seed) if word < END]
    ids = words[:4]
    for image, size in enumerate(sizes):
        ids = [*ids, *placeholders(*size), *words[4 + image : 4 + 2 * image]]
    return [*ids, *words[-3:]], images(*sizes, seed=seed) if sizes else {}


def case() -> list[tuple[Any, Request]]:
    """(stock model, request) of each kind there is."""
    return [(model(), request(*sizes)) for sizes in (SIZES[:1], SIZES)]


@pytest.mark.covers("image", "several", family="mistral3")
def test_dense_is_the_stock_model() -> None:
    stock_family.check_dense(model(), request(SIZES[0]), request(*SIZES, seed=1), request(seed=2))


@pytest.mark.slow
def test_dense_features_of_an_earlier_layer_are_the_stock_models() -> None:
    stock_family.check_dense(model(-2), request(*SIZES[1:]))


@pytest.mark.slow
@pytest.mark.covers("batch", family="mistral3")
@pytest.mark.parametrize("settings", [stock_family.CONFIG], ids=["pruned"])
def test_a_batch_says_what_its_samples_say_alone(settings: ViTCoPConfig) -> None:
    requests = [request(*SIZES[:2], seed=1), request(seed=2), request(SIZES[1], seed=3)]
    given = images(*SIZES[:2], seed=1), images(SIZES[1], seed=3)
    pixels = torch.zeros(3, 3, 80, 64)
    pixels[:2], pixels[2, :, :24, :40] = given[0]["pixel_values"], given[1]["pixel_values"][0]
    joined = {"pixel_values": pixels, "image_sizes": torch.cat([one["image_sizes"] for one in given])}
    stock_family.check_batch(model(), requests, joined, settings)


@pytest.mark.covers("turns", family="mistral3")
def test_later_turns_are_the_whole_conversation() -> None:
    ids, given = request(SIZES[1])

    def text(so_far: list[int]) -> Request:
        return so_far + models.text(5, 4), given

    def image(so_far: list[int]) -> Request:
        return so_far + request(SIZES[2], seed=1)[0], images(SIZES[1], SIZES[2])

    stock_family.check_turns(model(), (ids, given), text, image)


@pytest.mark.slow
def test_pruned_meets_its_schedule() -> None:
    schedule = stock_family.check_pruned(model(), request(*SIZES), [48, 15, 9])
    assert schedule.vision.policy == "attention_received" and schedule.vision.side == "merge"


def test_text_inside_an_image_stays_where_it_is() -> None:
    """Behind a row of which nothing is kept, too: between the tokens that stay stands what stood there."""
    from vitcop_compile.host import Images
    from vitcop_compile.prompt import align, read

    host, fast = host_of(config()), models.optimize(model(), stock_family.CONFIG)
    layout = host.layout_of(*SIZES[0])
    ids = torch.tensor([request(SIZES[0])[0]])
    reading = read(ids, torch.ones_like(ids, dtype=torch.bool), host.token_ids, VOCAB, [layout])
    schedule = fast.schedule_of(layout)
    columns = SIZES[0][1] // STEP
    kept = torch.arange(48).unsqueeze(0) + torch.tensor([[0] * 5 + [columns * 4 - 5 + 0] * 43])  # rows two and three: nothing
    kept = kept.clamp(max=79)
    prompt = align(reading, [0], schedule, kept, reading.text[0] + 48, torch.device("cpu"))
    at = iter(range(80))
    stays = set(kept[0].tolist())
    told = [word for word in ids[0].tolist() if word != IMAGE or next(at) in stays]
    assert [0 if word == IMAGE else word for word in told] == prompt.ids[0, : len(told)].tolist()
    assert prompt.visual[0].tolist() == [row for row, word in enumerate(told) if word == IMAGE]
    assert isinstance(host.blank([layout], torch.device("cpu"), torch.float32), Images)


@pytest.mark.parametrize("size", [(96, 96), (50, 33), (200, 80), (7, 300), (1, 1)])
def test_layouts_are_what_the_processor_makes_of_a_size(size: tuple[int, int]) -> None:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    processor = PixtralImageProcessorPil(size={"longest_edge": 96}, patch_size={"height": STEP, "width": STEP})
    made = processor(torch.zeros(3, *size, dtype=torch.uint8).numpy(), return_tensors="pt", input_data_format="channels_first")
    height, width = made["image_sizes"][0].tolist()
    (segment,) = host_of(config()).layout_of(*size)
    assert segment.grid == (1, height // STEP, width // STEP)


def test_images_that_are_not_the_models_are_refused() -> None:
    fast = models.optimize(model(), ViTCoPConfig.dense())
    ids, given = request(*SIZES[:2])
    pixels, sizes, prompt = given["pixel_values"], given["image_sizes"], torch.tensor([ids])
    for wrong, what in (
        ({"pixel_values": pixels}, "image_sizes is missing"),
        ({"pixel_values": pixels, "image_sizes": sizes - 4}, r"image_sizes holds \(76, 60\): .* multiples of 8"),
        ({"pixel_values": pixels[:1], "image_sizes": sizes}, r"pixel_values is \(1, 3, 80, 64\), image_sizes counts 2"),
        ({"pixel_values": pixels[..., :56], "image_sizes": sizes}, "of up to 80x64 pixels"),
        ({"pixel_values": pixels[0], "image_sizes": sizes}, "pixel_values has shape"),
        ({"pixel_values": pixels[:1], "image_sizes": sizes[:1]}, "a prompt holds 95 image tokens"),
    ):
        with pytest.raises(InputError, match=what):
            fast(prompt, **wrong)


def test_variants_are_refused() -> None:
    clip = CLIPVisionConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    for more, what in (
        ({"vision_config": clip}, "Mistral3 with a clip_vision_model encoder is not supported: pixtral is"),
        ({"vision_feature_layer": [-1, -2]}, r"vision_feature_layer=\[-1, -2\] is not supported: a single layer is"),
    ):
        with pytest.raises(UnsupportedError, match=what):
            host_of(config(**more))
