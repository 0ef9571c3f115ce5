"""OpenVINO: the folders that onnxruntime runs, and a backend; what it gives is what stock layers give, pruned by hand."""

from __future__ import annotations

import functools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import models
import onnx
import openvino
import pytest
import reference_llava as reference
import test_folder
import torch
from folders import CONFIG, LAYERS, NEW, SETTINGS, TEXT, folder, generate, optimized
from golden import largest_error
from models import pad, pixels, prompt, text
from test_export_turns import converse
from test_folder import FILES, manifest_of, reseal, write
from test_isolation import together
from torch import Tensor
from vitcop_compile.export import EngineModel, FolderError, Manifest, export
from vitcop_compile.export.openvino import OpenVinoProgram, precision_of
from vitcop_compile.export.openvino_backend import load

import vitcop_compile
from vitcop_compile import ConfigError, InputError, UnsupportedError
from vitcop_compile.bench.arms import Request
from vitcop_compile.bench.selection import SelectionOnly, selection_inputs

good, copy = test_folder.good, test_folder.copy
NEAR = 1e-3


def opened(path: Path, **options: Any) -> EngineModel:
    return EngineModel.from_pretrained(path, runtime="openvino", threads=1, **options)


@pytest.fixture(scope="module")
def engine() -> Callable[[str], EngineModel]:
    return functools.cache(lambda name: opened(folder(name)))


def of(model: EngineModel, kind: str) -> OpenVinoProgram:
    """A program of a folder."""
    return model.engines._get(model.manifest.program(kind))


# Equality


@pytest.mark.covers("openvino", "folder", family="llava")
@pytest.mark.parametrize("name", ["dynamic", "pair"])
@pytest.mark.parametrize("ids", [prompt(), prompt(2, 14, seed=1), prompt(0, 0)])
def test_image_prompts(name: str, ids: Tensor, engine: Callable) -> None:
    images = pixels(seed=3)
    told = reference.run(models.shared(LAYERS), ids, images, SETTINGS, 12)
    tokens, logits = generate(engine(name), ids, images, 12)
    assert tokens[0].tolist() == told.tokens
    torch.testing.assert_close(logits[0], torch.stack(told.logits), atol=NEAR, rtol=0)


@pytest.mark.parametrize("name", ["dynamic", "pair"])
def test_text_prompts(name: str, engine: Callable) -> None:
    for length in (1, 2, TEXT):
        ids = torch.tensor([text(length, seed=length)])
        expected, stock = generate(models.shared(LAYERS), ids, steps=4)
        tokens, logits = generate(engine(name), ids, steps=4)
        assert torch.equal(tokens[:1], expected)
        torch.testing.assert_close(logits[:1], stock, atol=NEAR, rtol=0)


@pytest.mark.covers("openvino", "batch", family="llava")
@pytest.mark.parametrize("side", ["left", "right"])
def test_unequal_lengths(side: str, engine: Callable) -> None:
    prompts, images = [prompt(4, 5), prompt(9, 12, seed=1)], pixels(2)
    ids, mask = pad(prompts, side)
    tokens, logits = generate(engine("pair"), ids, images, 8, attention_mask=mask)
    for row, one in enumerate(prompts):
        told = reference.run(models.shared(LAYERS), one, images[row : row + 1], SETTINGS, 8)
        assert tokens[row].tolist() == told.tokens
        torch.testing.assert_close(logits[row], torch.stack(told.logits), atol=NEAR, rtol=0)


@pytest.mark.covers("openvino", "turns", family="llava")
@pytest.mark.parametrize("name", ["dynamic", "pair"])
def test_turns(name: str, engine: Callable) -> None:
    turns = [text(6, 1), text(11, 2), text(3, 4)]
    said = [converse(model, prompt(4, 9), pixels(), turns) for model in (engine(name), optimized())]
    for found, expected in zip(*said, strict=True):
        assert torch.equal(found[:1].argmax(-1), expected.argmax(-1))
        torch.testing.assert_close(found[:1], expected, atol=NEAR, rtol=0)


def test_selections_are_those_of_eager(engine: Callable) -> None:
    for seed in range(4):
        given = {"input_ids": prompt(seed=seed), "pixel_values": pixels(seed=seed)}
        found, expected = (model(**given).past_key_values.selection for model in (engine("dynamic"), optimized()))
        assert torch.equal(found.kept, expected.kept) and torch.equal(found.labels, expected.labels)
        assert [stage.tolist() for stage in found.stages] == [stage.tolist() for stage in expected.stages]


@pytest.mark.covers("openvino", family="llava")
@pytest.mark.slow
def test_a_backend() -> None:
    model, images = models.shared(LAYERS), pixels(seed=5)
    fast = models.optimize(model, CONFIG, backend="openvino", prompt_buckets=(32,))
    told = reference.run(model, prompt(), images, SETTINGS, 6)
    tokens, logits = generate(fast, prompt(), images, 6)
    assert tokens[0].tolist() == told.tokens
    torch.testing.assert_close(logits[0], torch.stack(told.logits), atol=NEAR, rtol=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1)
    with pytest.raises(UnsupportedError, match="changed in place, and the programs of this backend hold copies"):
        fast(input_ids=prompt(), pixel_values=images)


# Memory


def test_a_folder_computes_in_the_precision_of_its_weights(engine: Callable) -> None:
    """Left alone, OpenVINO computes float32 models in bfloat16 where the CPU has that."""
    for spec in engine("dynamic").manifest.programs:
        chosen = engine("dynamic").engines._get(spec)._compiled.get_property("INFERENCE_PRECISION_HINT")
        assert chosen == openvino.Type.f32


def test_results_belong_to_the_caller(engine: Callable) -> None:
    """OpenVINO writes what it returns where it wrote it before: what was given stays as it is, and no two are one memory."""
    fast = engine("dynamic")
    see, read = of(fast, "vision"), of(fast, "prefill")
    found, kept = [], []
    for seed in range(3):
        images, ids = pixels(seed=seed), prompt(seed=seed)
        features, index, *state = see(images)
        places = (ids == models.IMAGE).nonzero()[:30, 1][None]
        positions = torch.arange(44)[None, None]
        outputs = read(ids[:, -44:].contiguous(), torch.tensor([43]), positions, features, places - 14, *state)
        found += [features, index, *state, *outputs]
        kept += [tensor.clone() for tensor in (features, index, *state, *outputs)]
    assert all(torch.equal(*pair) for pair in zip(found, kept, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == len(found)
    assert not all(torch.equal(*pair) for pair in zip(found[: len(found) // 3], found[-len(found) // 3 :]))


def test_a_step_reads_the_caches_where_they_are(engine: Callable) -> None:
    """The same request takes other caches in turn, none of them is written, and an input that is not contiguous will do."""
    fast, program = engine("dynamic"), of(engine("dynamic"), "decode")
    steps = []
    for seed in (1, 2):
        held = fast(input_ids=prompt(seed=seed), pixel_values=pixels(seed=seed)).past_key_values.held_buffers
        steps.append((held.token, held.last, held.length, held.position, held.removed, *[one.clone() for one in held.layers]))
    alone = [[result.clone() for result in program(*step)] for step in steps]
    copies = [[tensor.clone() for tensor in step] for step in steps]
    for which in (0, 1, 1, 0):
        assert all(torch.equal(*pair) for pair in zip(program(*steps[which]), alone[which], strict=True))
        assert all(torch.equal(*pair) for pair in zip(steps[which], copies[which], strict=True))
    turned = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() == 4 else tensor for tensor in steps[0]]
    assert any(not tensor.is_contiguous() for tensor in turned)
    assert all(torch.equal(*pair) for pair in zip(program(*turned), alone[0], strict=True))


def test_threads(engine: Callable) -> None:
    """Each has a request of its own."""
    fast = engine("dynamic")
    alone = [generate(fast, prompt(seed=seed), pixels(seed=seed), 8) for seed in range(4)]
    found = together([lambda seed=seed: generate(fast, prompt(seed=seed), pixels(seed=seed), 8) for seed in range(4)])
    for (tokens, logits), (expected, others) in zip(found, alone, strict=True):
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(logits, others, atol=1e-5, rtol=0)


# Precision


def lowers(precision: str) -> pytest.MarkDecorator:
    """Skips where the CPU does not compute in it."""
    has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return pytest.mark.skipif({"bf16": "BF16", "f16": "FP16"}[precision] not in has, reason=f"this CPU has no {precision}")


LOWER = [pytest.param(name, marks=lowers(name)) for name in ("bf16", "f16")]


@functools.cache
def selection() -> tuple[Any, Any, Any]:
    """What the passes insert for all stages, exported alone, as it is and compiled in float32, and a maker of inputs.

    Keys of the encoder are numbers of bfloat16, as its layers give them, those of the decoder differ by less; all are so far
    from 0 that their differences, norms and products are lost where they are rounded.
    """
    schedule, request = optimized().schedule, Request(text_tokens=12)

    def inputs() -> dict[str, Tensor]:
        found = selection_inputs(schedule, request, torch.float32, torch.device("cpu"))
        found |= {name: value + 300 for name, value in found.items() if name.startswith("key_decoder")}
        return found | {"key_vision_0": (found["key_vision_0"] + 10).bfloat16().float()}

    given = inputs()
    module = SelectionOnly(schedule, tuple(given), exact=False).eval()
    program = torch.export.export(module, tuple(given.values()), strict=False)
    return program, load(program, "f32"), lambda: tuple(inputs().values())


@pytest.mark.parametrize("precision", LOWER)
def test_selection_stays_in_float32(precision: str) -> None:
    """Rows are rounded, none is another; and a control: of rounded inputs some are."""
    program, exact, inputs = selection()
    lower = load(program, precision)
    near, far = [], []
    for _ in range(4):
        given = inputs()
        rounded = [one.bfloat16().float() if one.is_floating_point() else one for one in given]
        for results, found in ((lower(*given), near), (exact(*rounded), far)):
            found.append(max((a - b).abs().max().item() for a, b in zip(results, exact(*given), strict=True)))
    # Rows are of unit variance: others are further apart by far.
    assert max(near) < 0.1 and max(far) > 1


@pytest.mark.parametrize("precision", LOWER)
def test_a_lower_precision_comes_near(precision: str) -> None:
    """The folder is in float32. Every product with weights is computed in the precision that was asked for."""
    fast = opened(folder("dynamic"), precision=precision)
    given = {"input_ids": prompt(seed=2), "pixel_values": pixels(seed=2)}
    expected, found = optimized()(**given), fast(**given)
    assert found.logits.dtype == torch.float32
    assert torch.equal(found.past_key_values.selection.kept, expected.past_key_values.selection.kept)
    error = largest_error(found.logits, expected.logits) / expected.logits.std()
    assert 1e-6 < error < {"bf16": 0.6, "f16": 0.06}[precision]
    for kind in ("prefill", "decode"):
        assert precisions(of(fast, kind), "FullyConnected") == {precision}


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.bfloat16, marks=lowers("bf16")), pytest.param(torch.float16, marks=lowers("f16"))]
)
def test_a_whole_folder_of_lower_precision_is_as_near_to_float32_as_stock_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing is pruned: what tokens stay might hang on the last digit. A prompt, and steps on tokens that are told."""
    exact, half = (models.llava(3, seed=4).to(kind) for kind in (torch.float32, dtype))
    dense = vitcop_compile.optimize(half, vitcop_compile.ViTCoPConfig.dense(), backend="eager")
    export(dense, tmp_path / "folder", max_text_len=24, max_new_tokens=8, opset=22)
    engine = opened(tmp_path / "folder")
    assert engine.dtype == dtype
    ids, images, told = prompt(5, 7, seed=2), pixels(seed=2), torch.tensor([[3, 9, 4, 17]])

    def logits(model: Any) -> Tensor:
        found = model(input_ids=ids, pixel_values=images.to(model.dtype))
        steps = [found.logits[:, -1:]]
        for token in told.split(1, 1):
            found = model(input_ids=token, past_key_values=found.past_key_values)
            steps.append(found.logits[:, -1:])
        return torch.cat(steps, 1).float()

    with torch.no_grad():
        right, stock, ours = logits(exact), logits(half), logits(engine)
    off = (stock - right).abs().mean()
    assert off > 0 and (ours - right).abs().mean() < 1.5 * off


def precisions(program: OpenVinoProgram, kind: str) -> set[str]:
    """What the operators of a kind are computed in."""
    nodes = [node.get_rt_info() for node in program._compiled.get_runtime_model().get_ordered_ops()]
    return {str(info["runtimePrecision"].astype(str)) for info in nodes if info["layerType"].astype(str) == kind}


# Files


def test_a_cache_is_kept_outside_the_folder_and_found_again(copy: Path, tmp_path: Path, engine: Callable) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    expected, stored = of(engine("dynamic"), "vision")(pixels()), []
    for known in (False, True):
        program = of(opened(copy, cache_dir=tmp_path / "cache"), "vision")
        assert program._compiled.get_property("LOADED_FROM_CACHE") == known
        assert all(torch.equal(*pair) for pair in zip(program(pixels()), expected, strict=True))
        stored.append({path for path in (tmp_path / "cache").rglob("*") if path.is_file()})
    assert stored[0] == stored[1] and len(stored[0]) == 1
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    # Another folder in the same place, and of the same graphs, is not taken for it.
    data = bytearray((copy / "weights.bin").read_bytes())
    data[0] ^= 1
    (copy / "weights.bin").write_bytes(data)
    reseal(copy, "weights.bin")
    assert not of(opened(copy, cache_dir=tmp_path / "cache"), "vision")._compiled.get_property("LOADED_FROM_CACHE")


@pytest.mark.parametrize("pair", [("vision.onnx", "prefill.onnx"), ("decode.onnx", "extend.onnx")])
def test_swapped_files(pair: tuple[str, str], copy: Path) -> None:
    first, second = ((copy / name).read_bytes() for name in pair)
    (copy / pair[0]).write_bytes(second)
    with pytest.raises(FolderError, match=r"the file is truncated or replaced|the file was changed or swapped"):
        opened(copy)
    (copy / pair[1]).write_bytes(first)
    for name in pair:
        reseal(copy, name)
    for name in pair:
        with pytest.raises(FolderError, match=r"has .* vitcop\.json says"):
            of(opened(copy), name.removesuffix(".onnx"))


@pytest.mark.parametrize("location", ["../weights.bin", "{absolute}", "sub/../../weights.bin", "missing.bin"])
def test_weights_elsewhere(location: str, copy: Path, good: Path) -> None:
    """A graph whose weights lie outside the folder, well sealed: OpenVINO must not follow it."""
    shutil.copy(good / "weights.bin", copy.parent / "weights.bin")
    (copy / "weights.bin").write_bytes(b"")
    reseal(copy, "weights.bin")
    graph = onnx.load(copy / "decode.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location.format(absolute=good / "weights.bin") if entry.key == "location" else entry.value
    (copy / "decode.onnx").write_bytes(graph.SerializeToString())
    reseal(copy, "decode.onnx")
    with pytest.raises(FolderError, match=r"decode.onnx cannot be loaded by openvino"):
        of(opened(copy), "decode")


def test_a_broken_graph_that_nobody_hashed(copy: Path) -> None:
    (copy / "vision.onnx").write_bytes(b"\xff" * (copy / "vision.onnx").stat().st_size)
    with pytest.raises(FolderError, match="SHA-256"):
        opened(copy)
    with pytest.raises(FolderError, match=r"vision\.onnx cannot be loaded by openvino 20"):
        of(opened(copy, verify=False), "vision")


# Refusals


def test_onnxruntime_has_no_bfloat16(copy: Path) -> None:
    write(copy, manifest_of(copy) | {"dtype": "bfloat16"})
    with pytest.raises(UnsupportedError, match=r"bfloat16, .*onnxruntime has no kernels on a CPU: pass runtime='openvino'"):
        EngineModel.from_pretrained(copy, runtime="onnxruntime")
    message = r"backend='onnxruntime' has no kernels for torch.bfloat16 on a CPU: .*torch.float32, or use one of eager"
    work = mock.patch("vitcop_compile.pipeline.capture", side_effect=AssertionError("work began"))
    with work, pytest.raises(UnsupportedError, match=message):
        vitcop_compile.optimize(models.llava(LAYERS).bfloat16(), CONFIG, backend="onnxruntime")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"runtime": "tflite"}, UnsupportedError, "runtime='tflite' is unknown: use one of onnxruntime, openvino"),
        ({"runtime": "openvino", "device": "FPGA"}, UnsupportedError, r"device='FPGA' is not one that OpenVINO finds .*CPU"),
        ({"runtime": "openvino", "precision": "f8"}, UnsupportedError, "precision='f8' is unknown: use one of f32, f16, bf16"),
        ({"runtime": "openvino", "prepack": True}, ConfigError, "prepack=True: an option of runtime='onnxruntime'"),
        ({"precision": "bf16"}, ConfigError, "precision='bf16': an option of runtime='openvino'"),
        ({"runtime": "onnxruntime", "device": "CPU"}, ConfigError, "device='CPU': an option of runtime='openvino'"),
        ({"cache_dir": "x"}, ConfigError, "cache_dir='x': an option of runtime='openvino'"),
    ],
)
def test_options_are_refused_before_a_program_is_loaded(options: dict, error: type, message: str, good: Path) -> None:
    loads = mock.patch("openvino.Core.compile_model", side_effect=AssertionError("work began"))
    with loads, pytest.raises(error, match=message):
        EngineModel.from_pretrained(good, **options)


def test_a_cache_inside_the_folder_is_refused(copy: Path) -> None:
    for inside in (copy, copy / "cache", copy / ".." / copy.name / "deep" / "cache"):
        with pytest.raises(ConfigError, match="is inside the folder, which stays as it was exported: name another"):
            opened(copy, cache_dir=inside)
    assert {path.name for path in copy.iterdir()} == {*FILES, "vitcop.json"}


def test_engines_run_in_nothing_else(copy: Path) -> None:
    values = manifest_of(copy)
    write(copy, values | {"product": "tensorrt"})
    for runtime in ("openvino", "onnxruntime"):
        with pytest.raises(FolderError, match=rf"engines of tensorrt, which no other product runs: .*runtime='{runtime}'"):
            EngineModel.from_pretrained(copy, runtime=runtime)


def test_a_missing_package_is_named(good: Path) -> None:
    with mock.patch.dict(sys.modules, openvino=None):
        for attempt in (
            lambda: EngineModel.from_pretrained(good, runtime="openvino"),
            lambda: models.optimize(models.shared(LAYERS), CONFIG, backend="openvino"),
        ):
            with pytest.raises(UnsupportedError, match=r"OpenVINO is not installed .*pip install .*\[openvino\]"):
                attempt()


@pytest.mark.parametrize("backend", ["eager", "inductor", "aotinductor", "onnxruntime"])
def test_a_backend_without_precisions_refuses_one(backend: str) -> None:
    message = rf"precision='bf16': backend='{backend}' computes in the dtype of the model; .*backend='openvino'"
    with mock.patch("vitcop_compile.pipeline.capture", side_effect=AssertionError("work began")):
        with pytest.raises(ConfigError, match=message):
            models.optimize(models.shared(LAYERS), CONFIG, backend=backend, precision="bf16")
        with pytest.raises(UnsupportedError, match="precision='int8' is unknown: use one of f32, f16, bf16"):
            models.optimize(models.shared(LAYERS), CONFIG, backend="openvino", precision="int8")


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    with mock.patch("openvino.Core.get_property", return_value=["FP32", "INT8"]):
        assert precision_of(torch.float32, None) == precision_of(torch.bfloat16, "f32") == "f32"
        with pytest.raises(UnsupportedError, match="precision='f16': CPU does not compute in FP16 here: use precision='f32'"):
            precision_of(torch.float32, "f16")
        with pytest.raises(UnsupportedError, match="a model in bfloat16: CPU does not compute in BF16 here"):
            precision_of(torch.bfloat16, None)
        work = mock.patch("vitcop_compile.pipeline.capture", side_effect=AssertionError("work began"))
        with work, pytest.raises(UnsupportedError, match="a model in bfloat16: CPU does not compute in BF16 here"):
            vitcop_compile.optimize(models.llava(LAYERS).bfloat16(), CONFIG, backend="openvino")
    with pytest.raises(UnsupportedError, match=r"precision='f16': the weights are torch.bfloat16: use precision='bf16' or"):
        precision_of(torch.bfloat16, "f16")


def test_programs_check_their_inputs(engine: Callable) -> None:
    fast = engine("dynamic")
    run = of(fast, "decode")
    with pytest.raises(InputError, match="decode takes 11 inputs, got 1"):
        run(torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"input pixels is torch\.float16, the engine takes float32"):
        fast.engines.vision(1)(pixels().half())
    with pytest.raises(InputError, match=r"input pixels has shape \(2, 3, 112, 112\), the engine takes \(1, 3, 112, 112\)"):
        of(fast, "vision")(pixels(2))
    with pytest.raises(InputError, match=f"max_new_tokens={NEW + 1} exceeds"):
        fast.generate(prompt(), pixel_values=pixels(), max_new_tokens=NEW + 1)
    assert Manifest.read(folder("dynamic")).product == "onnx"
