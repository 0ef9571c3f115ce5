"""Folders of models whose image tokens are put together behind the encoder, or are of any size."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from folders import without_collection
from test_families import by_the_book, check, generate, optimized, pruned
from test_folder import refused, write
from vitcop_compile.export import EngineModel, export
from vitcop_compile.export.engine import RUNTIMES

from vitcop_compile import ConfigError, InputError

TEXT, NEW = 24, 16
CONFIG = pruned(8, 6, 3, 3)
# Sums of other kernels.
NEAR = 1e-4
ONE, TWO, CLIP = [3, (3, 4), 4], [2, (4, 4), 3, (3, 4), 4], [2, (3, 2, 4), 3]


def exported(name: str, root: Path, *prompts: list[Any], **options: Any) -> EngineModel:
    """A folder for prompts like these."""
    model = optimized(name, CONFIG)
    layouts = []
    for parts in prompts:
        ids, given = families.prompt(name, parts)
        layouts += model.layouts_of(torch.tensor([ids]), **given)
    with without_collection():
        export(model, root, layouts=layouts, **{"max_text_len": TEXT, "max_new_tokens": NEW} | options)
    return EngineModel.from_pretrained(root)


@pytest.mark.covers("folder", "onnxruntime", "openvino")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl"])
def test_a_folder_does_what_stock_layers_do_when_pruned_by_hand(name: str, tmp_path: Path) -> None:
    """A prompt with an image, then a turn of text; what the folder was not made for is refused, and so is a forged one."""
    exported(name, tmp_path / "f", ONE)
    for runtime in RUNTIMES:
        engine = EngineModel.from_pretrained(tmp_path / "f", runtime=runtime)
        ids, given = families.prompt(name, ONE)
        found, turn = generate(engine, ids, given, 3, name), by_the_book(name, CONFIG)
        check(found, turn, turn.turn(ids, given, found.sequences[0, len(ids) :].tolist()), near=NEAR)
        before = found.sequences[0].tolist()
        new = [5, 7, 9, 11]
        later = generate(engine, before + new, {}, 3, name, past_key_values=found.past_key_values)
        logits = turn.turn(before[-1:] + new, None, later.sequences[0, len(before) + len(new) :].tolist())
        torch.testing.assert_close(torch.cat(later.logits), logits, rtol=NEAR, atol=NEAR)
    ids, given = families.prompt(name, TWO)
    with pytest.raises(
        InputError, match=r"a prompt with images of .* tokens, the engine takes 1 x .* export again with layouts"
    ):
        generate(engine, ids, given, 2, name)
    values = json.loads((tmp_path / "f" / "vitcop.json").read_text())
    for change in ({"tokens": 3}, {"kind": "video"}, {"grid": [1, 7, 3]}):
        values["layouts"][0][0][0] |= change
        write(tmp_path / "f", values)
        refused(tmp_path / "f")


@pytest.mark.covers("folder", "onnxruntime", "openvino", "batch", "turns", family="qwen2_vl")
@pytest.mark.slow
def test_several_batches_layouts_and_images_in_later_turns(tmp_path: Path) -> None:
    """Two with an image and one without, and a video for each in the next turn: filled up to what programs take."""
    name = "qwen2_vl"
    options = {"batch_size": (1, 3), "prompt_buckets": (TEXT,), "later_images": True, "max_new_tokens": 48}
    exported(name, tmp_path / "f", ONE, CLIP, **options)
    for runtime in RUNTIMES:
        engine = EngineModel.from_pretrained(tmp_path / "f", runtime=runtime)
        assert engine.manifest.batch_sizes == (1, 3)
        prompts = [families.prompt(name, parts, seed) for seed, parts in enumerate((ONE, [6], [5, (3, 4), 1]))]
        width = max(len(ids) for ids, _ in prompts)
        ids = torch.tensor([[0] * (width - len(ids)) + ids for ids, _ in prompts])
        mask = (torch.arange(width) >= width - torch.tensor([[len(ids)] for ids, _ in prompts])).long()
        given = {key: torch.cat([own[key] for _, own in prompts if own]) for key in prompts[0][1]} | families.types(ids)
        settings: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        settings["suppress_tokens"] = [families.IMAGE, families.VIDEO]
        together = engine.generate(ids, attention_mask=mask, **given, max_new_tokens=3, **settings)
        turns = [by_the_book(name, CONFIG) for _ in prompts]
        for sample, (turn, (own, images)) in enumerate(zip(turns, prompts, strict=True)):
            logits = turn.turn(own, images or None, together.sequences[sample, width:].tolist())
            found = torch.stack([step[sample] for step in together.logits])
            torch.testing.assert_close(found, logits, rtol=NEAR, atol=NEAR)
        # Later turns with a video, of the same batch.
        new, clip = families.prompt(name, CLIP, 7)
        before = torch.cat((ids, together.sequences[:, width:]), 1)
        mask = torch.cat((mask, torch.ones(3, before.shape[1] - width + len(new), dtype=torch.int64)), 1)
        more = torch.cat((before, torch.tensor([new] * 3)), 1)
        clips = {key: torch.cat([value] * 3) for key, value in clip.items()} | families.types(more)
        later = engine.generate(
            more, attention_mask=mask, **clips, max_new_tokens=2, past_key_values=together.past_key_values, **settings
        )
        for sample, turn in enumerate(turns):
            said = later.sequences[sample, more.shape[1] :].tolist()
            logits = turn.turn(before[sample, -1:].tolist() + new, clip, said)
            found = torch.stack([step[sample] for step in later.logits])
            torch.testing.assert_close(found, logits, rtol=NEAR, atol=NEAR)
        with pytest.raises(InputError, match=r"2 sequences \(prompts times beams\), the engine was built for 1 or 3"):
            engine.generate(torch.tensor([[3, 4, 5]] * 2), max_new_tokens=2)


def test_a_folder_of_any_size_must_be_told_sizes(tmp_path: Path) -> None:
    fast = optimized("qwen2_vl", CONFIG)
    one = fast.layout_of(84, 112)
    for options, message in (
        ({}, r"takes images of any size.*layouts=.*\[\[model.layout_of\(height, width\)\]\]"),
        ({"layouts": []}, r"layouts=\[\]: pass what at least one prompt holds"),
        ({"layouts": [[one], []]}, "pass what at least one prompt holds, an image at least"),
        ({"layouts": [[one]], "batch_size": (2, 1)}, r"batch_size=\(2, 1\): pass one count, or ascending ones"),
        ({"layouts": [[one]], "batch_size": ()}, r"batch_size=\(\): pass one count"),
        ({"layouts": [[one]], "later_images": True}, "later_images=True and text of 2 to 512 tokens: .*pass prompt_buckets"),
        ({"layouts": [[one] * 60]}, "positions, the model has 1024"),
        (
            {"layouts": [[(dataclasses.replace(one[0], protected=(3,)),)]]},
            "are not of Qwen2VLForConditionalGeneration: pass what",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            fast.export(tmp_path / "f", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_of_one_size_refuses_layouts_of_another(tmp_path: Path) -> None:
    fast, other = optimized("internvl", CONFIG), optimized("qwen2_vl", CONFIG).layout_of(84, 112)
    with pytest.raises(ConfigError, match="are not of InternVLForConditionalGeneration: pass what its own layout_of"):
        fast.export(tmp_path / "f", layouts=[[other]])


def test_layouts_of_a_request() -> None:
    fast = optimized("qwen2_vl", CONFIG)
    prompts = [families.prompt("qwen2_vl", parts) for parts in (TWO, [len(families.prompt("qwen2_vl", TWO)[0])])]
    found = fast.layouts_of(torch.tensor([ids for ids, _ in prompts]), **prompts[0][1])
    assert [[[segment.grid for segment in image] for image in images] for images in found] == [[[(1, 4, 4)], [(1, 3, 4)]], []]
