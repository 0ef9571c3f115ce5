"""ONNX folders: what they hold, and that what runs from them equals what they were made from."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import models
import onnx
import pytest
import reference_llava as reference
import torch
from folders import BUDGET, CONFIG, FOLDERS, LAYERS, NEW, SETTINGS, SHIFTS, STEPS, TEXT, folder, generate, optimized
from golden import largest_error
from models import pad, pixels, prompt, text
from torch import Tensor
from vitcop_compile.export import EngineModel, FolderError, Manifest, export, writer
from vitcop_compile.export import onnx as onnx_export
from vitcop_compile.export.ort import OrtProgram

import vitcop_compile as vc
from vitcop_compile import ConfigError, InputError, UnsupportedError
from vitcop_compile.cache import PrunedCache


@pytest.fixture(scope="module")
def fast() -> Any:
    """The model that the folders are made from, on torch's eager backend."""
    return optimized()


@pytest.fixture(scope="module")
def engine() -> Callable[[str], EngineModel]:
    return functools.cache(lambda name: EngineModel.from_pretrained(folder(name), threads=1))


# Equality


@pytest.mark.parametrize("name", ["dynamic", "pair"])
@pytest.mark.parametrize("ids", [prompt(), prompt(2, 14, seed=1), prompt(0, 2), prompt(0, 0), prompt(20, 4, seed=2)])
@pytest.mark.covers("folder", family="llava")
def test_image_prompts(name: str, ids: Tensor, engine: Callable, fast: Any) -> None:
    images = pixels(seed=3)
    told = reference.run(models.shared(LAYERS), ids, images, SETTINGS, STEPS)
    tokens, logits = generate(engine(name), ids, images)
    assert tokens[0].tolist() == told.tokens
    torch.testing.assert_close(logits[0], torch.stack(told.logits), atol=1e-3, rtol=0)
    assert torch.equal(tokens[:1], generate(fast, ids, images)[0])
    assert torch.equal(tokens[:1], tokens[-1:])


@pytest.mark.parametrize("name", ["dynamic", "pair"])
@pytest.mark.parametrize("length", [1, 2, 10, 11, TEXT])
def test_text_prompts(name: str, length: int, engine: Callable, fast: Any) -> None:
    ids = torch.tensor([text(length, seed=length)])
    expected, stock = generate(models.shared(LAYERS), ids)
    tokens, logits = generate(engine(name), ids)
    assert torch.equal(tokens[:1], expected)
    torch.testing.assert_close(logits[:1], stock, atol=1e-3, rtol=0)
    assert torch.equal(tokens[:1], generate(fast, ids)[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_unequal_lengths(side: str, engine: Callable) -> None:
    prompts, images = [prompt(4, 5), prompt(9, 12, seed=1)], pixels(2)
    ids, mask = pad(prompts, side)
    tokens, logits = generate(engine("pair"), ids, images, 12, attention_mask=mask)
    for row, one in enumerate(prompts):
        told = reference.run(models.shared(LAYERS), one, images[row : row + 1], SETTINGS, 12)
        assert tokens[row].tolist() == told.tokens
        torch.testing.assert_close(logits[row], torch.stack(told.logits), atol=1e-3, rtol=0)


def test_text_batch_of_unequal_lengths(engine: Callable, fast: Any) -> None:
    ids, mask = pad([torch.tensor([text(3)]), torch.tensor([text(20, 1)])], "left")
    tokens, _ = generate(engine("pair"), ids, None, 12, attention_mask=mask)
    assert torch.equal(tokens, generate(fast, ids, None, 12, attention_mask=mask)[0])


def test_beams_fill_the_batch(engine: Callable, fast: Any) -> None:
    settings = {"max_new_tokens": 10, "num_beams": 2, "do_sample": False, "pixel_values": pixels()}
    found, expected = (model.generate(prompt(), **settings) for model in (engine("pair"), fast))
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match=r"3 sequences \(prompts times beams\), the engine was built for 2"):
        engine("pair").generate(prompt(), **(settings | {"num_beams": 3}))


def test_streaming_and_caches_that_stay(engine: Callable, fast: Any) -> None:
    class Streamer:
        got: list[int] = []  # noqa: RUF012

        def put(self, value: Tensor) -> None:
            self.got.extend(value.flatten().tolist())

        def end(self) -> None:
            self.got.append(-1)

    out = engine("dynamic").generate(prompt(), pixel_values=pixels(), max_new_tokens=6, do_sample=False, streamer=Streamer())
    assert Streamer.got == [*out[0].tolist(), -1]
    first = engine("dynamic")(input_ids=prompt(), pixel_values=pixels())
    cache: PrunedCache = first.past_key_values
    assert cache.layer_rows() == [TEXT + BUDGET + NEW - shift for shift in SHIFTS]
    before = [buffer.data_ptr() for buffer in cache.buffers]
    engine("dynamic")(input_ids=prompt()[:, :1], past_key_values=cache)
    assert [buffer.data_ptr() for buffer in cache.buffers] == before


def test_bytes_of_a_step(engine: Callable) -> None:
    """A step hands over one row of keys and values for each layer, and the caches stay where they are."""
    model = engine("dynamic")
    spec = model.manifest.program("decode")
    program = model.engines._get(spec)
    cache = model(input_ids=prompt(), pixel_values=pixels()).past_key_values
    held = cache.held_buffers
    given = (held.token, held.last, held.length, held.position, held.removed, *held.layers)
    assert all(tensor.is_contiguous() for tensor in given)  # what is not is copied before it is bound
    copies = [buffer.clone() for buffer in cache.buffers]
    logits, *rows = program(*given)
    assert all(torch.equal(*pair) for pair in zip(copies, cache.buffers))
    assert sum(row.nbytes for row in rows) == model.engines.bytes_per_step() == LAYERS * 2 * 64 * 4
    assert model.engines.bytes_per_step() * 50 < sum(buffer.nbytes for buffer in cache.buffers)
    assert logits.shape == (1, 1, models.VOCAB)


@pytest.mark.slow
def test_half_precision(tmp_path: Path) -> None:
    model = models.llava(LAYERS).half()
    half = vc.optimize(model, CONFIG, backend="eager")
    out = export(half, tmp_path / "f", max_text_len=16, max_new_tokens=4, prompt_buckets=[16])
    engine = EngineModel.from_pretrained(out)
    assert engine.dtype == torch.float16
    given = {"pixel_values": pixels().half()}
    found = engine(input_ids=prompt(), **given).logits
    expected = models.optimize(models.shared(LAYERS), CONFIG)(input_ids=prompt(), pixel_values=given["pixel_values"].float())
    assert found.dtype == torch.float16
    assert largest_error(found.float(), expected.logits) < 0.05 * expected.logits.abs().max()
    assert generate(engine, prompt(), given["pixel_values"], 4)[0].shape == (1, 4)


# What the files hold


def graphs(path: Path) -> list[tuple[str, Any]]:
    """(kind, ModelProto without its weights) of every program."""
    specs = Manifest.read(path).programs
    return [(spec.kind, onnx.load(path / spec.file, load_external_data=False)) for spec in specs]


@pytest.mark.parametrize("name", FOLDERS)
def test_graphs(name: str) -> None:
    path, (_, opset, _) = folder(name), FOLDERS[name]
    for kind, model in graphs(path):
        onnx.checker.check_model(path / Manifest.read(path).program(kind).file, full_check=True)
        nodes = list(model.graph.node)
        assert {node.domain for node in nodes} <= {"", "ai.onnx"}
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
        assert not model.functions and not any(a.HasField("g") for node in nodes for a in node.attribute)
        names = [node.op_type for node in nodes]
        assert not {"NonZero", "Loop", "If", "Scan", "Unique", "Compress"} & set(names)
        scatters = [
            a.s for node in nodes if node.op_type.startswith("Scatter") for a in node.attribute if a.name == "reduction"
        ]
        assert set(scatters) <= {b"none"}
        # Over caches, held and new rows are attended to apart: a decomposition at every opset. The vision stage adds its CLS
        # scores.
        attentions = names.count("Attention") + names.count("Softmax")
        assert attentions == {"vision": 4}.get(kind, LAYERS)
        if opset == 23 and kind == "prefill":
            assert names.count("Attention") == LAYERS


@pytest.mark.parametrize("name", FOLDERS)
def test_only_rows_are_dynamic(name: str) -> None:
    for kind, model in graphs(folder(name)):
        for value in (*model.graph.input, *model.graph.output):
            dims = value.type.tensor_type.shape.dim
            dynamic = [i for i, dim in enumerate(dims) if not dim.HasField("dim_value")]
            rows = {"prefill": r"positions|(key|value)_\d", "extend": r"new_(key|value)_\d"}.get(kind)
            if name == "dynamic" and rows and value.name == "ids":
                assert dynamic == [1]
            elif name == "dynamic" and rows and re.fullmatch(rows, value.name):
                assert dynamic == [2]
            else:
                assert not dynamic, (kind, value.name)


def test_weights_are_stored_once() -> None:
    path = folder("dynamic")
    places: dict[str, set] = {}
    for kind, model in graphs(path):
        external = [{entry.key: entry.value for entry in t.external_data} for t in model.graph.initializer if t.data_location]
        assert {entry["location"] for entry in external} == {"weights.bin"}
        places[kind] = {(entry["offset"], entry["length"]) for entry in external}
        assert all(len(t.raw_data) < 1024 for t in model.graph.initializer)
    assert places["extend"] <= places["prefill"] and len(places["extend"] & places["decode"]) >= 7 * LAYERS + 2
    # Nothing of the machine that exported.
    assert not any(
        b"/site-packages/" in file.read_bytes() or b"vitcop_compile" in file.read_bytes() for file in path.glob("*.onnx")
    )


def test_manifest(fast: Any) -> None:
    values = json.loads((folder("pair") / "vitcop.json").read_text())
    assert (values["format_version"], values["product"], values["dtype"], values["opset"]) == (3, "onnx", "float32", 18)
    assert values["kv_rows"] == [TEXT + BUDGET + NEW - shift for shift in SHIFTS]
    assert values["schedules"][0]["visual_tokens"] == [BUDGET - shift for shift in SHIFTS]
    assert [stage["tokens"] for stage in values["schedules"][0]["stages"]] == [[BUDGET], [18], [7]]
    assert (values["batch_sizes"], values["prompt_buckets"]) == ([2], [10, TEXT])
    assert {"torch", "transformers", "onnx", "onnxruntime", "vitcop-compile"} <= values["versions"].keys()
    present = {file.name for file in folder("pair").iterdir()} - {"vitcop.json"}
    assert present == values["files"].keys()
    assert {"config.json", "generation_config.json", "weights.bin", "prefill_40.onnx", "extend_24.onnx"} <= present
    for name, (digest, size) in values["files"].items():
        data = (folder("pair") / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, size)
    ranges = {spec["kind"]: spec["rows"] for spec in json.loads((folder("dynamic") / "vitcop.json").read_text())["programs"]}
    assert ranges == {"vision": None, "prefill": [32, 54], "extend": [2, TEXT], "decode": None}


_PEAK = """
import json, re, sys
import onnx, onnxruntime, onnxscript, torch
torch.set_num_threads(2)
import vitcop_compile as vc
from vitcop_compile.export import export
from vitcop_compile.toy import small_llava
# Not ru_maxrss, in which a process inherits the peak of the one that started it.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
base = peak()
sizes = dict(vision_hidden=64, vision_layers=3, vision_heads=2, hidden=1536, heads=12, intermediate=4096, layers=3, vocab=8000)
model = small_llava(**sizes, image_size=112)
fast = vc.optimize(model, vc.ViTCoPConfig.preset("1/3"), backend="eager")
path = export(fast, sys.argv[1], max_text_len=16, max_new_tokens=16, prompt_buckets=[16])
added = peak() - base
weights = sum(parameter.nbytes for parameter in model.parameters())
size = sum(file.stat().st_size for file in path.iterdir())
print(json.dumps([weights, size, added]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_peak_memory_and_size(tmp_path: Path) -> None:
    """What the libraries take is not counted: it is more on some machines, and no business of an export."""
    done = subprocess.run([sys.executable, "-c", _PEAK, tmp_path / "f"], capture_output=True, text=True, check=True)
    weights, size, added = json.loads(done.stdout.splitlines()[-1])
    assert weights > 4e8
    assert abs(size / weights - 1) < 0.05
    # The model is 1 and graphs, and what is written at the moment, are 0.4; a second copy of the weights would be 1 more.
    assert weights <= added < 1.75 * weights


# Refusals


def test_plan_names_value_and_bound(engine: Callable) -> None:
    model = engine("dynamic")
    ids, given = prompt(5, 9), {"pixel_values": pixels(), "do_sample": False}
    for arguments, message in (
        ({"inputs": ids, "max_new_tokens": 37, **given}, "max_new_tokens=37 exceeds max_new_tokens=36 of the engine"),
        ({"inputs": prompt(20, 5), "max_new_tokens": 2, **given}, "25 text tokens in a prompt exceed max_text_len=24"),
        ({"inputs": torch.tensor([text(25)]), "max_new_tokens": 2}, "25 text tokens in a prompt exceed max_text_len=24"),
        ({"inputs": ids.repeat(2, 1), "max_new_tokens": 2, "pixel_values": pixels(2)}, "2 sequences .* built for 1"),
        ({"inputs": ids, "max_new_tokens": 2, "pixel_values": pixels(2)}, "2 images for placeholders of 1: pass as many"),
        ({"inputs": ids, "max_new_tokens": 2, "pixel_values": pixels().int()}, "dtype torch.int32: pass normalised"),
        ({"inputs": ids.float(), "max_new_tokens": 2, **given}, "dtype torch.float32: pass int64"),
        (
            {"inputs": torch.cat((ids, ids[:, 5:]), 1), "max_new_tokens": 2, **given},
            "1 images for placeholders of 2: pass as many",
        ),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(**arguments)


def test_threads_of_a_program_do_not_spin_into_the_next(engine: Callable) -> None:
    options = engine("dynamic").engines._get(engine("dynamic").manifest.program("decode"))._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_programs_check_their_inputs(engine: Callable) -> None:
    engines = engine("dynamic").engines
    run = engines._get(engines.manifest.program("extend", 8))
    _, *rest = optimized().programs.extend_inputs(1, 8, engines.manifest.cache_rows)
    ids, last = torch.ones(1, 8, dtype=torch.int64), torch.tensor([7])
    assert isinstance(run, OrtProgram) and run(ids, *rest)[0].shape == (1, 1, models.VOCAB)
    others = rest[1:]
    for inputs, message in (
        ((ids,), "extend takes 11 inputs, got 1"),
        ((ids.int(), last, *others), "input ids is torch.int32, the engine takes int64"),
        ((ids[:, :1], last, *others), "1 rows of a turn, the engine takes 2 to 24"),
        ((ids.repeat(1, 4), last, *others), "32 rows of a turn, the engine takes 2 to 24"),
        ((ids.repeat(2, 1), last, *others), r"input ids has shape \(2, 8\), the engine takes \(1, 8\)"),
        ((ids, last.repeat(2), *others), r"input last has shape \(2,\), the engine takes \(1,\)"),
    ):
        with pytest.raises(InputError, match=message):
            run(*inputs)
    with pytest.raises(InputError, match=r"input pixels is torch\.float16, the engine takes float32"):
        engines.vision(1)(pixels().half())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "gguf"}, UnsupportedError, "format='gguf' is unknown: use one of onnx, tensorrt"),
        ({"opset": 17}, UnsupportedError, "opset=17 is out of range: choose 18 to 24"),
        ({"batch_size": 0}, ConfigError, "batch_size=0 is not a count of at least 1"),
        ({"batch_size": True}, ConfigError, "batch_size=True is not a count"),
        ({"max_text_len": 1}, ConfigError, "max_text_len=1 is not a count of at least 2"),
        ({"max_new_tokens": 0}, ConfigError, "max_new_tokens=0 is not a count"),
        ({"max_text_len": 900, "max_new_tokens": 95}, ConfigError, "need 1025 positions, the model has 1024"),
        ({"prompt_buckets": (8, 4, 24)}, ConfigError, r"prompt_buckets=\(8, 4, 24\): pass ascending lengths that end in"),
        ({"prompt_buckets": ()}, ConfigError, "prompt_buckets"),
        ({"prompt_buckets": (8, 25)}, ConfigError, "end in max_text_len=24"),
        ({"workspace": 1}, ConfigError, "workspace are options of format='tensorrt', not of 'onnx'"),
    ],
)
def test_options_are_refused_before_work(options: dict, error: type, message: str, fast: Any, tmp_path: Path) -> None:
    with mock.patch.object(writer, "staged", side_effect=AssertionError("work began")), pytest.raises(error, match=message):
        export(fast, tmp_path / "f", **({"max_text_len": TEXT, "max_new_tokens": 8} | options))
    assert not list(tmp_path.iterdir())


def test_bfloat16_needs_an_opset_that_has_it(fast: Any, tmp_path: Path) -> None:
    refused = pytest.raises(UnsupportedError, match=r"opset=21 .* opset 22")
    with mock.patch.object(type(fast), "dtype", torch.bfloat16), refused:
        export(fast, tmp_path / "f", max_text_len=TEXT, max_new_tokens=8, opset=21)


def test_missing_packages_are_named(fast: Any, tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, onnxscript=None), pytest.raises(UnsupportedError, match=r"pip install .*\[onnx\]"):
        export(fast, tmp_path / "f")
    path = tmp_path / "x.onnx"
    with mock.patch.dict(sys.modules, onnxruntime=None), pytest.raises(UnsupportedError, match=r"pip install .*\[onnx\]"):
        OrtProgram(path, mock.Mock())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_export_leaves_nothing(error: Any, fast: Any, tmp_path: Path) -> None:
    patches = [mock.patch.object(writer, "_save_configs", side_effect=error), mock.patch.object(writer, "check_programs")]
    with patches[0], patches[1], mock.patch.object(writer, "write_onnx") as write:
        write.side_effect = lambda program, path, *_: (path.write_bytes(b"half"), ((), ()))[1]
        with pytest.raises((KeyboardInterrupt, OSError)):
            export(fast, tmp_path / "deep" / "f", max_text_len=8, max_new_tokens=2, prompt_buckets=[8])
    assert write.call_count == 4
    assert not list((tmp_path / "deep").iterdir())


def test_existing_targets_are_refused(fast: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in ("full", "full/x", "link"):
        with pytest.raises(FolderError, match="exists: choose another output folder"):
            export(fast, tmp_path / target)
    with pytest.raises(FolderError, match="x is a file"):
        export(fast, tmp_path / "full" / "x" / "y")


@pytest.mark.parametrize(
    ("domain", "operator", "attributes", "message"),
    [
        ("com.microsoft", "FusedMatMul", {}, "is com.microsoft::FusedMatMul, not a standard operator"),
        ("", "NonZero", {}, "node bad is NonZero, whose size or order depends on data"),
        ("", "If", {}, "node bad is If"),
        ("", "ScatterElements", {"reduction": "add"}, "is ScatterElements with a reduction"),
    ],
)
def test_operators_are_refused(domain: str, operator: str, attributes: dict, message: str) -> None:
    import onnx_ir

    x = onnx_ir.Value(name="x")
    node = onnx_ir.node(operator, [x], attributes, domain=domain, name="bad")
    model = onnx_ir.Model(onnx_ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=10)
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        onnx_export.check_nodes(model, "prefill.onnx")
