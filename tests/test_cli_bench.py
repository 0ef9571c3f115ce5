"""The commands `bench` and `plot`, and the suite of benchmarks behind the README's tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch
import typer
from typer.testing import CliRunner

from vitcop_compile import ViTCoPConfig, bench
from vitcop_compile.bench.selection import SelectionOnly, selection_inputs
from vitcop_compile.cli import app
from vitcop_compile.kernels import rule
from vitcop_compile.methods import method_from, method_of

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY_SHAPE = bench.Shape(hidden=32, layers=4, vision_hidden=32, vision_layers=3, vocab=300, image_size=112)
TINY = ["--hidden", 32, "--layers", 4, "--vision-hidden", 32, "--vision-layers", 3, "--backend", "eager"]


def invoke(*arguments: object, command: typer.Typer = app):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def error_of(*arguments: object, command: typer.Typer = app) -> str:
    """The one line on stderr of a command that must fail with code 2."""
    result = invoke(*arguments, command=command)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """A model is traced, and a program exported, once for all of its settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitcop_compile.pipeline.capture", lambda family, model: models.captured(model))
        patch.setattr("vitcop_compile.pipeline.Programs", models.Remembered)
        yield


@pytest.fixture(scope="module")
def measured(traced_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(results, output) of one tiny run."""
    path = tmp_path_factory.mktemp("bench") / "r.json"
    options = ["--preset", "1/9", "--against", "stock_eager", "--rounds", 1, "--text-tokens", 8, "--batch", 2]
    result = invoke("bench", *TINY, *options, "--json", path)
    assert result.exit_code == 0, result.output
    return path, result.stdout


def test_bench_measures_prints_and_writes(measured):
    path, output = measured
    results = bench.read(path)
    found = [(row["backend"], row["arm"], row["preset"]) for row in results["rows"]]
    assert found == [("eager", "stock_eager", "dense"), ("eager", "eager", "dense"), ("eager", "eager", "1/9")]
    assert all(row[f"{stage}_ms"] > 0 for row in results["rows"] for stage in ("vision", "prefill", "decode", "ttft"))
    assert all((row["batch"], row["text_tokens"], row["shape"]) == (2, 8, "32x4") for row in results["rows"])
    assert results["rows"][2]["selection_ms"] > 0 and results["rows"][2]["attention"]["prefill"]
    assert results["environment"]["rounds"] == 1 and results["environment"]["shapes"]["32x4"]["layers"] == 4
    lines = [line for line in output.splitlines() if line.startswith("│ eager")]
    assert len(lines) == 3 and f"{results['rows'][0]['prefill_ms']:.1f}" in lines[0] and "1/9" in lines[2]


@pytest.mark.slow
def test_bench_measures_methods(tmp_path):
    """In place of presets, of which none is named: one that drops in the decoder, one that merges and weighs."""
    path, asked = tmp_path / "r.json", ("fastv:layer=1,tokens=9", "calibrated+visionzip:tokens=9")
    options = ["--against", "none", "--rounds", 1, "--text-tokens", 8, "--json", path]
    result = invoke("bench", *TINY, *options, *(word for name in asked for word in ("--method", name)))
    assert result.exit_code == 0, result.output
    dense, *rows = bench.read(path)["rows"]
    assert dense["preset"] == "dense" and tuple(row["preset"] for row in rows) == asked
    assert all(row["selection_ms"] > 0 and row["ratio_to_dense"]["prefill"]["median"] > 0 for row in rows)
    assert [row["visual_tokens"]["vision"] for row in rows] == [576, 9]
    assert [method_of(json.dumps(row["config"])) for row in rows] == [method_from(name) for name in asked]
    assert all(name in result.stdout for name in asked)
    drawn = invoke("plot", path, "--output-dir", tmp_path / "pictures", "--format", "svg")
    assert drawn.exit_code == 0, drawn.output


def test_plot_draws_what_bench_wrote(measured, tmp_path):
    result = invoke("plot", measured[0], "--output-dir", tmp_path / "pictures", "--format", "svg")
    assert result.exit_code == 0, result.output
    names = ["latency.svg", "stages.svg", "kv_memory.svg"]
    assert result.stdout.split() == [str(tmp_path / "pictures" / name) for name in names]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == sorted(names)
    assert "stock_eager" not in (tmp_path / "pictures" / "latency.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "none", "--against", "stock_eager"], "--against none was given with others"),
        (["--rounds", 0], "rounds=0 is below 1"),
        (["--json", "missing/r.json"], "missing/r.json cannot be written: name a file in a folder that exists"),
    ],
)
def test_bench_errors_come_before_the_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.Shape, "model", lambda *_: pytest.fail("a model was built"))
    assert message in error_of("bench", *arguments)
    assert not list(tmp_path.iterdir())


def test_nothing_to_compare_with_can_be_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "run", lambda cases, **options: seen.append((cases, options)) or {})
    monkeypatch.setattr(bench, "table", lambda results: "")
    assert invoke("bench", "--against", "none", "--backend", "eager", "--backend", "inductor", "--memory").exit_code == 0
    assert invoke("bench").exit_code == 0
    (none, options), (default, others) = seen
    assert [(case.backend, case.against) for case in none] == [("eager", ()), ("inductor", ())]
    assert [(case.backend, case.against) for case in default] == [("inductor", ("stock_compile",))]
    assert options == {"rounds": 5, "memory": True} and others["memory"] is False


def test_a_quick_run_is_the_default_and_options_win(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "run", lambda cases, **options: seen.append((cases[0], options["rounds"])) or {})
    monkeypatch.setattr(bench, "table", lambda results: "")
    for options in ([], ["--full"], ["--full", "--rounds", 2, "--layers", 7, "--preset", "2/9"], ["--vision-layers", 2]):
        assert invoke("bench", *options).exit_code == 0
    found = [(case.presets, case.shape.layers, case.shape.vision_layers, rounds) for case, rounds in seen]
    every = ("1/3", "2/9", "1/9")
    assert found == [(("1/9",), 4, 3, 5), (every, 12, 8, 15), (("2/9",), 7, 8, 2), (("1/9",), 4, 2, 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], "missing.json cannot be read: No such file"),
        (["old.json"], "old.json: rows.0 lacks arm, preset, ratio_to: measure the results anew"),
        (["empty.json"], "the results have no rows: there is nothing to draw"),
        (["empty.json", "--format", "pdf"], "format 'pdf' is unknown: use one of png, svg"),
    ],
)
def test_plot_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("old.json").write_text('{"environment": {}, "rows": [{"backend": "inductor", "dense_vision_ms": 1}]}')
    Path("empty.json").write_text('{"environment": {}, "rows": []}')
    assert message in error_of("plot", *arguments, "--output-dir", "pictures")
    assert not Path("pictures").exists()


@pytest.fixture
def suite(monkeypatch):
    """The module, which is no part of the package and lies beside what it imports."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import suite as module

    return module


@pytest.fixture
def command(suite) -> typer.Typer:
    made = typer.Typer()
    made.command()(suite.main)
    return made


@pytest.mark.slow
def test_the_suite_measures_writes_and_prints_a_table(command, tmp_path):
    """Some seconds: inductor compiles the vision program twice."""
    result = invoke("tiny", "--output-dir", tmp_path, command=command)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "tiny.json").read_text())
    found = {f"{row['backend']}: {row['arm']} {row['preset']}": row for row in results["rows"]}
    assert list(found) == [
        "eager: stock_eager dense", "eager: by_the_book 1/9", "eager: eager dense", "eager: eager 1/9",
        "inductor: inductor dense", "inductor: inductor vision_layer=0",
    ]  # fmt: skip
    assert found["eager: eager 1/9"]["ratio_to"].keys() == {"stock_eager", "by_the_book"}
    last = found["inductor: inductor vision_layer=0"]
    assert last["ratio_to_dense"].keys() == {"vision"} and last["vision_flop_ratio"] > 1 and last["prefill_ms"] is None
    printed = invoke("tiny", "--output-dir", tmp_path, "--tables", command=command)
    assert printed.exit_code == 0 and printed.stdout.startswith("### tiny\n")
    assert sum(line.startswith(("| eager |", "| inductor |")) for line in printed.stdout.splitlines()) == 6


def test_the_suite_refuses_what_it_does_not_know(command, tmp_path):
    assert "table 'huge' is unknown: use some of cpu, memory, decode" in error_of("huge", command=command)
    assert "tiny.json cannot be read: No such file" in error_of("tiny", "--tables", "--output-dir", tmp_path, command=command)
    assert "cannot be written" in error_of("tiny", "--output-dir", tmp_path / "missing", command=command)
    assert not list(tmp_path.iterdir())


def test_every_table_of_the_suite_can_be_measured_as_it_stands(suite):
    """Names, settings and shapes; nothing is built."""
    named = "cpu memory decode vision_layer selection families frames overhead matmul_rate products attention precisions"
    assert list(suite.TABLES) == [*named.split(), "precisions_16", "tiny"]
    for table in suite.TABLES.values():
        bench.check_cases(table.cases, rounds=1)
    (case,) = suite.TABLES["vision_layer"].cases
    layers = {config.schedule(case.shape.model_shape()).vision.layer for config in case.settings().values()}
    assert layers == {22, 18, 14, 10, 6, 2} and case.shape.model_shape().feature_layer == 22
    batches = {(case.backend, case.batch) for case in suite.TABLES["decode"].cases}
    assert batches == {(backend, batch) for backend in ("inductor", "aotinductor", "onnxruntime") for batch in (1, 16)}


def test_selection_of_pooled_images_has_their_shapes():
    shape = TINY_SHAPE.model_shape()
    schedule = ViTCoPConfig.preset("1/3", scope="pooled").schedule(shape, (shape.image,) * 3)
    given = selection_inputs(schedule, bench.Request(1, 8), torch.float32, torch.device("cpu"))
    kept, hidden = SelectionOnly(schedule, given)(*given.values())
    assert kept.shape == (3, 1 + schedule.segment_tokens[0], 32)
    assert hidden.shape == (1, 8 + schedule.decoder_stages[1].total, 32)


def test_matmul_rates_are_of_the_rows_a_schedule_leaves(suite):
    shape = bench.Shape(hidden=64, layers=4, vision_hidden=64, vision_layers=3, vocab=300, image_size=112)
    visual = set(ViTCoPConfig.preset("1/9").schedule(shape.model_shape()).visual_tokens())
    rows = suite.parts.matmul_rate(shape, rounds=2, text_tokens=8)
    counts = {8 + 64, 16, 1} | {8 + tokens for tokens in visual}
    assert [row["rows"] for row in rows] == 3 * sorted(counts, reverse=True)
    assert [row["to_dense"] for row in rows if row["rows"] == 72] == [1, 1, 1] and all(row["gflops"] > 0 for row in rows)


def test_products_have_a_row_per_type_rows_and_kernel(suite):
    kernels = suite.kernel_times
    rows = kernels.products(bench.Shape(hidden=64, layers=4, vision_hidden=64, vision_layers=3), rounds=1)
    keys = [(row["dtype"], row["rows"], row["kernel"]) for row in rows]
    assert keys == [(dtype, count, name) for dtype in kernels.TYPES for count in kernels.ROWS for name in ("torch", "ours")]
    one = {row["dtype"]: row["chosen"] for row in rows if row["rows"] == 1 and row["kernel"] == "ours"}
    assert one.pop("float32") == rule(torch.float32).one and set(one.values()) == {"few"}
    assert all(row["to_torch"] == 1 for row in rows if row["kernel"] == "torch")
    assert all(row["to_float32"] == 1 for row in rows if (row["dtype"], row["kernel"]) == ("float32", "ours"))


@pytest.mark.slow
def test_every_precision_backend_and_budget_has_a_row(suite):
    shape = dataclasses.replace(TINY_SHAPE, hidden=64, vision_hidden=64)
    *partial, rows = suite.precisions.precisions(shape, 2, ("1/9",), 1, backends=("eager",), memory=False)
    # Given after every stage: what has been timed is not lost.
    filled = [[stage for stage in ("vision", "prefill", "decode", "ttft", "selection") if given[-1][f"{stage}_ms"]]
              for given in partial]  # fmt: skip
    assert [len(stages) for stages in filled] == [1, 2, 3, 4, 5]
    assert [(row["precision"], row["preset"]) for row in rows] == [
        (precision, preset) for precision in ("float32", "bfloat16", "int8", "int8 dynamic") for preset in ("dense", "1/9")
    ]
    for row in rows:
        assert row["refused"] is None and row["peak_mib"] is None
        assert all(row[f"{stage}_ms"] > 0 for stage in ("vision", "prefill", "decode", "ttft"))
        assert (row["selection_ms"] is not None) == (row["preset"] == "1/9")
        assert row["tokens_per_s"] == pytest.approx(2 * 64e3 / (row["ttft_ms"] + 63 * row["decode_ms"]))
        assert (row["prefill_to_float32"] is None) == (row["precision"] == "float32")
    table = bench.markdown({"environment": bench.environment() | {"device": "cpu", "dtype": "-", "rounds": 1}, "rows": rows},
                           suite.TABLES["precisions"].columns)  # fmt: skip
    assert table.count("\n| eager |") == 8


def test_what_an_arm_is_refused_for_stands_in_its_row(suite):
    *_, rows = suite.precisions.precisions(TINY_SHAPE, 1, (), 1, backends=("tensorrt",), memory=False)
    assert [row["vision_ms"] for row in rows] == [None] * 4 and all("tensorrt" in row["refused"] for row in rows)


def test_rows_that_come_piece_by_piece_are_saved_as_they_come(suite):
    def pieces(rounds):
        yield [{"what": 1, "precision": "bfloat16"}]
        yield [{"what": 2, "precision": "bfloat16"}]

    saved = []
    table = suite.Table(("what",), 1, [], measure=pieces)
    results = table.results(lambda found: saved.append([row["what"] for row in found["rows"]]))
    assert saved == [[1], [2]] and results["rows"][0]["what"] == 2 and results["environment"]["dtype"] == "bfloat16"


def test_ratios_of_precisions_are_of_the_same_rounds(suite):
    Key, case = suite.precisions.Key, bench.Case(bench.Shape(weights="int8"), batch=2)
    keys = {preset: Key("onnxruntime", "int8", preset) for preset in ("dense", "1/9")}
    times = {stage: {keys["dense"]: [4.0, 9.0, 20.0], keys["1/9"]: [1.0, 3.0, 4.0],
                     keys["1/9"]._replace(precision="float32"): [2.0, 3.0, 12.0]}
             for stage in ("vision", "prefill", "decode", "ttft")}  # fmt: skip
    schedule = ViTCoPConfig.preset("1/9").schedule(case.shape.model_shape(), case.layout())
    row = suite.precisions.row_of(keys["1/9"], times, schedule, case)
    assert row["decode_to_dense"] == 4.0 and row["decode_to_float32"] == 2.0
    assert row["quartiles"]["decode_to_dense"] == [3.5, 4.5]
    # 1024 x 12 with a head of 2048, a byte a weight; caches of 4 bytes, of 576 + 128 rows.
    weights = 12 * (4 * 1024**2 + 3 * 1024 * 2752) + 2048 * 1024
    kept = 2 * 4 * 1024 * sum(tokens + 128 for tokens in schedule.visual_tokens())
    dense = 2 * 4 * 1024 * 12 * (576 + 128)
    assert row["decode_ideal"] == pytest.approx((weights + 2 * dense) / (weights + 2 * kept))
    assert row["decode_realised"] == pytest.approx(4.0 / row["decode_ideal"])


def test_selection_cost_has_a_row_per_number_of_images(suite):
    rows = suite.parts.selection(TINY_SHAPE, ("eager",), (1, 2), rounds=1, text_tokens=8)
    assert [(row["images"], row["prompts"]) for row in rows] == [(1, 1), (2, 2), (2, 1)]
    assert rows[0]["per_image_to_one"]["median"] == 1 and rows[0]["linear"]
    columns, environment = suite.TABLES["selection"].columns, bench.environment() | {"device": "cpu", "dtype": "float32"}
    table = bench.markdown({"environment": environment | {"rounds": 1}, "rows": rows}, columns)
    assert table.count("\n| eager |") == 3 and "interleaved rounds in ms" in table


def test_cost_per_image_is_stated_beside_that_of_one(suite):
    times = {(1, 1): [1.0, 2.0, 4.0], (8, 8): [8.0, 16.0, 16.0], (8, 1): [24.0, 24.0, 24.0]}
    batch, pooled = (suite.parts.selection_row((8, prompts), times) for prompts in (8, 1))
    assert batch["per_image_to_one"]["median"] == 1.0 and batch["linear"]
    assert pooled["per_image_to_one"]["median"] == 1.5 and not pooled["linear"]
    assert (pooled["images"], pooled["prompts"], pooled["ms_per_image"]) == (8, 1, 3.0)
