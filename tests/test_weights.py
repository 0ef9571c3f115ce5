"""Weights that change after `optimize`: followed, or refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import reference_llava as reference
import torch
from torch import nn
from vitcop_compile.export import export

import vitcop_compile
from vitcop_compile import UnsupportedError, ViTCoPConfig

THIRD = ViTCoPConfig.preset("1/3")
# The layers that `THIRD` names, in a decoder of three.
SETTINGS = reference.preset("1/3", models.PATCHES, 3, shallow=1, deep=2, vision=2)
REQUEST: dict[str, Any] = {"input_ids": models.prompt(), "pixel_values": models.pixels()}


def made(backend: str = "eager", seed: int = 0):
    model = models.llava(3, seed=seed)
    return model, vitcop_compile.optimize(model, THIRD, backend=backend)


def logits(fast) -> torch.Tensor:
    return fast(**REQUEST).logits


def by_hand(model) -> torch.Tensor:
    """The logits of stock layers, pruned by hand."""
    return reference.run(model, REQUEST["input_ids"], REQUEST["pixel_values"], SETTINGS, 1).logits[0][None, None]


@pytest.fixture(scope="module")
def served():
    """(model, what serves it, its logits): one for all changes that are taken back."""
    model = models.llava(3)
    fast = models.optimize(model, THIRD)
    return model, fast, logits(fast)


@contextlib.contextmanager
def taken_back(model: nn.Module) -> Iterator[None]:
    """Within the context `model` is changed; afterwards it is what it was, with its tensors at the same addresses."""
    classes = [(module, type(module)) for module in model.modules()]
    held = [(part, dict(part)) for module in model.modules() for part in vars(module).values() if isinstance(part, dict)]
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    configs = (model.config, model.config.text_config, model.config.vision_config, model.generation_config)
    settings = [(vars(config), dict(vars(config))) for config in configs]
    tensors = [(tensor, tensor.data, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    parameters = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, kind in classes:
            module.__class__ = kind
        for now, before in (*held, *attributes, *settings):
            now.clear()
            now.update(before)
        with torch.no_grad():
            for tensor, data, values in tensors:
                tensor.data = data
                tensor.copy_(values)
        for parameter, trained in parameters:
            parameter.requires_grad_(trained).grad = None


class Adapter(nn.Module):
    """What an adapter library puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def attention(model) -> nn.Module:
    return model.model.language_model.layers[1].self_attn


def adapt(model) -> None:
    attention(model).q_proj = Adapter(attention(model).q_proj)


def assign(model) -> None:
    model.load_state_dict(models.llava(3, seed=1).state_dict(), assign=True)


def point_elsewhere(model) -> None:
    weight = attention(model).q_proj.weight
    weight.data = weight.data.clone()


def parametrize(model) -> None:
    nn.utils.parametrizations.weight_norm(attention(model).q_proj)


def add_bias(model) -> None:
    attention(model).q_proj.bias = nn.Parameter(torch.ones(64))


def remove(model) -> None:
    attention(model).o_proj = None


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "assigned": (assign, r"weight was replaced|embedding was replaced"),
    "adapter": (adapt, r"module model\.language_model\.layers\.1\.self_attn\.q_proj was replaced"),
    "bfloat16": (lambda model: model.bfloat16(), "was moved or converted"),
    "half": (lambda model: model.half(), "was moved or converted"),
    "meta": (lambda model: model.to("meta"), "was replaced|was moved or converted"),
    "data": (point_elsewhere, r"layers\.1\.self_attn\.q_proj\.weight was moved or converted"),
    "parametrized": (parametrize, r"q_proj has gained or lost parameters"),
    "head": (lambda model: setattr(model, "lm_head", nn.Linear(64, models.VOCAB, bias=False)), "module lm_head was replaced"),
    "buffer": (lambda model: model.lm_head.register_buffer("scale", torch.ones(1)), "lm_head has gained or lost"),
    "child": (lambda model: model.add_module("extra", nn.Identity()), "the model itself has gained or lost"),
    "bias": (add_bias, r"layers\.1\.self_attn\.q_proj\.bias was replaced"),
    "removed": (remove, r"module model\.language_model\.layers\.1\.self_attn\.o_proj was replaced"),
    "resized": (lambda model: model.resize_token_embeddings(models.VOCAB + 8), "was replaced"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_and_named(name: str, served, tmp_path) -> None:
    change, words = CHANGES[name]
    model, fast, expected = served
    refusal = rf"model has changed since optimize\(\): .*({words}).*: optimize again"
    with taken_back(model):
        change(model)
        for ask in (
            lambda: logits(fast),
            lambda: fast.generate(**REQUEST, max_new_tokens=2),
            lambda: fast.generate(input_ids=torch.tensor([models.text(4)]), max_new_tokens=2),
            lambda: fast.warmup(),
            lambda: export(fast, tmp_path / "folder", max_text_len=8, max_new_tokens=4),
        ):
            with pytest.raises(UnsupportedError, match=refusal):
                ask()
    assert not list(tmp_path.iterdir())
    assert torch.equal(logits(fast), expected)  # it was the change that was refused


def test_a_change_before_the_first_request_is_refused(served) -> None:
    model, _, _ = served
    fast = models.optimize(model, THIRD)
    with taken_back(model):
        adapt(model)
        with pytest.raises(UnsupportedError, match="optimize again"):
            logits(fast)
    assert not fast.compiled


@pytest.mark.slow
def test_optimized_again_it_serves() -> None:
    model, fast = made()
    assign(model)
    with pytest.raises(UnsupportedError):
        logits(fast)
    with pytest.raises(UnsupportedError, match="optimize again"):
        vitcop_compile.optimize(model, THIRD, backend="eager", like=fast)
    again = vitcop_compile.optimize(model, THIRD, backend="eager")
    assert torch.equal(logits(again), logits(made(seed=1)[1]))


@pytest.mark.parametrize("backend", ["eager", models.slow("inductor"), models.exhaustive("aotinductor")])
def test_values_that_change_in_place_are_followed(backend: str, served) -> None:
    model, fast, _ = served if backend == "eager" else (*made(backend), None)
    before = logits(fast)
    with taken_back(model):
        model.load_state_dict(models.llava(3, seed=1).state_dict())
        after, expected = logits(fast), by_hand(models.llava(3, seed=1))
        assert (before - after).abs().max() > 0.1
        torch.testing.assert_close(after, expected, atol=1e-4, rtol=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(**REQUEST).logits.square().mean().backward()
        optimizer.step()
        assert (by_hand(model) - expected).abs().max() > 0.1
        torch.testing.assert_close(logits(fast), by_hand(model), atol=1e-4, rtol=0)
        if backend == "eager":
            same = vitcop_compile.optimize(model, THIRD, backend=backend, like=fast)
            torch.testing.assert_close(logits(same), by_hand(model), atol=1e-4, rtol=0)


def test_values_that_change_in_place_are_refused_where_programs_hold_copies(served) -> None:
    model, _, _ = served
    fast = models.optimize(model, THIRD, backend="onnxruntime")
    with taken_back(model):
        with torch.no_grad():
            attention(model).q_proj.weight.mul_(1.5)
        with pytest.raises(UnsupportedError, match=r"changed in place, and .* this backend hold copies.*optimize again"):
            logits(fast)


def test_what_leaves_weights_alone_is_no_change(served) -> None:
    model, fast, expected = served
    with taken_back(model):
        model.train()
        model.requires_grad_(False)
        model.tie_weights()
        model.set_attn_implementation("eager")
        model.eval().generate(**REQUEST, max_new_tokens=2, do_sample=False)
        with torch.inference_mode():
            model(**REQUEST)
        model.to("cpu").float()
        model.generation_config.max_new_tokens = 3
        model.lm_head.register_forward_hook(lambda *_: None)
        assert torch.equal(logits(fast), expected)


@pytest.mark.exhaustive
def test_weights_of_inference_mode_serve() -> None:
    with torch.inference_mode():
        model = models.llava(3)
    for backend in ("eager", "onnxruntime"):
        fast = vitcop_compile.optimize(model, THIRD, backend=backend)
        torch.testing.assert_close(logits(fast), logits(made()[1]), atol=1e-4, rtol=0)


def test_a_decoding_step_checks_nothing(served, monkeypatch) -> None:
    _, fast, _ = served
    out, checks = fast(**REQUEST), []
    monkeypatch.setattr(fast, "check_weights", lambda: checks.append(1))
    fast(input_ids=torch.tensor([[5]]), past_key_values=out["past_key_values"])
    assert not checks
    logits(fast)
    assert checks == [1]
