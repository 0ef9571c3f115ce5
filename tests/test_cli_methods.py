"""Methods by name on the command line, and what their selection alone does."""

from __future__ import annotations

import families
import models
import pytest
import torch
from typer.testing import CliRunner

from vitcop_compile import ConfigError, bench, methods
from vitcop_compile.bench.selection import SelectionOnly, selection_inputs
from vitcop_compile.cli import app, shared
from vitcop_compile.families import family_of
from vitcop_compile.methods.named import method_from, method_names
from vitcop_compile.schedule import resolve

NAMES = [name for name in method_names() if name != "dense"]


def explained(*options: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["explain", *options], env={"COLUMNS": "200"})
    return found.exit_code, found.output


def test_every_method_has_a_line() -> None:
    code, text = explained("--method", "all", "--retention", "0.3333")
    assert code == 0
    lines = {line.split(":")[0]: line for line in text.splitlines() if ":" in line}
    assert list(lines) == NAMES
    assert lines["uniform"] == (
        "uniform: 576 patches -> 192 after encoder layer 22 (uniform); mean 192.0, prefill FLOPs / 2.52, KV / 2.50"
    )
    assert "-> 166 before layer 2 (last_attention); mean 191.6" in lines["fastv"]


@pytest.mark.parametrize(
    "command, options, reader",
    [
        ("view", ["--random"], "vitcop_compile.cli.view._methods"),
        ("tune", ["--model", "x", "--images", "y", "--target", "kl=1"], "vitcop_compile.cli.tune._methods"),
        ("bench", [], "vitcop_compile.bench.run"),
    ],
)
def test_all_are_all_in_every_command_that_takes_several(
    command: str, options: list[str], reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(asked: list, *_: object, **__: object) -> None:
        raise ConfigError(f"asked for {' '.join(asked[0].configs if command == 'bench' else asked)}")

    monkeypatch.setattr(reader, read)
    found = CliRunner().invoke(app, [command, *options, "--method", "all"])
    assert found.exit_code == 2 and " ".join(found.output.split()) == f"error: asked for {' '.join(NAMES)}"
    found = CliRunner().invoke(app, [command, *options, "--method", "all", "--method", "fastv"])
    assert found.exit_code == 2 and "--method all was given with others: choose either" in found.output


def test_only_what_takes_several_methods_speaks_of_all() -> None:
    assert "`all`" not in shared.ONE_METHOD_HELP and "`all` alone for all" in shared.METHOD_HELP
    found = CliRunner().invoke(app, ["export", "--method", "all", "--model", "x", "--output-dir", "y"])
    assert found.exit_code == 2 and "method 'all' is unknown" in found.output


def test_a_calibrated_method_has_a_line() -> None:
    code, text = explained("--method", "calibrated+visionzip:tokens=64", "--method", "visionzip:tokens=64")
    lines = [line for line in text.splitlines() if "visionzip:tokens" in line]
    assert code == 0 and len(lines) == 2 and lines[0] == f"calibrated+{lines[1]}"


def test_one_method_has_a_table() -> None:
    code, text = explained("--method", "fastv:layer=3,tokens=64")
    assert code == 0 and "before layer 3: last_attention to 64" in text and "0-2" in text and "3-31" in text


@pytest.mark.parametrize(
    "options, words",
    [
        (["--method", "slowv"], "method 'slowv' is unknown: use one of vitcop, dense, "),
        (["--method", "fastv:speed=3"], "fastv: unknown settings speed: use some of tokens, retention, layer"),
        (["--method", "fastv", "--retention", "0.05"], "as the first 2 of 32 layers see all: choose more than 0.0641"),
        (["--method", "all", "--method", "fastv"], "--method all was given with others: choose either"),
        (["--method", "fastv", "--preset", "1/9"], "leave --preset, --mean-tokens, --config out"),
    ],
)
def test_what_cannot_be_explained(options: list[str], words: str) -> None:
    code, text = explained(*options)
    assert code == 2 and words in " ".join(text.split())


@torch.no_grad()
@pytest.mark.parametrize("name", [*NAMES, "calibrated+vitcop", "calibrated+vscan"])
def test_selection_alone_leaves_what_the_schedule_says(name: str) -> None:
    shape = family_of(models.shared()).shape
    method = method_from(name, retention=0.3 if name.endswith("vitcop") else 0.4)
    if name in ("fastv", "dart"):
        method = method_from(f"{name}:layer=1", retention=0.4)
    schedule, request = resolve(method, shape, (shape.image,)), bench.Request(2, 7, 5)
    given = selection_inputs(schedule, request, torch.float32, torch.device("cpu"))
    found = list(SelectionOnly(schedule, given)(*given.values()))
    if schedule.decoder_stages:
        assert found.pop().shape == (2, 7 + schedule.decoder_stages[-1].total, shape.hidden)
    if schedule.vision is not None:
        prefix = shape.prefix_tokens if schedule.vision.side == "encoder" else 0
        assert found.pop().shape[:2] == (2, prefix + schedule.image_tokens)
    assert not found


@torch.no_grad()
@pytest.mark.parametrize("method", [methods.VScan(retention=0.5, window=2), methods.DivPrune(retention=0.4)])
def test_selection_alone_behind_a_merger(method: methods.Budgeted) -> None:
    shape = family_of(families.model("qwen2_5_vl")).shape
    layout = bench.Case(bench.Shape(family="qwen2_5_vl", image_size=224), images=1).layout()
    schedule = resolve(method, shape, layout)
    given = selection_inputs(schedule, bench.Request(1, 5), torch.float32, torch.device("cpu"), padded=True)
    found = SelectionOnly(schedule, given)(*given.values())
    assert found[0].shape == (1, schedule.image_tokens, shape.hidden)
