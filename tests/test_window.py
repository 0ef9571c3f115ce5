"""Decoders with a sliding window: served as full attention up to the window, and refused beyond it."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, MistralConfig, Qwen2Config
from vitcop_compile.export import export

import vitcop_compile
from vitcop_compile import ConfigError, InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.attention import anchored
from vitcop_compile.capture import capture
from vitcop_compile.families import family_of
from vitcop_compile.families.registry import shape_of
from vitcop_compile.methods import Calibrated, Uniform

WINDOW = 140
SIZES: dict[str, Any] = {
    "vocab_size": models.VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip


def llava(text: Any) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=models.SIDE,
        patch_size=models.SIDE // models.GRID, projection_dim=16,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=models.IMAGE, tie_word_embeddings=False)
    model = LlavaForConditionalGeneration(config).eval()
    models.randomize(model, 0)
    return model


@cache
def mistral(window: int | None = WINDOW) -> LlavaForConditionalGeneration:
    """One for all tests, which leave it as it is."""
    return llava(MistralConfig(**SIZES, sliding_window=window))


def greedy(model: Any, new_tokens: int, ids: torch.Tensor, pixels: torch.Tensor | None) -> list[list[int]]:
    mask = torch.ones_like(ids)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "do_sample": False}
    given |= {} if pixels is None else {"pixel_values": pixels}
    return model.generate(**given, max_new_tokens=new_tokens).tolist()


def test_the_default_configuration_is_taken() -> None:
    shape = shape_of(llava(MistralConfig(**SIZES)).config)
    assert (shape.window, shape.max_positions, shape.most_tokens) == (4096, 4096 * 32, 4096)


@pytest.mark.parametrize("image", [True, False])
def test_up_to_the_window_it_is_the_stock_model(image: bool) -> None:
    """To its last token: 64 patches, 30 of text and 46 new ones are 140."""
    model = mistral()
    fast = models.optimize(model, ViTCoPConfig.dense(), prompt_buckets=(32, WINDOW))
    ids, pixels = (models.prompt(10, 20), models.pixels()) if image else (torch.tensor([models.text(94)]), None)
    assert greedy(fast, 46, ids, pixels) == greedy(model, 46, ids, pixels)
    with pytest.raises(InputError, match=r"rows and 47 new tokens need 141 positions, the model has a window of 140: shorten"):
        greedy(fast, 47, ids, pixels)


def test_the_stock_model_does_leave_its_window() -> None:
    """A control: past the window the stock model is another one."""
    ids, pixels = models.prompt(10, 20), models.pixels()
    assert greedy(mistral(60), 8, ids, pixels) != greedy(mistral(None), 8, ids, pixels)


def test_pruned_rows_count_and_not_the_image() -> None:
    config = ViTCoPConfig(budgets=(20, 10, 5), shallow_layer=1, deep_layer=2)
    fast = models.optimize(mistral(), config, prompt_buckets=(32,))
    assert len(greedy(fast, 90, models.prompt(10, 20), models.pixels())[0]) == 94 + 90
    with pytest.raises(InputError, match="a prompt of 50 rows and 91 new tokens need 141 positions"):
        greedy(fast, 91, models.prompt(10, 20), models.pixels())


KEPT = Calibrated(Uniform(tokens=20))


def test_pruned_tokens_that_keep_positions_take_them() -> None:
    """78 positions of which 34 are rows; a second turn of 10 and an image takes 74 more, and 1 was said."""
    model = models.llava(1, positions=158)
    fast = vitcop_compile.optimize(model, KEPT, backend="eager", prompt_buckets=(32,))
    ids, pixels = models.prompt(5, 9), models.pixels()
    assert fast.schedule.placed
    with pytest.raises(
        InputError, match="a prompt of 78 positions, which pruned tokens keep, and 81 new tokens need 159, the model has 158"
    ):
        greedy(fast, 81, ids, pixels)
    out = fast.generate(ids, pixel_values=pixels, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
    whole = torch.cat((out.sequences, models.prompt(4, 6, 1)), 1)
    asked = {"pixel_values": pixels, "attention_mask": torch.ones_like(whole), "past_key_values": out.past_key_values}
    with pytest.raises(InputError, match=r"a prompt of 154 positions, .* and 5 new tokens need 159, the model has 158"):
        fast.generate(whole, max_new_tokens=5, do_sample=False, **asked)
    assert fast.generate(whole, max_new_tokens=4, do_sample=False, **asked).shape == (1, 158)


def test_engines_of_tokens_that_keep_positions_end_with_those(tmp_path) -> None:
    fast = models.optimize(models.shared(3), KEPT)
    with pytest.raises(ConfigError, match=r"64 image tokens, which keep their positions, max_text_len=900 .* need 1025 pos"):
        export(fast, tmp_path / "folder", max_text_len=900, max_new_tokens=61)


def test_engines_end_at_the_window(tmp_path) -> None:
    fast = models.optimize(mistral(), ViTCoPConfig.dense())
    with pytest.raises(ConfigError, match="64 image tokens, max_text_len=40 and max_new_tokens=37 need 141 positions"):
        export(fast, tmp_path / "folder", max_text_len=40, max_new_tokens=37)


@pytest.mark.slow
def test_layers_of_both_kinds() -> None:
    """Qwen2 attends within a window in some layers only; no other model has one unless it says so."""
    text = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
    model = llava(text)
    fast = vitcop_compile.optimize(model, ViTCoPConfig.dense(), backend="eager")
    assert fast.schedule.shape.window == WINDOW
    ids, pixels = models.prompt(10, 20), models.pixels()
    assert greedy(fast, 4, ids, pixels) == greedy(model, 4, ids, pixels)
    assert shape_of(llava(Qwen2Config(**SIZES, use_sliding_window=False)).config).window is None


def test_a_window_that_the_family_does_not_state_is_refused() -> None:
    model = mistral()
    family = family_of(model)
    object.__setattr__(family.shape, "window", None)
    with pytest.raises(UnsupportedError, match="within a window of 140 tokens, and the model's family states none"):
        capture(family, model)
    object.__setattr__(family.shape, "window", 141)
    with pytest.raises(UnsupportedError, match="within a window of 140 tokens, and the model's family states 141"):
        capture(family, model)
    with anchored(family.decoder, window=3):
        pass  # what is stated ends with the context
    object.__setattr__(family.shape, "window", 140)
    capture(family, model)
