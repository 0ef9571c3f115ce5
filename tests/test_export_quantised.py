"""Folders with int8 weights: what they hold, and that they compute what those rounded values say."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import models
import numpy as np
import onnx
import pytest
import reference_llava as reference
import torch
from folders import BUDGET, CONFIG, LAYERS, SETTINGS, folder, optimized
from onnx import numpy_helper
from torch import nn
from vitcop_compile.export import EngineModel, FolderError, Manifest, export, writer

import vitcop_compile
from vitcop_compile import ConfigError, UnsupportedError

SIZES: dict[str, Any] = {"max_text_len": 24, "max_new_tokens": 8}
# Files and the linear layers in each: of three of four encoder layers and the projector, of the decoder and the head.
LINEARS = {"vision.onnx": 3 * 6 + 2} | dict.fromkeys(("prefill.onnx", "extend.onnx", "decode.onnx"), LAYERS * 7 + 1)


def naive(model: Any) -> Any:
    """`model` with every linear layer's weights rounded row by row, in its own loops, as floats."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            for row in module.weight.detach().numpy():
                step = np.float32(max(abs(value) for value in row)) / np.float32(127)
                row[:] = [np.float32(round(float(value / step))) * step for value in row]
    return model


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nobody writes into it."""
    return export(optimized(), tmp_path_factory.mktemp("int8") / "folder", weights="int8", **SIZES)


def graph(path: Path) -> Any:
    return onnx.load(path, load_external_data=False).graph


def dequantised(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name of a scale: (int8 values, scales)} of every DequantizeLinear."""
    loaded = onnx.load(path).graph
    held = {tensor.name: tensor for tensor in loaded.initializer}
    found = {}
    for node in loaded.node:
        if node.op_type == "DequantizeLinear":
            weight, scale = (numpy_helper.to_array(held[name]) for name in node.input)
            assert weight.dtype == np.int8 and [attribute.i for attribute in node.attribute] == [1]
            found[node.input[1]] = weight, scale
    return found


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_it_computes_what_the_rounded_values_say(runtime: str, int8: Path) -> None:
    """With products in floats; the kernels for int8 weights round the other factor too, and come near."""
    rounded = naive(models.llava(LAYERS))
    ids, images = models.prompt(), models.pixels()
    told = reference.run(rounded, ids, images, SETTINGS, 4)
    exact = EngineModel.from_pretrained(int8, exact=True, threads=1, runtime=runtime)
    _, kept, *_ = exact.engines.vision(1)(images)
    assert kept[0].tolist() == told.kept and len(told.kept) == BUDGET
    ask: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = exact.generate(ids, pixel_values=images, **ask)
    assert out.sequences[0, -4:].tolist() == told.tokens
    torch.testing.assert_close(torch.cat(out.logits), torch.stack(told.logits), atol=1e-4, rtol=0)
    # A prompt without an image: nothing is chosen, so what is rounded cannot choose otherwise.
    text = torch.tensor([models.text(8)])
    with torch.no_grad():
        expected = rounded(input_ids=text).logits[0, -1]
    near = EngineModel.from_pretrained(int8, threads=1, runtime=runtime)(input_ids=text).logits.flatten()
    assert torch.nn.functional.cosine_similarity(near, expected, 0) > 0.99
    if runtime == "onnxruntime":  # OpenVINO rounds where the processor multiplies int8 faster
        assert not torch.allclose(near, expected, atol=1e-4)


def test_what_it_holds(int8: Path) -> None:
    names = {name for name, module in models.shared(LAYERS).named_modules() if isinstance(module, nn.Linear)}
    manifest = Manifest.read(int8)
    listed = {tensor.name: tensor for tensor in manifest.quantised}
    assert {tensor.scheme for tensor in listed.values()} == {"int8_channel"} and {t.axis for t in listed.values()} == {1}
    for layer in range(LAYERS):
        for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
            assert f"decoder.model.layers.{layer}.{part}.weight" in listed
    assert listed["head.weight"].shape == (64, models.VOCAB) and len(listed) <= len(names)
    for name, count in LINEARS.items():
        counts = Counter(node.op_type for node in graph(int8 / name).node)
        assert counts["DequantizeLinear"] == count
    told = {name.removesuffix("_scale") for path in int8.glob("*.onnx") for name in dequantised(path)}
    assert told == listed.keys()
    # No float copy of them stays: the file holds them once, a byte each.
    held = [tensor for path in int8.glob("*.onnx") for tensor in graph(path).initializer if len(tensor.dims) == 2]
    floats = {tensor.name: tuple(tensor.dims) for tensor in held if tensor.data_type == onnx.TensorProto.FLOAT}
    shapes = {tensor.shape for tensor in listed.values()}
    assert {name for name, dims in floats.items() if dims in shapes} == {"decoder.model.embed_tokens.weight"}
    before, now = ((root / "weights.bin").stat().st_size for root in (folder("dynamic"), int8))
    assert now < 0.5 * before  # of pages of 4096 bytes, as small as these weights are


def test_values_are_rounded_to_the_nearest(int8: Path) -> None:
    weight = models.shared(LAYERS).lm_head.weight.detach().numpy()
    whole, scale = dequantised(int8 / "decode.onnx")["head.weight_scale"]
    np.testing.assert_array_equal(scale, np.abs(weight).max(1) / np.float32(127))
    assert np.abs(whole.T * scale[:, None] - weight).max() <= scale.max() / 2 * 1.0001
    assert whole.min() == -127 or whole.max() == 127


# The manifest


def sealed(folder: Path, values: dict[str, Any]) -> None:
    values.pop("digest", None)
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    folder.mkdir(exist_ok=True)
    (folder / "vitcop.json").write_text(json.dumps(values | {"digest": hashlib.sha256(text.encode()).hexdigest()}))


def test_a_folder_of_the_version_before_opens(tmp_path: Path) -> None:
    values = json.loads((folder("dynamic") / "vitcop.json").read_text())
    assert values["format_version"] == 3 and values.pop("quantised") == []
    sealed(tmp_path, values | {"format_version": 2})
    assert Manifest.read(tmp_path) == Manifest.read(folder("dynamic"))
    sealed(tmp_path, values | {"format_version": 2, "quantised": []})
    with pytest.raises(FolderError, match=r"unknown fields \['quantised'\]"):
        Manifest.read(tmp_path)
    sealed(tmp_path, values)
    with pytest.raises(FolderError, match=r"fields \['quantised'\] are missing"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("wrong", [{"scheme": "int3"}, {"axis": 2}, {"shape": [0, 4]}, {"shape": [4]}])
def test_schemes_that_are_not_known(wrong: dict, int8: Path, tmp_path: Path) -> None:
    values = json.loads((int8 / "vitcop.json").read_text())
    values["quantised"][0] |= wrong
    sealed(tmp_path, values)
    with pytest.raises(FolderError, match="quantised"):
        Manifest.read(tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": "int4"}, ConfigError, "weights='int4' is unknown: use one of int8"),
        ({"weights": "int8", "format": "tensorrt"}, UnsupportedError, "weights='int8' is an option of format='onnx'"),
    ],
)
def test_options_are_refused_before_work(options: dict, error: type, message: str, tmp_path: Path) -> None:
    with mock.patch.object(writer, "staged", side_effect=AssertionError("work began")), pytest.raises(error, match=message):
        export(optimized(), tmp_path / "f", **(SIZES | options))


def test_half_precision_needs_an_opset_that_scales_in_it() -> None:
    writer.check_weights_option("int8", "onnx", torch.float16, 19)
    with pytest.raises(UnsupportedError, match=r"opset=18 has no scales in torch\.float16 .*: choose opset 19"):
        writer.check_weights_option("int8", "onnx", torch.float16, 18)


# Weights that torchao quantised


def quantised(config: Any, only: str = "") -> Any:
    ao = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = models.llava(LAYERS)
    ao.quantize_(model, config(ao), filter_fn=lambda module, name: isinstance(module, nn.Linear) and only in name)
    return model


@pytest.mark.slow
def test_int8_weights_of_torchao_keep_their_values(tmp_path: Path) -> None:
    model = quantised(lambda ao: ao.Int8WeightOnlyConfig())
    out = export(vitcop_compile.optimize(model, CONFIG, backend="eager"), tmp_path / "f", **SIZES)
    manifest = Manifest.read(out)
    assert {tensor.scheme for tensor in manifest.quantised} == {"int8_given"}
    whole, scale = dequantised(out / "decode.onnx")["head.weight_scale"]
    np.testing.assert_array_equal(whole, model.lm_head.weight.qdata.numpy().T)
    np.testing.assert_array_equal(scale, model.lm_head.weight.scale.numpy().flatten())
    assert len(dequantised(out / "decode.onnx")) == LINEARS["decode.onnx"]
    ids, images = models.prompt(), models.pixels()
    told = reference.run(model, ids, images, SETTINGS, 1)
    found = EngineModel.from_pretrained(out, exact=True, threads=1)(input_ids=ids, pixel_values=images).logits
    torch.testing.assert_close(found.flatten(), told.logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (
            lambda ao: ao.Int8DynamicActivationInt8WeightConfig(),
            {},
            r"lm_head\.weight is an Int8Tensor of torchao that format='onnx' cannot keep as it is, as its inputs are rounded",
        ),
        (
            lambda ao: ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
            {},
            r"as its scales are for blocks of \(1, 16\): export the model before it is quantized, with weights='int8'",
        ),
        (
            lambda ao: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(16)),
            {},
            "is a IntxUnpackedToInt8Tensor of torchao, which format='onnx' cannot keep",
        ),
        (
            lambda ao: ao.Int8WeightOnlyConfig(),
            {"format": "tensorrt"},
            "which format='tensorrt' cannot keep as it is: export the model before it is quantized, or with format='onnx'",
        ),
    ],
)
def test_weights_that_a_folder_cannot_keep(config: Any, options: dict, message: str, tmp_path: Path) -> None:
    """Asked before any work, on what was traced for the model before it was quantised: the weights alone are looked at."""
    fast = mock.Mock(wraps=optimized(), model=quantised(config, "lm_head"))
    for name in ("programs", "host", "dtype", "pruning_config", "schedule_of"):
        setattr(fast, name, getattr(optimized(), name))
    began = mock.patch.object(writer, "staged", side_effect=AssertionError("work began"))
    with began, pytest.raises(UnsupportedError, match=message):
        export(fast, tmp_path / "f", **(SIZES | options))
