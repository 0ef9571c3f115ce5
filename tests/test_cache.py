"""Buffers that serve request after request, and checks that wait for the host to wait anyway."""

import gc

import models
import pytest
import torch
from transformers import LlavaForConditionalGeneration

import vitcop_compile
from vitcop_compile import InputError, ViTCoPConfig, turn
from vitcop_compile.bench import Request
from vitcop_compile.bench.overhead import overhead
from vitcop_compile.cache import BufferPool, PrunedCache

CONFIG = ViTCoPConfig.preset("1/3")
SHAPES = [(2, 4, 9, 16), (2, 4, 5, 16)]


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """Many of these tests collect garbage: what other files have left is not walked each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def fast():
    return models.optimize(models.shared(3), CONFIG)


@pytest.fixture
def request_():
    return {"input_ids": models.prompt(), "pixel_values": models.pixels()}


def addresses(cache: PrunedCache) -> list[int]:
    names = ("length", "position", "token", "last", "removed")
    return [tensor.data_ptr() for tensor in (*cache.buffers, *(getattr(cache, name) for name in names))]


def lend(pool: BufferPool, shapes=SHAPES, dtype=torch.float32):
    cache = PrunedCache()
    return cache, pool.lend(cache, shapes, tuple(shape[2] for shape in shapes), torch.empty(0, dtype=dtype))


def test_a_request_takes_over_the_buffers_of_one_that_is_gone(fast, request_):
    out = fast.forward(**request_)
    before = addresses(out.past_key_values)
    del out
    gc.collect()
    again = fast.forward(**request_)
    assert addresses(again.past_key_values) == before
    other = fast.forward(**request_)
    assert not set(addresses(other.past_key_values)) & set(before)


def test_what_a_request_leaves_behind_reaches_no_other(fast, request_):
    def serve() -> list[torch.Tensor]:
        out = fast.forward(**request_)
        logits = [out.logits]
        for token in (7, 8):
            logits.append(fast.forward(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values).logits)
        return logits

    expected = serve()
    gc.collect()
    out = fast.forward(**request_)
    for buffer in out.past_key_values.buffers:
        buffer.fill_(torch.nan)
    spoiled = addresses(out.past_key_values)
    del out, buffer
    gc.collect()
    probe = fast.forward(**request_)
    assert addresses(probe.past_key_values) == spoiled
    del probe
    gc.collect()
    assert all(torch.equal(*pair) for pair in zip(serve(), expected, strict=True))


def test_a_pool_lends_by_shape_and_type():
    pool = BufferPool()
    cache, buffers = lend(pool)
    assert [tuple(layer.shape) for layer in buffers.layers] == [SHAPES[0]] * 2 + [SHAPES[1]] * 2 and buffers.rows == (9, 5)
    assert buffers.length.shape == buffers.position.shape == buffers.last.shape == (2,)
    assert buffers.token.shape == (2, 1) and buffers.removed.shape == (2, 2)
    del cache
    gc.collect()
    assert lend(pool, SHAPES[:1])[1] is not buffers
    assert lend(pool, dtype=torch.bfloat16)[1] is not buffers
    assert lend(pool)[1] is buffers


def test_idle_buffers_are_bounded_and_the_oldest_go_first():
    pool = BufferPool(idle=2)
    held = [lend(pool, [(1, 1, rows, 2)]) for rows in (1, 2, 3)]
    made = {buffers.rows: id(buffers) for _, buffers in held}
    while held:
        held.pop(0)
        gc.collect()
    assert len(pool._free) == 2
    again = {rows: lend(pool, [(1, 1, rows, 2)])[1] for rows in (3, 2)}
    assert {rows: id(buffers) for rows, buffers in again.items()} == {2: made[(2,)], 3: made[(3,)]}


def test_buffers_made_in_inference_mode_serve_outside_of_it(request_):
    fast = models.optimize(models.shared(3), CONFIG)
    with torch.inference_mode():
        out = fast.forward(**request_)
        before = addresses(out.past_key_values)
    del out
    gc.collect()
    again = fast.forward(**request_)
    assert addresses(again.past_key_values) == before
    assert fast.forward(input_ids=torch.tensor([[7]]), past_key_values=again.past_key_values).logits.isfinite().all()


# Postponed checks


@pytest.fixture
def postponing(fast, monkeypatch):
    """As on a GPU, where values are not read back before the first token."""
    monkeypatch.setattr(fast, "_postpone", True)
    return fast


def test_pixels_that_are_not_finite_are_refused_when_the_host_waits(postponing, request_):
    ids, pixels = request_["input_ids"], request_["pixel_values"].index_fill(3, torch.tensor([3]), torch.nan)
    out = postponing.forward(input_ids=ids, pixel_values=pixels)
    assert out.logits.shape[1] == 1
    with pytest.raises(InputError, match="NaN or infinite"):
        postponing.forward(input_ids=ids[:, :1], past_key_values=out.past_key_values)
    for new_tokens in (1, 3):
        with pytest.raises(InputError, match="NaN or infinite"):
            postponing.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=new_tokens)


def test_ids_are_read_before_anything_runs(postponing, request_, monkeypatch):
    monkeypatch.setattr(postponing.on_demand, "vision", lambda *_: pytest.fail("a program was asked for"))
    for wrong in (10**9, -5):
        with pytest.raises(InputError, match="outside the vocabulary"):
            postponing.forward(**request_ | {"input_ids": request_["input_ids"].index_fill(1, torch.tensor([0]), wrong)})


def test_postponed_checks_are_silent_about_good_values(postponing, request_):
    out = postponing.forward(**request_)
    out.past_key_values.verify()
    assert postponing.generate(**request_, max_new_tokens=2).shape[1] == request_["input_ids"].shape[1] + 2


def test_a_refused_request_does_not_trouble_the_next(postponing, request_):
    with pytest.raises(InputError, match="no image token"):
        postponing.generate(**request_ | {"input_ids": request_["input_ids"].clamp_max(4)}, max_new_tokens=1)
    postponing.generate(**request_, max_new_tokens=1)


# What the runtime costs


class Clock:
    """A clock that stands still unless it is moved."""

    seconds = 0.0

    def perf_counter(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def taking(self, seconds: float, call):
        def run(*given, **named):
            self.seconds += seconds
            return call(*given, **named)

        return run


def test_overhead_times_the_runtime_and_not_the_programs(fast, monkeypatch):
    """A prefill program takes 100 ms, a decode program 10; the runtime 3 ms for a prompt and 1 for a token."""
    clock, provider = Clock(), fast.on_demand
    monkeypatch.setattr("vitcop_compile.bench.overhead.time", clock)
    monkeypatch.setattr("vitcop_compile.bench.timing.time", clock)
    for name, seconds in (("prefill", 0.1), ("extend", 0.01)):
        made = getattr(provider, name)
        monkeypatch.setattr(provider, name, lambda *key, made=made, s=seconds: clock.taking(s, made(*key)))
    monkeypatch.setattr("vitcop_compile.turn.align", clock.taking(0.003, turn.align))
    monkeypatch.setattr(PrunedCache, "take_token", clock.taking(0.001, PrunedCache.take_token))
    cost = overhead(fast, Request(text_tokens=14), rounds=5)
    expected = {"prefill": 3.0, "decode": 1.0, "prefill_alone": 3.0, "decode_alone": 1.0}
    assert cost == pytest.approx(expected)


# Nothing is read back


@pytest.fixture(scope="module")
def nowhere():
    """A model without values: reading any of them raises."""
    config = models.llava(3).config
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).eval()
    return vitcop_compile.optimize(model, CONFIG, backend="eager")


def test_no_value_is_read_between_the_pixels_and_the_next_token(nowhere, request_):
    """Ids are read once, before anything is launched: they are given on the host. Everything else has no value."""
    ids, pixels = request_["input_ids"], request_["pixel_values"].to("meta")
    out = nowhere._turn(ids, nowhere._images(ids, pixels, {}), torch.ones_like(ids), PrunedCache())
    assert out.logits.is_meta and out.logits.shape[:2] == (1, 1)
    cache = out.past_key_values
    step = nowhere.forward(input_ids=torch.zeros(1, 1, dtype=torch.int64, device="meta"), past_key_values=cache)
    assert step.logits.is_meta and step.past_key_values.get_seq_length() == ids.shape[1] + 1


def test_a_read_would_be_noticed(nowhere, request_, monkeypatch):
    monkeypatch.setattr(nowhere, "_postpone", False)  # as on a CPU, where values are read at once
    ids, pixels = request_["input_ids"], request_["pixel_values"].to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        nowhere._turn(ids, nowhere._images(ids, pixels, {}), torch.ones_like(ids), PrunedCache())


def test_nothing_is_generated_or_warmed_up_without_values(nowhere, request_):
    with pytest.raises(InputError, match="meta device, which holds no values: load the model to generate"):
        nowhere.generate(**{name: tensor.to("meta") for name, tensor in request_.items()}, max_new_tokens=1)
    with pytest.raises(InputError, match="meta device, which holds no values: load the model to warm it up"):
        nowhere.warmup()
