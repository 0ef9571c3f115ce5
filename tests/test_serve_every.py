"""The simulation that chooses how many decode steps lie between two prefills: times by hand, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vitcop_compile import InputError

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import serving_every
import typer
from serving_load import Item

COSTS = serving_every.Costs(0.25, 0.0625)


def test_one_request_takes_its_prefill_and_its_steps() -> None:
    (found,), took = serving_every.played([Item(1.0, 24, 4, 0)], COSTS, every=4)
    # It waits for company, for 5 ms.
    assert found.first == pytest.approx(1.255) and found.last == pytest.approx(1.255 + 3 * 0.0625)
    assert found.whole and found.tokens == 4 and took == found.last


@pytest.mark.parametrize("every", [1, 2, 8])
def test_a_second_one_joins_after_so_many_steps(every: int) -> None:
    items = [Item(0.0, 24, 16, 0), Item(0.1, 56, 2, 1)]
    (first, second), _ = serving_every.played(items, COSTS, every)
    assert second.first == pytest.approx(0.255 + every * 0.0625 + 0.25)
    # The prefill of the second lies between two tokens of the first.
    assert first.last == pytest.approx(0.255 + 15 * 0.0625 + 0.25) and first.whole and second.whole


def test_those_with_one_key_come_together() -> None:
    items = [Item(0.0, 24, 2, number) for number in range(4)] + [Item(0.0, 24, 2, None)]
    found, _ = serving_every.played(items, COSTS, every=1)
    assert [one.first for one in found[:4]] == pytest.approx([1.0] * 4)
    assert found[4].first == pytest.approx(1.0 + 0.0625 + 0.25)


def test_a_loop_serves_one_after_the_other() -> None:
    found, took = serving_every.looped([Item(1.0, 24, 5, 0), Item(1.1, 24, 2, 0), Item(9.0, 24, 1, None)], COSTS)
    assert [(one.first, one.last) for one in found] == [(1.25, 1.5), (1.75, 1.8125), (9.25, 9.25)]
    assert took == 9.25 and found[1].ttft == pytest.approx(0.65)


def test_the_rate_that_is_sustained_is_that_of_the_limits() -> None:
    """A prefill of 1/4 s, and nobody decodes: a queue with a fixed time of service, whose load lies below one."""
    costs = serving_every.Costs(0.25, 0.0)
    rate = serving_every.sustained(lambda items: serving_every.looped(items, costs), 400, {"ttft": 1000.0, "tpot": 1.0})
    assert 1.0 < rate < 4.0
    for limit, passes in ((249.0, False), (251.0, True)):
        found = serving_every.sustained(lambda items: serving_every.looped(items, costs), 20, {"ttft": limit, "tpot": 1.0})
        assert (found > 0) == passes
    told = serving_every.rates({"1/9": (serving_every.Costs(0.1, 0.01), 5.0)}, 60, {"ttft": 500.0, "tpot": 100.0})
    assert told["slots 1/9"] > 1.5 * told["loop 1/9"] > 0


def test_the_table_is_written_and_shown(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(serving_every.main)
    asked = ["--results", str(tmp_path), "--requests", "10"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2 and "serving.json cannot be read" in " ".join(done.output.split())
    (tmp_path / "serving.json").write_text(json.dumps({"environment": {}, "rows": []}))
    with pytest.raises(InputError, match=r"run benchmarks/serving\.py first"):
        serving_every.measured(tmp_path / "serving.json")
    programs = {"1/9": {"prefill_ms": 100.0, "step_ms": 10.0, "per_s": 5.0}}
    found = {"programs": programs, "limits_ms": {"ttft": 500.0, "tpot": 100.0}}
    kept = {"environment": {"found": found}, "rows": []}
    (tmp_path / "serving.json").write_text(json.dumps(kept))
    expected = {"1/9": (serving_every.Costs(0.1, 0.01), 5.0)}
    assert serving_every.measured(tmp_path / "serving.json") == (expected, found["limits_ms"])
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "serving_every.json").read_text())
    assert [(row["load"], row["every"]) for row in made["rows"]] == [
        (load, every) for load in serving_every.LOADS for every in serving_every.EVERY
    ]
    assert all(row["whole"] == row["requests"] for row in made["rows"])
    assert set(made["environment"]["sustained_per_s"]) == {"slots 1/9", "loop 1/9"}
    shown = CliRunner().invoke(app, [*asked, "--tables"])
    assert shown.output.count("\n| 1/9 |") == len(made["rows"])
    assert "slots 1/9: " in shown.output and shown.output.count("requests a second are sustained") == 2
