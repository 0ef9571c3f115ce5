"""What a second process finds compiled. Two processes compile and call three programs each, which takes a while."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import startup

TINY = {
    "hidden": 32, "layers": 6, "heads": 2, "intermediate": 64, "vocab": 260,
    "vision_hidden": 32, "vision_layers": 2, "vision_heads": 2, "image_size": 112,
}  # fmt: skip
PROGRAMS = ["vision", "prefill", "decode"]


@pytest.fixture(scope="module")
def results():
    return startup.measure(TINY, "inductor", "1/9", Console(file=io.StringIO()), text_tokens=16, planned=False)


def test_a_second_process_finds_every_program_compiled(results):
    first, second = results["rows"]
    for row, found in ((first, "miss"), (second, "hit")):
        assert [program["program"] for program in row["programs"]] == PROGRAMS
        for program in row["programs"]:
            counted = {f"{cache}_{event}": program[f"{cache}_{event}"] for cache in ("fxgraph", "autograd") for event in EVENTS}
            assert counted == {name: int(name.endswith(found)) for name in counted}, (row["process"], program["program"])


EVENTS = ("hit", "miss", "bypass")


def test_every_step_is_reported(results):
    for row in results["rows"]:
        assert min(row["import_s"], row["optimize_s"], row["optimize_cpu_s"]) > 0
        for program in row["programs"]:
            assert min(program[name] for name in ("export_s", "compile_s", "first_call_s")) > 0 and program["nodes"] > 100
    # Compiling takes seconds, and what is found takes none of them.
    first, second = (sum(program["first_call_s"] for program in row["programs"]) for row in results["rows"])
    assert second < first
    text = io.StringIO()
    Console(width=140, file=text).print(startup.table(results))
    assert all(text.getvalue().count(name) == 2 for name in PROGRAMS)
    json.dumps(results)


def test_a_process_that_fails_says_why(tmp_path):
    asked = {"model": {"layers": 0}, "dtype": "float32", "meta": True, "backend": "eager", "preset": "7/9"}
    with pytest.raises(RuntimeError, match=r"ended with 1:.*preset '7/9' is unknown"):
        startup.process(str(tmp_path), asked | {"text_tokens": 8, "new_tokens": 8})
