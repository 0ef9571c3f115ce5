"""Cases, rows and the runner of the benchmarks, on arms whose times are known."""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
import re

import pytest
import torch
from rich.console import Console

from vitcop_compile import ConfigError, UnsupportedError, ViTCoPConfig
from vitcop_compile.bench import ARMS, Arm, Case, Shape, check_cases, rows, run, runner, timing
from vitcop_compile.schedule import ModelShape

TINY = Shape(hidden=32, layers=4, vision_hidden=32, vision_layers=3, vocab=300, image_size=112, name="tiny")
LLAVA = ModelShape()
# One decoder layer of LLaVA-1.5-7B: four square projections and three of the MLP.
LAYER_WEIGHTS = 4 * 4096 * 4096 + 3 * 4096 * 11008
KV_ROW_BYTES = 2 * 32 * 128 * 2
# Preset 1/9 with 64 text tokens: 172 visual tokens in 2 layers, 77 in 20, 15 in 10.
PRUNED_ROWS = [64 + 172] * 2 + [64 + 77] * 20 + [64 + 15] * 10

ROW_FIELDS = {
    "backend", "arm", "preset", "shape", "dtype", "weights", "batch", "text_tokens", "new_tokens", "images", "frames", "side",
    "tower_ms", "select_ms", "tower_ms_quartiles", "select_ms_quartiles",
    "vision_ms", "prefill_ms", "decode_ms", "ttft_ms", "selection_ms",
    "vision_ms_quartiles", "prefill_ms_quartiles", "decode_ms_quartiles", "ttft_ms_quartiles", "selection_ms_quartiles",
    "selection_share", "ratio_to_dense", "ratio_to", "visual_tokens", "retention", "kv_bytes",
    "vision_flops", "prefill_flops", "vision_flop_ratio", "flop_ratio", "decode_byte_ratio",
    "vision_realized_over_ideal", "realized_over_ideal", "decode_realized_over_ideal",
    "peak_memory_bytes", "resident_memory_bytes", "attention", "config",
}  # fmt: skip


def measured_rows(batch: int = 1, **case) -> dict[str, dict]:
    """Rows by "arm label" of a case on LLaVA-1.5-7B's shape, from three rounds of made-up times."""
    given = Case(Shape(), "eager", ("1/9",), batch=batch, against=("stock_compile", "by_the_book"), **case)
    times = {
        "vision": {"stock_compile dense": [6.0] * 3, "eager dense": [4.0] * 3, "eager 1/9": [5.0] * 3},
        "prefill": {
            "stock_compile dense": [12.0, 8.0, 40.0],
            "by_the_book 1/9": [20.0, 40.0, 20.0],
            "eager dense": [10.0, 20.0, 30.0],
            "eager 1/9": [5.0, 4.0, 10.0],
        },
        "decode": {"eager dense": [3.0, 3.0, 9.0], "eager 1/9": [2.0, 3.0, 3.0]},
        "selection": {"eager 1/9": [1.0, 2.0, 3.0], "by_the_book 1/9": [9.0, 10.0, 11.0]},
    }
    attention = {"eager 1/9": {"prefill": "flash"}}
    found = rows(given, LLAVA, times, attention)
    return {f"{row['arm']} {row['preset']}": row for row in found}


def flops(tokens: int) -> int:
    """Of one decoder layer: every weight twice per token, and two products of 4096 for every causal pair."""
    return 2 * tokens * LAYER_WEIGHTS + 2 * 2 * 4096 * sum(range(1, tokens + 1))


def test_a_row_has_every_field_whatever_the_arm():
    found = measured_rows()
    assert list(found) == ["stock_compile dense", "by_the_book 1/9", "eager dense", "eager 1/9"]
    assert all(row.keys() == ROW_FIELDS for row in found.values())


def test_times_are_medians_with_quartiles():
    row = measured_rows()["eager 1/9"]
    assert row["prefill_ms"] == 5.0 and row["prefill_ms_quartiles"] == [4.5, 7.5]
    assert row["selection_ms"] == 2.0 and row["selection_share"] == 2.0 / 5.0
    assert row["ttft_ms"] is None and row["ttft_ms_quartiles"] is None
    assert row["attention"] == {"prefill": "flash"}


def test_ratios_are_medians_of_the_rounds_and_not_ratios_of_medians():
    """10/5, 20/4, 30/10: median 3, where the medians 20 and 5 would give 4."""
    row = measured_rows()["eager 1/9"]
    assert row["ratio_to_dense"]["prefill"] == {"median": 3.0, "quartiles": [2.5, 4.0]}
    assert row["ratio_to_dense"]["decode"]["median"] == 1.5
    assert row["ratio_to_dense"]["vision"]["median"] == 0.8
    assert row["ratio_to_dense"].keys() == {"vision", "prefill", "decode"}
    assert row["ratio_to"]["stock_compile"]["prefill"]["median"] == 2.4
    assert row["ratio_to"]["stock_compile"]["vision"]["median"] == 1.2
    assert row["ratio_to"]["stock_compile"].keys() == {"vision", "prefill"}


def test_an_arm_that_prunes_is_compared_at_the_same_setting():
    found = measured_rows()
    assert found["eager 1/9"]["ratio_to"]["by_the_book"]["prefill"]["median"] == 4.0
    assert found["eager dense"]["ratio_to"].keys() == {"stock_compile"}
    assert found["eager dense"]["ratio_to"]["stock_compile"]["prefill"]["median"] == 1.2
    assert found["by_the_book 1/9"]["ratio_to_dense"]["prefill"]["median"] == 0.5
    assert found["by_the_book 1/9"]["selection_share"] == 0.5
    assert found["stock_compile dense"]["ratio_to"] == {}


def test_dense_rows_have_no_ratio_to_dense():
    row = measured_rows()["eager dense"]
    assert row["ratio_to_dense"] is None and row["realized_over_ideal"] is None and row["selection_share"] is None
    assert row["flop_ratio"] == row["vision_flop_ratio"] == row["decode_byte_ratio"] == row["retention"] == 1.0
    assert row["visual_tokens"] == {"vision": 576, "shallow": 576, "deep": 576, "mean": 576.0}


@pytest.mark.parametrize("batch", [1, 16])
def test_ideals_follow_from_the_published_budgets(batch: int):
    row, dense = (measured_rows(batch, new_tokens=32)[f"eager {label}"] for label in ("1/9", "dense"))
    assert row["visual_tokens"] == {"vision": 172, "shallow": 77, "deep": 15, "mean": (2 * 172 + 20 * 77 + 10 * 15) / 32}
    assert row["retention"] == row["visual_tokens"]["mean"] / 576
    assert row["kv_bytes"] == batch * KV_ROW_BYTES * (sum(PRUNED_ROWS) + 32 * 32)
    assert dense["kv_bytes"] == batch * KV_ROW_BYTES * 32 * (640 + 32)
    head = 2 * 4096 * 32064
    pruned_flops, dense_flops = sum(map(flops, PRUNED_ROWS)) + head, 32 * flops(640) + head
    assert row["prefill_flops"] == batch * pruned_flops and dense["prefill_flops"] == batch * dense_flops
    assert row["flop_ratio"] == dense_flops / pruned_flops
    assert row["realized_over_ideal"] == 3.0 / (dense_flops / pruned_flops)
    weights = 2 * (32 * LAYER_WEIGHTS + 4096 * 32064)
    bytes_ratio = (weights + dense["kv_bytes"]) / (weights + row["kv_bytes"])
    assert row["decode_byte_ratio"] == pytest.approx(bytes_ratio, rel=1e-12)
    assert row["decode_realized_over_ideal"] == pytest.approx(1.5 / bytes_ratio, rel=1e-12)
    # All that the vision program saves at the default layer is the projector's work on the patches that are gone.
    saved = batch * 2 * (576 - 172) * (1024 * 4096 + 4096 * 4096)
    assert dense["vision_flops"] - row["vision_flops"] == saved


def test_settings_of_ones_own_are_recorded():
    found = measured_rows(configs={"early": ViTCoPConfig.preset("1/9", vision_layer=10)})
    assert found["eager early"]["config"]["vision_layer"] == 10
    assert found["eager 1/9"]["config"] is None and found["eager dense"]["config"] is None
    # Twelve encoder layers see 173 tokens in place of 577.
    layer = lambda tokens: 2 * tokens * (4 + 8) * 1024 * 1024 + 4 * tokens * tokens * 1024  # noqa: E731
    assert found["eager 1/9"]["vision_flops"] - found["eager early"]["vision_flops"] == 12 * (layer(577) - layer(173))


def test_a_case_builds_dense_once_for_all_presets():
    case = Case(TINY, "eager", ("1/3", "1/9"), against=("stock_eager", "by_the_book", "inductor"))
    assert [entrant.key for entrant in case.entrants()] == [
        "stock_eager dense", "by_the_book 1/3", "by_the_book 1/9", "inductor dense", "eager dense", "eager 1/3", "eager 1/9",
    ]  # fmt: skip
    assert [entrant.config.prune for entrant in case.entrants()] == [False, True, True, False, False, True, True]


def test_a_shape_is_the_model_it_describes():
    model = TINY.model(seed=1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert TINY.model_shape() == dataclasses.replace(
        LLAVA, layers=4, hidden=32, intermediate=128, heads=1, kv_heads=1, head_dim=32, vocab=300, grid=(8, 8),
        vision_layers=3, feature_layer=1, vision_hidden=32, vision_intermediate=128, vision_heads=1, element_bytes=4,
    )  # fmt: skip
    assert Shape(hidden=1024).model_shape().heads == 16 and Shape(hidden=1024).intermediate == 2752
    assert Shape().name == "1024x12" and Shape(dtype="bfloat16").model_shape().element_bytes == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": "magic"}, UnsupportedError, "backend='magic' is unknown: use one of eager"),
        ({"against": ("magic",)}, ConfigError, "arm 'magic' is unknown: use one of"),
        ({"against": ("eager",)}, ConfigError, "against=eager with backend 'eager' names an arm twice"),
        ({"against": ("stock_eager", "stock_eager")}, ConfigError, "names an arm twice"),
        ({"presets": ("1/2",)}, ConfigError, "preset '1/2' is unknown: use one of 1/3, 2/9, 1/9"),
        ({"batch": 0}, ConfigError, "batch=0 is below 1"),
        ({"text_tokens": 0}, ConfigError, "text_tokens=0 is below 1"),
        ({"new_tokens": -1}, ConfigError, "new_tokens=-1 is below 1"),
        (
            {"stages": ("training",)},
            ConfigError,
            "stage 'training' is unknown: use one of vision, tower, select, prefill, decode, ttft",
        ),
        ({"configs": {"dense": ViTCoPConfig.preset("1/9")}}, ConfigError, "'dense' already names a setting"),
        ({"configs": {"x": ViTCoPConfig(retention=0.3, vision_layer=2)}}, ConfigError, "vision_layer=2 is layer 2 of 3"),
        ({"family": "bert"}, ConfigError, "family 'bert' is unknown: use one of llava, internvl, qwen2_vl, qwen2_5_vl"),
        ({"dtype": "int8"}, ConfigError, "dtype 'int8' is unknown: use one of float32, float16, bfloat16"),
        ({"weights": "int4"}, ConfigError, "weights 'int4' is unknown: use one of float, int8"),
        ({"device": "tpu"}, ConfigError, "device 'tpu' is unknown: use one of cpu, cuda"),
        ({"hidden": 0}, ConfigError, "hidden=0 is below 1"),
        ({"hidden": 200}, ConfigError, "hidden=200 does not split into heads of 64: choose a multiple of 64"),
        ({"hidden": 448, "head": 128}, ConfigError, "hidden=448 does not split into heads of 128"),
        ({"layers": 2}, ConfigError, "a decoder of 2 layers has no room for two stages"),
        ({"vision_layers": 0}, ConfigError, "vision_layers=0 is below 1"),
        ({"vocab": 100}, ConfigError, "vocab=100 cannot hold"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_built(changes, error, message, monkeypatch):
    monkeypatch.setattr(Shape, "model", lambda *_: pytest.fail("a model was built"))
    names = {field.name for field in dataclasses.fields(Shape)}
    shape = dataclasses.replace(TINY, **{name: value for name, value in changes.items() if name in names})
    rest = {"backend": "eager", "against": ()} | {name: value for name, value in changes.items() if name not in names}
    with pytest.raises(error, match=re.escape(message)):
        run([Case(TINY, "eager", against=()), Case(dataclasses.replace(shape, name=""), **rest)], rounds=1)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="device 'cuda' needs a CUDA GPU, and there is none: use 'cpu'"):
        Shape(device="cuda").check()


def test_rounds_and_names_are_checked():
    with pytest.raises(ConfigError, match="rounds=0 is below 1"):
        check_cases([Case(TINY, "eager", against=())], rounds=0)
    with pytest.raises(ConfigError, match="two shapes are named 'tiny'"):
        check_cases([Case(shape, "eager", against=()) for shape in (TINY, dataclasses.replace(TINY, layers=5))], rounds=1)


class Clock:
    """A clock that only the arms move."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.log: list[tuple[str, str]] = []

    def perf_counter(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept = seconds

    def arm(self, name: str, milliseconds: dict[str, float], selection: float):
        def build(model, config, request) -> Arm:
            label = f"{name} {'pruned' if config.prune else 'dense'}"
            self.log.append((label, "build"))

            def call(stage: str, cost: float):
                def step() -> None:
                    assert not torch.is_grad_enabled()
                    self.log.append((label, stage))
                    self.seconds += cost / (4 if config.prune else 1) / 1e3

                return step

            calls = {stage: call(stage, cost) for stage, cost in milliseconds.items()}
            return Arm(calls, {"prefill": "flash"}, call("selection", selection) if config.prune else None)

        return build


@pytest.fixture
def clock(monkeypatch):
    """Arms "eager" (8 ms of prefill dense, 2 pruned) and "stock_compile" (16 ms, cannot decode) in place of the real ones."""
    made = Clock()
    eager = made.arm("eager", {"vision": 4.0, "prefill": 8.0, "decode": 1.0, "ttft": 12.0}, selection=2.0)
    stock = made.arm("stock_compile", {"vision": 4.0, "prefill": 16.0, "ttft": 24.0}, selection=0.0)
    monkeypatch.setitem(ARMS, "eager", eager)
    monkeypatch.setitem(ARMS, "stock_compile", stock)
    monkeypatch.setattr(timing, "time", made)
    return made


def test_run_interleaves_the_arms_stage_by_stage(clock):
    results = run([Case(TINY, "eager", ("1/9",))], rounds=2, console=Console(file=io.StringIO()))
    stock, dense, pruned = results["rows"]
    assert (stock["arm"], dense["preset"], pruned["preset"]) == ("stock_compile", "dense", "1/9")
    assert stock["prefill_ms"] == pytest.approx(16) and pruned["prefill_ms"] == pytest.approx(2)
    assert stock["decode_ms"] is None and dense["decode_ms"] == pytest.approx(1)
    assert pruned["ratio_to_dense"]["ttft"]["median"] == pytest.approx(4)
    assert pruned["ratio_to"]["stock_compile"]["prefill"]["median"] == pytest.approx(8)
    assert pruned["selection_share"] == pytest.approx(0.5 / 2)
    assert pruned["attention"] == {"prefill": "flash"} and pruned["peak_memory_bytes"] is None
    built = [name for name, what in clock.log if what == "build"]
    assert built == ["stock_compile dense", "eager dense", "eager pruned"]
    # One call each to compile, three rounds to warm up, two that count, in which every arm takes 40 ms: 20, 5, 3 calls.
    order = [name for name, what in clock.log if what == "prefill"]
    assert order[:3] == built and len(order) == 3 + 3 * 3 + 2 * (20 + 5 + 3)
    rounds = [order[start : start + 3] for start in (3, 6, 9)]
    assert all(sorted(names) == sorted(built) for names in rounds) and rounds[1] == rounds[0][::-1]
    timed = [name for name, _ in itertools.groupby(order[12:])]
    assert timed[:3] == rounds[2][::-1] and clock.slept == timing.SETTLE
    last = {stage: max(i for i, (_, what) in enumerate(clock.log) if what == stage) for stage in ("vision", "prefill", "ttft")}
    assert last["vision"] < last["prefill"] < last["ttft"]


def test_the_order_of_arms_is_drawn_anew_and_turned_around():
    called = []
    arms = {name: functools.partial(called.append, name) for name in "abcd"}
    times = timing.interleave(arms, rounds=20, warmup=0, settle=0.0)
    rounds = ["".join(called[start : start + 4]) for start in range(0, 80, 4)]
    assert all(sorted(names) == list("abcd") for names in rounds) and {len(found) for found in times.values()} == {20}
    assert all(second == first[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=True))
    assert len(set(rounds)) > 8 and len({before for names in rounds for before in itertools.pairwise(names)}) == 12


def test_a_short_call_is_repeated_and_its_mean_taken(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    calls = []

    def call():
        calls.append(None)
        clock.seconds += 0.003

    times = timing.interleave({"short": call}, rounds=2, warmup=1, least_ms=10)
    assert times["short"] == pytest.approx([3, 3]) and len(calls) == 1 + 2 * 4


def test_only_the_stages_asked_for_are_called(clock):
    results = run([Case(TINY, "eager", ("1/9",), stages=("vision",))], rounds=1, console=Console(file=io.StringIO()))
    assert {what for _, what in clock.log} == {"build", "vision"}
    assert results["rows"][-1]["prefill_ms"] is None and results["rows"][-1]["realized_over_ideal"] is None


def test_a_model_is_built_once_per_shape_and_rows_keep_their_order(clock, monkeypatch):
    built, other = [], dataclasses.replace(TINY, layers=5, name="other")
    monkeypatch.setattr(Shape, "model", lambda shape, seed: built.append((shape.name, seed)) or "a model")
    cases = [Case(shape, "eager", ("1/9",), against=()) for shape in (TINY, other, TINY)]
    results = run(cases, rounds=1, seed=7, console=Console(file=io.StringIO()))
    assert built == [("tiny", 7), ("other", 7)]
    assert [row["shape"] for row in results["rows"]] == ["tiny"] * 2 + ["other"] * 2 + ["tiny"] * 2
    environment = results["environment"]
    assert environment["shapes"]["other"]["layers"] == 5
    assert (environment["dtype"], environment["device"], environment["rounds"]) == ("float32", "cpu", 1)


def test_a_row_has_the_memory_and_whatever_else_is_asked_of_its_arm(clock, monkeypatch):
    def inspect(model, case, entrant, arm):
        assert clock.log[-1][1] == "selection" or not entrant.config.prune  # its last stage, so that all are compiled
        return {"weights": model, "name": entrant.key}

    monkeypatch.setattr(Shape, "model", lambda shape, seed: "a model")
    monkeypatch.setattr(runner, "peak", lambda case, entrant, seed: (seed, 600) if entrant.config.prune else None)
    asked = {"memory": True, "seed": 7, "inspect": inspect, "console": Console(file=io.StringIO())}
    dense, pruned = run([Case(TINY, "eager", ("1/9",), against=())], rounds=1, **asked)["rows"]
    assert (pruned["peak_memory_bytes"], pruned["resident_memory_bytes"], dense["peak_memory_bytes"]) == (7, 600, None)
    assert pruned["weights"] == "a model" and [row["name"] for row in (dense, pruned)] == ["eager dense", "eager 1/9"]


def test_a_case_that_would_begin_too_late_is_listed(clock, monkeypatch):
    monkeypatch.setattr(Shape, "model", lambda *_: pytest.fail("a model was built"))
    found = run([Case(TINY, "eager", text_tokens=text) for text in (8, 64)], rounds=1, minutes=0.0)
    assert not found["rows"]
    assert found["left_out"] == [f"tiny eager batch 1, {text} text tokens" for text in (8, 64)]


def test_an_arm_that_recompiles_too_often_fails_instead_of_running_eager():
    step = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with runner._measured_as_compiled():
        for size in range(1, 9):
            step(torch.ones(size))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            step(torch.ones(9))
    step(torch.ones(10))
