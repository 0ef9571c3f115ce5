"""Idefics3 and SmolVLM against the stock models."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import stock_family
import torch
from stock_family import Request
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.families.idefics3 import positions_of

BOTH = pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
CLASSES: dict[str, Any] = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
IMAGE, VOCAB, SIDE, TOKENS = 95, 96, 90, 9


@cache
def model(name: str) -> Any:
    """9 x 9 patches of 10 pixels, merged three by three."""
    config, kind = CLASSES[name]
    settings = config(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": SIDE, "patch_size": 10,
        },
        text_config=LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        ),
        image_token_id=IMAGE,
        scale_factor=3,
    )  # fmt: skip
    made = kind(settings).eval()
    stock_family.scatter(made)
    return made


def request(images: int, seed: int = 0, mask: bool = True) -> Request:
    """A prompt with text between its images, as that of an image in tiles is."""
    ids = models.text(4, seed)
    for image in range(images):
        ids = [*ids, *[IMAGE] * TOKENS, *models.text(image + 1, seed + image)]
    ids += models.text(3, seed + 9)
    if not images:
        return ids, {}
    pixels = torch.randn(1, images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    shown = {"pixel_attention_mask": torch.ones(1, images, SIDE, SIDE, dtype=torch.int64)} if mask else {}
    return ids, {"pixel_values": pixels} | shown


def joined(*given: dict[str, Any]) -> dict[str, Any]:
    """A batch of such, with images of zeros where a sample has fewer than another."""
    most = max(one["pixel_values"].shape[1] for one in given if one)
    pixels = torch.zeros(len(given), most, 3, SIDE, SIDE)
    mask = torch.zeros(len(given), most, SIDE, SIDE, dtype=torch.int64)
    for row, one in enumerate(given):
        if one:
            count = one["pixel_values"].shape[1]
            pixels[row, :count], mask[row, :count] = one["pixel_values"][0], 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def case() -> list[tuple[Any, Request]]:
    """(stock model, request) of each kind there is."""
    return [(model(name), request(images, images)) for name in CLASSES for images in (1, 3)]


@pytest.mark.covers("image", "several")
@BOTH
def test_dense_is_the_stock_model(name: str) -> None:
    stock_family.check_dense(model(name), request(1), request(3, 1), request(2, 2, mask=False), request(0, 3))


@pytest.mark.slow
@pytest.mark.covers("batch")
@pytest.mark.parametrize("name", ["smolvlm"])
@pytest.mark.parametrize("config", [stock_family.CONFIG], ids=["pruned"])
def test_a_batch_says_what_its_samples_say_alone(name: str, config: ViTCoPConfig) -> None:
    requests = [request(2, 1), request(0, 2), request(1, 3)]
    stock_family.check_batch(model(name), requests, joined(*(given for _, given in requests)), config)


@pytest.mark.covers("turns")
@pytest.mark.parametrize("name", ["idefics3"])
def test_later_turns_are_the_whole_conversation(name: str) -> None:
    ids, given = request(2)

    def text(so_far: list[int]) -> Request:
        return so_far + models.text(5, 4), given

    def image(so_far: list[int]) -> Request:
        more, new = request(1, 5)
        both = torch.cat((given["pixel_values"], new["pixel_values"]), 1)
        return so_far + more, {"pixel_values": both, "pixel_attention_mask": torch.ones(1, 3, SIDE, SIDE)}

    stock_family.check_turns(model(name), (ids, given), text, image)


@pytest.mark.parametrize("name", [models.slow("idefics3"), "smolvlm"])
def test_pruned_meets_its_schedule(name: str) -> None:
    schedule = stock_family.check_pruned(model(name), request(3), [4, 4, 4])
    assert schedule.vision.policy == "attention_received" and schedule.vision.side == "merge"


@BOTH
def test_positions_are_the_stock_embeddings_own(name: str) -> None:
    embeddings = model(name).model.vision_model.embeddings
    pixels = torch.randn(1, 3, SIDE, SIDE)
    with torch.no_grad():
        found = embeddings(pixels, torch.ones(1, 9, 9, dtype=torch.bool)) - embeddings.patch_embedding(pixels).flatten(2).mT
        torch.testing.assert_close(found[0], embeddings.position_embedding(positions_of(embeddings)), atol=1e-5, rtol=0)


@BOTH
def test_a_mask_may_leave_out_pixels_but_no_patch(name: str) -> None:
    fast = models.optimize(model(name), ViTCoPConfig.dense())
    ids, given = request(1)
    mask = given["pixel_attention_mask"].clone()
    mask[..., 85:] = 0  # of the last patches half
    stock_family.check_same(
        stock_family.generate(fast, [ids], given | {"pixel_attention_mask": mask}),
        stock_family.generate(model(name), [ids], given | {"pixel_attention_mask": mask}),
    )
    mask[..., 80:] = 0
    with pytest.raises(InputError, match=r"leaves patches of 1 images out: only whole images .* resize each to 90x90"):
        fast(torch.tensor([ids]), **given | {"pixel_attention_mask": mask})


@BOTH
def test_images_that_are_not_the_models_are_refused(name: str) -> None:
    fast = models.optimize(model(name), ViTCoPConfig.dense())
    ids, given = request(2)
    pixels, prompt = given["pixel_values"], torch.tensor([ids])
    for wrong, what in (
        ({"pixel_values": pixels[0]}, r"pixel_values is \(2, 3, 90, 90\): this model takes \[batch, images, 3, 90, 90\]"),
        ({"pixel_values": pixels[..., :80]}, r"this model takes \[images, \*\(3, 90, 90\)\]"),
        ({"pixel_values": pixels[:, :1]}, "1 images for placeholders of 2"),
        ({"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 2)}, r"pixel_attention_mask is \(1, 2\)"),
    ):
        with pytest.raises(InputError, match=what):
            fast(prompt, **wrong)
    blank = pixels.clone()
    blank[:, 1] = 0
    with pytest.raises(InputError, match="1 images for placeholders of 2"):
        fast(prompt, pixel_values=blank)


def test_an_all_zero_request_is_what_the_stock_model_makes_of_it() -> None:
    ids, given = request(1)
    nothing = {"pixel_values": torch.zeros_like(given["pixel_values"])}
    stock_family.check_dense(model("smolvlm"), (ids, nothing))
    with pytest.raises(InputError, match="no image is there"):
        models.optimize(model("idefics3"), ViTCoPConfig.dense())(torch.tensor([ids]), **nothing)


def test_another_encoder_is_refused() -> None:
    from vitcop_compile.families.registry import host_of

    config = CLASSES["smolvlm"][0](vision_config={"image_size": SIDE, "patch_size": 10}, scale_factor=3)
    config.vision_config.__class__.model_type, before = "other", config.vision_config.model_type
    try:
        with pytest.raises(UnsupportedError, match="SmolVLM with a other encoder is not supported: smolvlm_vision is"):
            host_of(config)
    finally:
        config.vision_config.__class__.model_type = before
