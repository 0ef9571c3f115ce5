"""The GPU benchmark at toy size on the CPU: all of it but what only a GPU can show."""

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vitcop_compile import UnsupportedError, ViTCoPConfig, bench

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu

STAGES = ("vision", "prefill", "decode", "ttft")


@pytest.mark.exhaustive
def test_every_case_has_a_dense_row_and_three_presets_and_a_line_in_the_table():
    results = gpu.run(True, 1e9, 2, False, Console(quiet=True))  # minutes: no clock decides
    found = [(row["batch"], row["preset"]) for row in results["rows"]]
    assert found == [(batch, preset) for batch in (1, 2) for preset in ("dense", "1/3", "2/9", "1/9")]
    assert not results["left_out"]
    for row in results["rows"]:
        assert all(row[f"{stage}_ms"] > 0 and row[f"{stage}_over_roofline"] > 0 for stage in STAGES)
        assert (row["selection_ms"] is None) == (row["preset"] == "dense")
        assert row["host_syncs"] is None and row["profile"] == {} and row["attention"]["prefill"] == "flash (cpu)"
    json.dumps(results)
    lines = bench.markdown(results, gpu.COLUMNS).splitlines()[2:]
    assert len(lines) == 2 + len(results["rows"]) and len({line.count("|") for line in lines}) == 1


def test_the_roofline_by_hand():
    shape, case = gpu.TOYS[0], gpu.cases(True)[1]
    schedule = ViTCoPConfig.dense().schedule(shape.model_shape())
    assert case.batch == 2
    with torch.device("meta"):
        weights = bench.models.llava(shape, 0)
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


def test_the_real_sizes_are_those_of_the_published_configs():
    small, large = (shape.model_shape() for shape in gpu.SIZES)
    assert small == ViTCoPConfig.preset("1/9").schedule().shape
    assert (large.layers, large.hidden, large.heads, large.head_dim, large.intermediate) == (40, 5120, 40, 128, 13824)


def test_real_sizes_need_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="needs a CUDA GPU"):
        gpu.run(False, 1.0, 1, False, Console(quiet=True))


@pytest.mark.parametrize("name", ["flash_fwd_kernel", "fmha_cutlassF"])
def test_a_prefill_without_flash_kernels_is_refused(name, monkeypatch):
    case = gpu.cases(False)[0]
    monkeypatch.setattr(gpu, "kernels", lambda call: [(name, 1.0, 2)] * 20)
    monkeypatch.setattr(gpu, "host_syncs", lambda call: 0)
    monkeypatch.setattr(gpu, "roofline", lambda *given: {})
    given = ({}, None, case, case.entrants()[0], bench.Arm(dict.fromkeys(STAGES, lambda: None)))
    if "flash" in name:
        found = gpu.inspect(*given)
        assert found["host_syncs"] == 0 and [len(costs) for costs in found["profile"].values()] == [12, 12]
        return
    with pytest.raises(UnsupportedError, match="inductor dense: prefill runs no flash-attention kernel"):
        gpu.inspect(*given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ttft_over_roofline": 1.3}, ["TTFT 1.30 x roofline"]),
        ({"selection_share": 0.02}, ["selection 2.0 % of prefill"]),
        ({"batch": 8, "ratio_to_dense": {"ttft": {"median": 3.5}}}, ["dense / pruned TTFT 3.50"]),
        ({"host_syncs": 2}, ["2 host synchronisations"]),
        ({}, []),
        ({"preset": "dense", "batch": 8, "ratio_to_dense": None, "selection_share": None, "host_syncs": None}, []),
    ],
)
def test_missed_goals_are_named(change, words):
    row = {
        "batch": 1, "preset": "1/9", "ttft_over_roofline": 1.2, "selection_share": 0.005,
        "ratio_to_dense": {"ttft": {"median": 4.5}}, "host_syncs": 0,
    }  # fmt: skip
    assert gpu.missed(row | change) == words
