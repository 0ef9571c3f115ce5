"""Gemma 3, whose images attend to themselves both ways: dense against the stock model, pruned against stock layers pruned by
hand."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import gemma
import models
import pytest
import torch
from reference_gemma import Budget, Conversation
from torch import Tensor
from transformers import Gemma3ForConditionalGeneration
from vitcop_compile.export import EngineModel
from vitcop_compile.passes import extend_passes, prefill_passes, rewrite
from vitcop_compile.passes.attach_cache import write_numbers

from vitcop_compile import ConfigError, InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.attention import ANCHOR, anchored, sdpa_cached, sdpa_marked, visible, visible_cached
from vitcop_compile.families import family_of
from vitcop_compile.families.registry import host_of

PRUNED = ViTCoPConfig(budgets=(10, 6, 3, 4), shallow_layer=2, deep_layer=4, scale_layers=False)
BUDGET = Budget(10, 4, 6, 3, (2, 4))
NEW = 16


def request(*parts: int, seed: int = 0) -> dict[str, Tensor]:
    """Text of so many tokens each, images between, as a processor gives them."""
    ids = torch.tensor([gemma.ids(*parts, seed=seed)])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": gemma.kinds(ids)}
    return given | ({"pixel_values": gemma.pixels(len(parts) - 1, seed)} if len(parts) > 1 else {})


def case() -> list[tuple[Any, dict[str, Tensor]]]:
    """(model, request) pairs: one image, several, text alone."""
    return [(gemma.model(), request(*parts)) for parts in ((5, 9), (4, 3, 6), (20,))]


@cache
def dense() -> Any:
    return models.optimize(gemma.model(), ViTCoPConfig.dense(), prompt_buckets=(32,))


@cache
def pruned() -> Any:
    return models.optimize(gemma.model(), PRUNED, prompt_buckets=(32,))


def said(model: Any, given: dict[str, Any], new: int = NEW) -> Any:
    return model.generate(
        **given, max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True
    )  # fmt: skip


def check(ours: Any, theirs: Any) -> list[int]:
    """Both said the same: the tokens of the first sample."""
    new = len(theirs.logits)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-5, rtol=1e-5)
    assert ours.sequences[:, -new:].tolist() == theirs.sequences[:, -new:].tolist()
    return ours.sequences[0, -new:].tolist()


@pytest.mark.covers("image", "several", family="gemma3")
@pytest.mark.parametrize("parts", [(5, 9), (4, 3, 6), (20,), (3, 0, 5)])
def test_dense_is_the_stock_model(parts: tuple[int, ...]) -> None:
    """The last has two images side by side, which are one block."""
    given = request(*parts)
    tokens = check(said(dense(), given), said(gemma.model(), given))
    assert len(set(tokens)) > 4


@pytest.mark.covers("batch", family="gemma3")
def test_a_batch_is_its_samples() -> None:
    one, two = request(5, 9), request(12, seed=1)
    ids, mask = models.pad([one["input_ids"], two["input_ids"]], "left")
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": gemma.kinds(ids)}
    out = said(dense(), given | {"pixel_values": one["pixel_values"]})
    for row, alone in enumerate((one, two)):
        expected = said(gemma.model(), alone)
        torch.testing.assert_close(
            torch.stack(out.logits)[:, row], torch.stack(expected.logits)[:, 0], atol=1e-5, rtol=1e-5
        )  # fmt: skip


@pytest.mark.covers("turns", family="gemma3")
@pytest.mark.parametrize("parts", [(6,), (2, 7)])
def test_a_second_turn_goes_on(parts: tuple[int, ...]) -> None:
    """Its image attends to itself both ways, and to the first turn as text does."""
    first, then = request(5, 9), request(*parts, seed=1)
    before = said(dense(), first)
    ids = torch.cat((before.sequences, then["input_ids"]), 1)
    pixels = torch.cat([turn["pixel_values"] for turn in (first, then) if "pixel_values" in turn])
    whole = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": gemma.kinds(ids), "pixel_values": pixels,
    }  # fmt: skip
    check(said(dense(), whole | {"past_key_values": before.past_key_values}), said(gemma.model(), whole))


@pytest.mark.covers("beams", family="gemma3")
def test_beams_keep_their_positions() -> None:
    asked = request(5, 9) | {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    assert dense().generate(**asked).tolist() == gemma.model().generate(**asked).tolist()


@pytest.mark.covers("inductor", family="gemma3")
@pytest.mark.slow
def test_inductor_gives_what_the_stock_model_gives() -> None:
    """Nothing is pruned: an image that attends to itself both ways, wider than a window, and a step of text behind it."""
    fast = models.optimize(gemma.model(), ViTCoPConfig.dense(), backend="inductor", prompt_buckets=(32,))
    ours, theirs = (said(model, request(5, 9), 2) for model in (fast, gemma.model()))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), atol=1e-4, rtol=0)


@pytest.mark.covers("onnxruntime", "folder", family="gemma3")
@pytest.mark.exhaustive
def test_caches_that_programs_only_read(tmp_path: Path) -> None:
    """Two turns with an image each, pruned, from a folder, whose programs return their rows and positions."""
    first, then = request(5, 9), request(2, 7, seed=1)
    pruned().export(
        tmp_path / "f", layouts=pruned().layouts_of(**first), prompt_buckets=(32,), later_images=True, max_text_len=32,
        max_new_tokens=64,
    )  # fmt: skip
    out: list[list[Tensor]] = []
    for model in (pruned(), EngineModel.from_pretrained(tmp_path / "f")):
        before = said(model, first, 8)
        ids, pixels = (torch.cat((a, b)) if a.dim() == 4 else torch.cat((a, b), 1) for a, b in (
            (before.sequences, then["input_ids"]), (first["pixel_values"], then["pixel_values"])
        ))  # fmt: skip
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        after = said(model, given | {"past_key_values": before.past_key_values}, 8)
        out.append([torch.cat(turn.logits) for turn in (before, after)])
    torch.testing.assert_close(*out, atol=1e-4, rtol=1e-4)


@pytest.mark.covers("pruned by hand", family="gemma3")
@pytest.mark.slow
def test_pruned_is_stock_layers_pruned_by_hand() -> None:
    told, ids, pixels = Conversation(gemma.model(), BUDGET), None, []
    held = None
    for turn in (request(5, 4, 3), request(3, seed=2), request(2, 7, seed=1)):
        ids = turn["input_ids"] if ids is None else torch.cat((ids, turn["input_ids"]), 1)
        pixels += [turn["pixel_values"]] if "pixel_values" in turn else []
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.cat(pixels)}
        out = said(pruned(), given | ({} if held is None else {"past_key_values": held}))
        held = out.past_key_values
        # What was said last was not fed: it begins the next turn.
        fresh = ids[:, -turn["input_ids"].shape[1] - bool(told.start) :]
        expected = told.turn(fresh[0].tolist(), turn.get("pixel_values"), out.sequences[0, ids.shape[1] :].tolist())
        torch.testing.assert_close(torch.cat(out.logits), expected, atol=1e-5, rtol=1e-5)
        assert len(held.buffers) == 2 * len(told.cache.layers) == 2 * gemma.LAYERS
        for layer, stock in enumerate(told.cache.layers):
            for ours, theirs in zip(held.buffers[2 * layer : 2 * layer + 2], (stock.keys, stock.values), strict=True):
                torch.testing.assert_close(ours[0, :, : theirs.shape[2]], theirs[0], atol=1e-5, rtol=1e-5)
        if "pixel_values" in turn:
            through = [image * gemma.TOKENS + token for image, kept in enumerate(told.kept) for token in kept]
            assert held.selection.kept[0].tolist() == through
            assert [stage[0].tolist() for stage in held.selection.stages] == told.stages
        ids = out.sequences


def test_schedule() -> None:
    plan = pruned().schedule_of(2)
    assert plan.patches == 2 * gemma.TOKENS and plan.group_tokens() == (20, 12, 6)
    assert [stage.keys for stage in plan.decoder_stages] == ["raw", "raw"]
    assert [stage.positions for stage in plan.decoder_stages] == ["kept", "kept"]
    assert plan.shape.window is None and plan.shape.most_tokens == 1024


def test_masks_are_made_once_for_layers_that_share_them() -> None:
    captured = models.captured(gemma.model())
    module = rewrite(captured.decoder, prefill_passes(pruned().schedule_of(1), states=1))
    targets = [node.target for node in module.graph.nodes]
    assert targets.count(sdpa_marked) == gemma.LAYERS and ANCHOR not in targets
    # Three groups of layers have three sequences, one of them layers of both kinds.
    assert targets.count(visible) == 4
    flash = rewrite(captured.decoder, prefill_passes(pruned().schedule_of(1), "flash_attention_2", states=1))
    assert [node.target for node in flash.graph.nodes].count(sdpa_marked) == gemma.LAYERS
    filled = rewrite(captured.decoder, prefill_passes(pruned().schedule_of(1), "flash_attention_2", states=1, filled=True))
    assert [node.target for node in filled.graph.nodes].count(sdpa_cached) == gemma.LAYERS
    # A token of text is of no block: layers that do not slide attend as any others.
    extend = rewrite(captured.decoder, extend_passes(pruned().schedule, "flash_attention_2"))
    step = [node.target for node in extend.graph.nodes]
    assert step.count(torch.ops.vitcop.flash_cached.default) == 2 and step.count(sdpa_cached) == 3
    # The last group has no layer that slides, and nobody asks for the positions of its rows.
    assert step.count(visible_cached) == step.count(write_numbers) == 2


def test_a_causal_model_is_another() -> None:
    """A control: what the stock model says of an image that does not attend to itself both ways."""
    given = request(5, 9)
    causal = {name: value for name, value in given.items() if name != "token_type_ids"}
    first, second = (said(gemma.model(), asked, 1).logits[0] for asked in (given, causal))
    assert (first - second).abs().max() > 0.1


def test_a_mask_that_no_family_declares_is_refused() -> None:
    model = gemma.model()
    family = family_of(model)
    marks = torch.zeros(2, 2, 1, 11, dtype=torch.int64)
    inputs = (torch.zeros(2, 11, 64), torch.zeros(1, 2, 11, dtype=torch.int64))
    with (
        anchored(family.decoder, window=gemma.WINDOW),
        pytest.raises(UnsupportedError, match="hands its own mask to attention"),
    ):
        family.decoder(*inputs, marks)
    for wrong, found in ((None, "nothing"), (torch.zeros(2, 1, 11, 11), "torch.float32"), (marks[:, :1], "torch.int64")):
        with (
            anchored(family.decoder, marks=True),
            pytest.raises(UnsupportedError, match=f"states marks of its tokens, and a layer got {found}"),
        ):
            family.decoder(*inputs, wrong)


def test_a_window_matters() -> None:
    """A control: with a wider one the stock model says something else, of text and of an image."""
    wide = gemma.model(1000)
    for parts in ((20,), (5, 9)):
        narrow, wider = (said(model, request(*parts), 1).logits[0] for model in (gemma.model(), wide))
        assert (narrow - wider).abs().max() > 0.1


def test_refused() -> None:
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention=True is not supported"):
        host_of(gemma.config(use_bidirectional_attention=True))
    with pytest.raises(UnsupportedError, match="mm_tokens_per_image=9 is not supported for 8x8 patches"):
        host_of(gemma.config(tokens=9))
    with pytest.raises(UnsupportedError, match="mm_tokens_per_image=8 is not supported for 8x8 patches"):
        host_of(gemma.config(tokens=8))
    with pytest.raises(ConfigError, match="this model's masks are made of positions: use 'original'"):
        models.optimize(gemma.model(), dataclasses.replace(PRUNED, positions="published"))
    given = request(5, 9)
    for kinds in (torch.zeros_like(given["input_ids"]), given["token_type_ids"][:, 1:]):
        with pytest.raises(InputError, match="token_type_ids names other tokens than the image placeholders"):
            dense()(**given | {"token_type_ids": kinds})


def test_patches_as_tokens() -> None:
    """No squares, and no layer that slides."""
    model = Gemma3ForConditionalGeneration(gemma.config(tokens=64, layer_types=["full_attention"] * gemma.LAYERS)).eval()
    assert host_of(model.config).shape.group == 1
    models.randomize(model, 3)
    fast = models.optimize(model, ViTCoPConfig.dense(), prompt_buckets=(32,))
    ids = torch.tensor([[7, *[models.IMAGE] * 64, 8, 9]])
    given = {"input_ids": ids, "pixel_values": gemma.pixels(), "token_type_ids": gemma.kinds(ids)}
    torch.testing.assert_close(fast(**given).logits, model(**given).logits[:, -1:], atol=1e-5, rtol=1e-5)
