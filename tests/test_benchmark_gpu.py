"""The GPU benchmark at toy size on the CPU: all of it but what only a GPU can show."""

import contextlib
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig, bench

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu

STAGES = ("vision", "prefill", "decode", "ttft")


@pytest.mark.exhaustive
def test_every_case_has_a_dense_row_and_three_presets_and_a_line_in_the_table():
    results = gpu.run(True, 1e9, 2, False, Console(quiet=True))  # minutes: no clock decides
    found = [(row["batch"], row["preset"]) for row in results["rows"]]
    wanted = [(1, "dense"), (1, "1/9"), (2, "dense"), (2, "1/9"), (1, "dense"), (1, "1/3"), (1, "2/9")]
    assert found == wanted
    assert not results["left_out"] and not results["failed"]
    for row in results["rows"]:
        assert all(row[f"{stage}_ms"] > 0 and row[f"{stage}_over_roofline"] > 0 for stage in STAGES)
        assert (row["selection_ms"] is None) == (row["preset"] == "dense")
        assert (
            row["host_syncs"] is row["graphs"] is None
            and row["profile"] == {}
            and row["attention"]["prefill"] == "flash (cpu)"
        )
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


def test_a_run_goes_on_where_an_earlier_one_ended(tmp_path, monkeypatch):
    """Nothing is measured: rows as `bench.run` makes them, saved after every case; one of them fails the first time."""
    output, asked = tmp_path / "gpu.json", []
    failing = [gpu.named(gpu.cases(True)[1])]
    monkeypatch.setattr(gpu, "ceilings", lambda *_: {"flops_per_second": 1.0, "bytes_per_second": 1.0})

    def rows(case):
        return [
            {"backend": "eager", "arm": "eager", "ratio_to": {}, "shape": case.shape.name, "batch": case.batch,
             "text_tokens": case.text_tokens, "preset": preset, "roofline_ms": {"ttft": 2.0}, "ttft_ms": 3.0,
             "selection_share": None, "host_syncs": None, "graphs": None, "ratio_to_dense": {"ttft": {"median": 1.0}}}
            for preset in ("dense", *case.presets)
        ]  # fmt: skip

    def run(cases, *, save, failed, minutes, **_):
        asked.append([gpu.named(case) for case in cases])
        done = []
        conditions = bench.environment() | {"rounds": 2, "memory": False}
        for case in cases[:minutes]:
            if gpu.named(case) in failing:
                failed(case, ValueError("no memory\nat all"))
                failing.clear()
                continue
            done += rows(case)
            save({"environment": conditions, "rows": done, "left_out": []})
            assert len(json.loads(output.read_text())["rows"]) == len(before) + len(done)
        return {"environment": conditions, "rows": done, "left_out": []}

    monkeypatch.setattr(bench, "run", run)
    names, before = [gpu.named(case) for case in gpu.cases(True)], []
    quiet = Console(quiet=True)
    first = gpu.run(True, 2, 2, False, quiet, output)
    assert first["failed"] == {names[1]: "ValueError: no memory"} and first["left_out"] == [names[2]]
    assert [row["ttft_over_roofline"] for row in first["rows"]] == [1.5, 1.5]
    before = first["rows"]
    second = gpu.run(True, 9, 2, False, quiet, output)
    assert asked == [names, names[1:]] and not second["failed"] and not second["left_out"]
    assert second["rows"][:2] == before and len(second["rows"]) == 7
    assert gpu.run(True, 9, 2, False, quiet, output) == second == json.loads(output.read_text()) and len(asked) == 2
    assert list(tmp_path.iterdir()) == [output]
    with pytest.raises(InputError, match=r"results of other conditions \(rounds 2, here 3\): name another file, or remove it"):
        gpu.run(True, 9, 3, False, quiet, output)


def test_the_first_minutes_go_to_what_matters():
    found = [(case.shape.name, case.batch, case.text_tokens, case.presets) for case in gpu.cases(False)]
    assert found[:3] == [("small", 1, 64, ("1/9",)), ("7b", 1, 64, ("1/9",)), ("7b", 8, 64, ("1/9",))]
    assert len(found) == 17 == len(set(found)) and found[9][0] == "13b"


def test_kernels_are_those_of_the_device(monkeypatch):
    """An operator has the time of its kernels as well, and a name that says what it asked for."""
    kinds, calls = torch.autograd.DeviceType, []

    def event(key, kind, time, count=1):
        return types.SimpleNamespace(key=key, device_type=kind, self_device_time_total=time, count=count)

    events = [event("aten::_scaled_dot_product_flash_attention", kinds.CPU, 9.0), event("small", kinds.CUDA, 1.0, 3),
              event("large", kinds.CUDA, 5.0), event("cudaGraphLaunch", kinds.CPU, 0.0, 2)]  # fmt: skip
    profiler = types.SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: contextlib.nullcontext(profiler))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu.kernels(lambda: calls.append(1)) == ([("large", 5.0, 1), ("small", 1.0, 3)], 2) and len(calls) == 3


FUSED = "cudnn_generated_fort_native_sdpa_sm90_fprop_wgmma_f16_knob_6x64x256x128"


@pytest.mark.parametrize("name", ["pytorch_flash::flash_fwd_kernel", FUSED, "fmha_cutlassF"])
def test_a_prefill_without_flash_kernels_is_refused(name, monkeypatch):
    case = gpu.cases(False)[0]
    monkeypatch.setattr(gpu, "kernels", lambda call: ([(name, 1.0, 2)] * 20, 1))
    monkeypatch.setattr(gpu, "host_syncs", lambda call: 0)
    monkeypatch.setattr(gpu, "roofline", lambda *given: {})
    given = ({}, None, case, case.entrants()[0], bench.Arm(dict.fromkeys(STAGES, lambda: None)))
    if name != "fmha_cutlassF":
        found = gpu.inspect(*given)
        assert (
            found["host_syncs"] == 0
            and found["graphs"] == 1
            and [len(costs) for costs in found["profile"].values()] == [12, 12]
        )
        return
    with pytest.raises(UnsupportedError, match="inductor dense: prefill runs no flash-attention kernel"):
        gpu.inspect(*given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ttft_over_roofline": 1.3}, ["TTFT 1.30 x roofline"]),
        ({"selection_share": 0.02}, ["selection 2.0 % of prefill"]),
        ({"batch": 8, "ratio_to_dense": {"ttft": {"median": 3.5}}}, ["dense / pruned TTFT 3.50"]),
        ({"host_syncs": 3}, ["3 host synchronisations"]),
        ({"graphs": 0}, ["no CUDA graph was launched"]),
        ({}, []),
        ({"preset": "dense", "batch": 8, "ratio_to_dense": None, "selection_share": None, "host_syncs": None}, []),
    ],
)
def test_missed_goals_are_named(change, words):
    row = {
        "batch": 1, "preset": "1/9", "ttft_over_roofline": 1.2, "selection_share": 0.005,
        "ratio_to_dense": {"ttft": {"median": 4.5}}, "host_syncs": 2, "graphs": 1,
    }  # fmt: skip
    assert gpu.missed(row | change) == words
