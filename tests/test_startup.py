"""What a second process finds compiled. Two processes compile and call three programs each, which takes a while."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import startup

TINY = startup.Shape(hidden=32, layers=3, mlp=64, vocab=260, vision_hidden=32, vision_layers=2, image_size=112)
PROGRAMS = ["vision", "prefill", "decode"]
CACHES, EVENTS = ("fxgraph", "autograd"), ("hit", "miss", "bypass")


@pytest.fixture(scope="module")
def results():
    with pytest.MonkeyPatch.context() as patch:
        # Scalar kernels, and no trials of what the processor has: they compile sooner, and are cached as any other.
        patch.setenv("TORCHINDUCTOR_VEC_ISA_OK", "0")
        return startup.measure(TINY, "inductor", "1/3", Console(file=io.StringIO()), text_tokens=16, planned=False)


@pytest.mark.exhaustive
def test_a_second_process_finds_every_program_compiled(results):
    first, second = results
    for row, happened in ((first, "miss"), (second, "hit")):
        assert [program["program"] for program in row["programs"]] == PROGRAMS
        for program in row["programs"]:
            for cache in CACHES:
                counted = {event: program[f"{cache}_{event}"] for event in EVENTS}
                assert counted == {event: int(event == happened) for event in EVENTS}, (row["process"], program)


@pytest.mark.exhaustive
def test_every_step_is_reported(results):
    for row in results:
        assert min(row["import_s"], row["optimize_s"], row["optimize_cpu_s"]) > 0
        for program in row["programs"]:
            assert min(program[name] for name in ("export_s", "compile_s", "first_call_s")) > 0 and program["nodes"] > 100
    text = io.StringIO()
    Console(width=140, file=text).print(startup.table(results))
    assert all(text.getvalue().count(name) == 2 for name in PROGRAMS)


def test_a_process_that_fails_says_why(tmp_path):
    asked = {"shape": vars(TINY), "meta": True, "backend": "eager", "preset": "7/9", "text_tokens": 8}
    with pytest.raises(RuntimeError, match=r"(?s)ended with 1:.*preset '7/9' is unknown"):
        startup.process(str(tmp_path), **asked)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backend", "tvm"], "backend='tvm' is unknown"),
        (["--preset", "7/9"], "preset '7/9' is unknown"),
        (["--output", "nowhere/startup.json"], "nowhere/startup.json cannot be written"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(monkeypatch, options, words):
    monkeypatch.setattr(startup, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    app = typer.Typer()
    app.command()(startup.main)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2 and words in result.stderr


def test_what_was_measured_is_written_and_printed(monkeypatch, tmp_path):
    program = {"program": "vision", "nodes": 7, "export_s": 0.5}
    rows = [{"process": "7B on meta", "import_s": 3.0, "optimize_s": 8.5, "optimize_cpu_s": 6.25, "programs": [program]}]
    monkeypatch.setattr(startup, "measure", lambda *args, **kwargs: rows)
    app = typer.Typer()
    app.command()(startup.main)
    result = CliRunner().invoke(app, ["--output", str(tmp_path / "startup.json")])
    assert result.exit_code == 0 and "8.5" in result.stdout
    written = json.loads((tmp_path / "startup.json").read_text())
    assert written["rows"] == rows and written["environment"]["backend"] == "inductor"
