"""The budget search: what it chooses, refuses and writes."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from unittest import mock

import models
import pytest
import torch
from models import pixels, prompt
from PIL import Image
from rich.console import Console
from test_cli import checkpoint, error_of, invoke  # noqa: F401

from vitcop_compile import ConfigError, InputError, UnsupportedError, ViTCoPConfig, methods, quality, tune
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
    settings = {"backend": "eager", "tokens": 2, "rounds": 1} | options
    return tune.tune(models.shared(), settings.pop("requests", requests), METHODS, target, steps=steps, **settings)


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


@pytest.mark.slow
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
    assert [evidence[name] for name in ("backend", "device", "dtype")] == ["eager", "cpu", "float32"]
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]
    (tmp_path / "folder").mkdir()
    for path, why in (("folder", "directory"), ("nowhere/tuned.json", "No such file"), ("tuned.json/a", "Not a directory")):
        with pytest.raises(InputError, match=f"{path} cannot be written: .*{why}.*; name a file in an existing folder"):
            found.save(tmp_path / path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "tuned.json"]


def _refused(*_):
    raise UnsupportedError("too many steps")


def failing(time: int, *settings):
    """`optimize` that cannot do what it is asked for `settings`: not at all (0), or what it returns cannot compile, from the
    second such call on (2) or from the first (1)."""
    asked = []

    def optimized(model, method, **options):
        asked.append(method)
        fast = models.optimize(model, method, **options)
        if method in settings:
            if time == 0:
                _refused()
            if asked.count(method) >= time:
                fast.on_demand.backend = dataclasses.replace(fast.on_demand.backend, compile=_refused)
        return fast

    return mock.patch.object(tune, "optimize", optimized)


@pytest.mark.parametrize("target, time", [("kl=100", 0), ("kl=100", 1), ("kl=100", 2), ("ttft=100", 2)])
def test_what_cannot_be_compiled_is_left_out(target: str, time: int) -> None:
    timed = []

    def interleave(calls, *_, **__):
        timed.extend(calls)
        return {name: [float(len(name))] for name in calls}

    with failing(time, METHODS["half"]), mock.patch.object(tune, "interleave", interleave):
        found = search(target)
    assert found.left_out["half"] == "too many steps" and list(found.left_out)[-1] == ("half" if time else "impossible")
    assert timed == ["dense", "tenth", "uniform"]  # else half would be the fastest
    assert [own.name for own in found.candidates] == timed and found.chosen in timed[1:]


def test_nothing_can_be_compiled() -> None:
    made = [METHODS[name] for name in ("half", "tenth", "uniform")]
    with failing(2, *made), pytest.raises(ConfigError, match=r"no method can be had on this model.*; half: too many steps"):
        search("kl=100")
    with failing(2, ViTCoPConfig.dense()), pytest.raises(UnsupportedError, match="too many steps"):
        search("kl=100")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"backend": "bogus"}, UnsupportedError, "backend='bogus' is unknown: use one of eager, inductor"),
        ({"tokens": 0}, InputError, "tokens=0 is below 1: ask for 1 or more"),
        ({"rounds": -1}, InputError, "rounds=-1 is below 1: ask for 1 or more"),
    ],
)
def test_arguments_are_looked_at_before_the_work(options: dict, error: type[Exception], message: str) -> None:
    with mock.patch.object(tune, "optimize", side_effect=AssertionError), pytest.raises(error, match=message):
        search("kl=1", **options)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--target", "speed=1"], "target 'speed=1' is none"),
        (["--backend", "bogus"], "backend='bogus' is unknown: use one of eager, inductor"),
        (["--tokens", "0"], "tokens=0 is below 1"),
        (["--rounds", "0"], "rounds=0 is below 1"),
        (["--limit", "0"], "--limit 0 is below 1"),
        (["--dtype", "int8"], "dtype='int8' is unknown: use one of float32, float16, bfloat16"),
        (["--output", "nowhere/out.json"], "--output nowhere/out.json cannot be written: name a file in an existing folder"),
        (["--output", "."], "--output . cannot be written: name a file in an existing folder"),
        (["--method", "slowv"], "method 'slowv' is unknown"),
        (["--images", "nowhere"], "--images nowhere is not a folder"),
        ([], "--images . holds no picture: .png"),
    ],
)
def test_the_command_refuses_before_a_model_is_loaded(
    options: list, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with mock.patch("vitcop_compile.cli.tune.AutoModelForImageTextToText", None):
        assert words in error_of("tune", "--model", "x", "--images", ".", "--target", "kl=1", *options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_command_says_in_what_it_measured(dtype: str | None, checkpoint: Path, tmp_path: Path) -> None:  # noqa: F811
    Image.new("RGB", (120, 90), "red").save(tmp_path / "a.png")
    asked = ["--model", checkpoint, "--images", tmp_path, "--target", "kv=1000", "--tokens", 1, "--backend", "eager"]
    more = ["--method", "uniform:tokens=9", "--output", tmp_path / "out.json", *(["--dtype", dtype] if dtype else [])]
    with mock.patch("torch.cuda.is_available", lambda: False):
        result = invoke("tune", *asked, *more)
    assert result.exit_code == 0, result.output
    told = dtype or "float32"
    assert f"eager, cpu, {told}" in result.output
    evidence = json.loads((tmp_path / "out.json").read_text())["evidence"]
    assert [evidence[name] for name in ("backend", "device", "dtype")] == ["eager", "cpu", told]
    dense, uniform = evidence["candidates"]
    # A cache row is of keys and values, 4 layers, 32 numbers: 64 patches or 9 among the same words.
    assert (dense["kv"] - uniform["kv"]) * 2**20 == 55 * 2 * 4 * 32 * (2 if dtype else 4)


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
