"""The regression gate: comparison, the command, and the library on real programs. Nothing here reads a clock."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from models import shared
from regress_subject import BATCH, KV_HEADS, LAYERS, NEW, PRESET, TEXT, build, measured
from typer.testing import CliRunner

from vitcop_compile import ConfigError, UnsupportedError, ViTCoPConfig, regress
from vitcop_compile.cli import app
from vitcop_compile.regress import baseline, compare, facts, gate
from vitcop_compile.regress.compare import Timing


def test_facts_are_compared_exactly_in_both_directions() -> None:
    before = {"flops": {"prefill": 10}, "kv_rows": [5, 4], "nodes": {"decode": {"aten.add": 2}}}
    now = {"flops": {"prefill": 9}, "kv_rows": [5, 4, 4], "nodes": {"decode": {"aten.mul": 2}}}
    found, notes, compared = compare.compare_facts("1/9", before, now)
    assert [(f.subject, f.what, f.baseline, f.found) for f in found] == [
        ("1/9", "flops.prefill", "10", "9"),
        ("1/9", "nodes.decode.aten.add", "2", "none"),
        ("1/9", "kv_rows.2", "none", "4"),
        ("1/9", "nodes.decode.aten.mul", "none", "2"),
    ]
    assert (notes, compared) == ([], 6)


def test_facts_bound_to_versions_or_a_device_are_left_out_aloud() -> None:
    facts_ = {"flops": {"prefill": 1}, "nodes": {"decode": {"add": 1, "mul": 1}}, "kernels": {"decode": {"extern": 1}}}
    facts_ |= {"reads": {"program": 0, "entry": 1}}
    other = {"flops": {"prefill": 1}, "nodes": {"decode": {"add": 9}}, "kernels": {}, "reads": {"program": 0, "entry": 0}}
    found, notes, compared = compare.compare_facts("s", facts_, other, versions="torch 2.11.0, transformers 5.17")
    assert [failure.what for failure in found] == ["reads.entry"] and compared == 3
    assert notes == [
        "s: nodes (2 facts) not compared: baseline made with torch 2.11.0, transformers 5.17",
        "s: kernels (1 facts) not compared: baseline made with torch 2.11.0, transformers 5.17",
    ]
    found, notes, compared = compare.compare_facts("s", facts_, other, device="cuda NVIDIA H200")
    assert [failure.what for failure in found] == ["nodes.decode.add", "nodes.decode.mul"] and compared == 4
    assert [note.split(" (")[0] for note in notes] == ["s: kernels", "s: reads.entry"]


def test_the_tolerance_follows_the_spread() -> None:
    # Deviations 0.1, 0, 0.1, 0.2, 5: their median is 0.1, and one wild repeat moves neither number.
    timing = compare.timing_of("prefill", [3.9, 4.0, 4.1, 4.2, 9.0])
    assert timing.ratio == 4.1 and timing.tolerance == pytest.approx(4 * 1.4826 * 0.1 / 4.1)
    assert compare.timing_of("prefill", [4.0, 4.0, 4.001]).tolerance == 0.1
    with pytest.raises(ConfigError, match=r"decode: the repeats 1\.00, 2\.00, 3\.00 would need a tolerance of 297%, above"):
        compare.timing_of("decode", [1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("found", "verdict", "rounds"),
    [
        ([3.7], "pass", [5]),
        ([4.39], "pass", [5]),
        ([4.5], "faster", [5]),
        ([3.5, 3.61], "pass", [5, 10]),
        ([3.5, 1.0, 4.0], "pass", [5, 10, 20]),
        ([3.5, 3.59, 3.59, 9.0], "slower", [5, 10, 20]),
    ],
)
def test_a_timing_fails_only_if_every_attempt_does(found: list[float], verdict: str, rounds: list[int]) -> None:
    asked: list[int] = []

    def measure(count: int) -> float:
        asked.append(count)
        return found[len(asked) - 1]

    judged = compare.judge("1/9", "prefill", Timing(4.0, 0.1), measure, 5)
    assert (judged.verdict, asked, judged.found) == (verdict, rounds, tuple(found[: len(rounds)]))


# The command. Facts come from `measured`, ratios from the test: nothing is compiled or timed.


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        optimized, found = measured()
        self.path, self.facts, self.measured_times = folder / "baseline.json", copy.deepcopy(found), 0
        self.ratios = {"prefill": 4.0, "decode": 1.1, "ttft": 2.5}
        self.processor = "Processor A"
        monkeypatch.setattr(gate, "builder", lambda source, settings: lambda config, backend: optimized)
        monkeypatch.setattr(facts, "measure", lambda *_: (copy.deepcopy(self.facts), {}))
        monkeypatch.setattr(gate, "bind", lambda *_: {})
        monkeypatch.setattr(gate, "ratio_of", self._ratio)
        environment = gate.here(optimized.device)
        monkeypatch.setattr(gate, "here", lambda device: environment | {"processor": self.processor})

    def _ratio(self, arms: Any, name: str, rounds: int) -> float:
        self.measured_times += 1
        return self.ratios[name]

    def __call__(self, *arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["regress", "--baseline", str(self.path), *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result.output

    def error(self, *arguments: object) -> str:
        line = self(*arguments, code=2).strip()
        assert line.startswith("error: ") and "\n" not in line, line
        return line

    def edit(self, change: Callable[[dict], None]) -> None:
        content = json.loads(self.path.read_text())
        change(content)
        self.path.write_text(json.dumps(content))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """The command with a baseline of the subject 1/3 on the eager backend."""
    made = Command(monkeypatch, tmp_path)
    made("--update", "--preset", PRESET, "--backend", "eager", "--batch", BATCH, "--text-tokens", TEXT, "--new-tokens", NEW)
    return made


def leaves(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every number."""
    if isinstance(value, int):
        yield path
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, key))


def test_an_unchanged_model_passes(command: Command) -> None:
    output = command()
    assert "3 timed measures compared: all pass" in output and command.measured_times == 7 * 3 + 3
    assert list(command.path.parent.iterdir()) == [command.path]


def test_every_tampered_fact_fails_and_is_named(command: Command) -> None:
    clean, paths = command.path.read_text(), list(leaves(command.facts))
    assert len(paths) > 100
    for path in paths:

        def tamper(content: dict, path: tuple = path) -> None:
            inner = content["subjects"][PRESET]["facts"]
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] += 1

        command.path.write_text(clean)
        command.edit(tamper)
        output = command("--counts-only", code=1)
        (row,) = [line for line in output.splitlines() if re.match(rf"│ {PRESET} ", line)]
        assert [cell.strip() for cell in row.split("│")][2] == ".".join(map(str, path))
        assert "1 failed" in output


def test_a_slow_down_fails_and_a_speed_up_passes_aloud(command: Command) -> None:
    command.ratios["prefill"] = 4.0 * 0.88
    output = command(code=1)
    assert "time.prefill (dense / pruned)" in output and "4.000, at least 3.600" in output and "1 failed" in output
    assert "3.520, 3.520, 3.520" in output
    command.ratios["prefill"] = 4.0 * 1.12
    output = command()
    assert "prefill is faster: ratio 4.480 where the baseline has 4.000: consider --update" in output and "all pass" in output


def test_counts_alone_are_compared_without_a_clock(command: Command) -> None:
    before = command.measured_times
    assert "timed measures not compared: only counts were asked for" in command("--counts-only")
    command("--update", "--counts-only")
    assert "the baseline holds no timed measures" in command() and command.measured_times == before


def test_timings_of_another_machine(command: Command) -> None:
    command.processor, before = "Processor B", command.measured_times
    command.ratios["prefill"] = 1.0
    line = command.error()
    assert "Processor A, " in line and "this is Processor B, " in line and "--elsewhere skip or compare" in line
    output = command("--elsewhere", "skip")
    assert "timed measures not compared" in output and "all pass" in output and command.measured_times == before
    output = command("--elsewhere", "compare", code=1)
    assert "compared all the same" in output and "time.prefill" in output
    assert "--elsewhere 'never' is unknown: use one of refuse, skip, compare" in command.error("--elsewhere", "never")
    # Facts gate anywhere.
    command.facts["kv_bytes"] += 1
    assert "kv_bytes" in command("--elsewhere", "skip", code=1)


def test_facts_of_other_versions(command: Command) -> None:
    command.edit(lambda content: content["environment"].update(torch="2.12.1+cu128"))
    command.facts["nodes"]["decode"]["aten.add.Tensor"] += 1
    assert "not compared: baseline made with torch 2.12.1, transformers" in command()
    command.facts["flops"]["decode"] += 1
    assert "flops.decode" in command(code=1)


def test_an_update_prints_what_changed(command: Command) -> None:
    assert "nothing changed" in command("--update")
    command.facts["kv_bytes"] += 1000
    command.ratios["ttft"] = 3.0
    output = command("--update", "--rounds", 5)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    size = command.facts["kv_bytes"]
    assert rows == [
        ["", "rounds", "9", "5"],
        [PRESET, "kv_bytes", f"{size - 1000:,}", f"{size:,}"],
        [PRESET, "time.ttft", "2.500, tolerance 10.0%", "3.000, tolerance 10.0%"],
    ]
    assert "all pass" in command("--rounds", 5)


@pytest.mark.parametrize("name", ["stream.graph_breaks", "stream.recompiles", "reads.program"])
def test_what_no_baseline_can_allow(command: Command, name: str) -> None:
    group, fact = name.split(".")
    command.facts[group][fact] = 1
    before = command.path.read_text()
    output = command("--update", code=1)
    assert name in output and "0 (always)" in output and "nothing was written" in output
    assert command.path.read_text() == before
    command.edit(lambda content: content["subjects"][PRESET]["facts"][group].update({fact: 1}))
    assert name in command(code=1)


def test_options_that_contradict_the_baseline(command: Command) -> None:
    line = command.error("--preset", "1/9", "--batch", 3, "--backend", "eager")
    assert "(--preset 1/9, there 1/3; --batch 3, there 2): leave the options out, or pass --update" in line
    assert "--repeats 5 belongs to --update" in command.error("--repeats", 5)
    command("--preset", PRESET, "--batch", BATCH)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch: Input should be greater than or equal to 1, found 0"),
        (["--rounds", "0"], "rounds: Input should be greater than or equal to 1, found 0"),
        (["--text-tokens", "-1"], "text_tokens: Input should be greater than or equal to 1, found -1"),
        (["--hidden", "100"], "hidden: Input should be a multiple of 64, found 100"),
        (["--layers", "2"], "layers: Input should be greater than or equal to 3, found 2"),
        (["--preset", "1/2"], "preset '1/2' is unknown"),
        (["--preset", "1/9", "--preset", "1/9"], "name each setting to measure once"),
        (["--backend", "gcc"], "backend='gcc' is unknown"),
        (["--repeats", "2"], "repeats=2: give an integer of at least 3"),
        (["--cuda", "sm_75"], "cuda=sm_75: name architectures once, of sm_80, sm_90"),
        (["--cuda", "sm_80", "--cuda", "sm_80"], "cuda=sm_80, sm_80: name architectures once"),
        (["--model", "somewhere", "--layers", "4"], "layers were given with model='somewhere'"),
    ],
)
def test_an_update_refuses_bad_numbers(command: Command, arguments: list[str], message: str) -> None:
    before = command.path.read_text()
    assert message in command.error("--update", *arguments)
    assert command.path.read_text() == before


def test_facts_of_cuda_join_and_leave_a_baseline(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nothing changed" in command("--update", "--cuda", "none")
    monkeypatch.setattr(regress.cuda, "missing", lambda: "it takes triton")
    before = command.path.read_text()
    assert "facts of sm_90 cannot be counted here: it takes triton" in command.error("--update", "--cuda", "sm_90")
    assert command.path.read_text() == before
    program = {**regress.cuda.ALWAYS, **regress.cuda.ALWAYS_DECODE, "launches": 20}
    monkeypatch.setattr(regress.cuda, "missing", lambda: None)
    monkeypatch.setattr(regress.cuda, "measure", lambda settings, say: {PRESET: {"sm_90": {"decode": dict(program)}}})
    assert "cuda.sm_90.decode.launches" in command("--update", "--cuda", "sm_90")
    assert "all pass" in command()
    program["launches"] += 1
    assert "cuda.sm_90.decode.launches" in command(code=1)
    monkeypatch.setattr(regress.cuda, "missing", lambda: "it takes triton")
    output = command()
    assert "cuda (9 facts) not compared: no code for CUDA was generated: it takes triton" in output and "all pass" in output
    program["reads"] = 1
    monkeypatch.setattr(regress.cuda, "missing", lambda: None)
    assert "nothing was written" in command("--update", code=1)


def test_timings_that_spread_too_far_are_not_stored(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    before, found = command.path.read_text(), iter(range(1, 22))
    monkeypatch.setattr(gate, "ratio_of", lambda *_: float(next(found)))
    assert "measure on a quiet machine, or with more --rounds" in command.error("--update")
    assert command.path.read_text() == before


def change(*path: str, value: Any) -> Callable[[dict], None]:
    def edit(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return edit


TIMED = ("subjects", PRESET, "timed", "decode")
BROKEN = {
    "format": (change("format", value=2), "format: Input should be 1, found 2"),
    "more": (change("comment", value=""), "comment: Unexpected keyword argument"),
    "rounds": (change("settings", "rounds", value=0), "settings.rounds: Input should be greater than or equal to 1, found 0"),
    "batch": (change("settings", "batch", value="2"), "settings.batch: Input should be a valid integer, found '2'"),
    "presets": (change("settings", "presets", value="1/3"), "settings.presets: Input should be a valid array"),
    "unsized": (change("settings", "layers", value=None), "settings: the random model has no layers"),
    "environment": (change("environment", value={}), "environment.processor: Field required"),
    "subjects": (change("subjects", value={}), "its subjects are not its presets, 1/3"),
    "subject": (change("subjects", PRESET, value={}), "subjects.1/3.facts: Field required"),
    "shape": (change("shape", value=[]), "shape: Input should be an object, found []"),
    "fact": (change("subjects", PRESET, "facts", "kv_bytes", value=1.5), "the fact kv_bytes is 1.5, not an integer"),
    "measure": (
        change("subjects", PRESET, "timed", "tpot", value={}),
        "tpot.[key]: Input should be 'prefill', 'decode' or 'ttft'",
    ),
    "nan": (change(*TIMED, "ratio", value=float("nan")), "timed.decode.ratio: Input should be a finite number, found nan"),
    "negative": (change(*TIMED, "ratio", value=-1.0), "timed.decode.ratio: Input should be greater than 0, found -1.0"),
    "wide": (change(*TIMED, "tolerance", value=0.9), "tolerance: Input should be less than or equal to 0.3, found 0.9"),
    "narrow": (change(*TIMED, "tolerance", value=0), "tolerance: Input should be greater than or equal to 0.1, found 0"),
    "missing": (change(*TIMED, value={"ratio": 1.0}), "timed.decode.tolerance: Field required"),
    "other model": (change("shape", "layers", value=4), "of a model of another shape (layers 4, here 3)"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_baseline_is_refused(command: Command, name: str) -> None:
    edit, message = BROKEN[name]
    command.edit(edit)
    line = command.error()
    assert message in line and str(command.path) in line
    assert "remove it and measure one anew with --update" in line or name == "other model"


def test_a_number_that_a_baseline_does_not_know_yet_is_the_default(command: Command) -> None:
    def without(name: str) -> Callable[[dict], None]:
        return lambda content: content["shape"].pop(name)

    command.edit(without("marks"))
    command()
    command.edit(without("layers"))
    assert "of a model of another shape (layers 32, here 3)" in command.error()


def test_a_missing_or_unreadable_baseline_is_refused(command: Command) -> None:
    command.path.write_text("{")
    assert f"{command.path}: Invalid JSON: EOF" in command.error()
    command.path.unlink()
    assert "does not exist: measure one with --update" in command.error()
    command.path = command.path.parent / "none" / "baseline.json"
    assert "does not exist: make it first" in command.error("--update")


def test_a_crash_is_no_regression(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("the compiler fell over")

    monkeypatch.setattr(facts, "measure", crash)
    assert "the compiler fell over" in command(code=2)


# The library, on real programs


def test_check_and_update_take_a_builder(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    settings = regress.Settings(presets=(PRESET,), backend="eager", batch=BATCH, text_tokens=TEXT, new_tokens=NEW)
    made, broken = regress.update(build, path, settings, counts_only=True)
    assert not broken and made.subjects[PRESET].facts == measured()[1]
    assert regress.load(path) == made and made.settings.model == "given"

    with pytest.raises(ConfigError, match=r"call regress\.check"):
        regress.check(None, path)
    content = json.loads(path.read_text())
    content["subjects"][PRESET]["facts"]["flops"]["decode"] -= 1
    path.write_text(json.dumps(content))
    report, found = regress.check(build, path), measured()[1]["flops"]["decode"]
    assert [(failure.subject, failure.what) for failure in report.failures] == [(PRESET, "flops.decode")]
    assert report.facts == len(list(leaves(measured()[1]))) and not report.passed
    assert report.notes == [f"{PRESET}: the baseline holds no timed measures"]
    assert f"1/3: flops.decode: baseline {found - 1:,}, found {found:,}" in str(report)


def test_a_model_given_is_optimized(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple] = []
    monkeypatch.setattr(baseline, "optimize", lambda model, config, backend: made.append((model, config, backend)))
    model, config = shared(LAYERS, KV_HEADS), ViTCoPConfig.preset(PRESET)
    baseline.builder(model, regress.Settings())(config, "eager")
    assert made == [(model, config, "eager")]
    baseline.builder(None, regress.Settings(hidden=64, layers=3, vision_hidden=64, vision_layers=2))(config, "inductor")
    toy_config = made[1][0].config
    assert (toy_config.text_config.hidden_size, toy_config.vision_config.num_hidden_layers) == (64, 2)
    with pytest.raises(UnsupportedError, match=r"--model \./nowhere cannot be loaded"):
        baseline.builder(None, regress.Settings(model="./nowhere"))
