"""Several images in a prompt, samples that differ in a batch, and conversations: against stock layers pruned by hand."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import torch
from models import IMAGE, PATCHES, exhaustive, slow, turn_ids
from reference_llava import Settings
from reference_turns import Conversation

from vitcop_compile import InputError, ViTCoPConfig

LAYERS, NEAR = 4, 1e-4
CONFIG = ViTCoPConfig(budgets=(30, 18, 7, 5), shallow_layer=1, deep_layer=3, scale_layers=False)
SETTINGS = Settings(30, 5, 18, 7, 2, 1, 3)
IMAGES = (1, 0, 2, 1, 0)  # of each turn


@cache
def optimized(backend: str = "eager", config: ViTCoPConfig = CONFIG):
    """One for all tests, which leave it as it is: its programs serve them all."""
    return models.optimize(models.shared(LAYERS), config, backend=backend)


def assert_caches(cache: Any, sample: int, told: Conversation) -> None:
    """Keys and values of one sample, over the rows that it has."""
    for layer, stock in enumerate(told.cache.layers):
        for ours, theirs in zip(cache.buffers[2 * layer : 2 * layer + 2], (stock.keys, stock.values), strict=True):
            rows = theirs.shape[2]
            torch.testing.assert_close(ours[sample, :, :rows], theirs[0], atol=NEAR, rtol=0)


@pytest.mark.parametrize("positions", ["published", slow("original")])
@pytest.mark.parametrize("scope", ["per_image", "pooled"])
@pytest.mark.parametrize("images", [slow(1), 2, exhaustive(3)])
def test_several_images_in_a_prompt(images: int, scope: str, positions: str) -> None:
    config = ViTCoPConfig(
        budgets=(30, 18, 7, 5), shallow_layer=1, deep_layer=3, scale_layers=False, scope=scope, positions=positions
    )
    fast = optimized(config=config)
    for seed in (1, 2):
        ids, pixels = turn_ids(images, seed), models.pixels(images, seed)
        settings = Settings(30, 5, 18, 7, 2, 1, 3, positions)
        told = Conversation(models.shared(LAYERS), settings, pooled=scope == "pooled")
        out = fast.generate(
            torch.tensor([ids]), pixel_values=pixels, max_new_tokens=3, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        said = out.sequences[0, len(ids) :].tolist()
        torch.testing.assert_close(torch.cat(out.logits), told.turn(ids, pixels, said), atol=NEAR, rtol=0)
        selection = out["past_key_values"].selection
        through = [[PATCHES * i + patch for i, kept in enumerate(of) for patch in kept] for of in (told.kept, *told.stages)]
        assert selection.kept[0].tolist() == through[0]
        assert [stage[0].tolist() for stage in selection.stages] == through[1:]
        assert_caches(out["past_key_values"], 0, told)


@pytest.mark.covers("several", family="llava")
@pytest.mark.parametrize("images", [0, 2, exhaustive(3)])
def test_dense_with_several_images_is_the_stock_model(images: int) -> None:
    stock, fast = models.shared(LAYERS), optimized(config=ViTCoPConfig.dense())
    ids, pixels = torch.tensor([turn_ids(images, images)]), models.pixels(max(images, 1), images)
    given: dict[str, Any] = {"pixel_values": pixels} if images else {}
    given |= {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    ours, theirs = (model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given) for model in (fast, stock))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), atol=NEAR, rtol=0)


BATCHES = {
    "all kinds": (2, 0, 1),
    "apart": (1, 0, 1, 0, 2),
    "text first": (0, 0, 3),
    "alike": (2, 2),
}


@pytest.mark.covers("batch", family="llava")
@pytest.mark.parametrize("side", ["left", slow("right")])
@pytest.mark.parametrize("name", ["all kinds", "apart", slow("text first"), "alike"])
def test_samples_of_a_batch_are_what_they_are_alone(name: str, side: str) -> None:
    fast, counts = optimized(), BATCHES[name]
    prompts = [torch.tensor([turn_ids(count, seed)]) for seed, count in enumerate(counts)]
    images = [models.pixels(count, seed) for seed, count in enumerate(counts) if count]
    ids, mask = models.pad(prompts, side)
    common: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = fast.generate(ids, attention_mask=mask, pixel_values=torch.cat(images), **common)
    kept = out["past_key_values"].selection.kept
    for sample, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        given = {"pixel_values": models.pixels(count, sample)} if count else {}
        alone = fast.generate(prompt, **given, **common)
        torch.testing.assert_close(torch.stack(out.logits)[:, sample], torch.stack(alone.logits)[:, 0], atol=NEAR, rtol=0)
        assert out.sequences[sample, ids.shape[1] :].tolist() == alone.sequences[0, prompt.shape[1] :].tolist()
        own = kept[sample][kept[sample] >= 0].tolist()
        assert own == (alone["past_key_values"].selection.kept[0].tolist() if count else [])


def test_a_mixed_batch_decodes_with_one_program() -> None:
    fast = models.optimize(models.shared(LAYERS), CONFIG)
    prompts = [torch.tensor([turn_ids(count, count)]) for count in (1, 0, 2)]
    ids, mask = models.pad(prompts, "left")
    pixels = torch.cat([models.pixels(1, 1), models.pixels(2, 2)])
    fast.generate(ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=3, do_sample=False)
    kinds = [key[:4] if key[0] == "prefill" else key[:3] for key in fast.compiled]
    one, two = ((30,), (18,), (7,)), ((30, 30), (18, 18), (7, 7))
    assert sorted(kinds) == [
        ("extend", 1, 32), ("extend", 3, 1), ("prefill", 1, 32, one), ("prefill", 1, 32, two), ("vision", 3)
    ]  # fmt: skip


@pytest.mark.covers("beams", family="llava")
def test_beams_take_all_images_of_their_prompt() -> None:
    stock, fast = models.shared(LAYERS), optimized(config=ViTCoPConfig.dense())
    prompts = [torch.tensor([turn_ids(2, 4)]), torch.tensor([turn_ids(2, 5)])]
    ids, mask = models.pad(prompts, "left")
    given: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pixel_values": models.pixels(4)}
    expected = torch.cat(
        [
            stock.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), **given | {"pixel_values": models.pixels(4)[at]}
            )[:, -5:]
            for prompt, at in zip(prompts, (slice(0, 2), slice(2, 4)), strict=True)
        ]
    )
    assert fast.generate(ids, attention_mask=mask, **given)[:, -5:].tolist() == expected.tolist()


# Conversations


def talk(fast: Any, batch: int, resend: bool = True) -> None:
    """Five turns with images in the first, third and fourth, each sample against its own conversation by hand."""
    told = [Conversation(models.shared(LAYERS), SETTINGS) for _ in range(batch)]
    whole, mask = torch.empty(batch, 0, dtype=torch.int64), torch.empty(batch, 0, dtype=torch.int64)
    seen: list[list[torch.Tensor]] = [[] for _ in range(batch)]
    cache, unfed = None, [[] for _ in range(batch)]
    for turn, images in enumerate(IMAGES):
        prompts = [turn_ids(images, 7 * turn + sample) for sample in range(batch)]
        ids, real = models.pad([torch.tensor([prompt]) for prompt in prompts], "left")
        new = [models.pixels(images, 10 * turn + sample) if images else None for sample in range(batch)]
        for sample, pixels in enumerate(new):
            seen[sample] += [] if pixels is None else [pixels]
        whole, mask = torch.cat((whole, ids), 1), torch.cat((mask, real), 1)
        sent = [part for of in seen for part in of] if resend else [part for part in new if part is not None]
        given: dict[str, Any] = {"pixel_values": torch.cat(sent)} if sent and (resend or images) else {}
        given |= {} if cache is None else {"past_key_values": cache}
        out = fast.generate(
            whole, attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True,
            **given,
        )  # fmt: skip
        cache = out["past_key_values"]
        said = out.sequences[:, whole.shape[1] :]
        for sample in range(batch):
            fed = [*unfed[sample], *prompts[sample]]
            logits = told[sample].turn(fed, new[sample], said[sample].tolist())
            torch.testing.assert_close(torch.stack(out.logits)[:, sample], logits, atol=NEAR, rtol=0)
            assert_caches(cache, sample, told[sample])
            unfed[sample] = said[sample, -1:].tolist()
        whole, mask = out.sequences, torch.cat((mask, torch.ones_like(said)), 1)
        assert cache.get_seq_length() == whole.shape[1] - 1
    assert cache.images == (sum(IMAGES),) * batch


@pytest.mark.covers("turns", family="llava")
@pytest.mark.parametrize(("resend", "batch"), [(True, 3), (False, 3), exhaustive(True, 1), exhaustive(False, 1)])
def test_five_turns(batch: int, resend: bool) -> None:
    talk(optimized(), batch, resend)


@pytest.mark.covers("backend", family="llava")
@pytest.mark.parametrize(("backend", "batch"), [slow("onnxruntime", 3)])
def test_five_turns_compiled(backend: str, batch: int) -> None:
    talk(optimized(backend), batch)


def test_turns_in_which_samples_differ() -> None:
    """The second turn brings an image to one sample, two to another, and text alone to a third."""
    fast, told = optimized(), [Conversation(models.shared(LAYERS), SETTINGS) for _ in range(3)]
    cache, unfed = None, [[], [], []]
    whole, mask = torch.empty(3, 0, dtype=torch.int64), torch.empty(3, 0, dtype=torch.int64)
    for turn, counts in enumerate([(0, 1, 1), (1, 0, 2), (0, 0, 0)]):
        prompts = [turn_ids(count, 3 * turn + sample) for sample, count in enumerate(counts)]
        ids, real = models.pad([torch.tensor([prompt]) for prompt in prompts], "left")
        new = [models.pixels(count, 5 * turn + sample) if count else None for sample, count in enumerate(counts)]
        whole, mask = torch.cat((whole, ids), 1), torch.cat((mask, real), 1)
        sent = [part for part in new if part is not None]
        given: dict[str, Any] = {"pixel_values": torch.cat(sent)} if sent else {}
        given |= {} if cache is None else {"past_key_values": cache}
        out = fast.generate(
            whole, attention_mask=mask, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True,
            **given,
        )  # fmt: skip
        cache, said = out["past_key_values"], out.sequences[:, whole.shape[1] :]
        for sample in range(3):
            logits = told[sample].turn([*unfed[sample], *prompts[sample]], new[sample], said[sample].tolist())
            torch.testing.assert_close(torch.stack(out.logits)[:, sample], logits, atol=NEAR, rtol=0)
            assert_caches(cache, sample, told[sample])
            unfed[sample] = said[sample, -1:].tolist()
        whole, mask = out.sequences, torch.cat((mask, torch.ones_like(said)), 1)


def test_forward_takes_a_turn() -> None:
    fast, told = optimized(), Conversation(models.shared(LAYERS), SETTINGS)
    first, second = turn_ids(1, 0), turn_ids(0, 1)
    out = fast(input_ids=torch.tensor([first]), pixel_values=models.pixels())
    torch.testing.assert_close(out.logits[0], told.turn(first, models.pixels(), [0]), atol=NEAR, rtol=0)
    out = fast(input_ids=torch.tensor([second]), past_key_values=out["past_key_values"])
    torch.testing.assert_close(out.logits[0], told.turn(second, None, [0]), atol=NEAR, rtol=0)


def test_a_conversation_outgrows_its_cache() -> None:
    """Turns beyond the first cache's room move it into larger ones, and give the old ones back."""
    fast, told = models.optimize(models.shared(LAYERS), CONFIG), Conversation(models.shared(LAYERS), SETTINGS)
    cache, sizes = None, []
    for turn in range(6):
        ids = turn_ids(int(turn == 2), turn) + models.text(30, turn)
        pixels = models.pixels(seed=turn) if turn == 2 else None
        out = fast(input_ids=torch.tensor([ids]), pixel_values=pixels, past_key_values=cache)
        cache = out["past_key_values"]
        torch.testing.assert_close(out.logits[0], told.turn(ids, pixels, [0]), atol=NEAR, rtol=0)
        assert_caches(cache, 0, told)
        sizes.append(cache.rows)
    assert sizes == sorted(sizes) and 2 <= len(set(sizes)) <= 3
    assert len(fast._pool._free) == len(set(sizes)) - 1
    cache.release()
    assert not cache.filled and len(fast._pool._free) == len(set(sizes))


def test_a_turn_that_fails_can_be_tried_again(monkeypatch) -> None:
    fast, told = models.optimize(models.shared(LAYERS), CONFIG), Conversation(models.shared(LAYERS), SETTINGS)
    first, second = turn_ids(1, 0), turn_ids(1, 1)
    out = fast(input_ids=torch.tensor([first]), pixel_values=models.pixels())
    told.turn(first, models.pixels(), [0])
    cache = out["past_key_values"]
    given = {"input_ids": torch.tensor([second]), "pixel_values": models.pixels(seed=1), "past_key_values": cache}
    with monkeypatch.context() as patch:
        patch.setattr(fast.on_demand, "prefill", lambda *_: lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fast(**given)
    torch.testing.assert_close(fast(**given).logits[0], told.turn(second, models.pixels(seed=1), [0]), atol=NEAR, rtol=0)
    assert_caches(cache, 0, told)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_ids": torch.tensor([[5, 6]] * 2)}, "2 samples for a cache of 1"),
        ({"input_ids": torch.tensor([[5, IMAGE, 6]])}, "holds 1 image tokens, one image needs 64"),
        ({"input_ids": torch.tensor([[5, *[IMAGE] * PATCHES]])}, "placeholders of 1 images but there are no pixel_values"),
        ({"pixel_values": models.pixels()}, "holds no image token"),
        ({"input_ids": torch.tensor([[5, models.VOCAB]])}, "outside the vocabulary"),
    ],
)
def test_a_turn_that_does_not_fit_is_refused(change: dict, words: str) -> None:
    fast = optimized()
    ids = turn_ids(1, 0)
    cache = fast(input_ids=torch.tensor([ids]), pixel_values=models.pixels())["past_key_values"]
    with pytest.raises(InputError, match=words):
        fast(**{"input_ids": torch.tensor([[5, 6]])} | change, past_key_values=cache)
    assert cache.get_seq_length() == len(ids)


def test_generate_refuses_what_cannot_follow() -> None:
    fast = optimized()
    ids = torch.tensor([turn_ids(1, 0)])
    out = fast.generate(ids, pixel_values=models.pixels(), max_new_tokens=2, return_dict_in_generate=True)
    cache = out["past_key_values"]
    with pytest.raises(InputError, match=r"beams need a cache of their own"):
        fast.generate(torch.cat((out.sequences, ids[:, :2]), 1), past_key_values=cache, max_new_tokens=2, num_beams=2)
    with pytest.raises(InputError, match="pass the whole conversation with something new at its end"):
        fast.generate(ids, past_key_values=cache, max_new_tokens=2)
    more = torch.cat((out.sequences, ids[:, :2]), 1)
    with pytest.raises(InputError, match="holds no image token"):  # one is old, the other belongs to nothing
        fast.generate(more, pixel_values=models.pixels(2), past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == ids.shape[1] + 1
    from transformers import DynamicCache

    with pytest.raises(InputError, match="past_key_values is a DynamicCache"):
        fast.generate(ids, past_key_values=DynamicCache(), max_new_tokens=2)
