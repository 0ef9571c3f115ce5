"""Calibration: attention that counts a merged token as often as tokens are in it, against stock layers weighed by hand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import families
import models
import pytest
import torch
from calibrated import COUNTS, LAYERS, NEAR, SEEING, TOLD, TURNS, check, check_sizes, optimized, talk
from models import IMAGE, PATCHES, exhaustive, slow
from reference_calibrated import NOWHERE, FamilyWeighing, LlavaWeighing
from reference_llava import Settings
from torch import Tensor
from vitcop_compile.export import EngineModel

from vitcop_compile import ViTCoPConfig
from vitcop_compile.layout import Layout
from vitcop_compile.methods import Calibrated, Downsample, ToMe, VisionZip, VScan
from vitcop_compile.schedule import ModelShape, Stage


@pytest.mark.parametrize(
    ("name", "turns", "layers"), [("visionzip", (1, 1), 2), *(slow(name, TURNS, LAYERS) for name in SEEING)]
)
def test_stock_layers_weighed_by_hand(name: str, turns: tuple[int, ...], layers: int) -> None:
    talk(optimized(Calibrated(SEEING[name][0]), layers=layers), name, turns=turns)


@pytest.mark.slow
def test_a_batch_whose_samples_differ() -> None:
    """One image, text alone, two images, decoded together."""
    method, settings, see = SEEING["vitcop"]
    fast, counts = optimized(Calibrated(method)), (1, 0, 2)
    prompts = [models.turn_ids(count, seed) for seed, count in enumerate(counts)]
    ids, mask = models.pad([torch.tensor([prompt]) for prompt in prompts], "left")
    pixels = [models.pixels(count, seed) if count else None for seed, count in enumerate(counts)]
    out = fast.generate(
        ids, attention_mask=mask, pixel_values=torch.cat([part for part in pixels if part is not None]), max_new_tokens=3,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    for sample, prompt in enumerate(prompts):
        told = LlavaWeighing(models.shared(LAYERS), settings, see)
        logits = told.turn(prompt, pixels[sample], out.sequences[sample, ids.shape[1] :].tolist())
        torch.testing.assert_close(torch.stack(out.logits)[:, sample], logits, atol=NEAR, rtol=NEAR)
        check(out["past_key_values"], told, sample)
        check_sizes(fast, out["past_key_values"], told, sample)


# Tokens that are put together behind their encoder, positions of three coordinates


def family_talk(method: Any, hand: FamilyWeighing, parts: list[list[Any]]) -> None:
    fast = models.optimize(families.model("qwen2_5_vl"), Calibrated(method))
    cache, unfed, whole = None, [], []
    for turn, part in enumerate(parts):
        ids, given = families.prompt("qwen2_5_vl", part, turn)
        whole += ids
        prompt = torch.tensor([whole])
        out = fast.generate(
            prompt, attention_mask=torch.ones_like(prompt), **given, **families.types(prompt), max_new_tokens=3,
            do_sample=False, return_dict_in_generate=True, output_logits=True, past_key_values=cache,
            suppress_tokens=[families.IMAGE, families.VIDEO],
        )  # fmt: skip
        cache, said = out["past_key_values"], out.sequences[0, len(whole) :].tolist()
        logits = hand.turn([*unfed, *ids], given or None, said)
        torch.testing.assert_close(torch.cat(out.logits), logits, atol=NEAR, rtol=NEAR)
        check(cache, hand)
        check_sizes(fast, cache, hand)
        unfed, whole = said[-1:], out.sequences[0].tolist()
    assert max(map(max, hand.sizes)) > 2, "something has merged"


@pytest.mark.parametrize("turns", [[[2, (4, 8), 3]], slow([[2, (4, 8), 3, (4, 8), 1], [4], [2, (4, 8), 1]])])
def test_packed_tokens_pooled_behind_the_projector(turns: list[list[Any]]) -> None:
    book = families.KINDS["qwen2_5_vl"].book
    every = FamilyWeighing(
        families.model("qwen2_5_vl"), book, lambda n: Settings(n, 1, 1, 1, 1, NOWHERE, NOWHERE, "original"), pool=(2, 3)
    )  # fmt: skip
    family_talk(Downsample(tokens=6), every, turns)


@pytest.mark.slow
def test_packed_tokens_merged_in_the_decoder() -> None:
    book = families.KINDS["qwen2_5_vl"].book
    hand = FamilyWeighing(families.model("qwen2_5_vl"), book, lambda _: Settings(8, 3, 4, 3, 1, 1, 3, "original"))
    family_talk(ViTCoPConfig(budgets=(8, 4, 3, 3), **COUNTS), hand, [[3, (3, 4), 4], [5], [2, (4, 4), 3, (3, 4), 2]])


# What calibration is for


@cache
def alike(layers: int = LAYERS) -> Any:
    """A model to which all patches of an image of one color are alike, wherever they stand."""
    model = models.llava(layers, seed=3)
    with torch.no_grad():
        model.model.vision_tower.embeddings.position_embedding.weight.zero_()
        model.model.language_model.rotary_emb.inv_freq.zero_()
    return model


MERGING = {
    "downsample": Downsample(tokens=16),  # cells that do not overlap: none is in two
    "visionzip": VisionZip(tokens=9, contextual=0.5),
    "tome": ToMe(tokens=22),
    "vscan": VScan(tokens=9, last=1.0),
    "vitcop": ViTCoPConfig(budgets=(PATCHES, 9, 9, 5), **COUNTS),
}


ALIKE = torch.tensor([[IMAGE] * PATCHES + models.text(6)])


def one_color() -> Tensor:
    return models.pixels()[:, :, :1, :1].expand(1, 3, models.SIDE, models.SIDE).contiguous()


@pytest.mark.parametrize(("name", "layers"), [("tome", 2), *(exhaustive(name, LAYERS) for name in MERGING)])
def test_alike_tokens_that_merge_change_nothing(name: str, layers: int) -> None:
    """The image comes first: what is alike sees the same then."""
    stock, fast = alike(layers), models.optimize(alike(layers), Calibrated(MERGING[name]))
    asked = {"pixel_values": one_color(), "attention_mask": torch.ones_like(ALIKE), "max_new_tokens": 4} | TOLD
    expected, found = (model.generate(ALIKE, **asked) for model in (stock, fast))
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", MERGING)
def test_alike_tokens_in_a_second_turn_and_in_beams(name: str) -> None:
    """And without calibration the same tokens change much."""
    stock, color, ids = alike(), one_color(), ALIKE
    fast, plain = (models.optimize(stock, method) for method in (Calibrated(MERGING[name]), Kept(Calibrated(MERGING[name]))))
    said = {"max_new_tokens": 4} | TOLD
    asked = {"pixel_values": color, "attention_mask": torch.ones_like(ids)} | said
    expected, found, off = (model.generate(ids, **asked) for model in (stock, fast, plain))
    assert (off.logits[0] - expected.logits[0]).abs().max() > 1e-2
    more = torch.cat((expected.sequences, torch.tensor([models.text(5, 1)])), 1)
    asked = {"attention_mask": torch.ones_like(more)} | said
    turns = ((stock, expected), (fast, found))
    after = [model.generate(more, past_key_values=out["past_key_values"], **asked) for model, out in turns]
    torch.testing.assert_close(*(torch.cat(out.logits) for out in after), atol=1e-4, rtol=0)
    asked = {"pixel_values": color, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert fast.generate(ids, num_beams=3, **asked).tolist() == stock.generate(ids, num_beams=3, **asked).tolist()


@dataclass(frozen=True)
class Kept:
    """A calibrated method whose tokens count once."""

    method: Calibrated

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        return tuple(dataclasses.replace(stage, weighs=False) for stage in self.method.stages(shape, layout))

    def to_json(self) -> str:
        raise NotImplementedError


@pytest.mark.slow
def test_sizes_of_one_change_nothing() -> None:
    """Nothing takes part in what is kept: the graphs weigh, and everything weighs the same."""
    method = Calibrated(VisionZip(tokens=20, contextual=0.0))
    ids, pixels = torch.tensor([models.turn_ids(1, 0)]), models.pixels()
    said = {"max_new_tokens": 3} | TOLD
    found, expected = (
        optimized(of).generate(ids, pixel_values=pixels, **said) for of in (method, Kept(method))
    )  # fmt: skip
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=NEAR, rtol=NEAR)
    assert optimized(method).schedule.told == (0,) and optimized(Kept(method)).schedule.told == ()
    sizes = found["past_key_values"].held_buffers.numbers[0]
    assert set(sizes[0, : ids.shape[1] - PATCHES + 20 + 2].tolist()) == {1}


# Other backends


@pytest.mark.parametrize(
    ("name", "backend"),
    [slow("vitcop", "onnxruntime"), exhaustive("visionzip", "onnxruntime"), exhaustive("vitcop", "inductor"),
     exhaustive("visionzip", "inductor")],
)  # fmt: skip
def test_other_backends(name: str, backend: str) -> None:
    talk(optimized(Calibrated(SEEING[name][0]), backend), name, 2, 1e-4)


@pytest.mark.parametrize(("name", "opset"), [slow("visionzip", 18), slow("vitcop", 23), exhaustive("tome", 18)])
def test_a_folder(name: str, opset: int, tmp_path: Path) -> None:
    """Two turns from a folder, whose programs return rows and sizes."""
    fast = optimized(Calibrated(SEEING[name][0]))
    fast.export(
        tmp_path / "f", opset=opset, prompt_buckets=(32,), later_images=True, max_text_len=32, max_new_tokens=64
    )  # fmt: skip
    engine = EngineModel.from_pretrained(tmp_path / "f")
    first, then = torch.tensor([models.turn_ids(1, 0)]), torch.tensor([models.turn_ids(1, 1)])
    found = []
    for model in (fast, engine):
        said = {"max_new_tokens": 4} | TOLD
        before = model.generate(first, pixel_values=models.pixels(), **said)
        whole = torch.cat((before.sequences, then), 1)
        held = before["past_key_values"]
        after = model.generate(whole, pixel_values=models.pixels(seed=1), past_key_values=held, **said)
        numbers = [sizes[:, : held.held[group]] for sizes, group in zip(held.held_buffers.numbers, fast.schedule.told)]
        found.append(([torch.cat(out.logits) for out in (before, after)], numbers))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert all(int(sizes.max()) > 2 for sizes in found[0][1])
