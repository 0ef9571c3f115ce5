"""Quantised weights: torchao's are shared with every program, as they are; others are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import families
import models
import pytest
import reference_llava as reference
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.integrations.bitnet import BitLinear
from vitcop_compile.passes.lower_int8 import lower_int8

import vitcop_compile
from vitcop_compile import UnsupportedError, ViTCoPConfig, kernels, quantised

torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")

LAYERS = 3
THIRD = ViTCoPConfig.preset("1/3")
# The layers that `THIRD` names, in a decoder of three.
SETTINGS = reference.preset("1/3", models.PATCHES, LAYERS, shallow=1, deep=2, vision=2)
REQUEST: dict[str, Any] = {"input_ids": models.prompt(), "pixel_values": models.pixels()}
# Linear layers of the model: six for each of four encoder layers, the projector's two, seven for each decoder layer, the head.
LINEARS = 4 * 6 + 2 + LAYERS * 7 + 1
KINDS: dict[str, Callable[[], Any]] = {
    "int8": lambda: torchao.Int8WeightOnlyConfig(),
    "int4": lambda: torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(16)),
    "dynamic": lambda: torchao.Int8DynamicActivationInt8WeightConfig(),
    "dynamic int4": lambda: torchao.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=torchao.PerGroup(16)
    ),
    "float8": lambda: torchao.Float8WeightOnlyConfig(),
}


def made(kind: str, only: str = "", seed: int = 0) -> Any:
    """A model of its own, whose linear layers with `only` in their names are quantised."""
    model = models.llava(LAYERS, seed=seed)
    torchao.quantize_(model, KINDS[kind](), filter_fn=lambda module, name: isinstance(module, nn.Linear) and only in name)
    return model


@cache
def _once(kind: str, only: str) -> Any:
    return vitcop_compile.optimize(made(kind, only), THIRD, backend="eager")


def pruned(kind: str, only: str = "") -> Any:
    """What prunes `shared`, eager."""
    return _once(kind, only)


def shared(kind: str, only: str = "") -> Any:
    """One model for all tests, which leave it as it is."""
    return _once(kind, only).model


def by_hand(model: Any) -> Tensor:
    """The logits of stock layers on the model's own quantised weights, pruned by hand."""
    return reference.run(model, REQUEST["input_ids"], REQUEST["pixel_values"], SETTINGS, 1).logits[0][None, None]


@torch.no_grad()
def stock(model: Any) -> Tensor:
    return model(**REQUEST).logits[:, -1:]


def dense(model: Any, like: Any = None) -> Tensor:
    return vitcop_compile.optimize(model, ViTCoPConfig.dense(), backend="eager", like=like)(**REQUEST).logits


def addresses(model: nn.Module) -> set[int]:
    tensors = [*model.parameters(), *model.buffers()]
    return {part.data_ptr() for tensor in tensors for part in quantised.parts_of(tensor).values()}


# Equality


@pytest.mark.parametrize("kind", ["int8", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("int4", "float8"))])
def test_a_dense_configuration_is_the_quantised_model(kind: str) -> None:
    model = shared(kind)
    like = pruned(kind)  # which traced it
    torch.testing.assert_close(dense(model, like), stock(model), atol=1e-4, rtol=0)
    assert not torch.allclose(stock(model), stock(models.shared(LAYERS)), atol=1e-2)  # it is another model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", pytest.param("dynamic int4", marks=pytest.mark.exhaustive)])
def test_inputs_are_rounded_as_the_quantised_model_rounds_them(kind: str) -> None:
    """A sum that ends in another last digit can round to another int8: of the head alone, one rounding is what can differ."""
    model = shared(kind, "lm_head")
    torch.testing.assert_close(dense(model), stock(model), atol=2e-2, rtol=0)
    whole = shared(kind)
    found, expected = dense(whole).flatten(), stock(whole).flatten()
    assert torch.nn.functional.cosine_similarity(found, expected, 0) > 0.995 and found.argmax() == expected.argmax()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "only"), [("int4", ""), pytest.param("int8", "k_proj", marks=pytest.mark.exhaustive)])
def test_a_pruned_one_is_its_layers_pruned_by_hand(kind: str, only: str) -> None:
    """Keys are those of the quantised model, and so are the tokens that they choose: of the encoder, too."""
    model = shared(kind, only)
    fast = pruned(kind, only)
    told = reference.run(model, REQUEST["input_ids"], REQUEST["pixel_values"], SETTINGS, 4)
    out = fast.generate(**REQUEST, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True)
    assert out.sequences[0, -4:].tolist() == told.tokens
    torch.testing.assert_close(torch.cat(out.logits), torch.stack(told.logits), atol=1e-3, rtol=0)
    _, kept, *_ = fast.on_demand.vision(1)(REQUEST["pixel_values"])
    assert kept[0].tolist() == told.kept


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("inductor", "int8"),
        pytest.param("aotinductor", "int8", marks=pytest.mark.exhaustive),
        ("onnxruntime", "int8"),
        ("openvino", "int8"),
    ],
)
def test_backends(backend: str, kind: str) -> None:
    model = shared(kind)
    fast = vitcop_compile.optimize(model, THIRD, backend=backend)
    torch.testing.assert_close(fast(**REQUEST).logits, by_hand(model), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_a_family_with_towers_and_selections() -> None:
    """Whose encoder's first weights are quantised, and the head that programs of selections have nothing to do with."""
    model = families.qwen2_5_vl().eval()
    models.randomize(model, 0)
    torchao.quantize_(model, KINDS["int8"]())
    ids, given = families.prompt("qwen2_5_vl", [3, (3, 4), 2])
    prompt = torch.tensor([ids])
    with torch.no_grad():
        expected = model(input_ids=prompt, **given, **families.types(prompt)).logits[:, -1:]
    torch.testing.assert_close(
        vitcop_compile.optimize(model, ViTCoPConfig.dense(), backend="eager")(input_ids=prompt, **given).logits,
        expected, atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    pruned = vitcop_compile.optimize(model, ViTCoPConfig.preset("1/3"), backend="eager")
    assert pruned(input_ids=prompt, **given).logits.isfinite().all()


@pytest.mark.slow
def test_half_precision_with_scales_of_its_own() -> None:
    """The scales are float32, the model is not: programs compute in the model's type."""
    model = models.llava(LAYERS).bfloat16()
    torchao.quantize_(model, KINDS["int8"]())
    fast = vitcop_compile.optimize(model, ViTCoPConfig.dense(), backend="eager")
    assert fast.dtype == torch.bfloat16
    pixels = REQUEST["pixel_values"].bfloat16()
    with torch.no_grad():
        expected = model(input_ids=REQUEST["input_ids"], pixel_values=pixels).logits[:, -1:]
    found = fast(input_ids=REQUEST["input_ids"], pixel_values=pixels).logits
    torch.testing.assert_close(found.float(), expected.float(), atol=0.15, rtol=0)


@pytest.mark.slow
def test_a_checkpoint_that_transformers_quantises(tmp_path: Any) -> None:
    from transformers import LlavaForConditionalGeneration, TorchAoConfig

    models.shared(LAYERS).save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32).eval()
    assert any(
        name.endswith("q_proj.weight") and type(tensor) is not nn.Parameter for name, tensor in model.named_parameters()
    )
    torch.testing.assert_close(dense(model), stock(model), atol=1e-4, rtol=0)


# Structure


def test_programs_hold_the_model_s_own_int8_weights() -> None:
    model = shared("int8")
    fast = pruned("int8")
    assert sum(type(tensor) is not nn.Parameter for tensor in model.parameters()) == LINEARS  # which stays as it was
    program = fast.programs.export_extend(1, 1, (40, 40, 40))
    held = {tensor.data_ptr(): tensor for tensor in program.state_dict.values()}
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in held.values())
    assert held.keys() <= addresses(model) | {tensor.data_ptr() for tensor in fast.programs.family.decoder.buffers()}
    whole = [tensor for tensor in held.values() if tensor.dtype == torch.int8 and tensor.shape[-1] > 1]
    assert len(whole) == LAYERS * 7 + 1
    linears = [
        module.weight for module in (*model.model.language_model.modules(), model.lm_head) if isinstance(module, nn.Linear)
    ]
    numbers = sum(weight.numel() for weight in linears)
    assert sum(tensor.nbytes for tensor in whole) == numbers
    # of floats there are the embedding, norms, frequencies and scales alone
    floats = sum(tensor.nbytes for tensor in held.values() if tensor.dtype == torch.float32)
    rest = 4 * (models.VOCAB * 64 + (2 * LAYERS + 1) * 64 + 2 * 8 + sum(weight.shape[0] for weight in linears))
    assert floats == rest < numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kernel", "other", "atol"),
    [("int8", "linear_few", "mm", 1e-5), ("dynamic", "linear_int8", "_int_mm", 0.0)],
)
def test_few_rows_take_the_kernel_for_their_weights(kind: str, kernel: str, other: str, atol: float) -> None:
    """As many as a decode step has, and the head of a longer turn; more rows keep torch's product. That of int8 by int8 comes
    out the same, digit by digit, without its weights summed up in every call, whatever torchao traces on this processor."""
    kernels.load()
    programs = pruned(kind).programs
    for tokens, few in ((1, LAYERS * 7 + 1), (16, 1)):
        program = programs.export_extend(1, tokens, (40, 40, 40), in_place=False)
        inputs = programs.extend_inputs(1, tokens, (40, 40, 40))
        expected = program.module(check_guards=False)(*inputs)
        module = lower_int8(program.module(check_guards=False), lambda _: kernels.Rule(8, "aten"))
        targets = [node.target for node in module.graph.nodes]
        assert targets.count(getattr(torch.ops.vitcop_cpu, kernel).default) == few
        assert targets.count(getattr(torch.ops.aten, other).default) == LAYERS * 7 + 1 - few
        assert torch.ops.aten.sum.dim_IntList not in targets
        assert not [node for node in module.graph.nodes if node.args[1:2] == (torch.uint8,)]
        for found, right in zip(module(*inputs), expected, strict=True):
            torch.testing.assert_close(found, right, atol=atol, rtol=atol)


def _products(x: Tensor, shift: int = 128, again: bool = False, width: int = 0) -> fx.GraphModule:
    """What torchao traces of a product of int8, with another shift, its result read twice, or the sums of another axis."""

    def product(x: Tensor, weight: Tensor) -> Tensor:
        turned = weight.t()
        whole = torch._int_mm((x.to(torch.int32) + 128).to(torch.uint8), turned)
        less = whole - turned.sum([width], keepdim=True, dtype=torch.int32) * shift
        return less + whole if again else less

    return make_fx(product, tracing_mode="fake")(x, torch.zeros(6, 6, dtype=torch.int8))


def test_other_products_are_left_alone() -> None:
    x = torch.arange(-60, 60, dtype=torch.int8).reshape(20, 6)
    weight = torch.arange(-18, 18, dtype=torch.int8).reshape(6, 6)

    def lowered(rows: Tensor, **other: Any) -> tuple[bool, bool]:
        expected = _products(rows, **other)(rows, weight)
        module = lower_int8(_products(rows, **other), lambda _: kernels.Rule(8, "aten"))
        targets = [node.target for node in module.graph.nodes]
        assert torch.equal(module(rows, weight), expected)
        return torch.ops.aten.sum.dim_IntList not in targets, torch.ops.vitcop_cpu.linear_int8.default in targets

    kernels.load()
    assert lowered(x[:6]) == (True, True) and lowered(x) == (True, False)
    assert lowered(x[:6], shift=127) == lowered(x[:6], again=True) == lowered(x[:6], width=1) == (False, False)
    assert lowered(x[:6].short()) == (False, False)  # nor rows that no int8 holds


@pytest.mark.parametrize(("rows", "few"), [(8, True), (9, False)])
def test_a_plain_product_of_int8(rows: int, few: bool) -> None:
    """As torchao traces it where VNNI is missing, or AMX is there."""
    kernels.load()
    x = torch.arange(-54, 54, dtype=torch.int8)[: 6 * rows].reshape(rows, 6)
    weight = torch.arange(-18, 18, dtype=torch.int8).reshape(6, 6)
    module = lower_int8(
        make_fx(lambda x, weight: torch._int_mm(x, weight.t()), tracing_mode="fake")(x, weight),
        lambda _: kernels.Rule(8, "aten"),
    )
    assert torch.equal(module(x, weight).long(), x.long() @ weight.long().T)
    targets = [node.target for node in module.graph.nodes]
    assert (torch.ops.vitcop_cpu.linear_int8.default in targets) == few


# Changes


def test_changes_are_followed_or_refused() -> None:
    model, fast = shared("int8"), pruned("int8")
    before, weight = fast(**REQUEST).logits, model.lm_head.weight
    torch.testing.assert_close(before, by_hand(model), atol=1e-3, rtol=0)
    _, kept, *_ = fast.on_demand.vision(1)(REQUEST["pixel_values"])
    told = reference.run(model, REQUEST["input_ids"], REQUEST["pixel_values"], SETTINGS, 1)
    assert kept[0].tolist() == told.kept  # by keys of the quantised encoder
    own, other = weight.detach().clone(), made("int8", "lm_head", seed=1)
    try:
        with torch.no_grad():
            weight.copy_(other.lm_head.weight)
        after = fast(**REQUEST).logits
        torch.testing.assert_close(after, by_hand(model), atol=1e-3, rtol=0)
        assert not torch.allclose(after, before)
    finally:
        with torch.no_grad():
            weight.copy_(own)
    held = weight.qdata
    weight.qdata = held.clone()
    with pytest.raises(UnsupportedError, match=r"qdata of lm_head\.weight, a quantised weight, was replaced"):
        fast(**REQUEST)
    weight.qdata = held
    fast.check_weights()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.lm_head.half(), r"lm_head.*moved or converted"),
        (lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.zeros(96, 64))), r"lm_head\.weight was replaced"),
    ],
)
def test_other_changes_are_refused(change: Callable, message: str) -> None:
    model = made("int8", "lm_head")
    weights = vitcop_compile.weights.Weights(model)
    weights.check()
    change(model)
    with pytest.raises(UnsupportedError, match=message):
        weights.check()


def test_copies_notice_a_change_in_place() -> None:
    model = made("int8", "lm_head")
    weights = vitcop_compile.weights.Weights(model, copied=True)
    model.lm_head.weight.qdata.zero_()
    with pytest.raises(UnsupportedError, match="weights were changed in place"):
        weights.check()


# Refusals


class Foreign(nn.Module):
    """Stands in for a linear layer of a package that is not installed."""


@pytest.mark.parametrize(
    ("package", "library"),
    [
        ("bitsandbytes.nn.modules", "bitsandbytes"),
        ("gptqmodel.nn_modules.qlinear", "GPTQ or AWQ"),
        ("awq.modules.linear", "AWQ"),
        ("hqq.core.quantize", "HQQ"),
        ("compressed_tensors.linear", "compressed-tensors"),
        ("optimum.quanto.nn", "quanto"),
    ],
)
def test_modules_of_other_libraries(package: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Foreign, "__module__", package)
    refused(f"model.multi_modal_projector.linear_1 is a Foreign of {library}, whose kernels", Foreign())


def test_modules_of_transformers_and_torch() -> None:
    refused("is a BitLinear of a quantizer of transformers", BitLinear(8, 8, False))
    dynamic = torch.ao.nn.quantized.dynamic.Linear(8, 8)
    refused("linear_1 is a Linear of torch.ao.quantization, whose kernels", dynamic)


def refused(message: str, part: nn.Module) -> None:
    model = models.llava(1)
    model.model.multi_modal_projector.linear_1 = part
    with pytest.raises(UnsupportedError, match=message) as told:
        vitcop_compile.optimize(model, THIRD)
    assert "torchao.quantization.quantize_" in str(told.value)


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_methods_that_patch_plain_modules(method: str) -> None:
    model = models.llava(1)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method=method))
    with pytest.raises(
        UnsupportedError, match=f"the model is quantized by {method}, which programs cannot take: load the model"
    ):
        vitcop_compile.optimize(model, THIRD)
    del model.hf_quantizer
    model.is_quantized, model.config.quantization_config = True, {"quant_method": method}
    with pytest.raises(UnsupportedError, match=f"the model is quantized by {method}"):
        vitcop_compile.optimize(model, THIRD)


def test_a_weight_that_this_device_cannot_multiply_by(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> Tensor:
        raise NotImplementedError("no kernel\nat all")

    monkeypatch.setattr(quantised.F, "linear", none)
    with pytest.raises(
        UnsupportedError, match="Float8Tensor of torchao, by which nothing can be multiplied on cpu: no kernel; "
    ):
        vitcop_compile.optimize(made("float8", "lm_head"), THIRD)


def test_a_subclass_of_nobody_we_know() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = models.llava(1)
    model.lm_head.weight = nn.Parameter(TwoTensor(*[model.lm_head.weight.detach()] * 2), requires_grad=False)
    with pytest.raises(
        UnsupportedError, match=r"lm_head\.weight is a torch\.testing\..*TwoTensor, which programs cannot take"
    ):
        vitcop_compile.optimize(model, THIRD)


@pytest.mark.parametrize("kind", ["int4", "dynamic"])
def test_backends_that_cannot_keep_a_weight(kind: str) -> None:
    with pytest.raises(
        UnsupportedError, match=r"backend='onnxruntime' cannot keep .*: use backend='inductor', or quantize it by"
    ):
        vitcop_compile.optimize(made(kind, "lm_head"), THIRD, backend="onnxruntime")
