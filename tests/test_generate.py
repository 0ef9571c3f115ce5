"""Compiled models generate what an eager, by-the-book pruned LLaVA generates or, unpruned, the stock model."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import models
import pytest
import reference_llava as reference
import torch
from models import IMAGE, PATCHES, VOCAB, optimize, pad, pixels, prompt, shared
from reference_llava import Settings
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import vitcop_compile
from vitcop_compile import ViTCoPConfig, backends
from vitcop_compile.cache import PrunedCache

STEPS = 6


@dataclass
class Case:
    """The same pruning, said to the package and to the reference."""

    config: ViTCoPConfig
    settings: Settings
    layers: int = 6
    kv_heads: int = 4
    prompts: list[Tensor] = field(default_factory=lambda: [prompt(), prompt(2, 14, seed=1)])


def explicit(budgets, shallow: int, deep: int, vision=2, positions="published", density_width=8.0, reach=0.6, **model) -> Case:
    """budgets: (vision, shallow, deep, centers)."""
    n, merged, kept, centers = budgets
    config = ViTCoPConfig(
        budgets=(n, merged, kept, centers),
        shallow_layer=shallow,
        deep_layer=deep,
        vision_layer=vision,
        positions=positions,
        density_width=density_width,
        reach=reach,
        scale_layers=False,
    )
    return Case(config, Settings(n, centers, merged, kept, vision, shallow, deep, positions, density_width, reach), **model)


def published(name: str, **model) -> Case:
    return Case(ViTCoPConfig.preset(name), reference.preset(name, PATCHES, 6, shallow=1, deep=4, vision=2), **model)


CASES = {
    "preset-third": published("1/3"),
    "preset-two-ninths": published("2/9", kv_heads=2),
    "preset-ninth": published("1/9"),
    "original": explicit((40, 24, 8, 9), 2, 4, positions="original"),
    "gqa-original-early-scores": explicit((36, 20, 5, 4), 3, 5, vision=0, positions="original", kv_heads=2),
    "gqa-middle-scores": explicit((44, 30, 12, 6), 1, 3, vision=1, kv_heads=2),
    "adjacent-stages": explicit((40, 24, 8, 9), 2, 3, vision=1),
    "more-clusters-than-budget": explicit((33, 6, 3, 14), 2, 5),
    "unassigned-points": explicit((48, 25, 9, 2), 1, 5, density_width=5.0, reach=0.26),
    "whole-image": explicit((64, 40, 39, 8), 1, 2, positions="original", layers=3),
    "least": explicit((8, 1, 1, 1), 1, 2, layers=3),
    "nothing-removed": explicit((20, 20, 20, 5), 1, 2, layers=3),
    "image-at-an-edge": explicit((24, 12, 6, 4), 1, 2, layers=3, prompts=[prompt(0, 9), prompt(7, 0), prompt(0, 0)]),
}


def generate(fast, ids: Tensor, images: Tensor | None = None, steps: int = STEPS, **settings):
    """Greedy by default: the output with logits, and the new tokens [B, steps]."""
    settings = {"do_sample": False, "max_new_tokens": steps} | settings
    settings |= {} if images is None else {"pixel_values": images}
    out = fast.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)
    return out, out.sequences[:, ids.shape[1] :]


def logits_of(out) -> Tensor:
    return torch.stack(out.logits, 1)


def expected(model, ids: Tensor, images: Tensor, settings: Settings, tokens: Tensor) -> Tensor:
    """The reference's logits [steps, V] when it is made to say `tokens`."""
    forced = reference.run(model, ids, images, settings, len(tokens), lambda logits, step: int(tokens[step]))
    return torch.stack(forced.logits)


def keys(fast) -> set[tuple]:
    """What programs there are: kind, batch and, but for vision, rows."""
    return {key[:3] for key in fast.compiled}


def rows_of(cache: PrunedCache) -> list[int]:
    """Rows of every layer's keys."""
    return [buffer.shape[2] for buffer in cache.buffers[::2]]


PLAIN = explicit((30, 18, 7, 5), 1, 2, layers=3)


@pytest.fixture(scope="module")
def plain():
    """(fast, model, settings): the 3-layer model that most tests use."""
    model = shared(3)
    return optimize(model, PLAIN.config), model, PLAIN.settings


@pytest.fixture(scope="module")
def dense():
    model = shared(3)
    return optimize(model, ViTCoPConfig.dense()), model


# Equality with the reference


@pytest.mark.parametrize("name", CASES)
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


def test_positions_matter():
    case, other = CASES["original"], explicit((40, 24, 8, 9), 2, 4)
    images = pixels()
    original, renumbered = (
        torch.stack(reference.run(shared(6), prompt(), images, s, 1).logits) for s in (case.settings, other.settings)
    )
    assert (original - renumbered).abs().max() > 0.05
    fast = optimize(shared(6), other.config)
    torch.testing.assert_close(fast(prompt(), images).logits[0], renumbered, atol=1e-4, rtol=0)


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
    config = CASES["least"].config
    small, large = (optimize(shared(3), config, prompt_buckets=buckets) for buckets in ((16,), (100, 200)))
    short, _ = generate(small, UNEQUAL[1], pixels(4)[1:2])
    long, _ = generate(large, UNEQUAL[1], pixels(4)[1:2])
    assert ("prefill", 1, 16) in keys(small) and ("prefill", 1, 100) in keys(large)
    torch.testing.assert_close(logits_of(short), logits_of(long), atol=1e-5, rtol=0)


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


# Generation settings


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


def test_finished_rows_of_a_batch_are_padded(plain, alone):
    fast, _, _ = plain
    ids, mask = pad(UNEQUAL, "left")
    rows = alone[0].tolist()
    stop = rows[0][1]
    ends = [row.index(stop) + 1 if stop in row else STEPS for row in rows]
    assert ends[0] == 2 and STEPS in ends
    tokens = generate(fast, ids, pixels(4), attention_mask=mask, eos_token_id=stop, pad_token_id=0)[1]
    assert tokens.tolist() == [row[:end] + [0] * (STEPS - end) for row, end in zip(rows, ends)]


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


# Programs, memory and the model


def test_kv_rows(plain):
    fast, _, settings = plain
    cache = fast(prompt(), pixels()).past_key_values
    rows = 32 + settings.n
    delta = [0, settings.n - settings.merged, settings.n - settings.kept]
    assert rows_of(cache) == [rows - removed + 64 for removed in delta]
    assert [tuple(b.shape) for b in cache.buffers] == [(1, 4, row, 16) for row in rows_of(cache) for _ in "kv"]
    assert cache.length.tolist() == [prompt().shape[1] - PATCHES + settings.n]
    left = 32 - (prompt().shape[1] - PATCHES)  # of the bucket of prompts
    assert cache.get_seq_length() == prompt().shape[1] and cache.get_max_cache_shape() == prompt().shape[1] + left + 64


def test_known_bucket_adds_no_program(plain):
    fast, _, _ = plain
    generate(fast, prompt(), pixels())
    before = fast.compiled
    assert {("vision", 1), ("prefill", 1, 32), ("extend", 1, 1)} <= keys(fast)
    for shape in ((0, 1), (16, 16), (31, 0), (4, 28)):
        generate(fast, prompt(*shape), pixels(seed=3), 2)
    generate(fast, prompt(), pixels(), 64)
    assert fast.compiled == before
    generate(fast, prompt(4, 29), pixels(), 2)
    assert {key[:3] for key in set(fast.compiled) - set(before)} == {("prefill", 1, 64), ("extend", 1, 1)}


def test_warmup_makes_every_program_of_a_request():
    fast = optimize(shared(3), CASES["least"].config)
    assert fast.compiled == ()
    fast.warmup(batch_size=1, text_tokens=14, max_new_tokens=STEPS)
    warm = fast.compiled
    generate(fast, prompt(), pixels())
    assert fast.compiled == warm and keys(fast) == {("vision", 1), ("prefill", 1, 32), ("extend", 1, 1)}
    fast.warmup(batch_size=1, text_tokens=14, images=0)
    warm = fast.compiled
    generate(fast, torch.tensor([models.text(14)]))
    assert fast.compiled == warm


@pytest.fixture
def recorder(monkeypatch):
    """A backend "record" that keeps the exported programs and runs them eagerly."""
    seen = []
    record = backends.Backend(lambda program: seen.append(program) or backends.eager(program))
    monkeypatch.setitem(backends.BACKENDS, "record", record)
    return seen


def test_weights_are_shared(recorder):
    model = shared(3)
    fast = optimize(model, CASES["least"].config, backend="record")
    generate(fast, prompt(), pixels(), 2)
    owned = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert len(recorder) == 3
    used = set()
    for program in recorder:
        tensors = [*program.state_dict.values(), *program.constants.values()]
        used |= {t.data_ptr() for t in tensors if t.numel() > 1}
    assert used <= owned
    weights = {n: p for n, p in model.named_parameters() if "post_layernorm" not in n and "layers.3." not in n}
    assert {p.data_ptr() for p in weights.values()} <= used


def test_changed_weights_change_the_programs():
    model = models.llava(3, seed=5)
    case = CASES["least"]
    fast = optimize(model, case.config)
    before, _ = generate(fast, prompt(), pixels())
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    after, tokens = generate(fast, prompt(), pixels())
    torch.testing.assert_close(after.logits[0], -before.logits[0])
    assert tokens[0].tolist() == reference.run(model, prompt(), pixels(), case.settings, STEPS).tokens


def test_model_is_unchanged():
    model = models.llava(3, seed=2)
    model.config._attn_implementation = "eager"
    model.model.language_model.config._attn_implementation = "sdpa"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pointers = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    fast = vitcop_compile.optimize(model, CASES["least"].config, backend="eager")
    generate(fast, prompt(), pixels(), 2)
    assert model.config._attn_implementation == "eager"
    assert model.model.language_model.config._attn_implementation == "sdpa"
    after = model.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == pointers
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(generate(model, prompt(), pixels())[1], generate(models.llava(3, seed=2), prompt(), pixels())[1])


def test_training_mode_is_kept():
    model = models.llava(3).train()
    model.model.vision_tower.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert len(set(modes.values())) == 2
    fast = optimize(model, CASES["least"].config)
    assert {name: module.training for name, module in model.named_modules()} == modes
    generate(fast, prompt(), pixels(), 2)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_model_is_restored_when_tracing_fails(monkeypatch):
    model = models.llava(3).train()
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vitcop_compile.optimize(model, CASES["least"].config, backend="eager")
    assert model.config.text_config._attn_implementation == "sdpa" and all(m.training for m in model.modules())


def test_a_cache_is_freed_with_its_output(plain):
    def caches() -> int:
        gc.collect()
        return sum(type(o).__name__ == "PrunedCache" for o in gc.get_objects())

    before = caches()
    generate(plain[0], prompt(), pixels(), 2)
    assert caches() == before


# Half precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_selects_what_fp32_selects(dtype):
    """Images of four flat quadrants: three are kept, each is a cluster, one survives; all by wide margins."""
    case = explicit((48, 3, 1, 3), 1, 3, layers=4)
    model = shared(4)
    half = models.llava(4).to(dtype)
    fast = vitcop_compile.optimize(half, case.config, backend="eager")
    for seed in (0, 7, 11):
        colors = 20 * torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        images = colors.repeat_interleave(56, 2).repeat_interleave(56, 3)
        told = reference.run(model, prompt(), images, case.settings, 1)
        ranked, norms = told.scores.sort().values, told.saliency[1].sort().values
        assert ranked[16] > 1.5 * ranked[15] and norms[1] > 1.1 * norms[0]
        out, _ = generate(fast, prompt(), images)
        selection = out.past_key_values.selection
        assert selection.kept[0].tolist() == told.kept
        assert len(set(zip(selection.labels[0].tolist(), told.labels))) == 3 == len(set(told.labels))
        assert [stage[0].tolist() for stage in selection.stages] == told.stages
        assert rows_of(out.past_key_values) == [32 + visual + 64 for visual in (48, 3, 3, 1)]
        assert {b.dtype for b in out.past_key_values.buffers} == {dtype} and out.logits[0].isfinite().all()
        scale = torch.stack(told.logits).std()
        assert (logits_of(out)[0, :1].float() - torch.stack(told.logits)).abs().max() < 0.3 * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_on_any_image(dtype):
    fast = vitcop_compile.optimize(models.llava(6, 2).to(dtype), ViTCoPConfig.preset("1/3"), backend="eager")
    out, tokens = generate(fast, prompt(), pixels().to(dtype))
    selection = out.past_key_values.selection
    assert tokens.shape == (1, STEPS) and logits_of(out).isfinite().all()
    widths = [selection.kept, *selection.stages]
    assert [len(set(t[0].tolist())) for t in widths] == [32, 28, 6] and all((t.diff() > 0).all() for t in widths)
    assert selection.labels.max() == 4 and fast.dtype == dtype


def test_schedule_counts_the_bytes_of_the_weights():
    half = optimize(models.llava(3).half(), CASES["least"].config)
    assert 2 * half.schedule.kv_bytes(64) == optimize(shared(3), CASES["least"].config).schedule.kv_bytes(64)


# Compilation


def dynamo_only(monkeypatch, config: ViTCoPConfig, **settings):
    """A model compiled as the inductor backend does, without generating code."""
    compiler = {"fullgraph": True, "dynamic": False, "backend": "eager"}
    dynamo = backends.Backend(lambda program: torch.compile(program.module(check_guards=False), **compiler))
    monkeypatch.setitem(backends.BACKENDS, "dynamo", dynamo)
    return optimize(shared(3), config, backend="dynamo", **settings)


def compilations() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_inductor_compiles_once_and_equals_eager(plain):
    eager, model, _ = plain
    graphs = compilations()
    fast = optimize(model, PLAIN.config, backend="inductor")
    out, tokens = generate(fast, prompt(), pixels())
    plainly, same = generate(eager, prompt(), pixels())
    assert torch.equal(tokens, same)
    torch.testing.assert_close(logits_of(out), logits_of(plainly), atol=1e-4, rtol=0)
    before = fast.compiled
    assert len(before) == 3 and compilations() == graphs + 3
    ids, mask = pad([prompt(3, 3), prompt(3, 17)], "left")
    for request in (
        {"input_ids": prompt(2, 20, seed=5), "pixel_values": pixels(seed=5)},
        {"input_ids": prompt(0, 1).int(), "pixel_values": pixels(seed=6).double()},
        {"input_ids": ids[:1], "attention_mask": mask[:1], "pixel_values": pixels()},
        {"input_ids": prompt(), "pixel_values": pixels(), "max_new_tokens": 20, "do_sample": True},
    ):
        fast.generate(**{"max_new_tokens": 3, "do_sample": False} | request)
    assert fast.compiled == before and compilations() == graphs + 3


@pytest.mark.parametrize("name", ["channels-last", "strided", "gradient", "strided-ids"])
def test_layout_of_inputs_compiles_nothing(monkeypatch, name):
    fast = dynamo_only(monkeypatch, CASES["least"].config)
    graphs = compilations()
    expected = generate(fast, prompt(), pixels())[1]
    assert compilations() == graphs + 3
    ids, images = {
        "channels-last": (prompt(), pixels().to(memory_format=torch.channels_last)),
        "strided": (prompt(), pixels().transpose(2, 3).contiguous().transpose(2, 3)),
        "gradient": (prompt(), pixels().requires_grad_()),
        "strided-ids": (prompt().repeat_interleave(2, 1)[:, ::2], pixels()),
    }[name]
    assert torch.equal(generate(fast, ids, images)[1], expected)
    assert compilations() == graphs + 3


@pytest.mark.slow
def test_programs_do_not_count_as_recompilations(monkeypatch):
    """More programs of one kind than torch recompiles a function."""
    fast = dynamo_only(monkeypatch, CASES["least"].config, prompt_buckets=(2, 4, 6, 8))
    with torch._dynamo.config.patch(recompile_limit=2):
        for count in range(1, 5):
            fast(prompt(count, count), pixels())
    assert len(fast.compiled) == 5
