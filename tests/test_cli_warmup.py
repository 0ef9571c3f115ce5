"""`vitcop-compile warmup`: what it keeps, from a configuration alone, and what it refuses."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from typer.testing import CliRunner

import vitcop_compile
from vitcop_compile import ViTCoPConfig, backends
from vitcop_compile.cli import app
from vitcop_compile.kept import Keeper


@pytest.fixture
def folder(tmp_path) -> str:
    models.shared(3).config.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["warmup", *options])


@pytest.mark.slow
def test_a_model_finds_what_was_compiled_without_its_weights(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "kept"))
    kinds, graphs = [], {}

    def compile(program: Any, where: Path, bindings: Any) -> Any:
        bindings.write(where, dict(program.state_dict))
        (where / "name").write_text(str(len(graphs)))
        graphs[str(len(graphs))] = program
        return backends.eager(program)

    def load(where: Path, bindings: Any, device: torch.device) -> Any:
        kinds.append(where)
        return lambda *_: pytest.fail("called")

    monkeypatch.setitem(backends.BACKENDS, "counted", backends.Backend(backends.eager, keeper=Keeper(compile, load)))
    filled = []
    monkeypatch.setattr("vitcop_compile.optimized.fill", lambda *given: filled.append(given[4]))
    options = ["--model", folder, "--backend", "counted", "--retention", "1/3", "--processes", "1"]
    result = run(*options, "--batch-size", "1", "--batch-size", "2", "--output", str(tmp_path / "image.tar"))
    assert result.exit_code == 0, result.output
    assert "6 programs" in result.stdout and len(graphs) == 6
    # Processes are started once, and share the programs of both batches.
    ((*asked,),) = filled
    assert [name for name, _ in asked] == ["vision", "prefill", "extend"] * 2
    with tarfile.open(tmp_path / "image.tar") as tar:
        assert sum(name.endswith("entry.json") for name in tar.getnames()) == 6
    fast = vitcop_compile.optimize(models.llava(3, seed=7), ViTCoPConfig.preset("1/3"), backend="counted")
    fast.on_demand.vision(2)
    assert len(kinds) == 1 and len(graphs) == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "tvm"], "backend='tvm' is unknown"),
        (["--backend", "eager"], "backend='eager' keeps no programs: use inductor or aotinductor"),
        (["--retention", "7/9x"], "7/9x"),
        (["--dtype", "int8"], "dtype='int8' is unknown"),
        (["--threads", "0"], "--threads 0 is below 1"),
        (["--processes", "0"], "--processes 0 is below 1"),
        (["--images", "-1"], "--images -1 is below 0"),
        (["--image-size", "12"], "--image-size 12 is not WIDTHxHEIGHT"),
        (["--output", "nowhere/image.tar"], "nowhere/image.tar cannot be written: name a file in an existing folder"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_compiled(folder, monkeypatch, tmp_path, options, words):
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr("vitcop_compile.cli.warmup.optimize", lambda *_, **__: pytest.fail("optimized"))
    result = run("--model", folder, *options)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split())


def test_a_store_that_is_off_or_a_model_that_is_not_there_is_refused(monkeypatch, tmp_path):
    result = run("--model", str(tmp_path))
    assert result.exit_code == 2 and "nothing is kept: VITCOP_CACHE is off" in result.stderr
    monkeypatch.setenv("VITCOP_CACHE", str(tmp_path / "kept"))
    result = run("--model", str(tmp_path / "nowhere"))
    assert result.exit_code == 2 and "nowhere is not a folder" in result.stderr
