"""The commands that write a folder and ask one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import test_cli
import test_folder
from models import exhaustive, slow
from PIL import Image
from test_folder import NAME, manifest_of, write
from transformers import AutoProcessor, LlavaForConditionalGeneration
from vitcop_compile.export import EngineModel, Manifest

import vitcop_compile as vc
from vitcop_compile import ViTCoPConfig, toy
from vitcop_compile.cli import export as cli_export
from vitcop_compile.methods import method_from
from vitcop_compile.methods.named import settings_from

checkpoint, good, copy = test_cli.checkpoint, test_folder.good, test_folder.copy
invoke, error_of = test_cli.invoke, test_cli.error_of
LIMITS = ("--max-text-len", 40, "--max-new-tokens", 5)


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `export` writes of a checkpoint."""
    target = tmp_path_factory.mktemp("exported") / "llava-1_3"
    result = invoke("export", "--model", checkpoint, "--retention", "1/3", "--output-dir", target, *LIMITS)
    assert result.exit_code == 0, result.output
    assert str(target) in result.output and "MiB" in result.output
    return target


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_export_and_run(exported: Path, photo: Path, checkpoint: Path) -> None:
    manifest = Manifest.read(exported)
    assert manifest.config == ViTCoPConfig.preset("1/3")
    assert (manifest.dtype, manifest.opset, manifest.prompt_buckets, manifest.max_new_tokens) == ("float32", 18, None, 5)
    assert {"tokenizer.json", "tokenizer_config.json", "processor_config.json"} <= manifest.files.keys()
    # The answer is that of the checkpoint, through the same compiler, without a folder.
    processor = AutoProcessor.from_pretrained(checkpoint)
    stock = LlavaForConditionalGeneration.from_pretrained(checkpoint)
    fast = vc.optimize(stock, ViTCoPConfig.preset("1/3"), backend="eager")
    for arguments, image in ((("--image", photo), Image.open(photo)), ((), None)):
        asked = f"USER: {'' if image is None else '<image>' + chr(10)}What is it? ASSISTANT:"
        inputs = processor(images=image, text=asked, return_tensors="pt")
        ids = fast.generate(
            **{name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values") if name in inputs},
            max_new_tokens=5, do_sample=False,
        )  # fmt: skip
        answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        result = invoke("run", exported, "--prompt", "What is it?", *arguments)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == answer.strip() != ""


@pytest.mark.parametrize("name", [slow("divprune:tokens=9"), exhaustive("calibrated+visionzip:retention=1/9")])
def test_export_and_run_of_a_method(name: str, checkpoint: Path, photo: Path, tmp_path: Path) -> None:
    target, method = tmp_path / "folder", method_from(name)
    result = invoke("export", "--model", checkpoint, "--method", name, "--output-dir", target, *LIMITS)
    assert result.exit_code == 0, result.output
    assert Manifest.read(target).config == method
    processor = AutoProcessor.from_pretrained(checkpoint)
    fast = vc.optimize(LlavaForConditionalGeneration.from_pretrained(checkpoint), method, backend="eager")
    inputs = processor(images=Image.open(photo), text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    names = ("input_ids", "attention_mask", "pixel_values")
    ids = fast.generate(**{name: inputs[name] for name in names}, max_new_tokens=5, do_sample=False)
    answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    result = invoke("run", target, "--prompt", "What is it?", "--image", photo)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == answer.strip() != ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtime", "tflite"], "runtime='tflite' is unknown: use one of onnxruntime, openvino"),
        (["--precision", "bf16"], "precision='bf16': an option of runtime='openvino', choose that or leave it out"),
        (["--runtime", "openvino", "--device", "FPGA"], "device='FPGA' is not one that OpenVINO finds here"),
    ],
)
def test_run_refuses_a_runtime(arguments: list[str], message: str, copy: Path) -> None:
    assert message in error_of("run", copy, "--prompt", "Hi", *arguments)


def test_run_without_processor_files_prints_ids(copy: Path, photo: Path) -> None:
    """The tiny model of the other tests has a vocabulary of 96: fitting bytes do for a prompt, others are refused."""
    assert "outside the vocabulary of 96" in error_of("run", copy, "--prompt", "~", "--image", photo, "--max-new-tokens", 2)


def test_run_prints_ids(exported: Path, tmp_path: Path, photo: Path) -> None:
    """A folder without tokenizer and processor: the prompt's bytes stand in."""
    folder = shutil.copytree(exported, tmp_path / "f")
    values = manifest_of(folder)
    for name in set(values["files"]) - {"config.json", "generation_config.json"}:
        if Path(name).suffix in (".json", ".jinja"):
            (folder / name).unlink()
            del values["files"][name]
    write(folder, values)
    fast = EngineModel.from_pretrained(folder)
    inputs = toy.request("USER: <image>\nHi ASSISTANT:", Image.open(photo), fast.config)
    expected = fast.generate(**inputs, max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    result = invoke("run", folder, "--prompt", "Hi", "--image", photo, "--max-new-tokens", 3)
    assert [int(word) for word in result.stdout.split()] == expected
    chosen = ("--runtime", "openvino", "--device", "CPU", "--precision", "f32", "--cache-dir", tmp_path / "cache")
    result = invoke("run", folder, "--prompt", "Hi", "--image", photo, "--max-new-tokens", 3, *chosen)
    assert [int(word) for word in result.stdout.split()] == expected and any((tmp_path / "cache").iterdir())
    result = invoke("run", folder, "--prompt", "Hi", "--no-verify")
    assert result.exit_code == 0 and len(result.stdout.split()) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--retention", "half"],
            "--retention 'half' is neither one of 1/3, 2/9, 1/9, 1/3-wide, 2/9-wide, 1/9-wide nor a number",
        ),
        (["--retention", "1.5"], "retention=1.5 is out of range"),
        (["--retention", "nan"], "retention=nan is not a finite number"),
        (["--retention", "0.001"], "retention=0.001 leaves"),
        (["--method", "slowv"], "method 'slowv' is unknown: use one of vitcop, dense, "),
        (["--method", "fastv:layer=2,retention=0.05"], "as the first 2 of "),
        (["--format", "gguf"], "format='gguf' is unknown"),
        (["--format", "tensorrt", "--dtype", "float32"], "the model is float32"),
        (["--dtype", "int8"], "--dtype 'int8' is unknown: use one of float32, float16, bfloat16"),
        (["--weights", "int4"], "weights='int4' is unknown: use one of int8, or none for the model's own"),
        (["--opset", 17], "opset=17 is out of range: choose 18 to 24"),
        (["--batch-size", 0], "batch_size=0 is not a count"),
        (["--prompt-bucket", 8, "--prompt-bucket", 4], "pass ascending lengths that end in max_text_len=512"),
        (["--max-text-len", 5000], "positions, the model has 4096"),
        (["--output-dir", "."], "exists: choose another output folder"),
        (["--model", "./missing"], "--model ./missing is not a folder"),
    ],
)
def test_export_errors_come_before_the_work(
    arguments: list, message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "something").touch()
    monkeypatch.setattr(cli_export, "_export", lambda *_, **__: pytest.fail("a model was loaded"))
    given = {"--model": checkpoint, "--output-dir": tmp_path / "out"}
    rest = [part for name, value in given.items() if name not in arguments for part in (name, value)]
    assert message in error_of("export", *rest, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_run_errors_are_one_line(exported: Path, photo: Path, copy: Path) -> None:
    for arguments, message in (
        ((exported, "--image", "missing.jpg"), "missing.jpg cannot be read"),
        ((exported, "--max-new-tokens", 0), "--max-new-tokens 0 is below 1"),
        ((exported, "--max-new-tokens", 6), "max_new_tokens=6 exceeds max_new_tokens=5 of the engine"),
        ((copy.parent,), f"holds no {NAME}"),
        ((copy.parent / "nowhere",), "is not a folder"),
    ):
        assert message in error_of("run", *arguments, "--prompt", "What?")
    assert "exceed max_text_len=40" in error_of("run", exported, "--prompt", "What? " * 20, "--image", photo)
    (copy / "weights.bin").write_bytes(b"x")
    assert "weights.bin has 1 bytes" in error_of("run", copy, "--prompt", "What?")


def test_retention() -> None:
    assert settings_from("1/9") == ViTCoPConfig.preset("1/9")
    assert settings_from("0.25") == ViTCoPConfig.preset("2/9", retention=0.25)
