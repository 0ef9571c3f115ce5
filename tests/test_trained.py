"""The trained models of examples/models: they see, and what pruning costs them is what the study found, in a subset of it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1]))

from typer.testing import CliRunner

from benchmarks import study
from examples.see.evaluate import Example, answers, held_out
from examples.see.models import load_processor, prompt
from examples.see.questions import KINDS
from vitcop_compile import ConfigError, ViTCoPConfig, optimize
from vitcop_compile.cli import app
from vitcop_compile.methods import FastV, Random
from vitcop_compile.progress import Steps
from vitcop_compile.schedule import Method

FOLDER = Path(__file__).parents[1] / "examples" / "models"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LLAVA, QWEN = "llava", "qwen2_5_vl"
TOKENS = {LLAVA: 576, QWEN: 144}


@cache
def _model(name: str) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(FOLDER / name, dtype=torch.float32).eval()
    return model, load_processor(FOLDER / name)


@cache
def _dense(name: str) -> Any:
    return optimize(_model(name)[0], ViTCoPConfig.dense(), backend="eager")


@cache
def _asked(number: int) -> Mapping[str, list[Example]]:
    return {kind: list(held_out(kind, number)) for kind in KINDS}


def _right(name: str, method: Method | None, number: int) -> dict[str, float]:
    """Share of right answers, by kind and of all; method None: the stock model."""
    model, processor = _model(name)
    fast = model if method is None else optimize(model, method, backend="eager", like=_dense(name))
    found = study.accuracy(fast, processor, name, _asked(number), 7)
    every = [one for own in found.values() for one in own]
    return {kind: sum(own) / len(own) for kind, own in found.items()} | {"all": sum(every) / len(every)}


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_weights_are_small_and_half_precision(name: str) -> None:
    weights = FOLDER / name / "model.safetensors"
    assert weights.stat().st_size < 12e6
    assert json.loads((FOLDER / name / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_the_stock_model_sees(name: str) -> None:
    # Of the study's first questions; the bound is four standard deviations of 28 below what the study found.
    wanted = json.loads((RESULTS / f"study_{name}.json").read_text())["rows"]["dense"]["accuracy"]["all"]["share"]
    assert _right(name, None, 4)["all"] >= wanted - 4 * (wanted * (1 - wanted) / 28) ** 0.5


_ALL: list[Callable[[int], Method]] = [
    # The published merge doubles a token of each cluster, though none goes.
    lambda n: ViTCoPConfig(budgets=(n, n, n), merge="mean"),
    lambda n: FastV(layer=1, tokens=n),
    lambda n: Random(tokens=n),
]


@pytest.mark.parametrize("make", _ALL)
def test_keeping_all_is_dense(make: Callable[[int], Method]) -> None:
    model, processor = _model(QWEN)
    examples = [_asked(4)[kind][0] for kind in KINDS]
    batch = processor(
        images=[[one.image] for one in examples], text=[prompt(QWEN, one.question) for one in examples], return_tensors="pt",
        padding=True,
    )  # fmt: skip
    kept = optimize(model, make(TOKENS[QWEN]), backend="eager", like=_dense(QWEN))
    assert torch.equal(kept(**batch).logits, _dense(QWEN)(**batch).logits)
    assert answers(kept, processor, QWEN, examples) == answers(model, processor, QWEN, examples)


@pytest.mark.slow
def test_the_demo_asks_the_trained_model(tmp_path: Path) -> None:
    known = json.loads((FOLDER / LLAVA / "demo.json").read_text())["questions"]
    picture = tmp_path / "demo.png"
    arguments = ["demo", "--backend", "eager", "--rounds", "1", "--output", str(picture)]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert picture.is_file() and "that was trained" in result.output and "random weights" not in result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    told = {cells[0]: cells[1:] for cells in rows if cells and cells[0] in known}
    assert told.keys() == known.keys()
    right = 0
    for question, (answer, dense, pruned, differ) in told.items():
        assert answer == known[question]
        assert (differ == "differ") == (dense != pruned)
        right += dense == answer
    assert right >= len(known) - 2


@pytest.mark.parametrize("other", [{"weights": "others"}, {"asked": 5}, {"model": "qwen2_5_vl"}])
def test_a_study_goes_on_from_its_own_model_alone(other: dict[str, Any], tmp_path: Path) -> None:
    known = json.loads((RESULTS / f"study_{LLAVA}.json").read_text())
    (tmp_path / "study.json").write_text(json.dumps(known | other))
    ((key, value),) = other.items()
    with pytest.raises(ConfigError, match=rf"study\.json is of {key}={value}, not .*: give another --output"):
        study.Study(FOLDER / LLAVA, tmp_path / "study.json", known["asked"], 10, Steps(Console(quiet=True)))


def test_times_are_of_the_same_rounds() -> None:
    known: Any = SimpleNamespace(found={"times": {"64": {}}}, output="study.json")
    with pytest.raises(ConfigError, match=r"study\.json has times at 64, and others would not be of the same rounds"):
        study.Study.time(known, "64", [], "eager", 1)


@pytest.mark.parametrize("name", [LLAVA, QWEN])
def test_the_study_is_of_the_weights_that_are_shipped(name: str) -> None:
    weights = hashlib.sha256((FOLDER / name / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((RESULTS / f"study_{name}.json").read_text())["weights"] == weights


@pytest.fixture(scope="module")
def ninth() -> dict[str, dict[str, float]]:
    """At one ninth of Qwen's tokens, eight questions of each kind."""
    share = study.SHARES["64"]
    made: dict[str, study.Make] = {name: next(study.settings(name, share)) for name in ("vitcop", "divprune", "random")}
    made |= {"saliency": study.scored(lambda site: site.score, share), "shuffled": study.scored(study.shuffled, share)}
    return {name: _right(QWEN, make(), 8) for name, make in made.items()}


@pytest.mark.slow
def test_a_score_that_is_shuffled_falls_to_random(ninth: dict[str, dict[str, float]]) -> None:
    # 56 questions: a standard deviation of a difference is 0.09 at most.
    assert ninth["saliency"]["all"] > ninth["shuffled"]["all"] + 0.15
    assert abs(ninth["shuffled"]["all"] - ninth["random"]["all"]) < 0.2


@pytest.mark.slow
def test_a_subset_finds_the_orderings_of_the_study(ninth: dict[str, dict[str, float]]) -> None:
    rows = json.loads((RESULTS / f"study_{QWEN}.json").read_text())["rows"]
    full = {name: rows[f"{name} 64"]["accuracy"] for name in ("vitcop", "divprune", "random")}
    for better, worse, kind in (("divprune", "random", "all"), ("vitcop", "random", "all"), ("divprune", "vitcop", "read")):
        one, two = full[better][kind], full[worse][kind]
        assert one["low"] > two["high"], "the study itself does not tell them apart"
        assert ninth[better][kind] > ninth[worse][kind] + 0.1
