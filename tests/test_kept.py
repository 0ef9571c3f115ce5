"""Programs that are kept: what makes them others, what they bind, and what a second process does not do."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import optimize
from torch import nn

import vitcop_compile
from vitcop_compile import InputError, ViTCoPConfig, backends, fillers, fingerprint, inductor_backend, kept, methods
from vitcop_compile.bindings import Bindings, Signature
from vitcop_compile.fingerprint import NotKept
from vitcop_compile.kept import Keeper

THIRD = ViTCoPConfig.preset("1/3")
CPU = torch.device("cpu")


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """A backend "counted" that keeps graphs by what they are called in this process; what was done with it."""
    done, programs = [], {}

    def compile(program: Any, folder: Path, bindings: Bindings) -> Any:
        done.append("compile")
        bindings.write(folder, dict(program.state_dict))
        (folder / "name").write_text(str(len(programs)))
        programs[str(len(programs))] = program
        return backends.eager(program)

    def load(folder: Path, bindings: Bindings, device: torch.device) -> Any:
        done.append("load")
        module = backends.eager(programs[(folder / "name").read_text()])
        for name, value in bindings.read(folder, device).items():
            owner, _, last = name.rpartition(".")
            setattr(module.get_submodule(owner), last, nn.Parameter(value, False) if value.is_floating_point() else value)
        return module

    monkeypatch.setitem(backends.BACKENDS, "counted", backends.Backend(backends.eager, keeper=Keeper(compile, load)))
    return done


def answer(fast) -> list[int]:
    out = fast.generate(input_ids=models.prompt(5, 9, 0), pixel_values=models.pixels(), max_new_tokens=3, do_sample=False)
    return out[0, -3:].tolist()


def test_a_second_time_nothing_is_captured_or_exported(folder, counted, monkeypatch):
    expected = answer(optimize(models.shared(3), THIRD, backend="counted"))
    assert expected == answer(optimize(models.shared(3), THIRD)) and counted == ["compile"] * 3
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("exported"))
    counted.clear()
    assert answer(vitcop_compile.optimize(models.llava(3), THIRD, backend="counted")) == expected
    # Other values, the same programs: they are bound to the model that they are loaded for.
    assert answer(vitcop_compile.optimize(models.llava(3, seed=5), THIRD, backend="counted")) != expected
    assert counted == ["load"] * 6


def test_a_broken_program_is_made_anew(folder, counted, caplog):
    expected = answer(optimize(models.shared(3), THIRD, backend="counted"))
    for path in folder.rglob("weights.json"):
        path.write_text("{}")
    counted.clear()
    assert answer(optimize(models.shared(3), THIRD, backend="counted")) == expected and counted == ["compile"] * 3
    assert caplog.text.count("its files are not those that were written") == 3
    # And one that its backend cannot read, whose files are whole.
    keeper = backends.BACKENDS["counted"].keeper

    def fail(*_: Any) -> Any:
        raise RuntimeError("another version's")

    broken = dataclasses.replace(backends.BACKENDS["counted"], keeper=keeper._replace(load=fail))
    backends.BACKENDS["counted"] = broken
    assert answer(optimize(models.shared(3), THIRD, backend="counted")) == expected
    assert caplog.text.count("RuntimeError: another version's") == 3 and counted == ["compile"] * 6


def test_other_models_methods_and_backends_are_other_groups(folder, counted):
    def group(model: Any, method: Any = THIRD, backend: str = "counted", *settings: Any) -> str:
        return kept.kept(model, method, backend, backends.BACKENDS[backend].keeper, *settings).group

    model = models.shared(3)
    assert group(model) == group(models.llava(3, seed=3))
    others = [group(models.llava(4)), group(model, ViTCoPConfig.preset("1/9")), group(model, THIRD, "inductor")]
    assert len({group(model), *others, group(model, THIRD, "counted", "flash_attention_2")}) == 5


def test_what_other_threads_compile_meanwhile_does_not_vanish_under_them(folder):
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with inductor_backend._scratch() as scratch:
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(scratch)
    assert scratch.is_dir() and os.environ.get("TORCHINDUCTOR_CACHE_DIR") == before


def test_a_stock_call_beforehand_changes_nothing(folder):
    """transformers hangs hooks of its own into a model that is called."""
    model = models.llava(3)
    before = fingerprint.of_model(model)
    with torch.no_grad():
        model(input_ids=models.prompt(3, 4, seed=1), pixel_values=models.pixels(seed=1))
    assert any(module._forward_hooks for module in model.modules())
    assert fingerprint.of_model(model) == before


def test_nothing_is_kept_where_the_store_is_off_or_the_model_has_hooks(folder, counted, monkeypatch, caplog):
    model = models.llava(3)
    model.register_forward_pre_hook(lambda *_: None)
    with caplog.at_level(logging.INFO, "vitcop_compile"):
        assert kept.kept(model, THIRD, "counted", backends.BACKENDS["counted"].keeper) is None
    assert "not kept: module of the model has a hook" in caplog.text
    monkeypatch.setenv("VITCOP_CACHE", "off")
    assert optimize(models.shared(3), THIRD, backend="counted").on_demand.kept is None
    with pytest.raises(InputError, match="run=False leaves nothing where programs are not kept: set VITCOP_CACHE"):
        optimize(models.shared(3), THIRD).warmup(run=False)
    with pytest.raises(InputError, match=r"keep\(\), or run=False leaves nothing where programs are not kept"):
        optimize(models.shared(3), THIRD).keep([(1, 4, [])])
    with pytest.raises(InputError, match="kinds='decode' is no kind of program: use some of vision, tower"):
        optimize(models.shared(3), THIRD).keep([(1, 4, [])], kinds=("vision", "decode"))


def test_some_kinds_of_programs_are_kept_and_others_are_not(folder, counted):
    fast = optimize(models.shared(3), THIRD, backend="counted")
    fast.keep([(1, 14, [fast.host.layout])], 3, kinds=("extend",))
    assert [key[0] for key in fast.compiled] == ["extend"] and counted == ["compile"]
    answer(optimize(models.shared(3), THIRD, backend="counted"))
    assert counted == ["compile", "compile", "compile", "load"]


# What makes a program another


def test_values_do_not_matter_and_all_else_does():
    one = fingerprint.of_model(models.llava(3))
    assert fingerprint.of_model(models.llava(3, seed=9)) == one
    assert fingerprint.of_model(fillers.empty(type(models.shared(3)), models.shared(3).config, torch.float32)) == one
    others = [models.llava(4), models.llava(3, kv_heads=2), models.llava(3).bfloat16(), models.llava(3, positions=512)]
    changed = models.llava(3)
    changed.model.language_model.layers[1].self_attn.scaling = 0.5
    tied = models.llava(3)
    tied.lm_head.weight = tied.model.language_model.embed_tokens.weight
    replaced = models.llava(3)
    replaced.model.language_model.layers[0].mlp.act_fn = nn.GELU()
    strided = models.llava(3)
    weight = strided.lm_head.weight
    strided.lm_head.weight = nn.Parameter(weight.detach().t().contiguous().t())
    others += [changed, tied, replaced, strided]
    assert len({one, *map(fingerprint.of_model, others)}) == 1 + len(others)


class Wrapped(torch.Tensor):
    pass


def test_what_has_no_text_is_not_kept():
    model = models.llava(3)
    model.lm_head.forward = lambda x: x
    with pytest.raises(NotKept, match=r"module lm_head has a hook, or a forward of its own"):
        fingerprint.of_model(model)
    model = models.llava(3)
    model.lm_head.register_buffer("scale", torch.ones(1).as_subclass(Wrapped))
    with pytest.raises(NotKept, match=r"lm_head.scale is a Wrapped, which is more than its values"):
        fingerprint.of_model(model)
    custom = methods.CustomMethod(score=lambda site: site.score, tokens=4)
    with pytest.raises(NotKept, match=r"function in the settings has no text"):
        fingerprint.of_method(custom)
    typed = types.FunctionType((lambda site: site).__code__, {"__name__": "typed_in"})
    with pytest.raises(NotKept, match=r"<lambda> was defined in typed_in, which has no file to tell its versions apart"):
        fingerprint._code(functools.partial(typed))


def test_methods_and_keys_are_told_apart():
    each = [THIRD, ViTCoPConfig.preset("1/9"), methods.FastV(layer=2, tokens=8), methods.FastV(layer=1, tokens=8)]
    assert len({fingerprint.of_method(method) for method in each}) == 4
    assert fingerprint.of_method(ViTCoPConfig.preset("1/3")) == fingerprint.of_method(THIRD)
    keys = [("extend", 1, 1, (128, 123)), ("extend", 1, 1, (128, 124)), ("extend", 11, 1, (28, 123)), ("vision", 1)]
    assert len({fingerprint.of_key(key) for key in keys}) == 4


def test_the_machine_threads_and_versions_are_part_of_it(monkeypatch):
    from torch._inductor import config

    one = fingerprint.of_surroundings(CPU)
    assert fingerprint.of_surroundings(CPU) == one
    found = []
    with config.patch({"cpp.simdlen": 256}):
        found.append(fingerprint.of_surroundings(CPU))
    for owner, name, value in (
        (torch, "get_num_threads", lambda: 77),
        (fingerprint, "_version", lambda name: f"{name} 0"),
        (fingerprint, "_processor", lambda: "another"),
        (fingerprint, "_own_code", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            found.append(fingerprint.of_surroundings(CPU))
    with config.patch({"compile_threads": 3}):
        assert fingerprint.of_surroundings(CPU) == one
    assert len({one, *found}) == 6


def test_a_program_says_that_it_calls_our_kernels(tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(inductor_backend.kernels, "load", lambda: loaded.append(1))

    def module(namespace: str) -> Any:
        node = types.SimpleNamespace(op="call_function", target=types.SimpleNamespace(namespace=namespace))
        return types.SimpleNamespace(graph=types.SimpleNamespace(nodes=[node]))

    inductor_backend.note_kernels(module("aten"), tmp_path)
    inductor_backend.load_kernels(tmp_path)
    assert not loaded
    inductor_backend.note_kernels(module("vitcop_cpu"), tmp_path)
    inductor_backend.load_kernels(tmp_path)
    assert loaded == [1]


# What a program binds


def test_weights_are_bound_by_name(tmp_path):
    model, other = models.llava(3), models.llava(3, seed=4)
    weights = {"a": model.lm_head.weight, "b": model.lm_head.weight.detach(), "c": torch.tensor([3, 1])}
    Bindings(model).write(tmp_path, weights)
    read = Bindings(other).read(tmp_path, CPU)
    assert list(read) == ["a", "b", "c"] and read["c"].tolist() == [3, 1]
    assert read["a"].data_ptr() == read["b"].data_ptr() == other.lm_head.weight.data_ptr()
    with pytest.raises(NotKept, match="d is a tensor of numbers that is none of the model's"):
        Bindings(model).write(tmp_path, {"d": torch.ones(2)})


def test_a_signature_is_checked_after_it_was_read(tmp_path):
    Signature.of([torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64)]).write(tmp_path)
    signature = Signature.read(tmp_path, CPU)
    signature.check((torch.ones(2, 3), torch.ones(1, dtype=torch.int64)))
    with pytest.raises(InputError, match="takes 2 inputs, got 1"):
        signature.check((torch.ones(2, 3),))
    with pytest.raises(InputError, match=r"input 0 is torch.float32 \(3, 2\).*takes torch.float32 \(2, 3\) on cpu"):
        signature.check((torch.ones(3, 2), torch.ones(1, dtype=torch.int64)))


# Processes that compile at the same time


@pytest.mark.parametrize(("images", "batch"), [(1, 1), models.slow(0, 2), models.slow(2, 2)])
def test_a_rehearsal_asks_for_what_a_request_asks_for(folder, counted, monkeypatch, images, batch):
    asked = []
    monkeypatch.setattr("vitcop_compile.optimized.fill", lambda provider, *rest: asked.append((provider, rest[3])))
    fast = optimize(models.shared(3), THIRD, backend="counted")
    fast.warmup(batch_size=batch, text_tokens=20, images=images)
    provider, found = asked.pop()
    assert len(found) == len(fast.compiled) and all(provider.has(*ask) for ask in found)
    provider.release()
    assert all(provider.has(*ask) for ask in found)  # kept
    assert not provider.has("vision", (7,))


SCRIPTS = {"dies": "raise SystemExit('no memory')", "hangs": "import time; time.sleep(600)"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_process_that_fails_costs_nothing_but_time(folder, counted, monkeypatch, caplog, name):
    started = []

    def start(told: bytes, compilers: int) -> Any:
        with open(os.devnull, "r+b") as null:
            said = (folder.parent / name).open("w+b")
            command = [sys.executable, "-S", "-c", SCRIPTS[name]]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=said)
        started.append(process)
        return process, said

    monkeypatch.setattr(fillers, "_start", start)
    monkeypatch.setattr(fillers, "_LEAST_SECONDS", 5.0 if name == "dies" else 0.0)
    monkeypatch.setattr(fillers, "_TIMES", 0.0)
    fast = optimize(models.shared(3), THIRD, backend="counted")
    fast.warmup(text_tokens=20, processes=2)
    assert counted == ["compile"] * 3 and len(started) == 1 and started[0].poll() is not None
    assert {"dies": "the rest is compiled here: no memory", "hangs": "longer: ended"}[name] in caplog.text
    assert answer(fast)


@pytest.mark.slow
def test_a_process_ends_with_its_parent():
    """Its input ends before it was told anything."""
    code = "from vitcop_compile.filling import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process.stdin.close()
    assert process.wait(120) != 0


SECOND = """
import json, sys
sys.path.insert(0, sys.argv[1])
import models, torch, vitcop_compile
from torch._inductor.cpp_builder import CppBuilder
done = {"exports": 0, "compilers": 0, "dynamo": 0}
def count(owner, name, what):
    plain = getattr(owner, name)
    def call(*args, **named):
        done[what] += 1
        return plain(*args, **named)
    setattr(owner, name, call)
count(torch.export, "export", "exports")
count(CppBuilder, "build", "compilers")
count(torch, "compile", "dynamo")
model = models.llava(3)
if sys.argv[4]:
    import torchao.quantization
    config = getattr(torchao.quantization, sys.argv[4])()
    torchao.quantization.quantize_(model, config, filter_fn=lambda module, name: name.endswith("q_proj"))
fast = vitcop_compile.optimize(model, vitcop_compile.ViTCoPConfig.preset("1/3"), backend=sys.argv[2])
if sys.argv[3] == "warmup":
    fast.warmup(text_tokens=14, max_new_tokens=64, processes=2)
out = fast.generate(input_ids=models.prompt(5, 9, 0), pixel_values=models.pixels(), max_new_tokens=3, do_sample=False)
print(json.dumps(done | {"tokens": out[0, -3:].tolist()}))
"""


def process(folder: Path, backend: str, how: str = "", weights: str = "") -> dict[str, Any]:
    environment = os.environ | {"VITCOP_CACHE": str(folder), "TORCHINDUCTOR_VEC_ISA_OK": "0", "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # compilers are then called, and counted, in the process itself
    command = [sys.executable, "-c", SECOND, str(Path(__file__).parent), backend, how, weights]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", models.exhaustive("aotinductor"), "onnxruntime"])
def test_a_second_process_exports_and_compiles_nothing(tmp_path, backend):
    first = process(tmp_path / "kept", backend, "warmup" if backend == "inductor" else "")
    assert first["exports"] >= 2
    os.rename(tmp_path / "kept", tmp_path / "moved")
    second = process(tmp_path / "moved", backend)
    expected = answer(optimize(models.shared(3), THIRD))
    assert first["tokens"] == expected
    assert second == {"exports": 0, "compilers": 0, "dynamo": 0, "tokens": expected}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "weights"),
    [
        models.exhaustive("inductor", "Int8DynamicActivationInt8WeightConfig"),
        models.exhaustive("aotinductor", "Int8DynamicActivationInt8WeightConfig"),
        models.exhaustive("onnxruntime", "Int8WeightOnlyConfig"),
    ],
)
def test_programs_of_quantised_models_are_kept(tmp_path, backend, weights):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    first = process(tmp_path, backend, "", weights)
    second = process(tmp_path, backend, "", weights)
    assert first["exports"] >= 2 and second == {"exports": 0, "compilers": 0, "dynamo": 0, "tokens": first["tokens"]}
    model = models.llava(3)
    torchao.quantize_(model, getattr(torchao, weights)(), filter_fn=lambda module, name: name.endswith("q_proj"))
    assert first["tokens"] == answer(vitcop_compile.optimize(model, THIRD, backend="eager"))


@pytest.mark.slow
def test_a_kept_program_of_a_quantised_model_reads_the_bytes_of_another(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")

    def quantised(seed: int) -> Any:
        model = models.llava(3, seed=seed)
        config = torchao.Int8DynamicActivationInt8WeightConfig()
        torchao.quantize_(model, config, filter_fn=lambda module, name: name.endswith("layers.1.mlp.up_proj"))
        return vitcop_compile.optimize(model, ViTCoPConfig.dense(), backend="eager")

    one, other = quantised(0), quantised(5)
    keeper = backends.backend_of("inductor").keeper
    keeper.compile(one.programs.export_extend(1, 1, (9,)), tmp_path, Bindings(one.model))
    loaded = keeper.load(tmp_path, Bindings(other.model), CPU)
    told = [value.clone() for value in other.programs.extend_inputs(1, 1, (9,))]

    def said(program: Any) -> torch.Tensor:
        return program(*[value.clone() for value in told])[0]

    with torch.no_grad():
        eager, first = (fast.programs.export_extend(1, 1, (9,)).module(check_guards=False) for fast in (other, one))
        found = said(loaded)
        torch.testing.assert_close(found, said(eager), atol=1e-2, rtol=0)  # a rounding to another int8 is 1e-3
        assert not torch.allclose(found, said(first), atol=0.1)
        other.model.model.language_model.layers[1].mlp.up_proj.weight.qdata.neg_()  # and follows them
        torch.testing.assert_close(said(loaded), said(eager), atol=1e-2, rtol=0)
        assert not torch.allclose(said(loaded), found, atol=0.1)


def test_quantised_models_are_told_apart_by_how_they_are_quantised(folder):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")

    def quantised(config: Any, seed: int = 0) -> Any:
        model = models.llava(3, seed=seed)
        torchao.quantize_(model, config)
        return model

    configs = [
        lambda: torchao.Int8WeightOnlyConfig(),
        lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
        lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)),
        lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(8)),
        lambda: torchao.Float8WeightOnlyConfig(),
    ]
    each = [fingerprint.of_model(quantised(config())) for config in configs]
    assert len({fingerprint.of_model(models.llava(3)), *each}) == 1 + len(configs)
    assert fingerprint.of_model(quantised(configs[1](), seed=5)) == each[1]


def test_parts_of_a_quantised_weight_are_bound_and_no_process_is_started(tmp_path, folder, counted, monkeypatch, caplog):
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    one, other = models.llava(3), models.llava(3, seed=4)
    for model in (one, other):
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    parts = one.lm_head.weight
    Bindings(one).write(tmp_path, {"values": parts.qdata.detach(), "scale": parts.scale})
    read = Bindings(other).read(tmp_path, CPU)
    assert read["values"].data_ptr() == other.lm_head.weight.qdata.data_ptr()
    assert read["scale"].data_ptr() == other.lm_head.weight.scale.data_ptr()
    monkeypatch.setattr(fillers, "_start", lambda *_: pytest.fail("started a process"))
    with caplog.at_level(logging.INFO, "vitcop_compile"):
        fast = vitcop_compile.optimize(one, THIRD, backend="counted")
        fast.warmup(text_tokens=20, processes=2)
    assert "all is compiled in this process: quantised weights are not what" in caplog.text
    assert counted == ["compile"] * 3


def test_onnxruntime_follows_the_values_that_it_copies():
    from vitcop_compile.export.ort_backend import small_values

    model, other = models.llava(3), models.llava(3)
    assert small_values(model) == small_values(other)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    assert small_values(model) == small_values(other)  # read from the model when a program is loaded
    with torch.no_grad():
        other.model.language_model.norm.weight[0] += 1
    assert small_values(model) != small_values(other)


def test_kept_is_for_backends_that_can_and_the_cpu(folder):
    model = models.shared(3)
    assert kept.kept(model, THIRD, "eager", backends.backend_of("eager").keeper) is None
    assert kept.kept(model, THIRD, "inductor", backends.backend_of("inductor").keeper) is not None
    with torch.device("meta"):
        planned = type(model)(model.config)
    assert kept.kept(planned, THIRD, "inductor", backends.backend_of("inductor").keeper) is None
