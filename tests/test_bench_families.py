"""Benchmarks of families whose tokens are put together behind the encoder: their models, requests, arms and selection."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import families
import models
import naive
import numpy as np
import pytest
import torch
from test_cli_bench import error_of, invoke
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitcop_compile import ConfigError, UnsupportedError, ViTCoPConfig, bench, pipeline
from vitcop_compile.bench.arms import build, inputs
from vitcop_compile.bench.bind import Served, bind, with_programs
from vitcop_compile.bench.selection import SelectionOnly, selection_inputs
from vitcop_compile.families import family_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import parts

DENSE, PRUNED = ViTCoPConfig.dense(), ViTCoPConfig.preset("1/3")
# Two prompts of two images: of qwen2_5_vl's, windows are filled up.
REQUEST = bench.Request(2, 7, 5, images=2, side=112)
VIDEO = bench.Request(2, 7, 5, frames=3, side=84)
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "internvl")
TOLERANCE = 1e-4  # fp32 with another order of operations; logits are of the order of 1
STAGES = {"vision", "tower", "select", "prefill", "decode", "ttft"}


@pytest.fixture(autouse=True)
def one_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is traced, and a program exported, once for all arms."""
    monkeypatch.setattr(pipeline, "capture", lambda family, model: models.captured(model))
    monkeypatch.setattr(pipeline, "Programs", models.Remembered)


def longer(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The request and its first token once more."""
    more = {name: given[name][:, :1] for name in ("input_ids", "mm_token_type_ids") if name in given}
    return given | {name: torch.cat((given[name], column), 1) for name, column in more.items()}


@torch.no_grad()
@pytest.mark.parametrize(
    ("arm", "name", "request_"),
    [
        ("stock_eager", "qwen2_5_vl", VIDEO),
        *(models.slow("stock_eager", name, REQUEST) for name in FAMILIES),
        *(models.slow("eager", name, REQUEST) for name in FAMILIES),
        models.slow("eager", "qwen2_5_vl", VIDEO),
    ],
)
def test_a_dense_arm_computes_what_the_stock_model_computes_and_changes_no_state(arm, name, request_):
    model = families.model(name)
    given = inputs(model, request_)
    kind = "video" if request_.frames else "image"
    about = {key: value for key, value in given.items() if key.startswith("pixel") or key.endswith("thw")}
    features = torch.cat(tuple(getattr(model, f"get_{kind}_features")(**about).pooler_output))
    expected = {"vision": features.flatten(0, -2), "prefill": model(**given).logits[:, -1:]}
    expected |= {"ttft": expected["prefill"], "decode": model(**longer(given)).logits[:, -1:]}
    built = build(arm, model, DENSE, request_)
    assert built.stages.keys() == (STAGES if arm == "eager" else STAGES - {"tower", "select"}) and built.selection is None
    for _ in range(2):
        for stage, wanted in expected.items():
            found = built.stages[stage]()
            found = found if isinstance(found, Tensor) else found[0]
            found = found.flatten(0, -2) if stage == "vision" else found
            assert (found - wanted).abs().max() < TOLERANCE, stage
    assert (expected["prefill"] - expected["decode"]).abs().max() > 0.1  # the comparison above tells them apart


@torch.no_grad()
def test_stages_are_given_what_the_runtime_gives_and_vision_is_tower_and_select():
    fast = models.optimize(families.model("qwen2_5_vl"), PRUNED)
    given: dict[str, tuple] = {}

    def noting(name: str, make: Any) -> Any:
        program = make()
        return lambda *inputs: (given.setdefault(name, (program, [x.clone() for x in inputs])), program(*inputs))[1]

    calls = bind(fast, REQUEST)
    calls["select"]()
    assert [key[0] for key in fast.compiled] == ["tower", "select"]
    Served(fast, REQUEST).decode(with_programs(fast, noting))
    assert set(given) == {"tower", "select", "prefill", "decode"}
    for _ in range(2):
        for name, (program, inputs_) in given.items():
            expected = program(*inputs_)
            assert all(torch.equal(a, b) for a, b in zip(calls[name](), expected, strict=True)), name
        assert all(torch.equal(a, b) for a, b in zip(calls["vision"](), calls["select"](), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", models.slow("qwen2_vl"), models.slow("internvl")])
def test_a_pruned_arm_selects(name):
    arm = build("eager", families.model(name), PRUNED, REQUEST)
    host = family_of(families.model(name)).host
    schedule = PRUNED.schedule(host.shape, bench.Case(bench.Shape(family=name, image_size=112), images=2).layout())
    features, kept, *_ = arm.stages["select"]()
    assert features.shape[:2] == kept.shape == (4, schedule.segment_tokens[0])
    assert arm.attention["vision"] == ("flash (cpu)" if name == "internvl" else "flash (cpu) with a mask")
    assert arm.selection is not None
    index, hidden = arm.selection()
    assert index.shape == (4, schedule.segment_tokens[0], 4)
    assert hidden.shape == (2, 7 + schedule.decoder_stages[1].total, 64)


def received(query: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Of query, key [rows, heads, hd]: attention that every row receives, mean over heads and queries."""
    total = np.zeros(len(key))
    for head in range(query.shape[1]):
        for row in query[:, head]:
            logits = key[:, head] @ row / np.sqrt(query.shape[2])
            total += np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    return total / (query.shape[0] * query.shape[1])


@torch.no_grad()
def test_selection_alone_is_the_selection_of_every_image():
    shape = family_of(families.model("qwen2_vl")).shape
    layout = bench.Case(bench.Shape(family="qwen2_vl", image_size=196), images=2).layout()
    schedule = ViTCoPConfig.preset("1/3").schedule(shape, layout)
    given = selection_inputs(schedule, bench.Request(1, 5), torch.float32, torch.device("cpu"), padded=True)
    kept, hidden = SelectionOnly(schedule, given)(*given.values())
    names = ("query_vision_0", "key_vision_0", "hidden", "key_decoder_0", "key_decoder_1")
    query, key, states, first, second = (given[name].double().numpy() for name in names)
    vision, (shallow, last) = schedule.vision, schedule.decoder_stages
    options = dict(vision.options)
    n, parts_ = vision.tokens[0], []
    for image in range(2):
        score = received(query[image], key[image]).reshape(-1, 4).mean(1)
        chosen = naive.keep_lowest(list(-score), n)
        assert kept[image].tolist() == [[49 * 4 * image + 4 * token + i for i in range(4)] for token in chosen]
        features = key[image].reshape(49, 4, -1).mean(1)[chosen]
        places = np.array([(token // 7, token % 7) for token in chosen]) / 7
        peaks = naive.density_peaks(features, places, options["centers"][0], options["density_width"], options["reach"])
        rows = slice(image * n, image * n + n)
        centered = [first[0, :, rows].mean(0) - first[0, :, rows].mean((0, 1))]
        merged, _ = naive.merge_by_cluster(
            states[0, rows].astype(np.float32), naive.key_norm(np.stack(centered)), peaks.labels, shallow.tokens[0]
        )
        rows = slice(image * shallow.tokens[0], (image + 1) * shallow.tokens[0])
        centered = [second[0, :, rows].mean(0) - second[0, :, rows].mean((0, 1))]
        parts_.append(merged[naive.keep_lowest(naive.key_norm(np.stack(centered)), last.tokens[0])])
    expected = np.concatenate((*parts_, states[0, 2 * n :]))
    assert np.abs(hidden[0].numpy() - expected).max() < TOLERANCE


@pytest.mark.parametrize("family", bench.MODELS)
def test_a_family_is_the_model_that_its_shape_describes(family):
    size = bench.IMAGE_SIZES[family]
    given = bench.Shape(hidden=128, layers=5, vision_hidden=192, vision_layers=4, family=family, image_size=size)
    shape = given.model_shape()
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.intermediate) == (128, 5, 2, 2, 384)
    assert (shape.vision_hidden, shape.vision_layers, shape.element_bytes, shape.vocab) == (192, 4, 4, 2048)
    assert shape.scored_layers == ((3,) if family == "qwen2_5_vl" else ())
    (segment,) = bench.Case(given).layout()
    assert segment.tokens == (576 if family == "llava" else 256)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_vision_side_saves_is_the_projector_on_tokens_that_are_gone(name):
    model, side = families.model(name), 196
    family = family_of(model)
    schedule = PRUNED.schedule(family.shape, family.host.layout_of(side, side))
    assert 0 < schedule.image_tokens < schedule.patches
    counted = []
    for tokens in (schedule.patches, schedule.image_tokens):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            family.projector(torch.zeros(1, tokens, 4, 32))
        counted.append(counter.get_total_flops())
    assert schedule.dense_vision_flops() - schedule.vision_flops() == counted[0] - counted[1] > 0


def test_ideals_follow_from_all_images_of_a_prompt():
    case = bench.Case(bench.Shape(family="internvl", image_size=448), "eager", ("1/9",), images=3, against=())
    shape, layout = case.shape.model_shape(), case.layout()
    times = {"prefill": {"eager dense": [30.0], "eager 1/9": [10.0]}, "select": {"eager 1/9": [3.0]}}
    dense, pruned = bench.rows(case, shape, times, {}, layout)
    schedule = ViTCoPConfig.preset("1/9").schedule(shape)  # of one image: every image has a budget of its own
    tokens = {name: 3 * count for name, count in zip(("vision", "shallow", "deep"), schedule.group_tokens())}
    assert dense["visual_tokens"]["mean"] == 768 and dense["retention"] == 1.0
    assert {name: pruned["visual_tokens"][name] for name in tokens} == tokens
    assert pruned["images"] == 3 and pruned["select_ms"] == 3.0 and pruned["tower_ms"] is None
    flops = lambda rows: naive.decoder_layer_flops(rows, 1024, 16, 16, 64, 2752)  # noqa: E731
    head = 2 * 1024 * 2048
    ideal = (12 * flops(64 + 768) + head) / (sum(flops(64 + 3 * count) for count in schedule.visual_tokens()) + head)
    assert pruned["flop_ratio"] == pytest.approx(ideal, rel=1e-12)
    assert pruned["realized_over_ideal"] == pytest.approx(3.0 / ideal, rel=1e-12)


def test_what_a_family_cannot_take_is_refused():
    tiny: dict[str, Any] = {"hidden": 64, "layers": 4, "vision_hidden": 64, "vision_layers": 3, "image_size": 112}
    with pytest.raises(UnsupportedError, match="frames=2: this family takes frames as images, ask for so many of these"):
        bench.Case(bench.Shape(**tiny, family="internvl"), frames=2).check()
    with pytest.raises(ConfigError, match="images=3 with text_tokens=2: every image stands behind a token of text"):
        bench.Case(bench.Shape(**tiny, family="qwen2_vl"), images=3, text_tokens=2).check()
    with pytest.raises(ConfigError, match="images=0 is below 1"):
        bench.Case(bench.Shape(**tiny), images=0).check()
    with pytest.raises(ConfigError, match="frames=-1 is below 0"):
        bench.Case(bench.Shape(**tiny), frames=-1).check()


def test_the_command_lists_the_families_and_refuses_others():
    told = invoke("bench", "--help").stdout.replace("│", " ")
    assert ", ".join(bench.MODELS) in " ".join(told.split())
    assert f"family 'bert' is unknown: use one of {', '.join(bench.MODELS)}" in error_of("bench", "--family", "bert")


def test_the_command_passes_family_size_images_and_frames_on(monkeypatch):
    seen = []
    monkeypatch.setattr(bench, "run", lambda cases, **options: seen.append(cases[0]) or {})
    monkeypatch.setattr(bench, "table", lambda results: "")
    for options in (["--family", "internvl", "--images", 3], ["--family", "qwen2_vl", "--frames", 8, "--image-size", 224]):
        assert invoke("bench", *options).exit_code == 0
    found = [(case.shape.family, case.request.side, case.request.images, case.request.frames) for case in seen]
    assert found == [("internvl", 448, 3, 0), ("qwen2_vl", 224, 1, 8)]
    assert all(case.stages == ("vision", "select", "prefill", "ttft") for case in seen)
    for options in (["--family", "internvl", "--full"], []):
        assert invoke("bench", *options).exit_code == 0
    assert all(case.stages == bench.STAGES for case in seen[2:])


def test_frames_are_stated_beside_the_first_count():
    times = {(stage, count): [float(count), 2.0 * count] for stage in parts.VIDEO for count in (8, 32)}
    times["prefill", 32] = [64.0, 128.0]
    peaks = {key: [2**20 * key[1], 0, 2**30] for key in times}
    row = parts.frames_row(32, 8, times, peaks)
    assert (row["tower_ms"], row["tower_ms_to_first"]["median"], row["prefill_ms_to_first"]["median"]) == (48.0, 1.0, 2.0)
    assert (row["select_mib"], row["select_mib_to_first"]) == (32.0, 1.0)


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process needs Linux")
def test_frames_are_measured_stage_by_stage():
    shape = bench.Shape(hidden=64, layers=4, vision_hidden=64, vision_layers=2, family="qwen2_5_vl", image_size=56)
    rows = parts.frames(shape, (2, 4), rounds=1, backend="eager", text_tokens=8)
    assert [(row["frames"], row["tokens"]) for row in rows] == [(2, 8), (4, 16)]
    assert all(row[f"{stage}_ms"] > 0 for row in rows for stage in parts.VIDEO)
