"""The command line, the demo behind it and the picture it draws."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vitcop_compile import ConfigError, InputError, ModelShape, UnsupportedError, ViTCoPConfig, demo, picture, toy
from vitcop_compile.cache import Selection
from vitcop_compile.cli import app
from vitcop_compile.cli.shared import question_of
from vitcop_compile.explain import explain
from vitcop_compile.layout import Segment
from vitcop_compile.optimized import OptimizedModel

TINY = {
    "vision_hidden": 32,
    "vision_layers": 3,
    "vision_heads": 2,
    "hidden": 32,
    "heads": 2,
    "layers": 4,
    "intermediate": 64,
    "vocab": 300,
    "image_size": 112,
}
GRID, PATCHES = (8, 8), 64


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(*arguments: object) -> str:
    """The one line on stderr of a command that must fail with code 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def cells(output: str, first: str) -> list[str]:
    """The cells of the table row that starts with `first`."""
    (row,) = [line for line in output.splitlines() if re.match(rf"│ +{re.escape(first)} +│", line)]
    return [cell.strip() for cell in row.strip("│\n").split("│")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the hub has them: weights, configuration, tokenizer and image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    model = toy.small_llava(**TINY)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1} | {letter: toy.FIRST_BYTE + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab | {"<image>": toy.IMAGE_TOKEN}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    processor = LlavaProcessor(
        toy.processor(model.config),
        fast,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_explain_prints_the_published_setting() -> None:
    output = invoke("explain", "--preset", "1/9").output
    assert cells(output, "vision")[1] == "172"
    assert cells(output, "2-21")[1:3] == ["77", str(77 + 64)]
    assert cells(output, "22-31")[1:3] == ["15", str(15 + 64)]
    assert cells(output, "all")[1:3] == ["63.6 mean", str(32 * 64 + 2 * 172 + 20 * 77 + 10 * 15)]


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ([], ViTCoPConfig.preset("1/9")),
        (["--preset", "1/9-wide"], ViTCoPConfig.preset("1/9-wide")),
        (["--preset", "1/3"], ViTCoPConfig.preset("1/3")),
        (["--mean-tokens", 128], ViTCoPConfig.for_mean_tokens(128)),
        (["--retention", 0.2222], ViTCoPConfig.preset("2/9")),
        (["--text-tokens", 10, "--layers", 16], ViTCoPConfig.preset("1/9")),
    ],
)
def test_explain_takes_one_target(arguments: list, config: ViTCoPConfig) -> None:
    layers, text = (16, 10) if "--layers" in arguments else (32, 64)
    shape = config.schedule().shape
    schedule = config.schedule(type(shape)(layers=layers))
    row = cells(invoke("explain", *arguments).output, "all")
    assert row[1:3] == [f"{schedule.mean_visual_tokens():.1f} mean", str(sum(schedule.kv_rows(text)))]


def test_explain_of_other_prompts() -> None:
    config, shape = ViTCoPConfig.preset("1/9"), ModelShape()
    three = explain(config.schedule(layout=(shape.image,) * 3), text=10)
    assert "10 text tokens + 1728 patches of 3 images" in three
    assert cells(three, "vision")[1::4] == ["516", "after layer 22: keep 3 x 172, 3 x 20 clusters"]
    assert cells(three, "22-31")[1:3] == ["45", "55"] and "keep_lowest to 3 x 15" in three
    half = Segment("image", (1, 12, 24), 288)
    mixed = explain(config.schedule(layout=(shape.image, half)))
    assert "keep 172 + 86, 20 + 10" in mixed and "merge_by_cluster to 77 + 39" in mixed
    pooled = explain(dataclasses.replace(config, scope="pooled").schedule(layout=(shape.image, half)))
    assert "keep 172 + 86, 20 + 10" in pooled and "merge_by_cluster to 116 " in pooled
    alone = explain(config.schedule(layout=()))
    assert "0 patches of 0 images" in alone and cells(alone, "0-31")[1:3] == ["0", "64"] and "no image" in alone
    assert "nothing pruned" in explain(ViTCoPConfig.dense().schedule())
    assert explain(config.schedule()) == explain(config.schedule(), 64)


@pytest.mark.parametrize("count", [-1, 1.0, True, "64"])
def test_text_is_a_count(count: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"text={count!r} is not a count of text tokens")):
        explain(ViTCoPConfig.dense().schedule(), count)


def test_explain_reads_a_config_file(tmp_path: Path) -> None:
    ViTCoPConfig(budgets=(100, 50, 10)).save(tmp_path / "c.json")
    assert cells(invoke("explain", "--config", tmp_path / "c.json").output, "22-31")[1] == "10"


def test_explain_reads_a_model_folder(checkpoint: Path) -> None:
    output = invoke("explain", "--model", checkpoint, "--preset", "1/3").output
    assert cells(output, "vision")[1] == str(PATCHES // 2)
    assert "4 layers" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "1/2"], "preset '1/2' is unknown: use one of 1/3, 2/9, 1/9"),
        (["--preset", "1/3", "--retention", 0.2], "--preset and --retention were given: choose one"),
        (["--retention", 1.5], r"retention=1.5 is out of range: choose a ratio in \(0, 1\]"),
        (["--mean-tokens", 1], "mean_tokens=1.0 leaves"),
        (["--layers", 0], "--layers 0 is below 1"),
        (["--layers", 2], "a decoder of 2 layers has no room"),
        (["--text-tokens", -1], "text=-1 is not a count of text tokens"),
        (["--config", "missing.json"], "--config missing.json cannot be read: No such file"),
        (["--model", "./missing"], "--model ./missing is not a folder"),
    ],
)
def test_explain_errors_are_one_line(arguments: list, message: str) -> None:
    assert re.search(message, error_of("explain", *arguments))


def test_explain_refuses_other_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert "BertModel is not a supported model" in error_of("explain", "--model", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be loaded" in error_of("explain", "--model", tmp_path)


def test_demo_measures_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SMALL", TINY)
    target = tmp_path / "out.png"
    result = invoke(
        "demo", "--random", "--backend", "eager", "--output", target, "--max-new-tokens", 3, "--rounds", 1, "--preset", "1/3"
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.output.count(demo.NOTE) == 2
    visual, ttft, tpot, kv = (
        cells(result.output, name)
        for name in ("visual tokens / layer", "TTFT: vision + prefill", "TPOT: decode", "KV cache, allocated")
    )
    assert visual[1] == f"{PATCHES:.1f}" and float(visual[2]) < PATCHES / 2
    for times in (ttft, tpot):
        dense, pruned = (float(cell.split(" ms")[0]) for cell in times[1:3])
        assert min(dense, pruned, float(times[3])) > 0
    assert float(kv[1].split()[0]) > float(kv[2].split()[0])
    for name in ("dense", "pruned"):
        (line,) = [line for line in result.output.splitlines() if line.startswith(f"{name} tokens: ")]
        assert len(line.split(",")) == 3
    for step in ("building the model", "dense: compiling vision, prefill", "pruned: compiling decode", "drawing"):
        assert re.search(rf"done {step}  \d+\.\d s", result.output)
    check_picture(target)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_dense_programs_and_pruned_decode_are_compiled_by_a_second_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does what the first one would: the same model, request and keys of programs."""
    monkeypatch.setattr(demo, "SMALL", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 2)
    started = []
    monkeypatch.setattr(demo.subprocess, "Popen", lambda command, **_: started.append(command))
    demo._elsewhere(demo.Options(prompt="Where?", seed=3, max_new_tokens=2, random=True))
    (command,) = started
    assert command[1:3] == ["-m", "vitcop_compile.demo"]
    arms, kept = [], []
    monkeypatch.setattr(
        demo, "_compile_prompt", lambda arm, subject, new_tokens, steps: arms.append((arm, subject, new_tokens))
    )
    monkeypatch.setattr(demo, "_compile_decode", lambda arm, subject, new_tokens, cache, steps: arms.append(arm.name))
    monkeypatch.setattr(demo.kernels, "begin", lambda: arms.append("kernels"))
    monkeypatch.setattr(OptimizedModel, "keep", lambda fast, *asked, **more: kept.append((fast, asked, more)))
    asked = json.loads(command[3]) | {"backend": "eager"}
    demo._compile_elsewhere(asked)
    first, (arm, subject, new_tokens), last = arms
    assert (first, arm.name, last, arm.model.pruning_config.prune, new_tokens) == ("kernels", "dense", "dense", False, 2)
    assert not kept  # nowhere
    monkeypatch.setattr(demo, "optimize", functools.partial(_with_a_store, demo.optimize))
    demo._compile_elsewhere(asked)
    ((pruned, ([request], tokens), more),) = kept
    assert pruned.pruning_config == ViTCoPConfig.preset(demo.Options().preset) and tokens == 2
    assert request == (1, subject.text_tokens, [pruned.host.layout]) and more == {"processes": 1, "kinds": ("extend",)}
    here = demo._random(demo.Options(prompt="Where?", seed=3), demo.picture.load_image(None))
    assert subject.inputs["input_ids"].shape == here.inputs["input_ids"].shape
    for options in (demo.Options(backend="eager"), demo.Options(model="somewhere")):
        assert demo._elsewhere(options) is None
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 1)
    assert demo._elsewhere(demo.Options()) is None and len(started) == 1


def _with_a_store(optimize: Any, *given: Any, **settings: Any) -> OptimizedModel:
    fast = optimize(*given, **settings)
    fast.on_demand.kept = fast  # anything but None
    return fast


def test_a_second_process_that_fails_is_named() -> None:
    out = Console(file=io.StringIO(), width=200)
    failing = subprocess.Popen([sys.executable, "-c", "raise SystemExit('no luck')"], stderr=subprocess.PIPE, text=True)
    demo._join(failing, demo.Steps(out), out)
    assert "the second process failed, all is compiled here: no luck" in out.file.getvalue()  # type: ignore[attr-defined]


def check_picture(path: Path) -> None:
    """The size of the drawing, and a photograph in the first panel that the others are darker than."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"), dtype=float)
    width, height = (int(picture.DPI * inches) for inches in picture.SIZE)
    assert pixels.shape == (height, width)
    upper, lower = pixels[int(0.2 * height) : int(0.45 * height)], pixels[int(0.6 * height) : int(0.9 * height)]
    left, right = slice(int(0.1 * width), int(0.4 * width)), slice(int(0.6 * width), int(0.9 * width))
    photo, *others = (upper[:, left], upper[:, right], lower[:, left], lower[:, right])
    assert photo.std() > 20
    assert all(panel.std() > 5 and panel.mean() < photo.mean() for panel in others)


@pytest.mark.slow
def test_demo_runs_a_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    result = invoke(
        "demo", "--model", checkpoint, "--image", tmp_path / "photo.png", "--backend", "eager", "--max-new-tokens", 1,
        "--rounds", 1, "--output", tmp_path / "out.png", "--prompt", "What is it?",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert demo.NOTE not in result.output
    assert "dense text: " in result.output and "pruned text: " in result.output
    assert "TTFT" in result.output and "TPOT: decode" not in result.output  # one token has no time between tokens
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "1"], "preset '1' is unknown"),
        (["--backend", "magic"], "backend='magic' is unknown: use one of"),
        (["--dtype", "int8"], "dtype='int8' is unknown: use one of float32, float16, bfloat16"),
        (["--max-new-tokens", 0], "max_new_tokens=0 is below 1"),
        (["--rounds", 0], "rounds=0 is below 1"),
        (["--output", "missing/out.png"], "missing/out.png cannot be written"),
        (["--image", "missing.jpg"], "missing.jpg cannot be read: No such file"),
        (["--image", __file__], "is not an image that Pillow can read"),
        (["--model", "./missing"], "--model ./missing is not a folder"),
    ],
)
def test_demo_errors_come_before_the_work(
    arguments: list, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "_random", lambda *_: pytest.fail("a model was built"))
    assert message in error_of("demo", *arguments)
    assert not list(tmp_path.iterdir())


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'vitcop-compile[plot]'" in error_of("demo")
    with pytest.raises(UnsupportedError, match="matplotlib"):
        picture.load_image(None)


def test_darkened_keeps_only_the_kept_patches() -> None:
    photo = np.full((16, 24, 3), 0.5)
    out = picture.darkened(photo, [0, 5], (2, 3), brightness=0.1)
    assert np.allclose(out[:8, :8], 0.5) and np.allclose(out[8:, 16:], 0.5)
    assert np.allclose(out[:8, 8:], 0.05) and np.allclose(out[8:, :16], 0.05)


def test_clusters_share_a_color() -> None:
    photo = np.full((16, 16, 3), 0.5)
    out = picture.colored(photo, [0, 1, 2], [4, 4, picture.NO_CLUSTER], (2, 2))
    first, second, gray, dropped = out[4, 4], out[4, 12], out[12, 4], out[12, 12]
    assert np.allclose(first, second) and first.std() > 0.1
    assert gray.std() < 1e-9 < gray.mean()
    assert dropped.mean() < 0.5 * gray.mean()


def test_cluster_colors_differ() -> None:
    colors = np.array(list(picture.cluster_colors(range(51)).values()))
    distances = np.abs(colors[:, None] - colors[None]).sum(-1) + 9 * np.eye(len(colors))
    assert distances.min() > 0.02


def test_figure_shows_the_selection(tmp_path: Path) -> None:
    kept = [0, 9, 18, 27, 36]
    selection = Selection(
        torch.tensor([kept]), torch.tensor([[0, 0, 1, -1, 1]]), (torch.tensor([[0, 18, 36]]), torch.tensor([[36]]))
    )
    drawing = picture.figure(np.full((112, 112, 3), 0.6), selection, GRID, "title")
    pixels = np.asarray(Image.open(picture.save(drawing, tmp_path / "p.png")).convert("RGB")).astype(float)

    def patch(panel: int, index: int) -> float:
        x, y = drawing.axes[panel].transData.transform((index % 8 * 14 + 7, index // 8 * 14 + 7))
        return pixels[pixels.shape[0] - round(y), round(x)].mean()

    assert len(drawing.axes) == 4
    assert all(patch(0, index) == patch(0, 0) for index in range(PATCHES))
    assert all((patch(1, index) > 2 * patch(1, 63)) == (index in kept) for index in range(PATCHES))
    assert patch(3, 36) > patch(3, 18) > patch(3, 9) == patch(3, 63)
    texts = [axes.get_title() for axes in drawing.axes]
    assert "5 of 64" in texts[1] and "2 clusters" in texts[2] and "1 patches in none" in texts[2]
    assert "3 after the shallow stage, 1 after the deep stage" in texts[3]
    assert drawing.get_suptitle() == "title\n64 → 5 → 3 → 1 visual tokens"


def test_figure_and_save_refuse(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no selection to draw"):
        picture.figure(np.zeros((8, 8, 3)), Selection(), GRID)
    from matplotlib.figure import Figure

    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        picture.save(Figure(), tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_photograph_inverts_the_processor() -> None:
    config = toy.small_llava(**TINY).config
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8))
    processor = toy.processor(config)
    photo = picture.photograph(toy.pixels(image, config)[0], processor.image_mean, processor.image_std)
    assert np.abs(photo * 255 - np.asarray(image)).max() < 1e-3


def test_small_llava_is_seeded_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first, again, other = (toy.small_llava(**TINY, seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ConfigError, match="vocab=200 cannot hold 256 bytes"):
        toy.small_llava(vocab=200)
    assert toy.small_llava(**TINY, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_encode_places_the_image() -> None:
    config = toy.small_llava(**TINY).config
    image = [toy.IMAGE_TOKEN] * PATCHES
    ids = toy.encode("ab<image>é", config)[0].tolist()
    assert ids == [toy.BOS, 3 + 97, 3 + 98, *image, 3 + 0xC3, 3 + 0xA9]
    assert toy.encode("x", config)[0].tolist() == [toy.BOS, *image, 3 + 120]
    assert toy.decode(ids) == "abé"


# What is asked


def test_questions_are_put_as_a_processor_has_them() -> None:
    """By its chat template, with a place for the image where there is one; without a template as LLaVA-1.5 is asked."""

    class Templated:
        chat_template = "any"

        def apply_chat_template(self, turns: list[dict], add_generation_prompt: bool) -> str:
            (turn,) = turns
            return f"{turn['role']}: {[part.get('text', part['type']) for part in turn['content']]}, {add_generation_prompt}"

    assert question_of(Templated(), "Why?") == "user: ['image', 'Why?'], True"
    assert question_of(Templated(), "Why?", image=False) == "user: ['Why?'], True"
    assert question_of(None, "Why?") == "USER: <image>\nWhy? ASSISTANT:"
    assert question_of(object(), "Why?", image=False) == "USER: Why? ASSISTANT:"
