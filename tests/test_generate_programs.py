"""The programs behind `generate`: when they are made, what they hold and leave alone, in which types, compiled how often."""

from __future__ import annotations

import gc

import generation
import models
import pytest
import reference_llava as reference
import torch
from generation import CASES, PLAIN, STEPS, explicit, generate, keys, logits_of, rows_of
from models import PATCHES, optimize, pad, pixels, prompt, shared

import vitcop_compile
from vitcop_compile import ViTCoPConfig, backends

plain = generation.plain

# Memory and the model


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
    model, case = shared(3), CASES["least"]
    fast = optimize(model, case.config)
    before, _ = generate(fast, prompt(), pixels())
    weight = model.lm_head.weight
    try:
        with torch.no_grad():
            weight.neg_()
        after, tokens = generate(fast, prompt(), pixels())
        assert tokens[0].tolist() == reference.run(model, prompt(), pixels(), case.settings, STEPS).tokens
    finally:
        with torch.no_grad():
            weight.neg_()  # others share it
    torch.testing.assert_close(after.logits[0], -before.logits[0])


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
    fast(prompt(), pixels())
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, models.exhaustive(torch.float16)])
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
        out = fast(prompt(), images)
        selection = out.past_key_values.selection
        assert selection.kept[0].tolist() == told.kept
        assert len(set(zip(selection.labels[0].tolist(), told.labels))) == 3 == len(set(told.labels))
        assert [stage[0].tolist() for stage in selection.stages] == told.stages
        assert rows_of(out.past_key_values) == [32 + visual + 64 for visual in (48, 3, 3, 1)]
        assert {b.dtype for b in out.past_key_values.buffers} == {dtype} and out.logits.isfinite().all()
        scale = torch.stack(told.logits).std()
        assert (out.logits[0].float() - torch.stack(told.logits)).abs().max() < 0.3 * scale


@pytest.mark.parametrize("dtype", [models.exhaustive(torch.bfloat16), torch.float16])
def test_half_precision_runs_on_any_image(dtype):
    fast = vitcop_compile.optimize(models.llava(6, 2).to(dtype), ViTCoPConfig.preset("1/3"), backend="eager")
    out, tokens = generate(fast, prompt(), pixels().to(dtype))
    selection = out.past_key_values.selection
    assert tokens.shape == (1, STEPS) and logits_of(out).isfinite().all()
    widths = [selection.kept, *selection.stages]
    assert [len(set(t[0].tolist())) for t in widths] == [32, 28, 6] and all((t.diff() > 0).all() for t in widths)
    assert selection.labels.max() == 4 and fast.dtype == dtype
    # The schedule counts the bytes of the weights' type.
    assert 2 * fast.schedule.kv_bytes(64) == optimize(shared(6, 2), fast.pruning_config).schedule.kv_bytes(64)


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


@pytest.mark.covers("inductor", family="llava")
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


@pytest.fixture(scope="module")
def compiled_once():
    """(fast, tokens): compiled for the usual request, which says those."""
    with pytest.MonkeyPatch.context() as patch:
        fast = dynamo_only(patch, CASES["least"].config)
        graphs = compilations()
        tokens = generate(fast, prompt(), pixels())[1]
        assert compilations() == graphs + 3
        yield fast, tokens


@pytest.mark.parametrize("name", ["channels-last", "strided", "gradient", "strided-ids"])
def test_layout_of_inputs_compiles_nothing(compiled_once, name):
    fast, expected = compiled_once
    graphs = compilations()
    ids, images = {
        "channels-last": (prompt(), pixels().to(memory_format=torch.channels_last)),
        "strided": (prompt(), pixels().transpose(2, 3).contiguous().transpose(2, 3)),
        "gradient": (prompt(), pixels().requires_grad_()),
        "strided-ids": (prompt().repeat_interleave(2, 1)[:, ::2], pixels()),
    }[name]
    assert torch.equal(generate(fast, ids, images)[1], expected)
    assert compilations() == graphs


@pytest.mark.slow
def test_programs_do_not_count_as_recompilations(monkeypatch):
    """More programs of one kind than torch recompiles a function."""
    fast = dynamo_only(monkeypatch, CASES["least"].config, prompt_buckets=(2, 4, 6, 8))
    with torch._dynamo.config.patch(recompile_limit=2):
        for count in range(1, 5):
            fast(prompt(count, count), pixels())
    assert len(fast.compiled) == 5
