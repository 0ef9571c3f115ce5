"""The study's tables, from numbers made up here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from PIL import Image
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import study_time
from benchmarks.study_report import ablations, by_budget, by_kind, save_plot, save_time_plot, tables
from vitcop_compile import ConfigError, UnsupportedError
from vitcop_compile.progress import Steps


def _row(right: str, tokens: float) -> dict[str, Any]:
    share = right.count("1") / len(right)
    told = {"share": share, "low": share - 0.1, "high": share + 0.1, "asked": len(right)}
    return {
        "accuracy": {"what": told, "all": told}, "right": {"what": right}, "mean_tokens": tokens, "of": 576,
        "kv_bytes": 2**20, "flop_ratio": 2.0,
    }  # fmt: skip


FOUND: dict[str, Any] = {
    "model": "llava",
    "asked": 4,
    "rows": {
        "dense": _row("1111", 576),
        "vitcop 192": _row("1110", 192),
        "random 192": _row("1100", 192),
        "vitcop 64": _row("1000", 64),
        "fastv 64": {"left_out": "too few"},
        "vitcop+calibrated 64": _row("1100", 64),
        "ablation 64: published": _row("1000", 64),
        "ablation 64: keys raw": _row("0110", 64),
        "saliency 64": _row("1111", 64),
    },
    "times": {"64": {"backend": "inductor", "rows": {"dense": {"ttft": 30.0}, "vitcop": {"ttft": 20.0, "selection": 1.25}}}},
}


def test_accuracy_by_budget() -> None:
    lines = by_budget(FOUND).splitlines()
    assert lines[2:] == [
        "| vitcop | 75 | - | 25 | - | - |",
        "| random | 50 | - | - | - | - |",
        "| fastv | - | - | - | - | - |",
        "| vitcop+calibrated | - | - | 50 | - | - |",
        "| 95 % | ± 10 | - | ± 10 | - | - |",
    ]


def test_accuracy_by_kind_with_times() -> None:
    lines = by_kind(FOUND, "64").splitlines()
    assert lines[2] == "| dense | 576 of 576 | 100 | 100 | 90 to 110 | 1.00 MiB | 1/2.0 | 30.0 ms, 1.00x | - |"
    assert lines[3] == "| vitcop | 64 of 576 | 25 | 25 | 15 to 35 | 1.00 MiB | 1/2.0 | 20.0 ms, 1.50x | 1.25 ms |"
    assert lines[4].endswith("| - | - |") and len(lines) == 5
    assert "TTFT" not in by_kind(FOUND, "192")


def test_answers_that_turned() -> None:
    assert ablations(FOUND).splitlines()[-1] == "| 64: keys raw | 50 | 50 | 2 | 1 | 1/2.0 |"
    alone = FOUND["rows"] | {"ablation 16: published": {"left_out": "too few"}, "ablation 16: keys raw": _row("0110", 16)}
    assert ablations({"rows": alone}).splitlines()[-1] == "| 16: keys raw | 50 | 50 | - | - | 1/2.0 |"
    assert ablations({"rows": {"dense": _row("1", 1)}}) == ""


def test_all_tables() -> None:
    text = tables(FOUND)
    assert "- left out: fastv 64: too few" in text and text.startswith("llava, 4 questions of each kind")


@pytest.mark.parametrize("draw", [save_plot, save_time_plot])
def test_plot(draw: Callable[[Any, Path], None], tmp_path: Path) -> None:
    draw(FOUND, tmp_path / "study.png")
    shown = Image.open(tmp_path / "study.png").convert("L")
    assert shown.width > 600 and len(set(shown.get_flattened_data())) > 20
    assert [file.name for file in tmp_path.iterdir()] == ["study.png"]


def test_a_plot_of_times_needs_times(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no times of llava were measured: run the study with --time first"):
        save_time_plot(FOUND | {"times": {}}, tmp_path / "study.png")


def test_times_leave_out_what_a_backend_cannot_compile(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is measured here: models and times are made up."""

    def optimize(model: Any, method: Any, **_: Any) -> Any:
        if method == "refused":
            raise UnsupportedError("too many steps")
        if method == "impossible":
            raise ConfigError("too few tokens")
        return SimpleNamespace(schedule_of=lambda layout: SimpleNamespace(stages=method != "plain"), method=method)

    def selection(fast: Any, *_: Any) -> Any:
        if fast.method == "selects":
            raise UnsupportedError("no such operator")
        return lambda: None

    dense: Any = SimpleNamespace(model=None, pruning_config="plain", layouts_of=lambda **_: [[]])
    methods: Any = {"a": "refused", "b": "fine", "c": "selects"}
    steps = Steps(Console(quiet=True))
    with (
        mock.patch.object(study_time, "optimize", optimize),
        mock.patch.object(study_time, "_call", lambda *_: lambda: None),
        mock.patch.object(study_time, "_selection", selection),
        mock.patch.object(study_time, "interleave", lambda calls, *_, **__: {name: [1.0] for name in calls}),
    ):
        found = study_time.times_of(dense, methods, {}, "onnxruntime", 1, steps)
        assert found == {"dense": {"ttft": 1.0}, "b": {"ttft": 1.0, "selection": 1.0}}
        assert capsys.readouterr().err == "a left out: too many steps\nc left out: no such operator\n"
        tries: Any = [lambda: "impossible", lambda: "refused", lambda: "fine"]
        assert study_time.first_that_fits(dense, "d", tries) == "fine" and not capsys.readouterr().err
        assert study_time.first_that_fits(dense, "d", tries[:2]) is None
        assert capsys.readouterr().err == "d left out: too many steps\n"
        dense.pruning_config = "refused"
        with pytest.raises(UnsupportedError, match="too many steps"):
            study_time.times_of(dense, {}, {}, "onnxruntime", 1, steps)
