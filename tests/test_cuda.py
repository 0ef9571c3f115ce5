"""The CUDA path without a GPU: every program on a fake device, what its graph may not hold, and the gate's facts of it."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import families
import numpy as np
import pytest
import torch
from models import IMAGE, PATCHES, shared, slow, text
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from transformers import PreTrainedModel

import vitcop_compile
from vitcop_compile import ConfigError, UnsupportedError, ViTCoPConfig, backends, regress
from vitcop_compile.attention import LOWERINGS
from vitcop_compile.bench.bind import compiled_by
from vitcop_compile.cache import PrunedCache
from vitcop_compile.optimized import OptimizedModel
from vitcop_compile.regress import compare, cuda, gate
from vitcop_compile.regress.cuda import checks, fake

pytestmark = pytest.mark.skipif(fake.missing() is not None, reason=f"no fake CUDA device: {fake.missing()}")
LAYERS, CONFIG = 3, ViTCoPConfig.preset("1/3")
Seen = list[tuple[Any, tuple[Any, ...]]]


IDS, WORDS = np.array([text(3) + [IMAGE] * PATCHES + text(4)]), np.array([text(6)])


@pytest.fixture(scope="module")
def mode() -> Any:
    """One for all tests: tables that depend on a layout alone are kept, and are fake as well."""
    fake.load_guard()
    return FakeTensorMode()


@pytest.fixture
def device(mode: Any) -> Iterator[Any]:
    """Within the test, tensors are fake, and on cuda:0."""
    with mode, torch.device("cuda"), torch.no_grad():
        yield mode


def real(make: Callable[[], Any]) -> Any:
    """What `make` returns outside the mode: some of it is kept for other tests."""
    with unset_fake_temporarily(), torch.device("cpu"):
        return make()


def faked(model: PreTrainedModel) -> Any:
    return type(model)._from_config(copy.deepcopy(model.config), dtype=torch.bfloat16).eval()


def conversation(made: OptimizedModel, mode: Any) -> tuple[Seen, list[tuple[str, int]], PrunedCache]:
    """Five requests of one conversation and one without an image: every program with what it was given, in order; the reads of
    the host, each with the programs that had run by then; the cache."""
    seen: Seen = []

    def note(program: Any) -> Any:
        plain = program.module(check_guards=False)

        def run(*given: Any) -> Any:
            seen.append((program, given))
            return plain(*given)

        return run

    running, reads = compiled_by(made, note), []
    pixels, cache = torch.zeros(1, 3, 112, 112, dtype=torch.bfloat16), PrunedCache(max_length=400)
    token, requests = WORDS[:, :1], [(IDS, pixels), (WORDS[:, :1], None), (WORDS, None), (IDS, pixels)]
    for ids, more in (*requests, (token, None), (WORDS, None)):
        alone = len(seen) > 6
        with fake.HostReads(mode, ids) as host:
            given = {} if alone else {"past_key_values": cache}
            running.forward(torch.from_numpy(ids).cuda(), more, **given)
        reads.append([str(dtype) for dtype, _ in host.found])
    return seen, reads, cache


def held(program: Any) -> list[str]:
    values = {**program.state_dict, **program.constants}
    values |= {node.name: node.meta.get("val") for node in program.graph.nodes}
    return sorted({str(value.device) for value in values.values() if isinstance(value, Tensor)})


@pytest.mark.parametrize("name", [name if name == "sdpa" else slow(name) for name in LOWERINGS])
def test_every_program_of_a_conversation_stays_on_the_device(name: str, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    made = vitcop_compile.optimize(faked(real(lambda: shared(LAYERS, 2))), CONFIG, attn_implementation=name)
    seen, reads, cache = conversation(made, device)
    # An image, a token, a turn of text, one with an image on filled caches, a token; then text without a cache.
    assert len(seen) == 2 + 1 + 1 + 2 + 1 + 1 and str(made.device) == "cuda:0"
    for program, given in seen:
        assert held(program) == ["cuda:0"]
        assert not checks.elsewhere(program) and not checks.reads(program) and not checks.moving(program, given)
        assert not program.graph_signature.buffers_to_mutate
    written = [checks.written(program) for program, _ in seen]
    assert list(map(len, written)) == [0, 2 * LAYERS, 2 * LAYERS, 2 * LAYERS, 0, 2 * LAYERS, 2 * LAYERS, 2 * LAYERS]
    assert all(
        names == list(program.graph_signature.user_inputs[-len(names) :])
        for names, (program, _) in zip(written, seen)
        if names
    )
    # Products of one row are worth a search for their kernels: those of the steps.
    assert [backends._single_rows(program) for program, _ in seen] == [place in (2, 6) for place in range(8)]
    static = [*cache.buffers, cache.length, cache.position, cache.removed, cache.token, cache.last]
    assert {tensor._dynamo_static_input_type for tensor in static} == {"unguarded"}
    # Ids and mask before anything is launched; whether the pixels of a turn were finite, once the host waits anyway.
    entry = ["torch.int64", "torch.bool"]
    assert reads == [entry, ["torch.bool"], entry, entry, ["torch.bool"], entry]


@pytest.mark.slow
def test_programs_of_a_tower_and_three_coordinates_stay_on_the_device(device: Any) -> None:
    made = vitcop_compile.optimize(faked(real(lambda: families.model("qwen2_5_vl"))), CONFIG)
    programs, schedule = made.programs, made.schedule
    segment = schedule.layout[0]
    select = (2, 16, 1, -(-segment.candidates // 16) * 16, segment.taps, schedule.vision.of_segment(0))
    rows = tuple(24 + tokens for tokens in schedule.group_tokens())
    exported = [
        programs.export_tower(2, 16),
        programs.export_select(*select),
        programs.export_prefill(1, 20, 1, rows),
        programs.export_prefill(1, 2, 1, rows, filled=True),
        programs.export_extend(2, 1, rows),
        programs.export_extend(1, 7, rows),
    ]
    for program in exported:
        assert held(program) == ["cuda:0"] and not checks.elsewhere(program) and not checks.reads(program)


# What is found if it is there


class Reading(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.ones(4, device="cpu" if how == "parameter" else "cuda"))

    def forward(self, x: Tensor) -> Any:
        if self.how == "item":
            return x * x.sum().item()
        if self.how == "nonzero":
            return x.nonzero()
        if self.how == "mask":
            return x[x > 0]
        if self.how == "put":
            x = x.clone()
            x[x > 0] = x.sum()
            return x
        if self.how == "index":
            return x[x.argsort()]
        if self.how == "host":
            return x.to("cpu") * 2
        if self.how == "constant":
            return x + torch.arange(4, device="cpu").sum().to("cuda")
        return x * (x > 0) + x[torch.arange(2, device=x.device)].sum()


@pytest.mark.parametrize("how", ["item", "nonzero", "mask", "put", "host", "constant", "parameter", "index", "none"])
def test_a_read_or_a_tensor_elsewhere_is_found(how: str, device: Any) -> None:
    module = Reading(how)
    if how == "parameter":
        module.forward = lambda x: x + module.weight.to("cuda")  # type: ignore[method-assign]
    program = torch.export.export(module, (torch.ones(4),), strict=False)
    assert bool(checks.reads(program)) == (how in ("item", "nonzero", "mask", "put"))
    assert bool(checks.elsewhere(program)) == (how in ("host", "constant", "parameter"))


def test_a_cache_whose_address_nobody_keeps_is_found(device: Any) -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache[:, :1].copy_(x)
            return cache.sum()

    x, cache = torch.ones(2, 1), torch.ones(2, 5)
    program = torch.export.export(Writing(), (x, cache), strict=False)
    assert checks.moving(program, (x, cache)) == ["cache"]
    torch._dynamo.mark_static_address(cache, guard=False)
    assert checks.moving(program, (x, cache)) == []


def test_a_read_that_forward_does_not_announce_is_an_error(device: Any) -> None:
    with fake.HostReads(device, np.zeros((1, 3), dtype=np.int64)):
        with pytest.raises(UnsupportedError, match="which is neither ids nor mask"):
            torch.zeros(7).cpu()
        with pytest.raises(DataDependentOutputException):
            torch.zeros(1).item()


def test_a_fake_device_needs_a_compiler_and_a_build_for_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    assert fake.missing().startswith("no C++ compiler was found (c++, g++, clang++)")
    with pytest.raises(UnsupportedError, match="there can be no fake CUDA device: no C"):
        fake.load_guard.__wrapped__()
    (tmp_path / "c++").write_text("#!/bin/sh\necho this is no compiler >&2; exit 1\n")
    (tmp_path / "c++").chmod(0o755)
    with pytest.raises(UnsupportedError, match="cannot build the guard of a fake CUDA device: this is no compiler"):
        fake.load_guard.__wrapped__()
    monkeypatch.setattr(torch.cuda, "_is_compiled", lambda: True)
    assert "is a build for CUDA" in fake.missing()


# The gate's facts


PROGRAM = {"kernels": 3, "launches": 4, "extern": {"mm": 2}, "written_moving": 0, "cache_copies": 0, "cpp_kernels": 0,
           "refused": 0, "partitions": 1, "elsewhere": 0, "reads": 0, "moving": 0}  # fmt: skip
FACTS = {"sm_90": {name: copy.deepcopy(PROGRAM) for name in ("vision", "prefill", "decode")}}
COMMON = {"stream": {"graph_breaks": 0, "recompiles": 0}, "reads": {"program": 0}}


def test_facts_of_cuda_are_compared_where_the_toolchain_is_the_same() -> None:
    other = copy.deepcopy(FACTS)
    other["sm_90"]["prefill"]["extern"]["mm"] = 3
    found, notes, compared = compare.compare_facts("1/9", {"cuda": FACTS, "kv_bytes": 1}, {"cuda": other, "kv_bytes": 1})
    assert [failure.what for failure in found] == ["cuda.sm_90.prefill.extern.mm"] and not notes and compared == 34
    why = "no code for CUDA was generated: it takes triton"
    found, notes, compared = compare.compare_facts("1/9", {"cuda": FACTS, "kv_bytes": 1}, {"kv_bytes": 2}, toolchain=why)
    assert [failure.what for failure in found] == ["kv_bytes"] and compared == 1
    assert notes == [f"1/9: cuda (33 facts) not compared: {why}"]


@pytest.mark.parametrize(("program", "fact"), [(p, f) for p in FACTS["sm_90"] for f in (*cuda.ALWAYS, *cuda.ALWAYS_DECODE)])
def test_what_no_baseline_can_allow_on_cuda(program: str, fact: str) -> None:
    facts = copy.deepcopy(FACTS)
    facts["sm_90"][program][fact] += 1
    broken = compare.broken_promises("1/9", COMMON | {"cuda": facts}, "eager")
    expected = [] if fact == "cache_copies" and program != "decode" else [f"cuda.sm_90.{program}.{fact}"]
    assert [failure.what for failure in broken] == expected


def test_what_a_machine_without_the_toolchain_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        cuda, "missing", lambda: "it takes torch 2.13.0 and triton 3.7.1, here are torch 2.13.0 and triton none"
    )
    settings = regress.Settings(cuda=("sm_80",))
    environment = gate.here(torch.device("cpu"))
    stored = types.SimpleNamespace(settings=settings, environment=environment)
    generated, why = gate._dry_run(stored, lambda what: None)
    assert generated == {} and why.startswith("no code for CUDA was generated: it takes torch 2.13.0 and triton 3.7.1")
    with pytest.raises(ConfigError, match=r"facts of sm_80 cannot be counted here: it takes .*; or pass --cuda none"):
        regress.update(None, "nowhere.json", settings)
    monkeypatch.setattr(cuda, "missing", lambda: None)
    stored.environment = environment | {"triton": "3.6.0"}
    generated, why = gate._dry_run(stored, lambda what: None)
    assert generated == {} and "triton 3.6.0, here is torch" in why
    stored.settings = regress.Settings()
    assert gate._dry_run(stored, lambda what: None) == ({}, None)


def test_settings_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cuda=sm_75: name architectures once, of sm_80, sm_90"):
        regress.Settings(cuda=("sm_75",))
    with pytest.raises(ValueError, match="cannot build a model handed in"):
        regress.Settings(cuda=("sm_80",)).of(shared(LAYERS, 2))
    monkeypatch.setattr(cuda.replaced, "version", lambda name: {"torch": "2.13.0"}.get(name, "none"))
    assert cuda.missing().startswith("it takes torch 2.13.0 and triton 3.7.1, here are torch 2.13.0 and triton none: pip")


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(regress.Settings(), cuda=("sm_80",))
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # which knows no -m
    with pytest.raises(UnsupportedError, match="the CUDA dry run for sm_80 failed: "):
        cuda.measure(settings)
