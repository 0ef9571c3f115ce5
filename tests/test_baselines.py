"""The arms of a benchmark: all serve the request they are given, and compute what they are said to compute.

The stock model called directly is the reference for dense arms, `reference_llava` for pruned ones, the published form among
them, and golden data of the published code for that form too. Compiled arms take some ten seconds each to build on a cold
cache.
"""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any

import golden
import naive
import numpy as np
import pytest
import reference_llava as reference
import test_golden_e2e as e2e
import torch
import torch.nn.functional as F
from models import PATCHES as PATCHES_DEEP
from models import Remembered, captured, llava, randomize, shared, slow
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel as allow_only
from torch.profiler import ProfilerActivity, profile
from vitcop_compile.export import ort_backend
from vitcop_compile.export.onnx import op_counts

from vitcop_compile import ConfigError, UnsupportedError, ViTCoPConfig, pipeline
from vitcop_compile.backends import BACKENDS
from vitcop_compile.bench import ours, stock
from vitcop_compile.bench.arms import ARMS, Arm, Request, build, inputs
from vitcop_compile.bench.kernels import backend_kernel, recorded
from vitcop_compile.bench.selection import SelectionOnly, selection_arm, selection_inputs
from vitcop_compile.cache import CACHE_NAME
from vitcop_compile.capture import capture
from vitcop_compile.families import family_of
from vitcop_compile.toy import small_llava

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
import by_the_book as book

DENSE, CPU = ViTCoPConfig.dense(), torch.device("cpu")
LAYERS, PATCHES, REQUEST = 2, 16, Request(batch=2, text_tokens=7, new_tokens=5)
STAGES = ("vision", "prefill", "decode", "ttft")
PRUNED = {
    "1/3": ViTCoPConfig.preset("1/3"),
    "1/9": ViTCoPConfig.preset("1/9"),
}
SHALLOW, DEEP = 1, 3  # 2 and 22 of 32 layers, at 4
TOLERANCE = 1e-4  # fp32 with another order of operations; logits are of the order of 5


@pytest.fixture(autouse=True)
def one_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is traced, and a program exported, once for all arms."""
    monkeypatch.setattr(pipeline, "capture", lambda family, model: captured(model))
    monkeypatch.setattr(pipeline, "Programs", Remembered)


@pytest.fixture(scope="module")
def shallow():
    """As little as shows every stage: the encoder's last layer is not read, the decoder has a second cache."""
    encoder = {"vision_hidden": 32, "vision_layers": 2, "vision_heads": 4, "image_size": 56}
    model = small_llava(**encoder, hidden=64, layers=LAYERS, heads=4, kv_heads=2, intermediate=96, vocab=264)
    randomize(model, 0)
    return model


@pytest.fixture(scope="module")
def deep():
    return shared(4, 2)


@pytest.fixture(scope="module")
def dense_arms(shallow):
    """Arms of one dense request, each built once."""
    made: dict[str, Arm] = {}

    def get(name: str) -> Arm:
        if name not in made:
            made[name] = build(name, shallow, DENSE, REQUEST)
        return made[name]

    return get


def result(arm: Arm, stage: str) -> Tensor:
    """The features or logits of one call, as a tensor that later calls leave alone."""
    found = arm.stages[stage]()
    return (found if isinstance(found, Tensor) else found[0]).clone()


def fused(call: Any) -> list[tuple[str, bool]]:
    """(fused attention operator, whether it had a mask) for every attention that `call` runs, compiled or not."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        call()
    events = [event for event in profiled.events() if event.name.startswith("aten::_scaled_dot_product")]
    return [(event.name.removeprefix("aten::"), bool(event.input_shapes[5])) for event in events]


# Dense arms


@torch.no_grad()
@pytest.mark.parametrize("name", ["stock_eager", slow("stock_compile"), "eager", slow("inductor"), "onnxruntime"])
def test_a_dense_arm_computes_what_the_stock_model_computes_and_changes_no_state(name, dense_arms, shallow):
    arm = dense_arms(name)
    given = inputs(shallow, REQUEST)
    ids = given["input_ids"]
    longer = torch.cat((ids, ids[:, :1]), 1)  # without a cache: the position of the decoded token is the model's own doing
    expected = {
        "vision": torch.stack(tuple(shallow.get_image_features(pixel_values=given["pixel_values"]).pooler_output)),
        "prefill": shallow(**given).logits[:, -1:],
        "decode": shallow(input_ids=longer, pixel_values=given["pixel_values"]).logits[:, -1:],
    }
    expected["ttft"] = expected["prefill"]
    assert tuple(arm.stages) == STAGES and arm.selection is None
    first = {stage: result(arm, stage) for stage in STAGES}
    for stage in (*STAGES, *reversed(STAGES)):
        found = result(arm, stage)
        assert golden.largest_error(found, expected[stage]) < TOLERANCE, stage
        assert torch.equal(found, first[stage]), stage
    assert (expected["prefill"] - expected["decode"]).abs().max() > 0.1  # the comparison above tells them apart


@torch.no_grad()
@pytest.mark.parametrize("name", ["stock_eager", slow("stock_compile"), "eager"])
def test_the_attention_words_of_a_dense_arm_name_the_operator_that_runs(name, dense_arms):
    arm = dense_arms(name)
    for stage in STAGES:
        arm.stages[stage]()
        found = set(fused(arm.stages[stage]))
        masked = stage == "decode" and name != "stock_eager"  # on a static cache, rows that are not filled yet
        assert found == {("_scaled_dot_product_flash_attention_for_cpu", masked)}
        assert arm.attention[stage] == ("flash (cpu) with a mask" if masked else "flash (cpu)")


@torch.no_grad()
@pytest.mark.slow
def test_the_attention_words_of_a_compiled_arm_name_what_its_source_calls(shallow):
    """Its C++ calls operators past torch's dispatcher, where no profiler sees them."""

    def called() -> Arm:
        arm = build("inductor", shallow, DENSE, REQUEST)
        for call in arm.stages.values():
            call()
        return arm

    arm, sources = run_and_get_code(called)
    found = []
    for source in sources:  # as they were compiled: vision, prefill, decode
        calls = re.findall(r"(?:cpu_|\")((?:_scaled_dot|vitcop_cpu::decode)\w+)[\"(](.*)", source)
        masks = [re.search(r", 0\.0, ([01]), (\w+),", given) for _, given in calls]  # between dropout and scale
        found.append({(name, mask and mask[2]) for (name, _), mask in zip(calls, masks, strict=True)})
    fused_alone = {("_scaled_dot_product_flash_attention_for_cpu", "nullptr")}
    assert found == [fused_alone, fused_alone, {("vitcop_cpu::decode_attention", None)}]
    assert [arm.attention[stage] for stage in STAGES[:3]] == ["flash (cpu)", "flash (cpu)", "vitcop_cpu"]


def test_the_stock_decode_cache_is_as_long_after_a_step_as_before(shallow):
    arm = build("stock_eager", shallow, DENSE, REQUEST)
    keys = arm.stages["prefill"]()[1]
    assert keys.shape[2] == PATCHES + REQUEST.text_tokens
    seen = []
    hook = shallow.model.language_model.layers[0].register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs[CACHE_NAME]), with_kwargs=True
    )
    try:
        for _ in range(3):
            arm.stages["decode"]()
    finally:
        hook.remove()
    assert [cache.get_seq_length() for cache in seen] == [PATCHES + REQUEST.text_tokens] * 3
    assert {layer.keys.shape[2] for layer in seen[0].layers} == {PATCHES + REQUEST.text_tokens}


@pytest.mark.parametrize("name", ["stock_eager", "stock_compile"])
def test_stock_arms_refuse_what_they_are_not_stated_for(name, shallow):
    with pytest.raises(ConfigError, match=r"cannot prune: pass ViTCoPConfig.dense\(\)"):
        build(name, shallow, ViTCoPConfig.preset("1/3"), REQUEST)
    with pytest.raises(UnsupportedError, match="Linear is not a supported model"):
        build(name, nn.Linear(2, 2), DENSE, REQUEST)  # type: ignore[arg-type]
    other = llava(LAYERS)
    other.train()
    with pytest.raises(ConfigError, match="training mode"):
        build(name, other, DENSE, REQUEST)
    other.eval().set_attn_implementation({"text_config": "eager"})
    with pytest.raises(ConfigError, match="the llama part has attn_implementation='eager'"):
        build(name, other, DENSE, REQUEST)


def test_more_requests_compile_than_dynamo_recompiles_one_function(monkeypatch):
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: plain(function, backend="eager", **settings))

    def made() -> Any:
        def double(values: Tensor) -> Tensor:
            return 2 * values

        return double

    for count in range(2, 2 + 2 * torch._dynamo.config.recompile_limit):
        assert stock._compiled(made(), (torch.ones(count),), True)().tolist() == [2.0] * count


def test_every_backend_is_an_arm():
    assert set(BACKENDS) <= set(ARMS)
    with pytest.raises(UnsupportedError, match="not a supported model"):
        ours.ours("eager", nn.Linear(2, 2), DENSE, REQUEST)  # type: ignore[arg-type]


# The published form, and pruned arms against it


def pruned_image(case: dict[str, Any]) -> bool:
    """Whether a golden case is of one image, with pruning switched on."""
    return e2e._one_image(case) and e2e._config(case["env"]).prune


@torch.no_grad()
@pytest.mark.parametrize("case", golden.params(case for case in golden.cases("e2e") if pruned_image(case)))
def test_the_published_form_gives_the_published_results(case):
    config = e2e._config(case["env"])
    index, data = golden.index("e2e"), golden.load("e2e", case["file"])
    model = golden.tiny_llava(index["vision_config"], index["config"], image_token_id=index["config"]["vocab_size"])
    weights = golden.load("e2e", "weights.safetensors")
    model.load_state_dict({e2e._renamed(key): tensor for key, tensor in weights.items()})
    served = book.ByTheBook(model, config)
    features, labels = served.see(data["pixel_values_int8"].float() / 64)
    ids = e2e._expanded(data["input_ids"], model.config.image_token_id, served.schedule.shape.patches)
    prompt, cache = served.prefill(ids, features, labels)
    assert [layer.keys.shape[2] for layer in cache.layers] == case["kv_len_prefill"]
    logits = [prompt]
    for token in case["tokens"][1:-1]:  # the first stands for the prompt, the last is not fed back
        logits.append(served.decode(torch.tensor([[token]]), cache))
    assert golden.largest_error(torch.cat(logits)[:, 0], data["sdpa/scores"]) < golden.TOLERANCE
    assert golden.partition(labels) == golden.partition(data["vision/labels"][0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["eager", slow("onnxruntime"), "by_the_book"])
def test_a_pruned_arm_computes_what_the_reference_computes_and_changes_no_state(name, deep):
    request, config = Request(1, 7, 5), ViTCoPConfig.preset("1/9")
    given = inputs(deep, request)
    ids = given["input_ids"]
    settings = reference.preset("1/9", PATCHES_DEEP, 4, SHALLOW, DEEP, vision=2)
    follow = lambda logits, step: int(ids[0, 0])  # noqa: E731
    told = reference.run(deep, ids, given["pixel_values"], settings, 2, follow)
    prefill, decode = torch.stack(told.logits)[:, None, None]
    features = reference._see(deep, given["pixel_values"], settings, reference.Result())
    expected = {"vision": features, "prefill": prefill, "ttft": prefill, "decode": decode}
    arm = build(name, deep, config, request)
    first = {stage: result(arm, stage) for stage in STAGES}
    for stage in (*STAGES, *reversed(STAGES)):
        found = result(arm, stage)
        assert golden.largest_error(found, expected[stage]) < TOLERANCE, stage
        assert torch.equal(found, first[stage]), stage
        assert arm.attention[stage]
    assert arm.selection is not None
    arm.selection()


@torch.no_grad()
@pytest.mark.parametrize("name", ["stock_eager", "eager", "by_the_book"])
def test_arms_serve_a_model_in_bfloat16(name):
    model = llava(3).bfloat16()
    config = DENSE if name == "stock_eager" else PRUNED["1/3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "capture", capture)
        arm = build(name, model, config, Request(1, 7, 5))
    for stage in STAGES:
        found = result(arm, stage)
        assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    assert name == "stock_eager" or arm.selection() is not None


def test_the_published_form_refuses_what_it_cannot_do(deep):
    with pytest.raises(ConfigError, match="batch=2: the published code takes one prompt at a time"):
        build("by_the_book", deep, ViTCoPConfig.preset("1/3"), Request(batch=2))
    with pytest.raises(ConfigError, match="always prunes"):
        build("by_the_book", deep, DENSE, Request())
    with pytest.raises(ConfigError, match="vision_layer=-3 is layer 1, the published code prunes after layer 2 only"):
        build("by_the_book", deep, ViTCoPConfig.preset("1/3", vision_layer=-3), Request())
    other = llava(2)
    other.set_attn_implementation({"vision_config": "eager"})
    with pytest.raises(ConfigError, match="the clip_vision_model part has attn_implementation='eager'"):
        build("by_the_book", other, ViTCoPConfig.preset("1/3"), Request())


# Selection alone


def _in_order(given):
    """Of the encoder, what enters the decoder, the keys of its two stages."""
    names = ("query_vision_0", "key_vision_0", "patches", "hidden", "visual", "key_decoder_0", "key_decoder_1")
    return [given[name] for name in names]


@torch.no_grad()
def test_selection_alone_is_the_published_selection_of_every_sample(deep):
    schedule, batch = PRUNED["1/3"].schedule(family_of(deep).shape), 3
    vision, (shallow, last) = schedule.vision, schedule.decoder_stages
    given = selection_inputs(schedule, Request(batch, 64, 5), torch.float32, CPU)
    found_patches, found_hidden = SelectionOnly(schedule, given)(*given.values())
    query, key, patches, hidden, visual, first, second = (tensor.numpy() for tensor in _in_order(given))
    n, side = vision.total, schedule.shape.grid[0]
    centers, width, reach = (stage_option[1] for stage_option in vision.options)
    for row in range(batch):
        heads = query[row].swapaxes(0, 1), key[row].swapaxes(0, 1)
        score = naive.cls_saliency(*heads, query.shape[-1] ** -0.5)
        kept = naive.keep_lowest([-value for value in score], n)
        assert np.array_equal(found_patches[row], np.concatenate((patches[row, :1], patches[row, 1:][kept])))
        places = np.array([(patch // side, patch % side) for patch in kept]) / side
        features = key[row, 1:].reshape(side * side, -1)[kept]
        labels = naive.density_peaks(features, places, centers[0], width, reach).labels
        rows, _ = naive.merge_by_cluster(hidden[row, :n], naive.key_norm(first[row, :, :n]), labels, shallow.total)
        rows = rows[naive.keep_lowest(naive.key_norm(second[row, :, : shallow.total]), last.total)]
        expected = torch.tensor(np.concatenate((rows, hidden[row, n:])))
        assert golden.largest_error(found_hidden[row].double(), expected) < TOLERANCE
    assert visual.tolist() == [list(range(n))] * batch


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_selection_arm_returns_what_the_schedule_says(backend, deep):
    request = Request(2, 7, 5)
    shape = family_of(deep).shape
    schedule = PRUNED["1/9"].schedule(shape)
    patches, hidden = selection_arm(schedule, request, backend, torch.float32, CPU)()
    assert patches.shape == (2, 1 + 19, 32)  # CLS and 0.3 of 64 patches
    assert hidden.shape == (2, 7 + schedule.decoder_stages[1].total, 64)


def test_a_selection_arm_refuses_a_schedule_of_something_else(deep):
    shape = family_of(deep).shape
    with pytest.raises(ConfigError, match="a dense schedule selects nothing"):
        selection_arm(DENSE.schedule(shape), Request(), "eager", torch.float32, CPU)
    with pytest.raises(UnsupportedError, match="backend='none' is unknown"):
        selection_arm(PRUNED["1/9"].schedule(shape), Request(), "none", torch.float32, CPU)


# The kernels of attention


@pytest.mark.parametrize("causal, decode", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_on_the_cpu_is_flash(causal, decode, kv_heads, dtype):
    shapes = (2, 4, 16, 8), (2, kv_heads, 16, 8)
    kernel = functools.partial(backend_kernel, "inductor", *shapes, dtype, CPU, causal=causal, decode=decode)
    mask = " with a mask" if decode else ""
    assert kernel() == f"flash (cpu){mask}"
    with allow_only(SDPBackend.MATH):
        assert kernel() == f"math{mask}"


@pytest.mark.parametrize(("backend", "words"), [("onnxruntime", "MatMul, Softmax (onnx)"), ("tensorrt", "chosen by tensorrt")])
def test_engines_that_are_not_torch_do_not_run_its_kernels(backend, words):
    assert backend_kernel(backend, (2, 4, 16, 8), (2, 4, 16, 8), torch.float32, CPU) == words


def test_a_decoding_step_on_the_cpu_runs_our_kernel_where_a_backend_has_it():
    shapes = (2, 4, 1, 8), (2, 2, 16, 8)
    found = [backend_kernel(name, *shapes, torch.float32, CPU, decode=True) for name in ("inductor", "aotinductor", "eager")]
    assert found == ["vitcop_cpu", "vitcop_cpu", "flash (cpu) with a mask"]


def test_a_recording_names_every_kernel_once_and_its_mask():
    q = torch.zeros(1, 2, 4, 8)
    mask = torch.ones(4, 4, dtype=torch.bool)

    def several() -> None:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
        F.scaled_dot_product_attention(q, q, q, mask)
        F.scaled_dot_product_attention(q[0], q[0], q[0], attn_mask=mask)
        F.scaled_dot_product_attention(q, q, q)

    assert recorded(several) == "flash (cpu), flash (cpu) with a mask, math with a mask"
    assert recorded(lambda: q @ q.transpose(2, 3)) == "none"


@pytest.mark.slow
@torch.no_grad()
def test_the_attention_words_of_onnxruntime_are_those_of_its_graphs(monkeypatch, shallow):
    counts = []
    plain = ort_backend.write_onnx

    def noting(program: Any, path: Path, *rest: Any) -> Any:
        written = plain(program, path, *rest)
        counts.append(op_counts(path))
        return written

    monkeypatch.setattr(ort_backend, "write_onnx", noting)
    arm = build("onnxruntime", shallow, DENSE, Request(1, 20, 3))
    for stage in ("vision", "prefill", "decode"):
        arm.stages[stage]()
    vision, prefill, decode = counts
    assert [count["Softmax"] for count in counts] == [1, LAYERS, LAYERS]  # the encoder ends at its first layer of two
    assert not any(count["Attention"] for count in counts)
    assert not vision["Where"] and prefill["Trilu"] and decode["Less"]  # where masks are made
    composed = "MatMul, Softmax (onnx)"
    assert arm.attention == {
        "vision": composed,
        "prefill": f"{composed} with a mask",
        "decode": f"{composed} with a mask",
        "ttft": f"{composed}, {composed} with a mask",
    }
