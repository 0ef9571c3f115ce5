"""Conversations on engine folders: later turns of text, and what a folder cannot take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import models
import pytest
import torch
from folders import BUDGET, LAYERS, NEW, SHIFTS, TEXT, folder, optimized
from models import pad, pixels, prompt, text
from torch import Tensor
from vitcop_compile.export import EngineModel, export

from vitcop_compile import InputError
from vitcop_compile.cache import PrunedCache
from vitcop_compile.provider import Ask

ROOM = TEXT + NEW  # rows beside the image


@pytest.fixture(scope="module")
def fast() -> Any:
    """The model that the folders are made from, on torch's eager backend."""
    return optimized()


@pytest.fixture(scope="module")
def engine() -> Callable[[str], EngineModel]:
    return functools.cache(lambda name: EngineModel.from_pretrained(folder(name), threads=1))


def converse(model: Any, ids: Tensor, images: Tensor | None, turns: list[list[int]], new: int = 4) -> list[Tensor]:
    """Logits [B, new, V] of every turn, each on the cache of the one before; the batch of an engine is filled with copies."""
    batch = max(model.manifest.batch_sizes) if isinstance(model, EngineModel) else 1
    ids, images = ids.repeat(batch, 1), None if images is None else images.repeat(batch, 1, 1, 1)
    found, settings = [], {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    given: dict[str, Any] = {} if images is None else {"pixel_values": images}
    for words in (None, *turns):
        if words is not None:
            ids = torch.cat((ids, torch.tensor([words]).repeat(batch, 1)), 1)
        out = model.generate(ids, max_new_tokens=new, **given, **settings)
        found.append(torch.stack(out.logits, 1))
        ids, given = out.sequences, {"past_key_values": out.past_key_values}
    return found


@pytest.mark.parametrize("name", ["dynamic", "pair"])
@pytest.mark.parametrize("image", [True, False])
def test_later_turns_equal_eager_programs(name: str, image: bool, engine: Callable, fast: Any) -> None:
    """In the folder with buckets, the last turn's pads would reach beyond the caches."""
    ids, images = (prompt(5, 8), pixels(seed=3)) if image else (torch.tensor([text(13)]), None)
    turns = [text(6, 1), text(11, 2), text(6, 3), text(3, 4)]
    used = 13 + sum(map(len, turns)) + 5 * 4
    assert used <= ROOM < used - 4 - 3 - 1 + 10  # the last token before a turn is written with it
    for found, expected in zip(converse(engine(name), ids, images, turns), converse(fast, ids, images, turns), strict=True):
        assert torch.equal(found[:1].argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(found[:1], expected, atol=1e-3, rtol=0)
        assert torch.equal(found[:1], found[-1:])


@pytest.mark.parametrize("name", ["dynamic", "pair"])
def test_a_conversation_of_text_equals_stock(name: str, engine: Callable) -> None:
    """The stock model reads all of it anew in every turn."""
    turns = [text(7, 1), text(1, 2), text(10, 3)]
    spoken = torch.tensor([text(9)])
    for words, found in zip((None, *turns), converse(engine(name), spoken, None, turns), strict=True):
        if words is not None:
            spoken = torch.cat((spoken, torch.tensor([words])), 1)
        out = models.shared(LAYERS).generate(
            spoken, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
        torch.testing.assert_close(found[:1], torch.stack(out.logits, 1), atol=1e-3, rtol=0)
        spoken = out.sequences


def test_turns_of_unequal_lengths(engine: Callable, fast: Any) -> None:
    first, mask = pad([prompt(4, 5), prompt(9, 12, seed=1)], "left")
    second, later = pad([torch.tensor([text(3, 5)]), torch.tensor([text(12, 6)])], "left")
    found = []
    for model in (engine("pair"), fast):
        cache = model(input_ids=first, attention_mask=mask, pixel_values=pixels(2)).past_key_values
        found.append(model(input_ids=second, attention_mask=later, past_key_values=cache).logits)
        found.append(model(input_ids=second[:, -1:], past_key_values=cache).logits)
    torch.testing.assert_close(found[0], found[2], atol=1e-3, rtol=0)
    torch.testing.assert_close(found[1], found[3], atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["dynamic", "pair"])
def test_caches_are_full_to_the_last_row(name: str, engine: Callable, fast: Any) -> None:
    """All rows can be used, none twice, and the cache stays where it is."""
    model = engine(name)
    batch = max(model.manifest.batch_sizes)
    logits = []
    for one in (model, fast):
        rows = batch if one is model else 1
        cache = PrunedCache(max_length=None if one is model else 64 + 2 * ROOM)
        images = pixels().repeat(rows, 1, 1, 1)
        one(input_ids=prompt(10, TEXT - 10).repeat(rows, 1), pixel_values=images, past_key_values=cache)
        places = [buffer.data_ptr() for buffer in cache.buffers]
        for count in (TEXT, NEW - TEXT - 2):
            one(input_ids=torch.tensor([text(count, count)]).repeat(rows, 1), past_key_values=cache)
        for token in (5, 6):
            last = one(input_ids=torch.full((rows, 1), token), past_key_values=cache).logits
        logits.append(last[:1])
        if one is model:
            assert cache.layer_rows() == [ROOM + BUDGET - shift for shift in SHIFTS]
            assert [buffer.data_ptr() for buffer in cache.buffers] == places
            with pytest.raises(InputError, match="the KV cache is full"):
                one(input_ids=torch.full((rows, 1), 7), past_key_values=cache)
            with pytest.raises(InputError, match="2 text tokens and 1 new ones do not fit into the 0 rows that are left"):
                one(input_ids=torch.full((rows, 2), 7), past_key_values=cache)
    torch.testing.assert_close(*logits, atol=1e-3, rtol=0)


# Refusals


def test_two_images_in_a_prompt(engine: Callable) -> None:
    with pytest.raises(InputError, match=r"images of 2 x 64 tokens, the engine takes 1 x 64 tokens of images: .*optimize"):
        engine("dynamic")(input_ids=torch.cat((prompt(2, 3), prompt(2, 3)), 1), pixel_values=pixels(2))


def test_prompts_with_and_without_an_image(engine: Callable, fast: Any) -> None:
    """Each goes alone through programs for two, and says what it says alone; so do later turns."""
    model, plain = engine("pair"), [text(6)]
    ids, mask = pad([prompt(4, 5), torch.tensor(plain)], "left")
    found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels())
    later = torch.tensor([text(5), text(5, 7)])
    after = model(input_ids=later, past_key_values=found.past_key_values)
    for row, alone in enumerate(({"input_ids": prompt(4, 5), "pixel_values": pixels()}, {"input_ids": torch.tensor(plain)})):
        expected = fast(**alone)
        torch.testing.assert_close(found.logits[row : row + 1], expected.logits, atol=1e-3, rtol=0)
        expected = fast(input_ids=later[row : row + 1], past_key_values=expected.past_key_values)
        torch.testing.assert_close(after.logits[row : row + 1], expected.logits, atol=1e-3, rtol=0)


def test_an_image_in_a_later_turn(engine: Callable) -> None:
    model = engine("dynamic")
    cache = model(input_ids=torch.tensor([text(5)])).past_key_values
    seen, held = cache.get_seq_length(), cache.held
    with pytest.raises(InputError, match=r"a later turn holds an image.*later_images=True, or call optimize"):
        model(input_ids=prompt(2, 3), pixel_values=pixels(), past_key_values=cache)
    assert (cache.get_seq_length(), cache.held) == (seen, held)


def test_a_part_of_a_batch(engine: Callable) -> None:
    engines = engine("pair").engines
    rows = engines.manifest.cache_rows
    for ask in (
        lambda: engines.vision(3),
        lambda: engines.prefill(3, 10, engines.schedule, rows),
        lambda: engines.extend(3, 1, rows),
    ):
        with pytest.raises(InputError, match=r"no (vision|prefill|decode) program for 3 (images|sequences) .*batches of 2"):
            ask()
    for batch in (1, 3):
        with pytest.raises(InputError, match=rf"{batch} sequences \(prompts times beams\), the engine was built for 2"):
            engines.plan(Ask(batch, 4, 0, 1))


def test_room_of_later_turns(engine: Callable) -> None:
    model = engine("dynamic")
    first = model.generate(
        prompt(8, 12), pixel_values=pixels(), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
    )
    # 20 text tokens and 35 of 36 new ones are in: the last one is part of the next turn.
    left, cache = ROOM - 20 - NEW + 1, first.past_key_values
    spoken = torch.cat((first.sequences, torch.tensor([text(2)])), 1)
    with pytest.raises(InputError, match=rf"3 text tokens and 3 new ones do not fit into the {left} rows .*len={TEXT}"):
        model.generate(spoken, past_key_values=cache, max_new_tokens=3, do_sample=False)
    assert model.generate(spoken, past_key_values=cache, max_new_tokens=2, do_sample=False).shape[1] == spoken.shape[1] + 2
    with pytest.raises(InputError, match=f"25 text tokens in a prompt exceed max_text_len={TEXT}"):
        model(input_ids=torch.tensor([text(25)]), past_key_values=cache)


def test_the_cache_of_another_model(engine: Callable, fast: Any) -> None:
    cache = fast(input_ids=prompt(), pixel_values=pixels()).past_key_values
    with pytest.raises(InputError, match="a cache goes back to the model that returned it"):
        engine("dynamic")(input_ids=torch.tensor([text(3)]), past_key_values=cache)


def test_a_method_exports_as_the_function_does(fast: Any, tmp_path: Path) -> None:
    with mock.patch("vitcop_compile.export.export", wraps=export) as called, pytest.raises(InputError, match="stop here"):
        called.side_effect = InputError("stop here")
        fast.export(tmp_path / "f", max_text_len=8)
    called.assert_called_once_with(fast, tmp_path / "f", max_text_len=8)
