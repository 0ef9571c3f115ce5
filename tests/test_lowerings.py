"""What attention is lowered to: every entry rewrites and exports every program; flash-attn by a stand-in of the package."""

from __future__ import annotations

import sys
import types

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import captured, shared
from torch import Tensor

from vitcop_compile import UnsupportedError, ViTCoPConfig, attention, backends
from vitcop_compile.families import family_of
from vitcop_compile.ops.clustering import _squared_by_differences
from vitcop_compile.programs import Programs

LAYERS, KV_HEADS = 6, 2
ENCODER = 3  # layers up to the one that features are read from


def programs(name: str) -> Programs:
    model = shared(LAYERS, KV_HEADS)
    family = family_of(model)
    return Programs(family, captured(model), ViTCoPConfig.preset("1/3").schedule(family.shape), name)


def calls(program, target) -> int:
    return sum(node.target is target for node in program.graph.nodes)


def probability(query: Tensor, key: Tensor, value: Tensor, scale: float, allowed: Tensor) -> Tensor:
    """Attention by the book: [B, heads, s, hd], with allowed bool [s, rows] or [B, 1, s, rows]."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    scores = (query.double() @ key.double().transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ value.double()).to(query.dtype)


@pytest.fixture
def flash_attn(monkeypatch):
    """The package's two functions on [B, rows, heads, hd], in plain torch."""
    stub = types.ModuleType("flash_attn")

    def flash_attn_func(q, k, v, softmax_scale, causal):
        rows = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return probability(q, k, v, softmax_scale, rows.tril() if causal else rows).transpose(1, 2).contiguous()

    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, softmax_scale):
        assert cache_seqlens.dtype == torch.int32
        rows = torch.arange(k_cache.shape[1]) < cache_seqlens[:, None, None, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        return probability(q, k, v, softmax_scale, rows).transpose(1, 2).contiguous()

    stub.flash_attn_func, stub.flash_attn_with_kvcache = flash_attn_func, flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", stub)


@pytest.mark.parametrize("name", attention.LOWERINGS)
def test_every_lowering_exports_every_program(name: str) -> None:
    made = programs(name)
    vision, prefill = made.export_vision(2), made.export_prefill(2, 60)
    text = Programs(made.family, made.captured, ViTCoPConfig.dense().schedule(made.family.shape), name)
    decode = made.export_decode(2, 90)
    if name == "flash_attention_2":
        flash = torch.ops.vitcop
        assert calls(vision, flash.flash_prefill.default) == ENCODER
        assert calls(prefill, flash.flash_prefill.default) == LAYERS
        assert calls(text.export_prefill(2, 30, False), flash.flash_prefill.default) == LAYERS
        assert calls(decode, flash.flash_decode.default) == LAYERS
    for program in (vision, prefill, decode):
        assert calls(program, attention.ANCHOR) == 0


def test_flash_attn_computes_what_sdpa_does(flash_attn) -> None:
    ours, flashed = programs("sdpa"), programs("flash_attention_2")
    pixels = models.pixels(2)
    features, kept, labels = ours.export_vision(2).module()(pixels)
    found = flashed.export_vision(2).module()(pixels)
    torch.testing.assert_close(found[0], features, atol=1e-4, rtol=0)
    assert torch.equal(found[1], kept) and torch.equal(found[2], labels)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, models.IMAGE, (2, 60), generator=generator)
    visual = torch.arange(4, 4 + kept.shape[1]).repeat(2, 1)
    given_ = (ids, torch.tensor([59, 50]), features, visual, labels)
    expected, found = (made.export_prefill(2, 60).module()(*given_) for made in (ours, flashed))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    caches = [torch.randn(shape, generator=generator) for shape in ours.schedule.cache_shapes(2, 90) for _ in "kv"]
    token, length = ids[:, :1].contiguous(), torch.tensor([70, 61])
    steps = []
    for made in (ours, flashed):
        held = [cache.clone() for cache in caches]
        (logits,) = made.export_decode(2, 90).module()(token, length, made.offsets(), *held)
        steps.append((logits, *held))
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_flash_attn_lays_out_what_it_says(flash_attn) -> None:
    """A program is compiled for the strides of the fake result."""
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    slot = torch.tensor([4, 2])
    for operator, given_ in (
        (torch.ops.vitcop.flash_prefill.default, (query, key, key, 0.3, True)),
        (torch.ops.vitcop.flash_decode.default, (query[:, :, :1], key, key, 0.3, slot)),
    ):
        torch.library.opcheck(operator, given_, test_utils=("test_schema", "test_faketensor"))
        assert operator(*given_).transpose(1, 2).is_contiguous()


@given(st.integers(1, 3), st.sampled_from([(4, 4), (4, 2), (6, 1), (2, 2)]), st.integers(1, 9), st.integers(0, 2**16))
def test_one_query_attends_to_its_rows(batch: int, heads: tuple[int, int], rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], 1, 8, generator=generator)
    key, value = torch.randn(2, batch, heads[1], rows, 8, generator=generator)
    slot = torch.randint(0, rows, (batch,), generator=generator)
    allowed = torch.arange(rows) <= slot[:, None, None, None]
    expected = probability(query, key, value, 0.4, allowed)
    torch.testing.assert_close(attention.sdpa_decode(query, key, value, 0.4, slot), expected, atol=1e-5, rtol=1e-5)


def test_grouped_queries_need_no_math_kernel(monkeypatch) -> None:
    asked = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def recorded(*given_, **options):
        asked.append((given_[0].shape, options))
        return kernel(*given_, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", recorded)
    attention.sdpa_decode(torch.randn(2, 6, 1, 8), *torch.randn(2, 2, 3, 5, 8), 0.4, torch.tensor([4, 2]))
    assert [shape for shape, _ in asked] == [(2, 3, 2, 8)] and "enable_gqa" not in asked[0][1]


# What belongs to a backend


def test_exactness_belongs_to_the_backend() -> None:
    assert {name for name, backend in backends.BACKENDS.items() if not backend.exact} == {"tensorrt"}
    model = models.optimize(shared(LAYERS), ViTCoPConfig.preset("1/3"))
    monkey = backends.Backend(lambda program: program, exact=False)
    for backend, doubles in ((backends.BACKENDS["eager"], True), (monkey, False)):
        made, model.on_demand.backend = [], backend
        model.on_demand.backend = backends.Backend(
            lambda program, made=made: (made.append(program), program.module())[1], exact=backend.exact
        )
        model.on_demand.compiled.clear()
        model.on_demand.vision(1)
        types_ = {node.meta["val"].dtype for node in made[0].graph.nodes if isinstance(node.meta.get("val"), Tensor)}
        assert (torch.float64 in types_) == doubles


@given(st.integers(1, 2), st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**16))
def test_squared_distances_by_differences(batch: int, n: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-9, 9, (batch, n, width), generator=generator) / 8 + 50
    rows[:, -1] = rows[:, 0]
    wide = rows.double()
    expected = ((wide[:, :, None] - wide[:, None]) ** 2).sum(-1)
    found = _squared_by_differences(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(found == 0, expected == 0)  # equal rows are equal, whatever their size


def test_options_that_inductor_does_not_know_are_refused(monkeypatch) -> None:
    options = backends._cuda_options(decode=False)
    assert options["triton.cudagraphs"] and options["triton.cudagraph_or_error"]
    assert options.keys() & set(backends._EXACT_DIVISION) and set(options) <= set(torch._inductor.list_options())
    tuned = backends._cuda_options(decode=True)
    assert tuned.pop("coordinate_descent_tuning") and tuned == options
    monkeypatch.setattr(torch._inductor, "list_options", lambda: ["triton.cudagraphs", "triton.cudagraph_or_error"])
    with pytest.raises(UnsupportedError, match=r"no option .*division_rounding.*use torch 2\.11 to 2\.13, or backend='eager'"):
        backends._cuda_options(decode=False)
