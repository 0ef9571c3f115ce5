"""LLaVA-1.5 around other language models than Llama: dense against stock, pruned against stock layers pruned by hand."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from reference_llava import Settings
from reference_turns import Conversation
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

from vitcop_compile import ViTCoPConfig

CONFIG = ViTCoPConfig(budgets=(30, 18, 7, 5), shallow_layer=1, deep_layer=3, scale_layers=False)


def llava(language: str) -> Any:
    """As `models.llava` of 4 layers, around another language model."""
    like = models.shared(4).config
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings",
        "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
    )  # fmt: skip
    text = AutoConfig.for_model(language, **{name: getattr(like.text_config, name) for name in names}, num_key_value_heads=2)
    config = LlavaConfig(
        vision_config=like.vision_config, text_config=text, image_token_id=models.IMAGE, tie_word_embeddings=False
    )  # fmt: skip
    made = LlavaForConditionalGeneration(config).eval()
    models.randomize(made, 1)
    return made


@pytest.mark.parametrize("language", ["mistral", "qwen2"])
def test_language_model(language: str) -> None:
    stock = llava(language)
    assert type(stock.model.language_model).__name__ == {"mistral": "MistralModel", "qwen2": "Qwen2Model"}[language]
    ids, given = models.prompt(), {"pixel_values": models.pixels()}
    asked: dict[str, Any] = {
        "max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    ours, theirs = (m.generate(ids, **given, **asked) for m in (models.optimize(stock, ViTCoPConfig.dense()), stock))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), atol=1e-4, rtol=0)

    out = models.optimize(stock, CONFIG).generate(ids, **given, **asked)
    told = Conversation(stock, Settings(30, 5, 18, 7, 2, 1, 3))
    expected = told.turn(ids[0].tolist(), given["pixel_values"], out.sequences[0, ids.shape[1] :].tolist())
    torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-5, rtol=1e-5)
    assert [out["past_key_values"].selection.kept[0].tolist()] == told.kept
    assert [[stage[0].tolist()] for stage in out["past_key_values"].selection.stages] == told.stages
