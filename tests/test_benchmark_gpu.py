"""The GPU benchmark at toy size on the CPU: all of it but what only a GPU can show."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vitcop_compile import UnsupportedError, ViTCoPConfig

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def results(gpu):
    return gpu.run(gpu.TOYS, True, 1e9, 2, Console(quiet=True))  # minutes: no clock decides


@pytest.mark.slow
def test_every_case_has_a_dense_row_and_three_presets(gpu, results):
    found = [(row["batch"], row["preset"]) for row in results["rows"]]
    assert found == [(batch, preset) for batch in (1, 2) for preset in ("dense", "1/3", "2/9", "1/9")]
    assert not results["left_out"]
    for row in results["rows"]:
        assert all(row[f"{stage}_ms"] > 0 for stage in gpu.STAGES)
        assert set(row["over_roofline"]) == set(gpu.STAGES) and all(value > 0 for value in row["over_roofline"].values())
        assert (row["selection_ms"] is None) == (row["preset"] == "dense")
        assert row["host_syncs"] is None and row["memory_bytes"] is None and row["flash_kernels"] == []
        assert row["attention"]["prefill"] == "flash (cpu)"
    json.dumps(results)


@pytest.mark.slow
def test_the_table_has_a_line_per_row(gpu, results):
    lines = gpu.table(results).splitlines()
    assert len(lines) == 2 + len(results["rows"])
    assert len({line.count("|") for line in lines}) == 1


def test_the_roofline_by_hand(gpu):
    model = gpu.TOYS["toy"]
    schedule = ViTCoPConfig.dense().schedule(model.model_shape())
    case = gpu.cases(gpu.TOYS, True)[1]
    assert case.batch == 2
    with torch.device("meta"):
        weights = model.__class__(**vars(model) | {"device": "meta"}).model()
    # Bytes bound: an absurd matrix rate. 4 layers of 4 x 32 x 32 + 3 x 32 x 96, and a head of 300 x 32, in fp32.
    decoder = 4 * (4 * (4 * 32 * 32 + 3 * 32 * 96) + 300 * 32)
    rows = 64 + 8  # 8 x 8 patches and the text
    slow = gpu.roofline(schedule, case, weights, {"flops_per_second": 1e30, "bytes_per_second": 1000.0})
    assert slow["prefill"] == pytest.approx(decoder + 2 * 4 * 2 * rows * 32 * 4)
    assert slow["decode"] == pytest.approx(decoder + 2 * 4 * 2 * (rows + 64) * 32 * 4)
    # FLOPs bound: an absurd copy rate.
    fast = gpu.roofline(schedule, case, weights, {"flops_per_second": 1000.0, "bytes_per_second": 1e30})
    pairs = rows * (rows + 1) // 2
    layer = 2 * rows * (4 * 32 * 32 + 3 * 32 * 96) + 4 * pairs * 32
    assert fast["prefill"] == pytest.approx(2 * (4 * layer + 2 * 300 * 32))
    assert fast["ttft"] == pytest.approx(fast["vision"] + fast["prefill"])


def test_a_case_that_would_not_end_in_time_is_listed(gpu):
    found = gpu.run(gpu.TOYS, True, 0.0, 1, Console(quiet=True))
    assert not found["rows"]
    assert found["left_out"] == [{"model": "toy", "batch": batch, "text_tokens": 8} for batch in (1, 2)]


def test_the_real_sizes_are_those_of_the_published_configs(gpu):
    shapes = {name: model.model_shape() for name, model in gpu.SIZES.items()}
    assert shapes["7b"] == ViTCoPConfig.preset("1/9").schedule().shape
    assert (shapes["13b"].layers, shapes["13b"].hidden, shapes["13b"].head_dim, shapes["13b"].intermediate) == (
        40,
        5120,
        128,
        13824,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_real_sizes_need_a_gpu(gpu):
    with pytest.raises(UnsupportedError, match=r"needs a CUDA GPU.*--toy"):
        gpu.run(gpu.SIZES, False, 1.0, 1, Console(quiet=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"over_roofline": {"ttft": 1.3}}, ["TTFT 1.30 x roofline"]),
        ({"selection_share": 0.02}, ["selection 2.0 % of prefill"]),
        ({"batch": 8, "ratio_to_dense": {"ttft": {"median": 3.5}}}, ["dense / pruned TTFT 3.50"]),
        ({"host_syncs": 2}, ["2 host synchronisations"]),
        ({}, []),
    ],
)
def test_missed_goals_are_named(gpu, change, words):
    row = {
        "batch": 1,
        "preset": "1/9",
        "over_roofline": {"ttft": 1.2},
        "selection_share": 0.005,
        "ratio_to_dense": {"ttft": {"median": 4.5}},
        "host_syncs": 0,
    }
    assert gpu.missed(row | change) == words
