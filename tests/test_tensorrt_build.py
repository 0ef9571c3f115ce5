"""What is refused before a TensorRT build, what is checked after it, and what the death of a builder looks like."""

import dataclasses
import importlib
import importlib.util
import sys
import types

import onnx_ir
import pytest
import torch
from vitcop_compile.export import (
    FolderError,
    export,
    tensorrt,
    tensorrt_build,
    tensorrt_check,
    writer,
)
from vitcop_compile.export.manifest import ProgramSpec, TensorSpec

import vitcop_compile as vc
from vitcop_compile.errors import ConfigError, UnsupportedError
from vitcop_compile.toy import small_llava

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed: pip install 'vitcop-compile[tensorrt-rtx]'")
SIZE = dict(vision_hidden=32, vision_layers=2, vision_heads=2, hidden=32, layers=3, heads=2, intermediate=64, vocab=260)


def graph(path, op, inputs, attributes=(), dtype="FLOAT16", outputs=1, shape=(1, 8), versions=18):
    """A file with a single node, called n0."""
    names = {value.name: value for value in inputs}
    given = [value for value in names.values() if value.const_value is None]
    made = [onnx_ir.Value(name=f"out_{i}", type=onnx_ir.TensorType(onnx_ir.DataType[dtype])) for i in range(outputs)]
    for value in made:
        value.shape = onnx_ir.Shape(shape)
    node = onnx_ir.Node("", op, inputs, attributes=list(attributes), outputs=made, name="n0")
    constants = [value for value in names.values() if value.const_value is not None]
    whole = onnx_ir.Graph(given, made[:1], nodes=[node], initializers=constants, opset_imports={"": versions}, name="g")
    onnx_ir.save(onnx_ir.Model(whole, ir_version=10), path)
    return path


def tensor(name, shape, dtype="FLOAT16"):
    kind = onnx_ir.TensorType(onnx_ir.DataType[dtype])
    return onnx_ir.Value(name=name, shape=onnx_ir.Shape(shape), type=kind)


def constant(name, values):
    return onnx_ir.Value(name=name, const_value=onnx_ir.tensor(values, dtype=onnx_ir.DataType.INT64, name=name))


def test_topk_beyond_the_limit_names_node_and_remedy(tmp_path):
    path = graph(tmp_path / "a.onnx", "TopK", [tensor("x", (1, 5000)), constant("k", [3841])], outputs=2)
    with pytest.raises(UnsupportedError, match=r"prefill .*node n0 \(TopK\) takes K=3841, the most is 3840: lower the budget"):
        tensorrt_check.check_graph(path, "prefill")
    path = graph(tmp_path / "b.onnx", "TopK", [tensor("x", (1, 5000)), constant("k", [3840])], outputs=2)
    assert tensorrt_check.check_graph(path, "prefill") == {"TopK": ["n0"]}


def test_topk_with_a_computed_k_is_refused(tmp_path):
    path = graph(tmp_path / "a.onnx", "TopK", [tensor("x", (1, 50)), tensor("k", (1,), "INT64")], outputs=2)
    with pytest.raises(UnsupportedError, match=r"n0 \(TopK\) takes a K that is no constant: export it at static budgets"):
        tensorrt_check.check_graph(path, "vision")


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "dtype", "match"),
    [
        ("Relu", [tensor("x", (1, 8), "DOUBLE")], [], "DOUBLE", r"tensor x is DOUBLE: compute in float32; node n0 \(Relu\)"),
        ("Relu", [tensor("x", (1, 8), "UINT16")], [], "UINT16", r"n0 \(Relu\) gives UINT16: use one of FLOAT, FLOAT16"),
        ("NonZero", [tensor("x", (1, 8))], [], "INT64", r"node n0 is NonZero"),
        ("Attention", [tensor("x", (1, 2, 8, 16))] * 3, [], "FLOAT16", r"n0 \(Attention\) takes one tensor as query, key"),
    ],
)
def test_graphs_no_builder_takes_are_refused_by_node(tmp_path, op, inputs, attributes, dtype, match):
    with pytest.raises(UnsupportedError, match=match):
        tensorrt_check.check_graph(graph(tmp_path / "a.onnx", op, inputs, attributes, dtype), "vision")


SPEC = ProgramSpec("vision", "v.plan", None, (TensorSpec("x", "float16", (1, 8)),), (TensorSpec("out_0", "float16", (1, 8)),))


def build_one(path, spec=SPEC, operators=None, **options):
    return tensorrt.build_engine(
        path,
        path.parent / "v.plan",
        spec,
        operators or {},
        "tensorrt_rtx",
        tensorrt.BuildOptions(**options),
        lambda text: None,
    )


@needs_rtx
def test_rtx_parser_refusals_carry_the_node(tmp_path):
    path = graph(tmp_path / "a.onnx", "Unique", [tensor("x", (8,))])
    with pytest.raises(UnsupportedError, match=r"vision, built with tensorrt_rtx: .*does not know Unique; n0 \(Unique\)"):
        build_one(path, operators={"Unique": ["n0"]})
    axes = onnx_ir.AttrInt64("axis", 7)
    path = graph(tmp_path / "b.onnx", "Softmax", [tensor("x", (1, 8))], [axes])
    with pytest.raises(UnsupportedError, match=r"the parser refuses the graph; n0 \(Softmax\): "):
        build_one(path)


@needs_rtx
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (dict(inputs=(TensorSpec("y", "float16", (1, 8)),)), r"inputs are \['x'\], vitcop.json says \['y'\]"),
        (dict(outputs=(TensorSpec("out_0", "float32", (1, 8)),)), r"out_0 is float16 \[1, 8\], vitcop.json says float32"),
        (dict(outputs=(TensorSpec("out_0", "float16", (1, 9)),)), r"out_0 is float16 \[1, 8\], .*says float16 \[1, 9\]"),
    ],
)
def test_rtx_engine_that_differs_from_the_manifest_is_refused(tmp_path, change, match):
    path = graph(tmp_path / "a.onnx", "Relu", [tensor("x", (1, 8))])
    with pytest.raises(FolderError, match=match):
        build_one(path, dataclasses.replace(SPEC, **change))


@needs_rtx
def test_rtx_build_reports_progress_and_writes_the_plan(tmp_path):
    """The builder itself, in this process: the events it sends are what the parent shows and checks."""
    events = []
    spec = dict(
        product="tensorrt_rtx",
        onnx=str(graph(tmp_path / "a.onnx", "Relu", [tensor("x", (1, 8))])),
        plan=str(tmp_path / "a.plan"),
        operators={"Relu": ["n0"]},
        profiles=[],
        workspace=1 << 20,
        timing_cache=None,
        optimization_level=1,
        load=False,
    )
    result = tensorrt_build.build(spec, lambda event, **values: events.append((event, values)))
    assert (tmp_path / "a.plan").stat().st_size == result["bytes"]
    kinds = [event for event, _ in events]
    assert kinds.count("network") == 1 and "progress" in kinds and "log" in kinds
    phases = {values["phase"] for event, values in events if event == "progress"}
    assert "Building engine" in phases


def test_static_dimension_beside_a_dynamic_one_may_be_unknown_and_a_budget_may_not():
    stated = dataclasses.replace(SPEC, outputs=(TensorSpec("k", "float16", (1, 2, "rows-4", 16)),))
    found = {"inputs": [{"name": "x", "dtype": "float16", "shape": [1, 8]}]}

    def check(shape):
        tensorrt.check_tensors("x", stated, found | {"outputs": [{"name": "k", "dtype": "float16", "shape": shape}]})

    check([1, 2, -1, 16])
    check([1, -1, -1, 16])
    for shape in ([1, 3, -1, 16], [1, 2, 9, 16], [1, 2, -1]):
        with pytest.raises(FolderError, match="k is float16"):
            check(shape)
    with pytest.raises(FolderError, match=r"x is float16 \[1, -1\]"):
        tensorrt.check_tensors("x", SPEC, {"inputs": [{"name": "x", "dtype": "float16", "shape": [1, -1]}], "outputs": []})


def test_profiles_of_a_loaded_engine_are_compared():
    spec = ProgramSpec("extend", "t", (2, 8), (TensorSpec("ids", "int64", (1, "rows")),), (), ((2, 8, 8),))
    tensorrt.check_profiles("extend", spec, {"ids": [[[1, 2], [1, 8], [1, 8]]]})
    with pytest.raises(FolderError, match=r"profiles of ids are \[\[\[1, 2\], \[1, 4\], \[1, 8\]\]\], vitcop.json says"):
        tensorrt.check_profiles("extend", spec, {"ids": [[[1, 2], [1, 4], [1, 8]]]})


@pytest.mark.parametrize(
    ("code", "match"),
    [
        (
            "import os; os.write(2, b'native trouble'); os.kill(os.getpid(), 11)",
            r"ended by SIGSEGV.*last lines: native trouble",
        ),
        ("import os; os.kill(os.getpid(), 9)", r"ended by SIGKILL \(out of memory\?\)"),
        ("import sys; sys.exit(3)", r"ended with exit status 3 and no engine"),
        ('print(\'{"event": "log", "te\', flush=True)', r"ended with exit status 0 and no engine"),
        (
            'import os; print(\'{"event": "log", "text": "said this"}\', flush=True); os.abort()',
            r"SIGABRT.*last lines: said this",
        ),
    ],
)
def test_death_of_the_builder_is_an_error_message(tmp_path, monkeypatch, code, match):
    monkeypatch.setattr(tensorrt, "_command", lambda: [sys.executable, "-c", code])
    with pytest.raises(UnsupportedError, match=match):
        build_one(tmp_path / "a.onnx")


def test_builder_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt, "_command", lambda: [sys.executable, "-c", "import time; time.sleep(3600)"])
    with pytest.raises(UnsupportedError, match=r"not done after timeout=0\.3 s; raise it"):
        build_one(tmp_path / "a.onnx", timeout=0.3)


@needs_rtx
def test_crash_of_the_rtx_builder_leaves_no_folder(tmp_path, monkeypatch):
    crash = "import os; os.kill(os.getpid(), 11)"
    monkeypatch.setattr(tensorrt, "_command", lambda: [sys.executable, "-c", crash])
    every = writer.wanted_programs
    monkeypatch.setattr(writer, "wanted_programs", lambda *args: every(*args)[:1])
    monkeypatch.setattr(writer, "check_programs", lambda *args: None)
    tiny = vc.optimize(small_llava(**SIZE, image_size=56, dtype=torch.float16), vc.ViTCoPConfig.preset("1/3"))
    with pytest.raises(UnsupportedError, match=r"vision, built with tensorrt_rtx: the builder's process was ended by SIGSEGV"):
        export(tiny, tmp_path / "out", format="tensorrt", max_text_len=8, max_new_tokens=4, product="tensorrt_rtx")
    assert list(tmp_path.iterdir()) == []


@needs_rtx
@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(product="openvino"), ConfigError, r"product='openvino' is unknown"),
        (dict(workspace=0), ConfigError, r"workspace=0 is out of range: at least 1, or None"),
        (dict(optimization_level=6), ConfigError, r"optimization_level=6 is out of range: 0 to 5"),
        (dict(timeout=0), ConfigError, r"timeout=0 is out of range"),
        (dict(plugins=[]), ConfigError, r"plugins are no options of format='tensorrt': use product, workspace"),
        (
            dict(product="tensorrt_rtx", timing_cache="c"),
            ConfigError,
            r"timing_cache has no effect with product='tensorrt_rtx'",
        ),
        (dict(timing_cache="."), ConfigError, r"timing_cache='\.' is a folder"),
        (dict(product="tensorrt"), UnsupportedError, r"tensorrt cannot be imported .*pip install tensorrt"),
    ],
)
def test_options_are_refused_before_any_work(monkeypatch, options, error, match):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(error, match=match):
        tensorrt.finisher(torch.float16, **options)


def test_float32_is_refused_with_the_remedy():
    with pytest.raises(
        UnsupportedError, match=r"float16 or bfloat16, the model is float32: load it with dtype=torch\.float16"
    ):
        tensorrt.finisher(torch.float32)


def test_product_none_takes_what_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UnsupportedError, match=r"tensorrt cannot be imported .*; or tensorrt_rtx cannot be imported"):
        tensorrt.product_of(None)
    stub = types.ModuleType("tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stub)
    assert tensorrt.product_of(None) == ("tensorrt_rtx", stub)
    full = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", full)
    assert tensorrt.product_of(None) == ("tensorrt", full)
