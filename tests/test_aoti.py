"""The aotinductor backend: the eager results on the model's own weights, and no call that does not fit.

Eight programs are compiled by a C++ compiler here, some seconds each.
"""

from __future__ import annotations

import collections
import tempfile

import models
import pytest
import torch
import torch.nn.functional as F
from models import optimize, pixels, prompt, randomize
from torch import nn
from vitcop_compile.passes.lower_linear import lower_linear

from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig, backends
from vitcop_compile.aoti_backend import _constants
from vitcop_compile.kernels import Rule, load

CONFIGS = {"dense": ViTCoPConfig.dense(), "1/9": ViTCoPConfig.preset("1/9")}
load()
LINEAR, ONEDNN, OURS, FEW = (
    torch.ops.aten.linear.default,
    torch.ops.mkldnn._linear_pointwise.default,
    torch.ops.vitcop.linear.default,
    torch.ops.vitcop_cpu.linear_few.default,
)


@pytest.fixture(scope="module")
def model():
    """A model whose weights may be changed and put back."""
    return models.llava(6, seed=3)


@pytest.fixture(scope="module")
def built(model):
    """Eager and ahead-of-time programs of `model` by setting, compiled once."""
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = tuple(optimize(model, CONFIGS[name], backend=backend) for backend in ("eager", "aotinductor"))
        return made[name]

    return get


def greedy(model, ids, images) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(
        input_ids=ids,
        pixel_values=images,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1/9"])
def test_generates_what_eager_does(built, name):
    eager, ahead = built(name)
    for seed in (0, 1):
        ids, images = prompt(5 + seed, 9, seed), pixels(seed=seed)
        tokens, logits = greedy(eager, ids, images)
        found, computed = greedy(ahead, ids, images)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(computed, logits, atol=1e-4, rtol=0)
    assert len(ahead.compiled) == 3


@pytest.mark.parametrize("name", [models.slow("1/9"), models.exhaustive("dense")])
def test_forward_selects_and_updates_its_cache_as_eager_does(built, name):
    outs = []
    for fast in built(name):
        out = fast(prompt(6, 8, seed=2), pixels(seed=2))
        before = [buffer.clone() for buffer in out.past_key_values.buffers]
        cache = out.past_key_values
        following = fast(torch.tensor([[7]]), past_key_values=cache).logits
        changed = [(new != old).any(-1).any(1).sum().item() for new, old in zip(cache.buffers, before, strict=True)]
        assert changed == [1] * 12  # one row of each layer's keys and values
        outs.append((out.logits, following, cache))
    (logits, following, cache), (computed, next_computed, own) = outs
    torch.testing.assert_close(computed, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(next_computed, following, atol=1e-4, rtol=0)
    for mine, theirs in zip(own.buffers, cache.buffers, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    for mine, theirs in zip(own.selection.stages, cache.selection.stages, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_weights_are_the_models_own(built, model):
    """Every weight is changed in place: what was compiled before goes by the new ones, as the model itself does."""
    eager, ahead = built("1/9")
    before = greedy(ahead, prompt(), pixels())[1]
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        randomize(model, seed=11)
        tokens, logits = greedy(eager, prompt(), pixels())
        found, computed = greedy(ahead, prompt(), pixels())
    finally:
        model.load_state_dict(kept)
    assert torch.equal(found, tokens) and not torch.allclose(computed, before, atol=1)
    torch.testing.assert_close(computed, logits, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda inputs: inputs[:-1], r"takes 18 inputs, got 17"),
        (lambda inputs: [inputs[0][:, :-1].contiguous(), *inputs[1:]], r"input 0 is torch.int64 \(1, 50\).*takes.*\(1, 51\)"),
        (lambda inputs: [*inputs[:3], inputs[3].double(), *inputs[4:]], r"input 3 is torch.float64.*takes torch.float32"),
        (lambda inputs: [inputs[0], inputs[1].to("meta"), *inputs[2:]], r"input 1 .* on meta; the program takes .* on cpu"),
        (lambda inputs: [*inputs[:3], inputs[3].mT.contiguous().mT, *inputs[4:]], r"input 3 .*, not contiguous; the program"),
    ],
)
def test_what_does_not_fit_never_reaches_the_program(built, change, words):
    _, ahead = built("1/9")
    rows = tuple(32 + tokens + 64 for tokens in ahead.schedule.group_tokens())
    program = ahead.on_demand.prefill(1, 32, ahead.schedule, rows)
    inputs = list(ahead.programs.prefill_inputs(1, 32, 1, rows))
    assert inputs[0].shape == (1, 51) and len(program(*inputs)) == 1 + 2
    with pytest.raises(InputError, match=words):
        program(*change(inputs))


class Odd(nn.Module):
    """A head tied to the embedding, a weight computed in the graph, a buffer, and a constant that is neither."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 8), nn.Linear(8, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.turned = nn.Parameter(torch.randn(8, 8))
        self.register_buffer("shift", torch.randn(8), persistent=False)

    def forward(self, ids):
        hidden = F.linear(self.embedding(ids) + self.shift, self.turned.t()) * torch.tensor([1.0, 2.0] * 4)
        return (self.head(F.silu(hidden)),)


@pytest.mark.slow
def test_odd_weights(monkeypatch, tmp_path):
    """And nothing stays behind on the disk but inductor's own cache."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    odd, ids = Odd(), torch.tensor([[1, 5, 2]])
    program = backends.backend_of("aotinductor")(torch.export.export(odd, (ids,), strict=False))
    assert not list(tmp_path.glob("vitcop-*"))
    with torch.no_grad():
        torch.testing.assert_close(program(ids), odd(ids))
        odd.embedding.weight.mul_(-2)
        odd.turned.add_(1)
        odd.shift.zero_()
        torch.testing.assert_close(program(ids), odd(ids))


@pytest.mark.slow
def test_a_program_without_weights():
    class Sum(nn.Module):
        def forward(self, x):
            return (x.cumsum(0).exp(),)

    x = torch.linspace(-1, 1, 5)
    program = backends.backend_of("aotinductor")(torch.export.export(Sum(), (x,), strict=False))
    torch.testing.assert_close(program(x)[0], x.cumsum(0).exp())


def test_unknown_constants_are_refused():
    module = torch.export.export(Odd(), (torch.tensor([[1]]),), strict=False).module(check_guards=False)
    held = _constants(module, ["turned", "shift"])
    assert held["turned"].data_ptr() == module.turned.data_ptr() and held["shift"].data_ptr() == module.shift.data_ptr()
    with pytest.raises(UnsupportedError, match=r"constants of its own \(_frozen0\).*use backend='inductor'"):
        _constants(module, ["turned", "_frozen0"])


def test_no_compiler_is_said_before_anything_is_traced(monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("traced"))
    message = r"compiles C\+\+ .*no-such-compiler.*install g\+\+.*backend='onnxruntime'"
    # The config's own patch: monkeypatch would take the setting away when it restores it.
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(UnsupportedError, match=message):
        optimize(models.shared(3), CONFIGS["dense"], backend="aotinductor")


# The pass that both inductor backends end with.


def targets(module) -> collections.Counter:
    return collections.Counter(node.target for node in module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize(
    ("ahead", "rule", "expected"),
    [
        (False, Rule(0, "onednn"), {OURS: 2}),
        (True, Rule(2, "onednn"), {ONEDNN: 1, OURS: 1}),
        (True, Rule(2, "aten"), {LINEAR: 2}),
        (False, Rule(3, "aten"), {FEW: 1, LINEAR: 1}),
    ],
)
def test_lower_linear_replaces_every_product(ahead, rule, expected):
    odd, ids = Odd(), torch.tensor([[1, 5, 2]])
    module = torch.export.export(odd, (ids,), strict=False).module(check_guards=False)
    assert targets(module)[LINEAR] == 2
    lowered = lower_linear(module, ahead, lambda dtype: rule)
    found = targets(lowered)
    assert {target: found[target] for target in (LINEAR, ONEDNN, OURS, FEW) if found[target]} == expected
    with torch.no_grad():
        torch.testing.assert_close(lowered(ids), odd(ids))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("wide", "expected"), [("onednn", OURS), ("aten", LINEAR)])
def test_products_of_half_precision_are_widened_where_that_is_faster(wide, expected, bias):
    rules = {torch.bfloat16: Rule(4, "wide"), torch.float32: Rule(64, wide)}
    linear = nn.Linear(16, 8, bias=bias).bfloat16().requires_grad_(False)
    for rows in (4, 5):
        given = torch.randn(rows, 16).bfloat16()
        module = torch.export.export(linear, (given,), strict=False).module(check_guards=False)
        lowered = lower_linear(module, True, rules.__getitem__)
        product = next(node for node in lowered.graph.nodes if node.target in (LINEAR, OURS, FEW))
        assert product.target == (FEW if rows == 4 else expected)
        assert product.meta["val"].dtype == (torch.bfloat16 if rows == 4 else torch.float32)
        exact = nn.functional.linear(given.double(), linear.weight.double(), linear.bias.double() if bias else None)
        torch.testing.assert_close(lowered(given)[0], exact.bfloat16(), atol=2**-8, rtol=2**-8)


@pytest.mark.parametrize(("one", "expected"), [("aten", LINEAR), ("few", FEW), ("onednn", OURS)])
@pytest.mark.parametrize("many", ["aten", "onednn"])
def test_one_row_in_float32_has_a_kernel_of_its_own(one, expected, many):
    linear = nn.Linear(4, 4).requires_grad_(False)
    for rows, kernel in ((1, expected), (2, FEW)):
        module = torch.export.export(linear, (torch.ones(rows, 4),), strict=False).module(check_guards=False)
        assert targets(lower_linear(module, rule=lambda dtype: Rule(8, many, one)))[kernel] == 1
    # Rows of half precision have one rule, whatever their number.
    module = torch.export.export(linear.bfloat16(), (torch.ones(1, 4).bfloat16(),), strict=False).module(check_guards=False)
    assert targets(lower_linear(module, rule=lambda dtype: Rule(8, "aten", one)))[FEW] == 1


def test_lower_linear_leaves_other_types():
    linear = nn.Linear(4, 4).double()
    module = torch.export.export(linear, (torch.ones(2, 4).double(),), strict=False).module(check_guards=False)
    assert targets(lower_linear(module, ahead=True))[LINEAR] == 1
