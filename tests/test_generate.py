"""Compiled models generate what an eager, by-the-book pruned LLaVA generates or, unpruned, the stock model."""

from __future__ import annotations

import dataclasses

import generation
import models
import pytest
import reference_llava as reference
import torch
from generation import CASES, STEPS, explicit, generate, keys, logits_of, rows_of
from models import IMAGE, VOCAB, optimize, pad, pixels, prompt, shared, slow

from vitcop_compile.cache import PrunedCache

plain, dense = generation.plain, generation.dense
# Between them the others have every regime, position, layer of the scores and kind of heads.
SLOW = ("preset-third", "preset-two-ninths", "original", "gqa-middle-scores", "adjacent-stages")

# Equality with the reference


@pytest.mark.covers("pruned by hand", family="llava")
@pytest.mark.parametrize("name", [slow(name) if name in SLOW else name for name in CASES])
def test_equals_reference(name):
    case = CASES[name]
    model = shared(case.layers, case.kv_heads)
    fast = optimize(model, case.config)
    for seed, ids in enumerate(case.prompts):
        images = pixels(seed=seed)
        told = reference.run(model, ids, images, case.settings, STEPS)
        out, tokens = generate(fast, ids, images)
        assert tokens[0].tolist() == told.tokens
        torch.testing.assert_close(logits_of(out)[0], torch.stack(told.logits), atol=1e-4, rtol=0)
        cache = out.past_key_values
        assert cache.selection.kept[0].tolist() == told.kept
        assert cache.selection.labels[0].tolist() == told.labels
        assert [stage[0].tolist() for stage in cache.selection.stages] == told.stages
        for layer, stock in enumerate(told.cache.layers):
            for buffer, rows in zip(cache.buffers[2 * layer : 2 * layer + 2], (stock.keys, stock.values)):
                torch.testing.assert_close(buffer[:, :, : rows.shape[2]], rows, atol=1e-4, rtol=0)


def test_cases_reach_every_branch():
    """The parametrisation above means something: it holds each regime of the method."""
    found = set()
    for case in CASES.values():
        model = shared(case.layers, case.kv_heads)
        told = reference.run(model, case.prompts[0], pixels(), case.settings, STEPS)
        clusters = len(set(told.labels))
        found |= {"over" if clusters > case.settings.merged else "quota"}
        found |= {"unassigned"} if -1 in told.labels else set()
        found |= {"varied"} if len(set(told.tokens)) > 3 else set()
    assert found == {"over", "quota", "unassigned", "varied"}


def test_positions_matter(plain):
    fast, model, settings = plain
    images = pixels()
    original, renumbered = (
        torch.stack(reference.run(model, prompt(), images, each, 1).logits)
        for each in (dataclasses.replace(settings, positions="original"), settings)
    )
    assert (original - renumbered).abs().max() > 0.05
    torch.testing.assert_close(fast(prompt(), images).logits[0], renumbered, atol=1e-4, rtol=0)


@pytest.mark.covers("image", family="llava")
def test_dense_equals_stock(dense):
    fast, model = dense
    ids, mask = pad([prompt(), prompt(2, 20, seed=1)], "left")
    images = pixels(2)
    out, tokens = generate(fast, ids, images, 12, attention_mask=mask)
    stock, said = generate(model, ids, images, 12, attention_mask=mask)
    assert torch.equal(tokens, said)
    torch.testing.assert_close(logits_of(out), logits_of(stock), atol=1e-4, rtol=0)
    assert out.past_key_values.selection.kept is None


def test_text_only_equals_stock(plain):
    fast, model, _ = plain
    prompts = [torch.tensor([models.text(count, seed=count)]) for count in (4, 11, 31)]
    for ids in prompts:
        out, tokens = generate(fast, ids)
        stock, said = generate(model, ids)
        assert torch.equal(tokens, said)
        torch.testing.assert_close(logits_of(out), logits_of(stock), atol=1e-4, rtol=0)
    ids, mask = pad(prompts, "left")
    assert torch.equal(generate(fast, ids, attention_mask=mask)[1], generate(model, ids, attention_mask=mask)[1])
    assert out.past_key_values.selection.kept is None


def test_long_text_only_equals_stock():
    """A prompt without an image fills its cache to the last row in every layer, deeply as an image would be pruned."""
    model = shared(3)
    fast = optimize(model, explicit((60, 2, 1, 3), 1, 2).config)
    ids = torch.tensor([models.text(32)])
    out, tokens = generate(fast, ids, steps=64)
    stock, said = generate(model, ids, steps=64)
    torch.testing.assert_close(logits_of(out), logits_of(stock), atol=1e-3, rtol=0)
    assert torch.equal(tokens, said)


# Batches and padding

UNEQUAL = [prompt(1, 4, seed=1), prompt(5, 9, seed=2), prompt(12, 0, seed=3), prompt(0, 30, seed=4)]


@pytest.fixture(scope="module")
def alone(plain):
    """Tokens and logits of each of the four prompts by itself, which are those of the reference."""
    fast, model, settings = plain
    found = [generate(fast, ids, pixels(4)[i : i + 1]) for i, ids in enumerate(UNEQUAL)]
    tokens, logits = torch.cat([tokens for _, tokens in found]), torch.cat([logits_of(out) for out, _ in found])
    for i, ids in enumerate(UNEQUAL):
        told = reference.run(model, ids, pixels(4)[i : i + 1], settings, STEPS)
        assert tokens[i].tolist() == told.tokens
        torch.testing.assert_close(logits[i], torch.stack(told.logits), atol=1e-4, rtol=0)
    return tokens, logits


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_prompts_alone(plain, alone, side):
    fast, _, _ = plain
    ids, mask = pad(UNEQUAL, side)
    out, tokens = generate(fast, ids, pixels(4), attention_mask=mask)
    assert torch.equal(tokens, alone[0])
    torch.testing.assert_close(logits_of(out), alone[1], atol=1e-4, rtol=0)


def test_holes_in_the_mask_are_dropped(plain, alone):
    fast, _, _ = plain
    whole = UNEQUAL[0][0].tolist()
    ids = torch.tensor([[IMAGE, whole[0], 9, *whole[1:65], 9, whole[65], 9, *whole[66:], 9]])
    mask = torch.ones_like(ids)
    mask[0, [0, 2, 67, 69, -1]] = 0
    assert ids[mask.bool()].tolist() == whole
    out, tokens = generate(fast, ids, pixels(4)[:1], attention_mask=mask)
    assert torch.equal(tokens, alone[0][:1])
    torch.testing.assert_close(logits_of(out), alone[1][:1], atol=1e-4, rtol=0)


def test_larger_bucket_changes_no_logit(plain, alone):
    fast, model, _ = plain
    large = optimize(model, generation.PLAIN.config, prompt_buckets=(100, 200))
    long, _ = generate(large, UNEQUAL[1], pixels(4)[1:2])
    assert ("prefill", 1, 32) in keys(fast) and keys(large) == {("vision", 1), ("prefill", 1, 100), ("extend", 1, 1)}
    torch.testing.assert_close(logits_of(long), alone[1][1:2], atol=1e-5, rtol=0)


def test_forward_returns_the_last_real_token(plain, alone):
    fast, _, _ = plain
    for side in ("left", "right"):
        ids, mask = pad(UNEQUAL, side)
        out = fast(ids, pixels(4), attention_mask=mask)
        assert out.logits.shape == (4, 1, VOCAB)
        torch.testing.assert_close(out.logits[:, 0], alone[1][:, 0], atol=1e-4, rtol=0)
    again = fast.forward(input_ids=alone[0][:, :1], past_key_values=out.past_key_values)
    assert again.logits.shape == (4, 1, VOCAB)
    torch.testing.assert_close(again.logits[:, 0], alone[1][:, 1], atol=1e-4, rtol=0)
    assert again.past_key_values.get_seq_length() == ids.shape[1] + 1


def test_forward_uses_the_cache_it_is_given(plain):
    fast, _, _ = plain
    cache = PrunedCache(max_length=78 + 100)
    assert fast(prompt(), pixels(), past_key_values=cache).past_key_values is cache
    assert cache.filled and rows_of(cache)[0] == 32 + 30 + 128


def test_finished_rows_of_a_batch_are_padded(plain, alone):
    fast, _, _ = plain
    ids, mask = pad(UNEQUAL, "left")
    rows = alone[0].tolist()
    stop = rows[0][1]
    ends = [row.index(stop) + 1 if stop in row else STEPS for row in rows]
    assert ends[0] == 2 and STEPS in ends
    tokens = generate(fast, ids, pixels(4), attention_mask=mask, eos_token_id=stop, pad_token_id=0)[1]
    assert tokens.tolist() == [row[:end] + [0] * (STEPS - end) for row, end in zip(rows, ends)]
