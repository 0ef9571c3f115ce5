"""The runner of engines and the torch-tensorrt backend, with TensorRT, torch-tensorrt and CUDA stood in for."""

import ctypes
import dataclasses
import math
import sys
import types

import pytest
import torch
from vitcop_compile.export import (
    FolderError,
    tensorrt_runtime,
)
from vitcop_compile.export.manifest import ProgramSpec, TensorSpec
from vitcop_compile.export.ort import resolve

import vitcop_compile as vc
from vitcop_compile import backends, tensorrt_backend
from vitcop_compile.errors import InputError, UnsupportedError
from vitcop_compile.toy import small_llava

SIZE = dict(vision_hidden=32, vision_layers=2, vision_heads=2, hidden=32, layers=3, heads=2, intermediate=64, vocab=260)


# torch-tensorrt is stood in for: it imports neither without its CUDA libraries nor without TensorRT itself.


class FakeCompiler:
    """torch_tensorrt.dynamo.compile as far as the backend goes by it: a partitioned graph, then a program."""

    def __init__(self, left):
        self.left, self.calls = left, []

    def __call__(self, program, arg_inputs, **options):
        self.calls.append(options)
        module = program.module(check_guards=False)
        return module if not options.get("dryrun") else self.plan(module)

    def plan(self, module):
        graph = torch.fx.Graph()
        root = torch.nn.Module()
        root._run_on_acc_0 = torch.nn.Identity()
        value = graph.call_module("_run_on_acc_0", (graph.placeholder("x"),))
        picks = [graph.call_function(__import__("operator").getitem, (value, i)) for i in range(2)]
        for i in range(self.left):
            picks[0] = graph.call_function(torch.ops.aten.cumsum.default, (picks[0], i))
        graph.output(tuple(picks))
        return torch.fx.GraphModule(root, graph)


@pytest.fixture
def fake(monkeypatch):
    def install(left):
        compiler = FakeCompiler(left)
        package = types.SimpleNamespace(dynamo=types.SimpleNamespace(compile=compiler))
        monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return compiler

    return install


def test_torch_tensorrt_is_asked_for_one_engine_and_its_decode_mutates_nothing(fake):
    compiler = fake(0)
    settings = vc.ViTCoPConfig.preset("1/3")
    tiny = small_llava(**SIZE, image_size=56)
    backend = backends.backend_of("tensorrt")
    assert not backend.in_place
    optimized = vc.optimize(tiny, settings, backend="eager")
    programs, rows = optimized.programs, [64 + tokens for tokens in optimized.schedule.group_tokens()]
    step = backends.writing_rows(
        backend(programs.export_extend(1, 1, rows, in_place=False)), optimized.schedule.groups, filled=True
    )
    assert [options.get("dryrun", False) for options in compiler.calls] == [True, False]
    assert compiler.calls[1]["require_full_compilation"] and compiler.calls[1]["min_block_size"] == 1
    inputs, again = (programs.extend_inputs(1, 1, rows) for _ in range(2))
    (logits,) = step(*inputs)
    want = programs.export_extend(1, 1, rows).module(check_guards=False)(*again)
    assert torch.allclose(logits, want[0], atol=1e-4)
    for cache, expected in zip(inputs[5:], again[5:], strict=True):
        assert torch.allclose(cache, expected, atol=1e-5)


def test_torch_tensorrt_fallback_is_refused_by_node(fake):
    compiler = fake(2)
    tiny = vc.optimize(small_llava(**SIZE, image_size=56), vc.ViTCoPConfig.preset("1/3"), backend="eager")
    with pytest.raises(UnsupportedError, match=r"leave 2 nodes in PyTorch: cumsum_default \(aten.cumsum.default\), cumsum"):
        rows = [64] * len(tiny.schedule.group_tokens())
        tensorrt_backend.compile_whole(tiny.programs.export_extend(1, 1, rows, in_place=False))
    assert len(compiler.calls) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a CUDA device")
def test_torch_tensorrt_needs_a_gpu():
    with pytest.raises(UnsupportedError, match=r"backend='tensorrt' builds and runs on a CUDA device.*use backend='inductor'"):
        vc.optimize(small_llava(**SIZE, image_size=56), backend="tensorrt")


def test_torch_tensorrt_missing_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(UnsupportedError, match=r"needs torch-tensorrt .*pip install 'vitcop-compile\[tensorrt\]'"):
        backends.backend_of("tensorrt")


class FakeEngine:
    """An engine of TensorRT's interface on CPU tensors: every output is filled with the number of rows of `ids`."""

    def __init__(self, spec):
        self.tensors = {value.name: value for value in (*spec.inputs, *spec.outputs)}
        self.profiles, self.inputs = spec.profiles, {value.name for value in spec.inputs}
        self.num_io_tensors, self.num_optimization_profiles = len(self.tensors), len(spec.profiles)
        self.shapes, self.addresses, self.chosen = {}, {}, []

    def get_tensor_name(self, i):
        return list(self.tensors)[i]

    def get_tensor_shape(self, name):
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.tensors[name].shape)

    def get_tensor_dtype(self, name):
        return types.SimpleNamespace(name={"int64": "INT64", "float32": "FLOAT"}[self.tensors[name].dtype])

    def get_tensor_mode(self, name):
        return "in" if name in self.inputs else "out"

    def get_tensor_profile_shape(self, name, i):
        return [resolve(self.tensors[name].shape, rows) for rows in self.profiles[i]]

    def create_execution_context(self):
        return self

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def set_optimization_profile_async(self, index, stream):
        self.chosen.append(index)

    def execute_async_v3(self, stream):
        rows = self.shapes["ids"][1]
        for name, spec in self.tensors.items():
            if name not in self.inputs:
                count = math.prod(resolve(spec.shape, rows))
                ctypes.memmove(self.addresses[name], (ctypes.c_float * count)(*[rows] * count), 4 * count)
        return True


class FakeStream:
    cuda_stream = 0

    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


def fake_program(monkeypatch, tmp_path, spec):
    """The runner over `FakeEngine`: its bookkeeping, with nothing of CUDA or TensorRT."""
    engine = FakeEngine(spec)
    runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda data: engine if data == b"plan" else None)
    trt = types.SimpleNamespace(
        __name__="fake",
        __version__="0",
        ILogger=object,
        Runtime=lambda logger: runtime,
        TensorIOMode=types.SimpleNamespace(INPUT="in"),
    )
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    (tmp_path / "p").write_bytes(b"plan")
    return engine, lambda name: tensorrt_runtime.TensorRtProgram(tmp_path / name, spec, trt, torch.device("cpu"))


ROWS = ProgramSpec(
    "extend",
    "extend/engine.plan",
    (4, 8),
    (TensorSpec("ids", "int64", (1, "rows")),),
    (TensorSpec("key_0", "float32", (1, "rows-1")),),
    ((4, 4, 4), (8, 8, 8)),
)


def test_runner_binds_addresses_and_selects_the_profile(monkeypatch, tmp_path):
    engine, load = fake_program(monkeypatch, tmp_path, ROWS)
    program = load("p")
    for rows in (4, 8, 8, 4):
        (out,) = program(torch.zeros(rows, 1, dtype=torch.int64).T)
        assert torch.equal(out, torch.full((1, rows - 1), float(rows)))
    assert engine.chosen == [1, 0]
    with pytest.raises(InputError, match=r"a turn of 5 rows is in none of the profiles \[\(4, 4, 4\), \(8, 8, 8\)\]"):
        program(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(InputError, match="9 rows of a turn, the engine takes 4 to 8"):
        program(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(InputError, match="an input is on meta, the engine runs on cpu"):
        program(torch.zeros(1, 4, dtype=torch.int64, device="meta"))


def test_outputs_are_new_in_every_call_but_those_of_decode(monkeypatch, tmp_path):
    ids = torch.zeros(1, 4, dtype=torch.int64)
    for kind, same in (("extend", False), ("decode", True)):
        _, load = fake_program(monkeypatch, tmp_path, dataclasses.replace(ROWS, kind=kind))
        program = load("p")
        assert (program(ids)[0].data_ptr() == program(ids)[0].data_ptr() and program(ids)[0] is program(ids)[0]) is same


def test_plan_that_does_not_load_or_differs_is_refused(monkeypatch, tmp_path):
    (tmp_path / "bad").write_bytes(b"?")
    engine, load = fake_program(monkeypatch, tmp_path, ROWS)
    with pytest.raises(FolderError, match=r"extend/engine\.plan cannot be loaded by fake 0 on none: no reason given; build"):
        load("bad")
    engine.profiles = ((4, 4, 4), (4, 8, 8))
    with pytest.raises(FolderError, match=r"profiles of ids are"):
        load("p")
