"""The benchmark of a server under load: what it sends, how it searches a rate, and what it makes of times."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcop_compile.errors import UnsupportedError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TIMES = st.lists(st.floats(0, 1e3), min_size=1)


@pytest.fixture(scope="module")
def modules() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(BENCHMARKS)
        import serving
        import serving_load

        yield serving, serving_load


@given(capacity=st.floats(0.01, 1000), first=st.floats(0.01, 1000))
def test_a_search_ends_within_a_tenth_below_what_passes(modules: Any, capacity: float, first: float) -> None:
    search = modules[0].Search(first)
    for _ in range(60):
        if search.over:
            break
        search.note(search.rate <= capacity)
    assert search.over and search.passed <= capacity < search.passed * 1.1 * (1 + 1e-9)


@given(values=TIMES, part=st.sampled_from([0.5, 0.99, 1.0]))
def test_a_percentile_is_the_least_that_covers_its_part(modules: Any, values: list[float], part: float) -> None:
    found = modules[1].percentile(values, part)
    covered = [value for value in values if value <= found]
    assert found in values and len(covered) >= part * len(values) - 1e-9
    assert len([value for value in values if value < found]) < part * len(values)


def test_a_percentile_of_nothing_is_beyond_every_bound(modules: Any) -> None:
    assert modules[1].percentile([], 0.5) == float("inf")


def test_requests_come_by_chance_at_their_rate_and_again_by_their_seed(modules: Any) -> None:
    load = modules[1]
    items = load.poisson(50.0, 100.0, seed=3)
    assert items == load.poisson(50.0, 100.0, seed=3) != load.poisson(50.0, 100.0, seed=4)
    assert abs(len(items) - 5000) < 5 * 5000**0.5  # five standard deviations
    ats = [item.at for item in items]
    assert ats == sorted(ats) and ats[0] > 0 and ats[-1] < 100
    without = sum(item.picture is None for item in items) / len(items)
    assert abs(without - load.TEXT_ONLY) < 0.03
    assert {item.text for item in items} == set(load.TEXTS) and {item.new for item in items} == set(load.NEW)


def test_times_count_from_when_a_request_was_meant_to_leave(modules: Any) -> None:
    load = modules[1]
    found = [
        load.Answered(200, True, 1.0, 1.5, 2.5, 11),
        load.Answered(200, True, 0.0, 2.0, 2.0, 1),  # one token has no pace
        load.Answered(200, False, 0.0, 0.25, 9.0, 3),  # broken
        load.Answered(429, False, 0.0, None, None, 0),
    ]
    told = load.summed(found, 4.0)
    assert (told["requests"], told["whole"], told["refused"], told["broken"]) == (4, 2, 1, 1)
    assert told["per_s"] == 0.5 and told["tokens_per_s"] == 3.0
    assert (told["ttft_p50_ms"], told["ttft_p99_ms"]) == (500.0, 2000.0)
    assert told["tpot_p50_ms"] == told["tpot_p99_ms"] == pytest.approx(100.0)


def test_servers_take_turns_and_medians_leave_the_first_round_out(modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import serving_ray

    asked: list[tuple[str, int, int]] = []

    class Fake:
        """Answers in as many seconds as its round says; a server named "broken" answers half."""

        def __init__(self, url: str, side: int):
            self.url = url

        async def closed_loop(self, model: str, clients: int, each: int, seed: int) -> tuple[list[Any], float]:
            asked.append((self.url, clients, seed))
            first = 100.0 if seed < 0 else [0.1, 0.5, 0.2][seed]
            whole = not (self.url == "broken" and seed == 1)
            return [modules[1].Answered(200, whole, 0.0, first, first + 1.0, 11)] * (clients * each), 10.0

        async def close(self) -> None:
            asked.append((self.url, 0, 0))

    monkeypatch.setattr(serving_ray, "Load", Fake)
    rows = asyncio.run(serving_ray.measured({"a": "one", "b": "two"}, 3, lambda text: None))
    assert [(row["server"], row["clients"]) for row in rows] == [(name, count) for count in (1, 4, 8) for name in "ab"]
    assert all(row["ttft_p50_ms"] == 200.0 and row["tpot_p50_ms"] == pytest.approx(100.0) for row in rows)
    assert rows[0]["per_s"] == 2.0 and rows[-1]["per_s"] == 16.0
    assert asked[:4] == [("one", 1, -1), ("two", 1, -1), ("one", 1, 0), ("two", 1, 0)] and asked[-1] == ("two", 0, 0)
    with pytest.raises(UnsupportedError, match="20 requests of b were not answered whole"):
        asyncio.run(serving_ray.measured({"a": "one", "b": "broken"}, 3, lambda text: None))


@pytest.mark.slow
def test_a_soak_of_seconds_finds_every_kind_of_request_answered_as_it_should_be(modules: Any, tmp_path: Path) -> None:
    """A real server of a toy folder; what the benchmark calls wrong is what this must not find."""
    import serving_folder
    import serving_soak

    folder = serving_folder.written(tmp_path / "tiny", 2)
    with serving_folder.serving(folder) as (url, pid):
        found = asyncio.run(serving_soak.soak(url, pid, "tiny", 8.0, 6, lambda text: None))
        served_nobody = asyncio.run(serving_soak.soak(url, pid, "nobody", 1.0, 1, lambda text: None))
    assert found["wrong"] == [] and set(found["told"]) == set(serving_soak.KINDS), found
    first, last = found["samples"][0], found["samples"][-1]
    assert last["occupied"] == last["queued"] == 0 and last["mib"] > 0
    assert last["files"] <= first["files"] + 8
    # It can tell: a model that is not served is wrong for all kinds but one.
    assert served_nobody["wrong"] and all(text.endswith((": 0", ": 404")) for text in served_nobody["wrong"])
