"""The command `view`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from test_cli import TINY, checkpoint, error_of, invoke  # noqa: F401
from test_view import Tree

from vitcop_compile import demo
from vitcop_compile.methods.named import method_names


def test_the_command_on_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SMALL", TINY)
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "in.png")
    options = ["--random", "--image", tmp_path / "in.png", "--prompt", "Which color?", "--max-new-tokens", 2]
    asked = ["--method", "uniform", "--method", "fastv:layer=1", "--retention", "1/2", "--retention", "1/5"]
    result = invoke("view", *options, *asked, "--output", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    assert "fastv:layer=1 at 1/5 left out: fastv: retention=0.2" in result.output
    assert (tmp_path / "out.png").stat().st_size > 5000
    tree = Tree()
    tree.feed((tmp_path / "out.html").read_text("utf-8"))
    told = json.loads(tree.scripts[0])
    assert told["random"] and told["prompt"] == "Which color?" and list(told["runs"]) == ["uniform", "fastv:layer=1"]
    assert [len(run["steps"][0]["kept"]) for run in told["runs"]["uniform"]] == [32, 13]


@pytest.mark.slow
def test_the_command_draws_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a model of four layers cannot have at a share are shown and printed with the reason."""
    monkeypatch.setattr(demo, "SMALL", TINY)
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "in.png")
    options = ["--random", "--image", tmp_path / "in.png", "--max-new-tokens", 1, "--method", "all", "--retention", "1/5"]
    result = invoke("view", *options, "--output", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    tree = Tree()
    tree.feed((tmp_path / "out.html").read_text("utf-8"))
    runs = json.loads(tree.scripts[0])["runs"]
    assert list(runs) == [name for name in method_names() if name != "dense"]
    out = [name for name, (run,) in runs.items() if run["left_out"]]
    assert 0 < len(out) < len(runs) / 2
    assert [name for name in runs if f"{name} at 1/5 left out: " in result.output] == out


def test_the_command_on_a_folder(checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "in.png")
    asked = ["--image", tmp_path / "in.png", "--method", "uniform:tokens=9", "--max-new-tokens", 3]
    result = invoke("view", "--model", checkpoint, *asked, "--output", tmp_path / "out.html")
    assert result.exit_code == 0, result.output
    tree = Tree()
    tree.feed((tmp_path / "out.html").read_text("utf-8"))
    told = json.loads(tree.scripts[0])
    assert told["model"] == checkpoint.name and not told["random"] and len(told["retentions"]) == 4
    runs = told["runs"]["uniform:tokens=9"]  # it says its own target: the same at every retention
    assert runs == [runs[0]] * 4 and len(runs[0]["steps"][0]["kept"]) == 9


@pytest.mark.parametrize(
    "options, words",
    [
        (["--random", "--method", "slowv"], "method 'slowv' is unknown: use one of vitcop"),
        (["--random", "--retention", "2"], "--retention 2 is no share of the visual tokens: give a number in (0, 1]"),
        (["--random", "--retention", "much", "--method", "uniform:tokens=9"], "--retention much is no share"),
        (["--random", "--retention", "0", "--method", "uniform:tokens=9"], "--retention 0 is no share"),
        (["--random", "--retention", "1/0", "--method", "dense"], "--retention 1/0 is no share"),
        (["--random", "--retention", "1/9-wide", "--method", "uniform"], "'1/9-wide' is not a number"),
        (["--random", "--retention", "1/3", "--retention", "1/3"], "1/3 was given twice"),
        (["--random", "--model", "x"], "--random and --model x were given: choose one"),
        (["--random", "--dtype", "int4"], "--dtype int4 is unknown: use one of float32"),
        (["--random", "--max-new-tokens", "0"], "--max-new-tokens 0 is below 1"),
        (["--random", "--output", "none/out.html"], "none/out.html cannot be written: name an .html file"),
        (["--random", "--output", "out.png"], "out.png cannot be written: name an .html file"),
        (["--random", "--image", "none.png"], "none.png cannot be read"),
        (["--model", "./none"], "--model ./none is not a folder"),
    ],
)
def test_what_the_command_refuses(options: list[str], words: str) -> None:
    assert words in error_of("view", *options)


def test_no_model_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "TRAINED", tmp_path)
    assert f"no model was given, and {tmp_path} holds none: give --model, or --random" in error_of("view")
