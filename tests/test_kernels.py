"""Our kernels for CPUs against sums in float64, how their library is built, and the rule that says where they run."""

from __future__ import annotations

import functools
import json
import threading
import time

import models
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import optimize, pixels, prompt

from vitcop_compile import UnsupportedError, ViTCoPConfig
from vitcop_compile.kernels import MOST_ROWS, Rule, build, load, products

load()
FEW = torch.ops.vitcop_cpu.linear_few.default
INT8 = torch.ops.vitcop_cpu.linear_int8.default
DECODE = torch.ops.vitcop_cpu.decode_attention.default
SDPA = torch.ops.aten.scaled_dot_product_attention.default
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# Of what a sum in fp32 is rounded to.
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def drawn(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=80)
@given(
    dtype=DTYPES,
    rows=st.integers(1, MOST_ROWS),
    width=st.integers(1, 1100),
    columns=st.integers(1, 70),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@example(torch.bfloat16, 1, 513, 4, True, 0)
@example(torch.float16, 64, 512, 5, False, 0)
@example(torch.float32, 3, 16, 1, True, 0)
def test_products_of_few_rows(dtype, rows, width, columns, bias, seed):
    x, weight = drawn(seed, rows, width, dtype=dtype), drawn(seed + 1, columns, width, dtype=dtype)
    added = drawn(seed + 2, columns, dtype=dtype) if bias else None
    exact = x.double() @ weight.double().T + (0 if added is None else added.double())
    # Terms of a sum are rounded at their own size, the result at its.
    terms = x.double().abs() @ weight.double().abs().T
    bound = ROUNDING[dtype] * exact.abs() + 2.0**-20 * terms + (2.0**-24 if dtype == torch.float16 else 0)
    assert ((FEW(x, weight, added).double() - exact).abs() <= bound).all()


@settings(deadline=None, max_examples=30)
@given(dtype=DTYPES, rows=st.integers(1, MOST_ROWS), width=st.integers(1, 600), columns=st.integers(1, 70))
def test_products_by_int8_weights(dtype, rows, width, columns):
    """Without their scales, which the graph applies."""
    x = drawn(0, rows, width, dtype=dtype)
    weight = torch.randint(-128, 128, (columns, width), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    exact, terms = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert ((FEW(x, weight, None).double() - exact).abs() <= ROUNDING[dtype] * exact.abs() + 2.0**-20 * terms).all()


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, MOST_ROWS),
    width=st.integers(1, 700),
    columns=st.integers(1, 70),
    most=st.booleans(),
    threads=st.sampled_from([1, 2, 5]),
)
@example(1, 64, 4, False, 2)
@example(64, 8192, 5, True, 2)
def test_products_of_int8_by_int8_are_exact(rows, width, columns, most, threads):
    generator = torch.Generator().manual_seed(rows)
    x, weight = (torch.randint(-128, 128, (count, width), dtype=torch.int8, generator=generator) for count in (rows, columns))
    if most:  # sums as far from zero as they get
        x.fill_(-128)
        weight.fill_(-128)[0] = 127
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = INT8(x, weight)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == torch.int32 and torch.equal(found.long(), x.long() @ weight.long().T)


def test_int8_products_of_other_shapes_and_what_they_refuse():
    x = torch.arange(-30, 30, dtype=torch.int8).reshape(2, 5, 6)
    weight = torch.arange(18, dtype=torch.int8).reshape(3, 6)
    assert torch.equal(INT8(x, weight).long(), x.long() @ weight.long().T)
    turned = x[0].T.contiguous().T
    assert torch.equal(INT8(turned, weight), INT8(x, weight)[0])
    for wrong, message in (
        ((x.float(), weight), "takes int8"),
        ((x, weight.int()), "takes int8"),
        ((x[..., :5], weight), "other widths"),
        ((x, torch.zeros(6, 3, dtype=torch.int8).T), "not contiguous"),
        ((torch.zeros(65, 6, dtype=torch.int8), weight), "takes 1 to 64 rows"),
        ((x[:0], weight), "takes 1 to 64 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            INT8(*wrong)


def test_products_of_what_is_not_contiguous():
    x, weight = drawn(0, 33, 7, dtype=torch.float32).T, drawn(1, 5, 33, dtype=torch.float32)
    bias = drawn(2, 10, dtype=torch.float32)[::2]
    torch.testing.assert_close(FEW(x, weight, bias), x @ weight.T + bias)
    stacked = drawn(3, 2, 3, 33, dtype=torch.float32)
    torch.testing.assert_close(FEW(stacked, weight, None), stacked @ weight.T)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(65, 4), torch.ones(3, 4), "takes 1 to 64 rows"),
        (torch.ones(2, 4), torch.ones(3, 5), "other widths"),
        (torch.ones(2, 4), torch.ones(3, 4).half(), "other types"),
        (torch.ones(0, 4), torch.ones(0, 4), "1 to 64 rows"),
        (torch.ones(2, 4), torch.ones(4, 3).T, "not contiguous"),
        (torch.ones(2, 4).double(), torch.ones(3, 4).double(), "takes float32, bfloat16 and float16"),
    ],
)
def test_products_that_the_kernel_cannot_make(x, weight, message):
    with pytest.raises(RuntimeError, match=message):
        FEW(x, weight, None)


def attended(query, key, value, scale, at):
    """By the definition, in float64, head by head."""
    shared = query.shape[1] // key.shape[1]
    out = torch.empty(query.shape, dtype=torch.float64)
    for sample in range(query.shape[0]):
        seen = int(at[sample]) + 1
        for head in range(query.shape[1]):
            keys, values = (cache[sample, head // shared, :seen].double() for cache in (key, value))
            out[sample, head, 0] = ((keys @ query[sample, head, 0].double()) * scale).softmax(0) @ values
    return out


@settings(deadline=None, max_examples=80)
@given(
    dtype=DTYPES,
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    shared=st.integers(1, 17),
    rows=st.integers(1, 300),
    width=st.integers(1, 130),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    threads=st.sampled_from([1, 2, 6]),
    data=st.data(),
)
def test_attention_of_one_query(dtype, batch, groups, shared, rows, width, scale, threads, data):
    at = torch.tensor([data.draw(st.integers(0, rows - 1)) for _ in range(batch)]).unsqueeze(1)
    query = drawn(0, batch, groups * shared, 1, width, dtype=dtype)
    key, value = (drawn(seed, batch, groups, rows, width, dtype=dtype) for seed in (1, 2))
    exact = attended(query, key, value, scale, at)
    for sample in range(batch):  # what is behind a sample's rows is never read
        key[sample, :, int(at[sample]) + 1 :] = value[sample, :, int(at[sample]) + 1 :] = torch.nan
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = DECODE(query, key, value, scale, at)
    finally:
        torch.set_num_threads(before)
    # A weight is off by its score's rounding, and scores are up to `scale` times some hundred.
    bound = ROUNDING[dtype] * exact.abs() + 2.0**-20 * (1 + scale * width) + (2.0**-24 if dtype == torch.float16 else 0)
    assert found.dtype == dtype and ((found.double() - exact).abs() <= bound).all()


def test_attention_of_scores_that_overflow_exponentials():
    query, key = (
        torch.full((1, 1, 1, 16), 100.0),
        torch.stack((torch.full((16,), 100.0), torch.full((16,), -100.0)))[None, None],
    )
    value = torch.stack((torch.full((16,), 2.0), torch.full((16,), 5.0)))[None, None]
    assert torch.equal(DECODE(query, key, value, 1.0, torch.tensor([[1]])), torch.full((1, 1, 1, 16), 2.0))
    equal = DECODE(query, key[:, :, :1].repeat(1, 1, 2, 1), value, 1.0, torch.tensor([[1]]))
    assert torch.equal(equal, torch.full((1, 1, 1, 16), 3.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(1, 4, 2, 8)}, "one query of every head"),
        ({"query": torch.ones(1, 3, 1, 8)}, "not those of the queries"),
        ({"value": torch.ones(1, 2, 6, 8)}, "not those of the queries"),
        ({"at": torch.zeros(2, 1, dtype=torch.int64)}, "not those of the queries"),
        ({"at": torch.zeros(1, 1, dtype=torch.int32)}, "not int64"),
        ({"key": torch.ones(1, 2, 5, 8).half()}, "types differ"),
        ({"key": torch.ones(1, 5, 2, 8).transpose(1, 2)}, "not contiguous"),
    ],
)
def test_attention_that_the_kernel_cannot_do(change, message):
    given = {"query": torch.ones(1, 4, 1, 8), "key": torch.ones(1, 2, 5, 8), "value": torch.ones(1, 2, 5, 8)}
    given |= {"at": torch.zeros(1, 1, dtype=torch.int64)} | change
    with pytest.raises(RuntimeError, match=message):
        DECODE(given["query"], given["key"], given["value"], 1.0, given["at"])


def test_every_layer_of_a_decoding_step_gets_the_kernel_where_a_backend_has_it():
    fast = optimize(models.shared(6, 2), ViTCoPConfig.preset("1/9"))
    rows = (96,) * len(fast.schedule.group_tokens())
    found = {
        (tokens, ours): [n.target for n in fast.programs.export_extend(2, tokens, rows, kernels=ours).graph.nodes]
        for tokens, ours in ((1, True), (1, False), (3, True))
    }
    assert {key: (targets.count(DECODE), targets.count(SDPA)) for key, targets in found.items()} == {
        (1, True): (6, 0),
        (1, False): (0, 6),
        (3, True): (0, 6),
    }


@pytest.mark.parametrize("dtype", [models.slow(torch.bfloat16), models.exhaustive(torch.float16)])
def test_half_precision_selects_what_float32_does(dtype):
    """Selections are well separated here: the weights are random and large."""
    model = models.llava(6, seed=3)
    models.randomize(model, 3)
    ids, images = prompt(6, 9, seed=4), pixels(seed=4)
    exact = optimize(model, ViTCoPConfig.preset("1/9"))(input_ids=ids, pixel_values=images)
    half = models.llava(6, seed=3)
    models.randomize(half, 3)
    half = half.to(dtype)
    found = optimize(half, ViTCoPConfig.preset("1/9"), backend="inductor")(input_ids=ids, pixel_values=images.to(dtype))
    assert torch.equal(found.past_key_values.selection.kept, exact.past_key_values.selection.kept)


# Building and choosing.


@pytest.fixture
def aside(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "folder", lambda: tmp_path)
    products._rule.cache_clear()
    yield tmp_path
    products._rule.cache_clear()


def test_what_no_compiler_builds_is_said(tmp_path):
    with pytest.raises(UnsupportedError, match=r"kernels for the CPU are C\+\+, which false does not build .*install g\+\+"):
        build._build(["false"], tmp_path / "cpu.so")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lock", [True, False])
def test_processes_that_start_together_build_once(lock, monkeypatch, tmp_path):
    """The other waits, and finds it; without locks both build."""
    target, built, begun = tmp_path / "new" / "cpu.so", [], threading.Event()

    def slowly(command, path):
        built.append(command)
        begun.set()
        time.sleep(0.2)
        path.write_bytes(b"x")

    class Missing:
        def __init__(self, *_, **__):
            raise NotImplementedError("no flock")

    monkeypatch.setattr(build, "_build", slowly)
    if not lock:
        monkeypatch.setattr(build, "FileLock", Missing)
    one = threading.Thread(target=build._build_once, args=(["one"], target))
    one.start()
    assert begun.wait(30)
    build._build_once(["two"], target)
    one.join()
    assert target.exists() and built == ([["one"]] if lock else [["one"], ["two"]])


def test_whoever_builds_too_long_is_not_waited_for(monkeypatch, tmp_path):
    target, built = tmp_path / "cpu.so", []
    monkeypatch.setattr(build, "_build", lambda command, path: built.append(command))
    monkeypatch.setattr(build, "_PATIENCE", 0.01)
    with build.FileLock(target.with_suffix(".lock")):
        build._build_once(["two"], target)
    assert built == [["two"]]


def test_a_folder_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(build, "folder", lambda: tmp_path / "file" / "kernels")
    with pytest.raises(UnsupportedError, match=r"kernels cannot be written .*VITCOP_CACHE or TORCHINDUCTOR_CACHE_DIR"):
        build.load.__wrapped__()


def test_a_missing_compiler_is_said():
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UnsupportedError, match=r"install g\+\+ or clang"):
        build._compiler()


def test_a_library_that_is_kept_is_loaded_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(build, "_compiler", lambda: pytest.fail("looked for a compiler"))
    monkeypatch.setattr(torch.ops, "load_library", (loaded := []).append)
    monkeypatch.setattr(build, "_describe", lambda: None)
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    flags = (*build._FLAGS, build._native(), build._INTERFACE)
    key = build._key(flags)
    (tmp_path / f"cpu-{key}.so").write_bytes(b"")
    build.load.__wrapped__()
    assert loaded == [str(tmp_path / f"cpu-{key}.so")]
    monkeypatch.setattr(build, "machine", lambda: "another")
    assert build._key(flags) != key


def test_what_compilers_are_asked_once_is_asked_while_others_work(monkeypatch):
    done = []

    def library():
        done.append("library")
        raise UnsupportedError("no compiler")  # which `load` says

    monkeypatch.setattr(build, "_library", library)
    monkeypatch.setattr(build, "instructions", lambda: done.append("instructions"))
    build.begin.__wrapped__()
    for thread in threading.enumerate():
        if thread.name == "vitcop-kernels":
            thread.join()
    assert done == ["library"]
    monkeypatch.setattr(build, "_library", lambda: done.append("library"))
    build._prepare()
    assert done == ["library", "library", "instructions"]


@pytest.mark.parametrize(("best", "asked"), [(True, ["best"]), (False, ["best", "all"])])
def test_inductor_checks_the_best_instructions_alone_if_they_work(monkeypatch, best, asked):
    from torch._inductor import config, cpu_vec_isa

    found = []

    @functools.cache
    def known():
        found.append("best" if config.cpp.vec_isa_ok else "all")
        return found[-1]

    class Best:
        def __bool__(self):
            assert config.cpp.vec_isa_ok is None  # inductor's own check
            return best

    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", known)
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: known() and Best())
    build.instructions()
    assert found == asked
    build.instructions()
    assert found == asked  # once


def test_a_rule_is_measured_once_and_kept(aside, monkeypatch):
    made = iter([Rule(8, "aten"), Rule(16, "aten"), *[Rule(16, "wide")] * 2, *[Rule(8, "aten")] * 2])
    monkeypatch.setattr(products, "_measured", lambda dtype: next(made))
    assert products.rule(torch.bfloat16) == Rule(8, "aten") and not list(aside.iterdir())  # not confirmed
    products._rule.cache_clear()
    assert products.rule(torch.bfloat16) == Rule(16, "wide")
    products._rule.cache_clear()
    assert products.rule(torch.bfloat16) == Rule(16, "wide")
    (kept,) = aside.iterdir()
    kept.write_text(json.dumps({"few": "many"}))
    products._rule.cache_clear()
    assert products.rule(torch.bfloat16) == Rule(8, "aten")  # what cannot be read is measured anew
    assert json.loads(kept.read_text()) == {"few": 8, "many": "aten", "one": "aten"}


def test_a_folder_that_cannot_be_written_costs_a_measurement(monkeypatch):
    monkeypatch.setattr(products, "folder", lambda: build.SOURCE / "no folder")
    monkeypatch.setattr(products, "_measured", lambda dtype: Rule(32, "aten"))
    products._rule.cache_clear()
    assert products.rule(torch.float16) == Rule(32, "aten")
    products._rule.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "seconds", "expected"),
    [
        (torch.float32, {"few": 0.5, "aten": 1.0, "onednn": 0.95}, Rule(64, "aten", "few")),
        (torch.float32, {"few": 0.95, "aten": 1.0, "onednn": 0.5}, Rule(8, "onednn", "onednn")),
        (torch.float32, {"few": 0.95, "aten": 1.0, "onednn": 0.95}, Rule(8, "aten", "aten")),
        (torch.bfloat16, {"few": 0.5, "aten": 1.0, "wide": 0.6}, Rule(64, "wide")),
    ],
)
def test_a_rule_takes_what_is_faster_by_a_tenth(monkeypatch, dtype, seconds, expected):
    monkeypatch.setattr(products, "_times", lambda arms, rows, weights: {name: seconds[name] for name in arms})
    assert products._measured(dtype) == expected


def test_measuring_leaves_the_callers_random_numbers_and_default_device_alone(monkeypatch):
    monkeypatch.setattr(products, "_WIDTH", 64)
    before = torch.get_rng_state()
    with torch.device("meta"):
        found = products._measured(torch.bfloat16)
    assert found.few >= 8 and torch.equal(torch.get_rng_state(), before)


def test_a_rule_is_for_a_number_of_threads(aside, monkeypatch):
    monkeypatch.setattr(products, "_measured", lambda dtype: Rule(torch.get_num_threads(), "aten"))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            assert products.rule(torch.float32).few == threads
    finally:
        torch.set_num_threads(before)
    assert len(list(aside.iterdir())) == 2


def test_what_is_measured_multiplies():
    for dtype in (torch.float32, torch.bfloat16):
        assert products._times(
            {"few": products._few, "wide": products._wide, "onednn": products.onednn}, 8, [drawn(0, 1024, 1024, dtype=dtype)]
        )
