"""The budget search: what it chooses, refuses and writes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from unittest import mock

import models
import pytest
import torch
from models import pixels, prompt
from rich.console import Console

from vitcop_compile import ConfigError, InputError, ViTCoPConfig, methods, quality, tune
from vitcop_compile.methods import load_method
from vitcop_compile.progress import Steps

METHODS = {
    "half": ViTCoPConfig(vision_ratio=0.8, retention=0.5),
    "tenth": ViTCoPConfig(vision_ratio=0.3, retention=0.12),
    "uniform": methods.Uniform(retention=0.25),
    "impossible": methods.FastV(layer=2, retention=0.1),
}


@pytest.fixture(autouse=True)
def exported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of one method are exported for the first search alone."""
    monkeypatch.setattr(tune, "optimize", models.optimize)


def search(target: str, **options):
    requests = [{"input_ids": prompt(seed=seed), "pixel_values": pixels(1, seed)} for seed in range(2)]
    steps = Steps(Console(file=io.StringIO()))
    return tune.tune(models.shared(), options.pop("requests", requests), METHODS, target, backend="eager", tokens=2, rounds=1,
                     steps=steps, **options)  # fmt: skip


def test_the_nearest_that_is_small_enough_is_chosen() -> None:
    schedules = {name: method.schedule(*_of(models.shared())) for name, method in METHODS.items() if name != "impossible"}
    text = prompt().shape[1] - models.PATCHES
    sizes = {name: schedule.kv_bytes(text) / 2**20 for name, schedule in schedules.items()}
    found = search(f"kv={sizes['uniform'] * 1.001}")
    kept = {own.name: own for own in found.candidates}
    assert {name: kept[name].kv for name in sizes} == pytest.approx(sizes)
    assert kept["half"].kl is None and kept["half"].ttft is None  # too large: nothing was measured
    assert found.chosen == min(("uniform", "tenth"), key=lambda name: kept[name].kl)
    assert list(found.left_out) == ["impossible"] and "layers see all" in found.left_out["impossible"]


def test_sizes_are_means_over_texts_of_any_length() -> None:
    requests = [{"input_ids": prompt(5, after), "pixel_values": pixels()} for after in (2, 90)]
    schedule = METHODS["uniform"].schedule(*_of(models.shared()))
    found = search("kv=1000", requests=requests)
    (kept,) = (own for own in found.candidates if own.name == "uniform")
    assert kept.kv == pytest.approx((schedule.kv_bytes(7) + schedule.kv_bytes(95)) / 2**21)


def test_the_fastest_that_is_near_enough_is_chosen() -> None:
    with mock.patch.object(tune, "interleave", lambda calls, *_, **__: {name: [float(len(name))] for name in calls}):
        found = search("kl=100")
        assert found.chosen == "half"  # of those named, the shortest name
        near = {own.name: own.kl for own in found.candidates if own.kl is not None}
        bound = min(near.values()) * 1.0001
        assert near[search(f"kl={bound}").chosen] <= bound < max(near.values())
        with pytest.raises(ConfigError, match=r"no method meets ttft=2.0 ms: the best was half with 4; raise"):
            search("ttft=2")


def test_nothing_is_asked_or_traced_twice() -> None:
    """Each request once of the dense model and once of each candidate, all of one capture."""
    asked, made = [], []

    def answer(model, request, tokens):
        asked.append((id(model), id(request)))
        return quality.answer(model, request, tokens)

    def optimized(*given, **options):
        made.append((models.optimize(*given, **options), options.get("like")))
        return made[-1][0]

    with (
        mock.patch.object(tune, "answer", answer),
        mock.patch.object(tune, "optimize", optimized),
        mock.patch.object(tune, "interleave", lambda calls, *_, **__: {name: [1.0] for name in calls}),
    ):
        found = search("kl=100")
    assert len(asked) == len(set(asked)) == 4 * 2
    (dense, none), *others = made
    assert none is None and len(others) == 7 and all(like is dense for _, like in others)  # three tried, and four timed
    assert all(0 <= own.agreed <= 1 for own in found.candidates if own.agreed is not None)


def test_what_it_writes_is_read_again(tmp_path: Path) -> None:
    found = search("kv=1000")
    found.save(tmp_path / "tuned.json")
    assert load_method(tmp_path / "tuned.json") == found.method == METHODS[found.chosen]
    evidence = json.loads((tmp_path / "tuned.json").read_text())["evidence"]
    assert evidence["chosen"] == found.chosen and evidence["target"] == "kv=1000" and len(evidence["candidates"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("target", ["kl", "kl=", "kl=-1", "speed=3", "kl=x", "kv=inf"])
def test_targets_that_are_none(target: str) -> None:
    with pytest.raises(ConfigError, match=r"is none: use one of ttft=NUMBER \(ms\), kv=NUMBER \(MiB\), kl=NUMBER \(nats\)"):
        tune.target_of(target)


def test_no_pictures() -> None:
    with pytest.raises(InputError, match="there is no picture to tune on"):
        search("kl=1", requests=[])


def _of(model):
    from vitcop_compile.families import family_of

    shape = family_of(model).shape
    assert shape.element_bytes == torch.finfo(torch.float32).bits // 8
    return shape, (shape.image,)
