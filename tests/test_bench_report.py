"""What becomes of measured rows: tables, JSON, pictures, their conditions, and the memory of an arm alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from vitcop_compile import ConfigError, InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.bench import ARMS, Case, Entrant, Shape, environment, markdown, memory, plot, read, rows, table, write
from vitcop_compile.bench.environment import _power_limit, commit, hardware
from vitcop_compile.schedule import ModelShape

LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process needs Linux")
GIVEN = {
    "processor": "A CPU", "threads": 2, "gpu": "A GPU", "gpu_power_limit_w": 700.0, "device": "cpu", "dtype": "float32",
    "torch": "2.13.0", "onnxruntime": None, "rounds": 3, "commit": "0123456789abcdef-dirty", "memory": True,
}  # fmt: skip
MIB = 2**20
TINY = Shape(hidden=32, layers=4, vision_hidden=32, vision_layers=3, vocab=300, image_size=112)


def results(batches: tuple[int, ...] = (1,), **case) -> dict:
    """Results of two backends at two presets on LLaVA-1.5-7B's shape, with times that are easily recognised."""
    found = []
    for batch in batches:
        for number, backend in enumerate(("eager", "inductor"), start=1):
            given = Case(Shape(), backend, ("1/3", "1/9"), batch=batch, **case)
            costs = {"stock_compile dense": 9, f"{backend} dense": 8, f"{backend} 1/3": 4, f"{backend} 1/9": 2}
            one = {key: [100.0 * number * cost] * 3 for key, cost in costs.items()}
            times = {stage: one for stage in ("vision", "prefill", "decode", "ttft")}
            times["selection"] = {f"{backend} {preset}": [10.0] * 3 for preset in ("1/3", "1/9")}
            found += rows(given, ModelShape(), times, {})
            found[-1] |= {"peak_memory_bytes": 512 * MIB, "resident_memory_bytes": 256 * MIB}
    return {"environment": GIVEN, "rows": found}


def test_markdown_has_a_line_per_row():
    lines = markdown(results()).splitlines()
    assert lines[0] == (
        "A CPU, 2 threads, torch 2.13.0, float32, medians of 3 interleaved rounds in ms, commit 0123456789-dirty."
    )
    header, rule, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert len(body) == 8 and {len(line) for line in body} == {len(header)} == {len(rule)}
    dense, pruned = (dict(zip(header, line)) for line in (body[1], body[3]))
    flops = results()["rows"][3]["flop_ratio"]
    assert pruned["backend"] == "eager" and pruned["preset"] == "1/9" and pruned["prefill"] == "200.0"
    assert pruned["prefill ratio / FLOPs"] == f"4.00 / {flops:.2f} = {4 / flops:.2f}"
    assert pruned["selection"] == "10.00 (5.0 %)"
    assert pruned["TTFT to stock_compile"] == "4.50 (4.50-4.50)"
    assert pruned["peak memory"] == "512.0 MiB" and pruned["KV"] == f"{pruned_kv() / MIB:,.1f} MiB"
    assert dense["prefill ratio / FLOPs"] == dense["selection"] == "-" and dense["peak memory"] == "Linux only"


def pruned_kv(new_tokens: int = 64) -> int:
    """Bytes for preset 1/9: keys and values of 32 heads, 128 wide, in 16 bit."""
    return 2 * 32 * 128 * 2 * (2 * 236 + 20 * 141 + 10 * 79 + 32 * new_tokens)


def test_columns_that_nothing_fills_are_left_out():
    given = results(stages=("vision",))
    for row in given["rows"]:
        row |= {"ttft_ms": None, "selection_ms": None}
    given["environment"] = GIVEN | {"memory": False}
    names = markdown(given).splitlines()[2]
    assert "TTFT |" not in names and "selection" not in names and "peak memory" not in names and "| vision |" in names


def test_the_table_shows_the_same_cells(capsys):
    Console(width=300).print(table(results()))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "inductor" in line and "1/9" in line]
    assert "400.0" in line and "10.00 (2.5 %)" in line and "4.50 (4.50-4.50)" in line and "512.0 MiB" in line


def test_json_keeps_every_digit_and_a_line_per_row(tmp_path):
    given = results()
    given["rows"][0]["prefill_ms"] = 1 / 3
    write(given, tmp_path / "r.json")
    assert read(tmp_path / "r.json") == given == json.loads((tmp_path / "r.json").read_text())
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert sum(line.startswith('    {"backend"') for line in lines) == len(given["rows"])
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


OTHER = '{"environment": {}, "rows": [{"backend": "eager", "dense_vision_ms": 1}]}'


def test_results_that_cannot_be_written_or_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written: Is a directory"):
        write(results(), tmp_path)
    assert not list(tmp_path.iterdir()) and not list(tmp_path.parent.glob("*.partial"))
    with pytest.raises(InputError, match=r"missing\.json cannot be read: No such file"):
        read(tmp_path / "missing.json")
    for text, message in (
        ("{", "r.json: Invalid JSON: EOF .*: measure the results anew"),
        ("[]", "r.json: Input should be an object"),
        ('{"environment": {}, "rows": [1]}', "rows.0: Input should be an object, found 1: measure the results anew"),
        (OTHER, "r.json: rows.0 lacks arm, preset, ratio_to: measure the results anew"),
    ):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(InputError, match=message):
            read(tmp_path / "r.json")


def test_the_environment_names_versions_and_hardware():
    found = environment()
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["processor"] and found["date"].endswith("+00:00")
    if not torch.cuda.is_available():
        assert found["gpu"] is None and found["gpu_power_limit_w"] is None
    assert hardware(GIVEN) == "A CPU, 2 threads" and hardware(GIVEN | {"threads": 1}) == "A CPU, 1 thread"
    assert hardware(GIVEN | {"device": "cuda"}) == "A GPU, 700 W"
    assert hardware(GIVEN | {"device": "cuda", "gpu_power_limit_w": None}) == "A GPU"


def test_the_power_limit_is_asked_of_the_gpu_in_use(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1 $2" = "-i GPU-1234" ] && echo 700.00\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    assert _power_limit() == 700.0
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="5678"))
    assert _power_limit() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert _power_limit() is None


def test_the_commit_is_that_of_the_checkout_and_marked_when_code_differs(tmp_path):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "inside").mkdir()
    file = tmp_path / "inside" / "a.py"
    file.write_text("1\n")
    assert commit(file) is None
    git("init", "-q")
    assert commit(file) is None
    git("add", ".")
    git("commit", "-q", "-m", "one")
    head = git("rev-parse", "HEAD").strip()
    assert commit(file) == head
    (tmp_path / "results.json").write_text("{}")
    assert commit(file) == head
    (tmp_path / "b.py").write_text("2\n")
    assert commit(file) == f"{head}-dirty"


@pytest.mark.slow
@LINUX
def test_the_peak_is_that_of_the_request_and_not_of_what_came_before():
    def touch(mebibytes: int) -> None:
        np.ones(mebibytes * MIB, dtype=np.uint8).sum()

    touch(256)
    peak, before = memory.around(lambda: touch(96))
    assert 95 * MIB < peak - before < 110 * MIB
    peak, before = memory.around(lambda: None)
    assert peak - before < 8 * MIB


def test_the_peak_is_forgotten_before_the_request(monkeypatch, tmp_path):
    """With a stand-in for /proc: figures of a real process are checked by the slow tests."""
    status, clear, resident = tmp_path / "status", tmp_path / "clear_refs", {"VmHWM": 900, "VmRSS": 500}
    monkeypatch.setattr(memory, "_STATUS", status)
    monkeypatch.setattr(memory, "_CLEAR", clear)

    def say() -> None:
        status.write_text("Name:\tpython\n" + "".join(f"{name}:\t  {kib} kB\n" for name, kib in resident.items()))

    def request() -> None:
        assert clear.read_text() == "5"
        resident["VmHWM"] = 740
        say()

    say()
    assert memory.around(request) == (740 * 1024, 500 * 1024)


ALONE = """
import torch
from vitcop_compile.bench.arms import Arm, register

@register("alone")
def alone(model, config, request):
    assert config.prune and request.batch == 2 and model.config.text_config.hidden_size == 32
    print("a line that is no result")
    return Arm({"ttft": lambda: torch.ones(64 * 2**18).sum(), "decode": lambda: None})
"""


@pytest.mark.slow
@LINUX
def test_an_arm_is_measured_in_a_process_of_its_own(tmp_path, monkeypatch):
    """Some seconds, which importing torch takes. The arm comes from a file outside the package, as foreign ones do."""
    (tmp_path / "alone.py").write_text(ALONE)
    monkeypatch.setitem(ARMS, "alone", None)
    monkeypatch.syspath_prepend(tmp_path)
    import alone  # noqa: F401

    case = Case(TINY, "eager", batch=2)
    peak, before = memory.peak(case, Entrant("alone", "1/9", ViTCoPConfig.preset("1/9")))
    assert 63 * MIB < peak - before < 80 * MIB


def raises(model, config, request):
    raise ValueError("a line\nno luck")


def dies(model, config, request):
    os._exit(3)


@pytest.mark.slow
@LINUX
@pytest.mark.parametrize(("builder", "named"), [(raises, "no luck"), (dies, "A process in the process pool was terminated")])
def test_a_process_that_fails_is_reported_by_its_last_line(builder, named, monkeypatch):
    monkeypatch.setitem(ARMS, "eager", builder)
    case = Case(TINY, "eager", ("1/9",), against=())
    with pytest.raises(UnsupportedError, match=f"arm 'eager dense' cannot be measured in a process of its own: {named}"):
        memory.peak(case, case.entrants()[0])


def test_elsewhere_the_peak_is_unknown_and_the_table_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "missing")
    case = Case(Shape(), "eager", ("1/9",), against=())
    assert memory.peak(case, case.entrants()[0]) is None
    found = rows(case, ModelShape(), {"vision": {"eager dense": [1.0]}}, {})
    assert markdown({"environment": GIVEN, "rows": found}).count("Linux only") == 2


def signature(path: Path) -> str:
    """The format that the file really is."""
    if path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return ET.parse(path).getroot().tag.removeprefix("{http://www.w3.org/2000/svg}")


@pytest.mark.parametrize("format", plot.FORMATS)
def test_all_pictures_are_written_in_the_format_asked_for(format, tmp_path):
    written = plot.draw_all(results(), tmp_path / "new" / "folder", format)
    assert [path.name for path in written] == [f"{name}.{format}" for name in ("latency", "stages", "kv_memory")]
    assert sorted(path for path in written[0].parent.iterdir()) == sorted(written)
    assert all(signature(path) == format for path in written)


def test_requests_are_not_mixed_in_one_picture(tmp_path):
    names = [path.stem for path in plot.draw_all(results(batches=(1, 16)), tmp_path, "svg")]
    request = "1024x12_batch{}_text64_new64"
    assert names == [
        *(f"{name}_{request.format(1)}" for name in ("latency", "stages")),
        *(f"{name}_{request.format(16)}" for name in ("latency", "stages")),
        "kv_memory",
    ]


def test_latency_draws_a_line_per_backend_beside_the_stock_model():
    drawing = plot.latency(results())
    for axes, stage in zip(drawing.axes, ("TTFT", "prefill")):
        assert stage in axes.get_title() and "(ms)" in axes.get_ylabel() and "(%)" in axes.get_xlabel()
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert lines.keys() == {"eager", "inductor", "stock model, torch.compile, dense"}
        # 192 and 64 of 576 tokens, about, and all of them.
        assert np.allclose(lines["inductor"].get_xdata(), [11.1, 33.3, 100], atol=0.1)
        assert np.allclose(lines["inductor"].get_ydata(), [400, 800, 1600])
        assert np.allclose(lines["eager"].get_ydata(), [200, 400, 800])
        assert set(lines["stock model, torch.compile, dense"].get_ydata()) == {1350.0}
    assert "A CPU, 2 threads" in drawing.get_suptitle()
    assert len({line.get_color() for line in drawing.axes[0].get_lines()}) == 3


def test_stages_stack_up_to_the_first_token_and_show_decoding_beside():
    first, second = plot.stages(results()).axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in first.containers}
    assert heights["vision"] == [800, 400, 200, 1600, 800, 400]
    assert heights["selection"] == [0, 10, 10, 0, 10, 10]
    assert heights["prefill without selection"] == [800, 390, 190, 1600, 790, 390]
    assert [bar.get_height() for bar in second.containers[0]] == [64 * height for height in heights["vision"]]
    assert [label.get_text() for label in second.get_xticklabels()] == ["dense", "1/3", "1/9"] * 2
    assert "(ms)" in first.get_ylabel() and "64 tokens" in second.get_title()


def test_kv_memory_grows_from_the_prompt_by_a_row_per_layer():
    (axes,) = plot.kv_memory(longest=256).axes
    lines = {line.get_label(): dict(zip(*line.get_data())) for line in axes.get_lines()}
    assert lines.keys() == {"dense", "1/3", "2/9", "1/9"}
    for new_tokens in (0, 256):
        assert lines["1/9"][new_tokens] == pruned_kv(new_tokens) / MIB
        assert lines["dense"][new_tokens] == 2 * 32 * 128 * 2 * 32 * (640 + new_tokens) / MIB
    assert "LLaVA-1.5-7B" in axes.figure.get_suptitle() and "(MiB)" in axes.get_ylabel()


def test_pictures_are_refused_where_there_is_nothing_to_draw_or_nowhere_to_put_them(tmp_path):
    with pytest.raises(ConfigError, match="format 'pdf' is unknown: use one of png, svg"):
        plot.draw_all(results(), tmp_path, "pdf")
    with pytest.raises(InputError, match="the results have no rows"):
        plot.draw_all(results() | {"rows": []}, tmp_path)
    timeless = [row | {"ttft_ms": None, "prefill_ms": None} for row in results()["rows"]]
    for draw, message in ((plot.latency, "neither TTFT nor prefill"), (plot.stages, "no row has vision, prefill and decode")):
        with pytest.raises(InputError, match=message):
            draw({"environment": GIVEN, "rows": timeless})
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be made: File exists"):
        plot.draw_all(results(), tmp_path / "file")
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(InputError, match=r"taken\.png cannot be written"):
        plot.save(plot.kv_memory(), tmp_path / "taken.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.png"]


def test_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'vitcop-compile\[plot\]'"):
        plot.draw_all(results(), tmp_path)


def test_the_same_results_make_the_same_svg(tmp_path):
    one, other = (plot.draw_all(results(), tmp_path / name, "svg") for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_results_are_not_changed_by_showing_them():
    given = results()
    before = json.dumps(given)
    markdown(given), table(given), plot.latency(given), plot.stages(given)
    assert json.dumps(given) == before
