"""LLaVA-NeXT and LLaVA-OneVision: dense against the stock models, pruned against stock layers pruned by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import tiled
import torch
from reference_llava import Settings
from reference_tiled import TiledConversation

from vitcop_compile import ViTCoPConfig

NEAR = 1e-5
COUNTS = {"budgets": (12, 8, 3, 4), "shallow_layer": 1, "deep_layer": 3, "scale_layers": False}
CONFIG = ViTCoPConfig(**COUNTS)
BOTH = pytest.mark.parametrize("name", ["next", "onevision"])


def by_the_book(candidates: int, positions: str = "published") -> Settings:
    return Settings(12, 4, 8, 3, 1, 1, 3, positions)


@cache
def optimized(name: str, config: ViTCoPConfig = CONFIG, backend: str = "eager", language: str = "") -> Any:
    return models.optimize(tiled.model(name, language), config, backend=backend)


def request(name: str, sizes: list[tuple[int, int]], seed: int = 0, alone: bool = True) -> tuple[list[int], dict[str, Any]]:
    """(ids, what the processor gives beside them) of a prompt about images of those sizes."""
    given = tiled.images(name, *sizes, alone=alone, seed=seed)
    if name == "onevision":
        given["batch_num_images"] = torch.tensor([len(sizes) if not alone else 1] * (1 if not alone else len(sizes)))
    with torch.no_grad():
        tokens = [len(features) for features in tiled.features(tiled.model(name), given)]
    return tiled.ids_of(tokens, seed), given


def generate(model: Any, ids: list[int], given: dict[str, Any], steps: int, **more: Any) -> Any:
    prompt = torch.tensor([ids])
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), **given, max_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


PROMPTS: dict[str, Any] = {f"{height}x{width}": ([(height, width)], True) for height, width in tiled.SIZES}
PROMPTS |= {"two images": ([(40, 100), (168, 150)], True), "two in one tile each": ([(40, 100), (56, 56)], False)}


# LLaVA-NeXT cuts every image into tiles.
PAIRS = pytest.mark.parametrize(
    "name, prompt",
    [(name, prompt) for name in ("next", "onevision") for prompt, (_, alone) in PROMPTS.items() if alone or name != "next"],
)


@pytest.mark.covers("image", "several")
@PAIRS
def test_dense_is_the_stock_model(name: str, prompt: str) -> None:
    sizes, alone = PROMPTS[prompt]
    ids, given = request(name, sizes, len(sizes), alone)
    stock = tiled.model(name)
    ours = generate(optimized(name, ViTCoPConfig.dense()), ids, given, 16)
    theirs = generate(stock, ids, given, 16)
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), atol=1e-4, rtol=0)


@BOTH
def test_dense_text_is_the_stock_model(name: str) -> None:
    ids = models.text(11)
    ours, theirs = (generate(model, ids, {}, 16) for model in (optimized(name, ViTCoPConfig.dense()), tiled.model(name)))
    assert ours.sequences.tolist() == theirs.sequences.tolist()


def assert_as_told(out: Any, ids: list[int], given: dict[str, Any], told: TiledConversation, near: float = NEAR) -> None:
    """Logits, keys and values, and what stayed in every stage."""
    said = out.sequences[0, len(ids) :].tolist()
    torch.testing.assert_close(torch.cat(out.logits), told.turn(ids, given, said), atol=near, rtol=0)
    cache = out["past_key_values"]
    firsts = [0]
    for segment in told.candidates[:-1]:
        firsts.append(firsts[-1] + segment)
    through = [
        [first + token for first, of in zip(firsts, stage, strict=True) for token in of] for stage in (told.kept, *told.stages)
    ]
    assert cache.selection.kept[0].tolist() == through[0]
    assert [stage[0].tolist() for stage in cache.selection.stages] == through[1:]
    for layer, stock in enumerate(told.cache.layers):
        for ours, theirs in zip(cache.buffers[2 * layer : 2 * layer + 2], (stock.keys, stock.values), strict=True):
            torch.testing.assert_close(ours[0, :, : theirs.shape[2]], theirs[0], atol=near, rtol=0)


@pytest.mark.covers("pruned by hand")
@PAIRS
def test_pruned_is_what_stock_layers_give_when_pruned_by_hand(name: str, prompt: str) -> None:
    sizes, alone = PROMPTS[prompt]
    ids, given = request(name, sizes, len(sizes), alone)
    told = TiledConversation(tiled.model(name), by_the_book)
    assert_as_told(generate(optimized(name), ids, given, 3), ids, given, told)
