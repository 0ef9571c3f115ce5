"""What `generate` can be asked for: lengths, sampling, beams, streamers, criteria and processors."""

from __future__ import annotations

import generation
import reference_llava as reference
import torch
from generation import STEPS, expected, generate, logits_of, rows_of
from models import VOCAB, pad, pixels, prompt
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from vitcop_compile.cache import PrunedCache

plain, dense = generation.plain, generation.dense


def test_more_new_tokens_than_the_smallest_bucket(dense):
    fast, model = dense
    out, tokens = generate(fast, prompt(), pixels(), 70)
    assert torch.equal(tokens, generate(model, prompt(), pixels(), 70)[1])
    assert rows_of(out.past_key_values) == [32 + 64 + 128] * 3


def test_sampling_follows_the_reference_distribution(plain):
    fast, model, settings = plain
    ids, images = prompt(), pixels()
    torch.manual_seed(11)
    _, tokens = generate(fast, ids, images, do_sample=True, temperature=0.7, top_k=0, steps=12)

    def draw(logits: Tensor, step: int) -> int:
        return int(torch.multinomial((logits / 0.7).softmax(-1), 1))

    torch.manual_seed(11)
    told = reference.run(model, ids, images, settings, 12, draw)
    assert tokens[0].tolist() == told.tokens
    assert told.tokens != reference.run(model, ids, images, settings, 12).tokens
    torch.manual_seed(11)
    assert torch.equal(generate(fast, ids, images, do_sample=True, temperature=0.7, top_k=0, steps=12)[1], tokens)
    cold = generate(fast, ids, images, do_sample=True, temperature=1e-4, top_k=0)[1]
    assert torch.equal(cold, generate(fast, ids, images)[1])


def test_num_return_sequences(plain):
    fast, model, settings = plain
    torch.manual_seed(3)
    out, tokens = generate(fast, prompt(), pixels(), do_sample=True, num_return_sequences=3, top_k=0)
    assert tokens.shape == (3, STEPS) and len({tuple(row) for row in tokens.tolist()}) == 3
    for row, logits in zip(tokens, logits_of(out)):
        torch.testing.assert_close(logits, expected(model, prompt(), pixels(), settings, row), atol=1e-4, rtol=0)


def test_dense_beams_equal_stock(dense):
    fast, model = dense
    ids, mask = pad([prompt(), prompt(3, 1, seed=6)], "left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "attention_mask": mask}
    out, tokens = generate(fast, ids, pixels(2), 8, **beams)
    stock, said = generate(model, ids, pixels(2), 8, **beams)
    assert torch.equal(tokens, said) and torch.equal(out.beam_indices, stock.beam_indices)
    torch.testing.assert_close(out.sequences_scores, stock.sequences_scores, atol=1e-4, rtol=0)
    # Beams did change places: the cache had to follow.
    assert any(len(set(row)) > 1 for row in (stock.beam_indices % 3).tolist())


def test_pruned_beams_equal_an_exhaustive_search(plain):
    """No eos: the reference expands every running beam and keeps the three best, step by step."""
    fast, model, settings = plain
    steps, width = 4, 3
    running: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for step in range(steps):
        options = []
        for score, tokens in running:
            chosen = torch.tensor((*tokens, 0))
            logp = expected(model, prompt(), pixels(), settings, chosen)[step].log_softmax(-1)
            options += [(score + float(logp[token]), (*tokens, token)) for token in range(VOCAB)]
        running = sorted(options, reverse=True)[:width]
    beams = {"num_beams": width, "num_return_sequences": width, "output_scores": True}
    out, tokens = generate(fast, prompt(), pixels(), steps, **beams)
    assert [tuple(row) for row in tokens.tolist()] == [tokens for _, tokens in running]
    scores = torch.tensor([score / steps for score, _ in running])
    torch.testing.assert_close(out.sequences_scores, scores, atol=1e-4, rtol=0)


class Collector(BaseStreamer):
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_streamer(plain):
    streamer = Collector()
    _, tokens = generate(plain[0], prompt(), pixels(), streamer=streamer)
    assert streamer.ended and streamer.got == [prompt()[0].tolist(), *([token] for token in tokens[0].tolist())]


def test_stopping_criteria_eos_and_processors(plain):
    fast, model, settings = plain
    free = generate(fast, prompt(), pixels(), 10)[1][0].tolist()
    third = free[2]
    assert third not in free[:2]

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids[:, -1] == third

    assert generate(fast, prompt(), pixels(), 10, stopping_criteria=[Stop()])[1][0].tolist() == free[:3]
    assert generate(fast, prompt(), pixels(), 10, eos_token_id=third)[1][0].tolist() == free[:3]
    late = {"eos_token_id": third, "min_new_tokens": 8}
    processed = {
        "min_new_tokens": (late, lambda logits, step: logits.index_fill(0, torch.tensor([third]), -torch.inf)),
        "bad_words_ids": (
            {"bad_words_ids": [[free[0]], [third]]},
            lambda logits, step: logits.index_fill(0, torch.tensor([free[0], third]), -torch.inf),
        ),
    }
    for name, (settings_, mask) in processed.items():
        told = reference.run(
            model, prompt(), pixels(), settings, 8, lambda logits, step, mask=mask: int(mask(logits, step).argmax())
        )
        assert generate(fast, prompt(), pixels(), 10, **settings_)[1][0, :8].tolist() == told.tokens, name

    class Shift(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.roll(1, -1)

    told = reference.run(model, prompt(), pixels(), settings, STEPS, lambda logits, step: int(logits.roll(1).argmax()))
    assert generate(fast, prompt(), pixels(), logits_processor=[Shift()])[1][0].tolist() == told.tokens


def test_return_dict_in_generate(plain):
    fast, _, _ = plain
    settings = {"pixel_values": pixels(), "max_new_tokens": 3, "do_sample": False}
    out = fast.generate(prompt(), return_dict_in_generate=True, output_scores=True, **settings)
    assert len(out.scores) == 3 and out.logits is None and out.scores[0].shape == (1, VOCAB)
    assert torch.equal(out.sequences, fast.generate(prompt(), **settings))
    assert torch.equal(out.sequences[:, : prompt().shape[1]], prompt())
    assert type(out.past_key_values) is PrunedCache
    # The last token has been chosen, not fed.
    assert out.past_key_values.get_seq_length() == prompt().shape[1] + 2
