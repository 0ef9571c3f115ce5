"""The benchmark beside other runtimes: workers that fail in every way, rows and tables by hand, what is refused, and the arms
of this environment at toy size."""

import json
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vitcop_compile import ConfigError, UnsupportedError, bench

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import peers
import peers_run
import typer
from peers_protocol import Worker, WorkerError, question

BENCHMARKS = Path(peers.__file__).parent
FAKE = """
    import os, sys, time
    sys.path.append({benchmarks!r})
    from peers_protocol import serve

    def build(**given):
        print("a library that prints")
        return {{"versions": {{}}, "precision": "bfloat16"}}

    def answer(arm, seed, ids=False):
        if "fails" in arm:
            raise RuntimeError("out of luck\\nand more")
        if "dies" in arm:
            print("a last word", file=sys.stderr)
            os._exit(3)
        if "sleeps" in arm:
            time.sleep(60)
        if "garbles" in arm:
            os.write(channel, b"what?\\n")
        ttft = {{"slow": 400.0, "fast": 100.0}}.get(arm.split()[0], 200.0)
        found = {{"ttft_ms": ttft + seed, "tpot_ms": ttft / 10, "answer_ms": 2 * ttft, "tokens": 8, "peak_bytes": 2**20}}
        return found | {{"ids": [1, 2, 3 if "slow" in arm else 4]}}

    channel = os.dup(1)
    serve({{"build": build, "answer": answer}})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """make(name, *arms) -> a group of fake arms in a process of their own; peers but for those that start with "our"."""
    monkeypatch.setattr(peers_run, "_SETTLE", 0.0)
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(FAKE).format(benchmarks=str(BENCHMARKS)))

    def make(name, *arms):
        rows = {
            arm: {"arm": arm, "precision": "float32", "preset": "dense", "peer": not arm.startswith("our"), "visual_tokens": 9,
                  "weights": "float", "make": arm} for arm in arms
        }  # fmt: skip
        return peers_run.Group(name, (sys.executable, str(script)), {}, rows)

    return make


def measured(groups, rounds=2, given=None):
    """(arms, failed, what was saved after each round) of a run of fake arms."""
    failed, facts, saved = {}, {}, []
    with peers_run.started(groups, given or {"threads": 1}, {"model": Path()}, failed, facts) as arms:
        peers_run.measure(arms, rounds, 1e9, failed, lambda text: None, lambda: saved.append(len(peers_run.rows(arms)[0])))
    return arms, failed, saved


def test_arms_that_answer_are_measured_and_those_that_fail_or_die_are_named(fake):
    groups = [fake("good", "fast", "slow", "our own"), fake("bad", "fails", "steady"), fake("lost", "dies", "with it")]
    arms, failed, saved = measured(groups)
    assert set(arms) == {"fast", "slow", "our own", "steady"} and saved == [4, 4]
    assert failed["fails"] == "bad: RuntimeError: out of luck and more"
    # Whatever shares the process is gone with it.
    assert failed["dies"] == failed["with it"] == "lost: ended with 3 at 'answer': a last word"
    assert all(len(arm.answers) == 2 and len(arm.disturbed) == 2 for arm in arms.values())
    assert arms["fast"].row["precision"] == "bfloat16"  # what the worker says of itself
    # Answers of a round are about one picture, another in every round: two rounds of warm-up come first.
    assert [answer["ttft_ms"] for answer in arms["fast"].answers] == [102.0, 103.0]


def test_a_worker_that_does_not_answer_is_ended_and_named(fake, monkeypatch):
    monkeypatch.setattr(peers_run, "_FIRST", 1.0)
    _, failed, _ = measured([fake("still", "sleeps"), fake("good", "fast")], rounds=1)
    assert failed == {"sleeps": "still: no answer to 'answer' within 1 s: a library that prints"}


def test_an_answer_that_is_no_json_and_a_command_that_nobody_knows():
    script = "import sys; [print('what?', flush=True) for line in sys.stdin]"
    worker = Worker("odd", (sys.executable, "-c", script))
    with pytest.raises(WorkerError, match=r"odd: answered 'build' with 'what\?\\n', which is no JSON"):
        worker.ask("build", 30.0)
    with pytest.raises(WorkerError, match=r"odd: ended with -?[0-9]+ at 'build'"):
        worker.ask("build", 30.0)
    with pytest.raises(WorkerError, match="none: /no/such/python cannot be started: No such file"):
        Worker("none", ("/no/such/python",))


def test_a_backend_that_is_missing_is_named_and_no_arm_at_all_is_an_error(fake):
    def missing():
        raise UnsupportedError("its package is not installed")

    group = fake("absent", "fast")
    absent = peers_run.Group(group.name, group.command, {}, group.arms, available=missing)
    arms, failed, _ = measured([absent, fake("good", "slow")], rounds=1)
    assert set(arms) == {"slow"} and failed == {"fast": "its package is not installed"}
    with pytest.raises(UnsupportedError, match="no arm is left: bad: RuntimeError: out of luck"):
        measured([fake("bad", "fails")])


def arm(peer, ttft, tpot, weights="float", **more):
    """An arm with made-up times of three rounds."""
    row = {
        "arm": "x",
        "precision": "float32",
        "weights": weights,
        "preset": "dense",
        "peer": peer,
        "visual_tokens": 256,
        "first_tokens": [5, 6, 7],
    }
    answers = [
        {"ttft_ms": a, "tpot_ms": b, "answer_ms": a + b, "tokens": 2, "peak_bytes": 2**20} | more for a, b in zip(ttft, tpot)
    ]
    return peers_run.Arm(None, row, answers, [0.0, 0.01, 0.02])


def results():
    """What a run saves, of made-up times."""
    arms = {
        "one peer": arm(True, (100.0, 200.0, 300.0), (30.0, 30.0, 30.0), visual_tokens=28),
        "other peer": arm(True, (400.0, 400.0, 400.0), (10.0, 12.0, 14.0), preprocessing_ms=5.0),
        "bytes": arm(True, (10.0, 10.0, 10.0), (1.0, 1.0, 1.0), "int8"),
        "inductor float32 dense": arm(False, (50.0, 50.0, 50.0), (20.0, 24.0, 28.0)),
        "our bytes": arm(False, (5.0, 5.0, 5.0), (2.0, 2.0, 2.0), "int8 dynamic"),
    }
    arms["one peer"].row["first_tokens"] = [5, 6, 8]
    found, best = peers_run.rows(arms)
    peers_run.agree(found)
    genai = {"versions": {"openvino-genai": "1.0"}, "flags": {"INFERENCE_PRECISION_HINT": "bf16"}}
    given = {
        "processor": "A CPU", "threads": 2, "device": "cpu", "dtype": "precision by row", "torch": "2.13.0",
        "onnxruntime": None, "rounds": 3, "commit": None, "memory": True, "best_peer": best, "load_before": 0.1,
        "load_after": 2.0, "workers": {"OpenVINO GenAI": genai},
    }  # fmt: skip
    return {"environment": given, "rows": found, "failed": [{"arm": "gone", "reason": "worker: died"}]}


def test_rows_by_hand():
    found = results()
    # Bytes are compared with bytes.
    both = {"ttft": "bytes", "tpot": "bytes"}
    assert found["environment"]["best_peer"] == {"float": {"ttft": "one peer", "tpot": "other peer"}, "int8": both}
    one, other, whole, own, rounded = found["rows"]
    assert rounded["ttft_to_best_peer"]["median"] == 2.0 and rounded["tpot_to_best_peer"]["median"] == 0.5
    assert whole["ttft_to_best_peer"]["median"] == 1.0
    assert (one["ttft_ms"], other["tpot_ms"], own["answer_ms"]) == (200.0, 12.0, 74.0)
    # Ratios of the same round: 100 / 50, 200 / 50, 300 / 50 and 10 / 20, 12 / 24, 14 / 28.
    assert own["ttft_to_best_peer"] == {"median": 4.0, "quartiles": [3.0, 5.0]}
    assert own["tpot_to_best_peer"]["median"] == 0.5 and one["ttft_to_best_peer"]["median"] == 1.0
    assert (one["visual_tokens"], own["visual_tokens"], other["preprocessing_ms"]) == (28, 256, 5.0)
    assert (one["tokens_as_float32"], own["tokens_as_float32"]) == (2, 3)
    assert own["others_busy"] == 0.02 and own["peak_memory_bytes"] == 2**20


def test_the_table_of_a_file(tmp_path):
    bench.write(results(), tmp_path / "peers.json")
    done = invoke("--tables", "--output", str(tmp_path / "peers.json"))
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("|")]
    assert lines[-2] == "| x | float32 | float | dense | 256 | 50 | 4.00 (3.00-5.00) | 24 | 0.50 (0.50-0.50) | 74 | 1.0 MiB |"
    assert "The fastest peer with float weights: TTFT one peer, TPOT other peer." in done.output
    assert "OpenVINO GenAI: openvino-genai 1.0, INFERENCE_PRECISION_HINT bf16." in done.output
    assert "Load 0.1 before, 2.0 after; arms that should sleep used 2 % of a core at most." in done.output
    assert "Not measured: gone: worker: died" in done.output


def invoke(*options):
    app = typer.Typer()
    app.command()(peers.main)
    return CliRunner().invoke(app, options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--genai-python is missing: make an environment of its own: python -m venv genai && genai/bin/pip install"),
        (("--genai-python", "/no/such/python"), "--genai-python /no/such/python cannot be run"),
        (("--genai-python", sys.executable), "lacks openvino_genai, optimum: make an environment of its own: python -m venv"),
        (("--genai-python", sys.executable, "--without-genai"), "exclude each other"),
        (("--without-genai", "--arm", "vllm"), "arm 'vllm' is unknown: use some of transformers; transformers, compiled;"),
        (("--without-genai", "--arm", "OpenVINO GenAI dense"), "arm 'OpenVINO GenAI dense' is unknown"),
        (("--without-genai", "--output", "/no/such/folder/peers.json"), "cannot be written"),
        (("--tables", "--output", "/no/such/peers.json"), "cannot be read"),
    ],
)
def test_what_is_refused_before_work_starts(options, words, tmp_path):
    done = invoke(*options, "--folder", str(tmp_path)) if "--tables" not in options else invoke(*options)
    assert done.exit_code == 2 and words in " ".join(done.output.split()), done.output
    assert not list(tmp_path.iterdir())


def test_a_converter_that_fails_is_told_with_the_versions_that_work(tmp_path):
    console = Console(quiet=True)
    with pytest.raises(
        UnsupportedError, match="failed: ModuleNotFoundError: No module named 'optimum': the versions that work"
    ):
        peers.prepare(peers.TINY, 0, sys.executable, tmp_path, console)
    # The model is kept, a half of a conversion is not taken for one.
    (made,) = tmp_path.iterdir()
    assert {path.name for path in made.iterdir()} == {"model", "openvino-fp16.partial"}


def test_every_arm_of_the_issue_is_there():
    groups = peers.groups(peers.FULL, "python")
    names = [name for group in groups for name in group.arms]
    ours = ("inductor float32", "inductor bfloat16", "inductor float32 int8", "inductor bfloat16 int8 dynamic")
    for backend in (*ours, "aotinductor bfloat16 int8 dynamic", "onnxruntime float32"):
        assert {f"{backend} dense", f"{backend} 1/9"} <= set(names)
    assert {"transformers", "transformers, compiled", "OpenVINO GenAI dense", "OpenVINO GenAI CDPruner 89 %"} <= set(names)
    rows = {name: row for group in groups for name, row in group.arms.items()}
    assert {name for name, row in rows.items() if row["peer"]} == {
        "transformers", "transformers, compiled", "OpenVINO GenAI dense", "OpenVINO GenAI CDPruner 89 %",
        "OpenVINO GenAI int8 dense", "OpenVINO GenAI int8 CDPruner 89 %", "onnxruntime float32 dense",
    }  # fmt: skip
    assert rows["inductor float32 dense"]["visual_tokens"] == 256
    with pytest.raises(ConfigError, match="is unknown"):
        peers.chosen(groups, ["vllm"])
    (only,) = peers.chosen(groups, ["onnxruntime float32 1/9"])
    assert list(only.arms) == ["onnxruntime float32 1/9"]


def test_a_prompt_is_as_long_as_asked_and_another_for_another_seed():
    assert len(question(0, 62)) == 62 and question(0, 62) == question(0, 62) != question(1, 62)


@pytest.mark.slow
def test_arms_of_this_environment_at_toy_size(tmp_path):
    saved = []
    only = ["transformers", "onnxruntime float32 1/9"]
    asked = {"rounds": 1, "minutes": 1e9, "threads": 1, "text": 16, "tokens": 8, "folder": tmp_path}
    found = peers.run(
        peers.TINY, None, only, console=Console(quiet=True), save=lambda r: saved.append(len(r["rows"])), **asked
    )
    json.dumps(found)
    assert found["failed"] == [] and saved == [2, 2]
    assert [row["name"] for row in found["rows"]] == only
    for row in found["rows"]:
        assert row["tokens"] == 8 == len(row["first_tokens"])
        assert row["answer_ms"] > row["ttft_ms"] > row["preprocessing_ms"] > 0 < row["tpot_ms"]
