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
from vitcop_compile.passes.attach_cache import attend_apart, cache_rows, fill_rows, write_rows

from vitcop_compile import UnsupportedError, ViTCoPConfig, attention, backends
from vitcop_compile.families import family_of
from vitcop_compile.ops.clustering import _squared_by_differences
from vitcop_compile.programs import Programs

LAYERS, KV_HEADS = 3, 2
ENCODER = 3  # layers up to the one that features are read from


def programs(name: str) -> Programs:
    model = shared(LAYERS, KV_HEADS)
    family = family_of(model)
    return Programs(family, captured(model), ViTCoPConfig.preset("1/3"), name)


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

    def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, softmax_scale, causal):
        assert cache_seqlens.dtype == torch.int32 and causal
        # As the package has it: the last query sees all rows, each before it one fewer.
        ends = cache_seqlens[:, None] - torch.arange(q.shape[1]).flip(0)
        rows = torch.arange(k_cache.shape[1]) < ends[:, None, :, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
        return probability(q, k, v, softmax_scale, rows).transpose(1, 2).contiguous()

    stub.flash_attn_func, stub.flash_attn_with_kvcache = flash_attn_func, flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", stub)


def rows_of(made: Programs, text: int, room: int = 0) -> tuple[int, ...]:
    """Rows of each group's caches for one image and so much text."""
    return tuple(text + tokens + room for tokens in made.schedule.group_tokens())


@pytest.mark.parametrize("name", attention.LOWERINGS)
def test_every_lowering_exports_every_program(name: str) -> None:
    made = programs(name)
    rows = rows_of(made, 28, 30)
    vision, prefill, filled = (
        made.export_vision(2),
        made.export_prefill(2, 28),
        made.export_prefill(2, 9, 1, rows, filled=True),
    )
    decode, text = made.export_extend(2, 1, rows), made.export_extend(2, 20, rows)
    if name == "flash_attention_2":
        flash = torch.ops.vitcop
        assert calls(vision, flash.flash_prefill.default) == ENCODER
        assert calls(prefill, flash.flash_prefill.default) == LAYERS
        for program in (filled, decode, text):
            assert calls(program, flash.flash_cached.default) == LAYERS
    for program in (vision, prefill, filled, decode, text):
        assert calls(program, attention.ANCHOR) == 0
        assert backends._single_rows(program) == (program is decode)  # whose kernels are worth a search on a GPU


@pytest.mark.slow
def test_flash_attn_computes_what_sdpa_does(flash_attn) -> None:
    ours, flashed = programs("sdpa"), programs("flash_attention_2")
    pixels = models.pixels(2)
    features, kept, labels = ours.export_vision(2).module()(pixels)
    found = flashed.export_vision(2).module()(pixels)
    torch.testing.assert_close(found[0], features, atol=1e-4, rtol=0)
    assert torch.equal(found[1], kept) and torch.equal(found[2], labels)
    generator = torch.Generator().manual_seed(0)
    tokens = 28 + kept.shape[1]
    ids = torch.randint(3, models.IMAGE, (2, tokens), generator=generator)
    visual = torch.arange(4, 4 + kept.shape[1]).repeat(2, 1)
    positions, rows = torch.arange(tokens).repeat(1, 2, 1), rows_of(ours, 28, 12)
    given_ = (ids, torch.tensor([tokens - 1, tokens - 9]), positions, features, visual, labels)
    caches = [torch.randn(shape, generator=generator) for shape in ours.schedule.cache_shapes(2, rows) for _ in "kv"]
    lengths = torch.tensor([tokens, tokens - 8])
    removed = torch.tensor([[rows[0] - count] * 2 for count in rows])
    steps = []
    for made in (ours, flashed):
        held = [cache.clone() for cache in caches]
        outputs = [*made.export_prefill(2, 28, 1, rows).module()(*given_, *held)]
        for count in (5, 1):
            last = torch.full((2,), count - 1)
            more = made.export_extend(2, count, rows).module()
            outputs += more(ids[:, :count].contiguous(), last, lengths, lengths, removed, *held)
        steps.append((*outputs, *held))
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_flash_attn_lays_out_what_it_says(flash_attn) -> None:
    """A program is compiled for the strides of the fake result."""
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    for operator, given_ in (
        (torch.ops.vitcop.flash_prefill.default, (query, key, key, 0.3, True)),
        (torch.ops.vitcop.flash_cached.default, (query[:, :, :1], key, key, 0.3, torch.tensor([[4], [2]]))),
        (torch.ops.vitcop.flash_cached.default, (query[:, :, :2], key, key, 0.3, torch.tensor([[3, 4], [1, 2]]))),
    ):
        torch.library.opcheck(operator, given_, test_utils=("test_schema", "test_faketensor"))
        assert operator(*given_).transpose(1, 2).is_contiguous()


HEADS = st.sampled_from([(4, 4), (4, 2), (6, 1), (2, 2)])


@given(st.integers(1, 3), HEADS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**16))
def test_queries_attend_to_rows_up_to_their_own(batch: int, heads: tuple, rows: int, count: int, seed: int) -> None:
    """Whatever the rows behind a query's own hold, as long as it is finite."""
    count = min(count, rows)
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], count, 8, generator=generator)
    key, value = torch.randn(2, batch, heads[1], rows, 8, generator=generator)
    at = torch.randint(0, rows - count + 1, (batch, 1), generator=generator) + torch.arange(count)
    allowed = torch.arange(rows) <= at[:, None, :, None]
    for tensor in (key, value):
        tensor.masked_fill_((torch.arange(rows) > at[:, -1:])[:, None, :, None], 1e4)
    expected = probability(query, key, value, 0.4, allowed)
    torch.testing.assert_close(attention.sdpa_cached(query, key, value, 0.4, at), expected, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 3), HEADS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**16))
def test_attention_over_caches_and_rows_apart_from_them(batch: int, heads: tuple, rows: int, count: int, seed: int) -> None:
    """As if the new rows stood in the caches, whose own rows from there on are not looked at; caches may be full or empty."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], count, 8, generator=generator)
    key, value = torch.randn(2, batch, heads[1], rows + count, 8, generator=generator)
    start = torch.randint(0, rows + 1, (batch, 1), generator=generator)
    at = start + torch.arange(count)
    here = at[:, None, :, None].expand(batch, heads[1], count, 8)
    new_key, new_value = key.gather(2, here), value.gather(2, here)
    caches = [tensor[:, :, :rows].clone() for tensor in (key, value)]
    for cache in caches:
        cache.masked_fill_((torch.arange(rows) >= start)[:, None, :, None], 1e4)
    before = [cache.clone() for cache in caches]
    found = attend_apart(query, *caches, new_key, new_value, 0.4, at)
    expected = probability(query, key, value, 0.4, torch.arange(rows + count) <= at[:, None, :, None])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(caches, before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_apart_share_a_softmax_in_fp32(dtype: torch.dtype) -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 8).to(dtype)
    found = attend_apart(query, key, value, key, value, 0.4, torch.tensor([[2, 3, 4, 5]]))
    keys, values = (torch.cat((t[:, :, :2], t), 2) for t in (key, value))
    allowed = torch.arange(6) <= torch.arange(2, 6)[:, None]
    expected = probability(query, keys, values, 0.4, allowed)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected.double(), atol=3 * torch.finfo(dtype).eps, rtol=0.02)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.data())
def test_write_rows_and_fill_rows(batch: int, heads: int, rows: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, rows))
    start = data.draw(st.lists(st.integers(0, rows - count), min_size=batch, max_size=batch))
    new, old = torch.randn(batch, heads, count, 2), torch.randn(batch, heads, rows, 2)
    cache = old.clone()
    assert write_rows(cache, new, torch.tensor(start)[:, None] + torch.arange(count)) is cache
    for sample, first in enumerate(start):
        assert torch.equal(cache[sample, :, first : first + count], new[sample])
        rest = [row for row in range(rows) if not first <= row < first + count]
        assert torch.equal(cache[sample][:, rest], old[sample][:, rest])
    # What an earlier request left is gone, even where it was not finite.
    cache[0] = torch.nan
    assert fill_rows(cache, new) is None
    assert torch.equal(cache[:, :, :count], new) and not cache[:, :, count:].any()


def test_rows_of_a_group() -> None:
    length, removed = torch.tensor([9, 7]), torch.tensor([[0, 0], [2, 0], [5, 3]])
    key = torch.zeros(2, 1, 3, 4)
    assert cache_rows(length, removed, 0, key).tolist() == [[9, 10, 11], [7, 8, 9]]
    assert cache_rows(length, removed, 2, key).tolist() == [[4, 5, 6], [4, 5, 6]]


def test_grouped_queries_need_no_math_kernel(monkeypatch) -> None:
    asked = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def recorded(*given_, **options):
        asked.append((given_[0].shape, options))
        return kernel(*given_, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", recorded)
    caches = torch.randn(2, 2, 3, 5, 8)
    attention.sdpa_cached(torch.randn(2, 6, 1, 8), *caches, 0.4, torch.tensor([[4], [2]]))
    attention.sdpa_cached(torch.randn(2, 6, 3, 8), *caches, 0.4, torch.tensor([[2, 3, 4], [0, 1, 2]]))
    assert [shape for shape, _ in asked] == [(2, 3, 2, 8), (2, 3, 6, 8)]
    assert [tuple(options["attn_mask"].shape) for _, options in asked] == [(2, 1, 1, 5), (2, 1, 6, 5)]
    assert not any("enable_gqa" in options for _, options in asked)


# What belongs to a backend


def test_exactness_belongs_to_the_backend() -> None:
    assert {name for name, backend in backends.BACKENDS.items() if not backend.exact} == {"openvino", "tensorrt"}
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
