"""Runs what inductor generates for a GPU on CPU tensors, by triton's interpreter, beside the eager programs.

`python interpreted.py DTYPE out.json` in a process of its own, with TRITON_INTERPRET=1: torch and triton then believe in a
device that is not there. It writes {case: {"integers": how many differ, "floats": largest difference relative to the largest
value}}, of the kernels as they are, and in float32 of kernels that were changed on purpose.
"""

from __future__ import annotations

import json
import re
import sys
import types
from operator import attrgetter
from pathlib import Path
from typing import Any

import models
import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import LlavaForConditionalGeneration
from triton.runtime.interpreter import TensorHandle

from vitcop_compile import ViTCoPConfig, attention, backends, optimize
from vitcop_compile.regress.cuda import generated
from vitcop_compile.regress.cuda.fake import fake_cuda

LAYERS, TEXT, ROOM = 3, 12, 8
CONFIG = ViTCoPConfig.preset("1/3")
# name -> (what a kernel says, what it then says, the program, the cases): each moves a tie or a quota.
CONTROLS = {
    "ties go to the higher index": (r"(\btmp\d+ = tmp\d+) < (tmp\d+\b)", r"\1 <= \2", "prefill", ("equal rows",)),
    "quotas are cut off": (r"libdevice\.nearbyint", "libdevice.floor", "prefill", ("few clusters", "uneven clusters")),
    "the last of equals does not count": (r"(\btmp\d+ = tmp\d+) <= (tmp\d+\b)", r"\1 < \2", "vision", ("all patches alike",)),
}


def _lift(function: Any) -> Any:
    """A function of numpy over what kernels hold."""

    def call(*given: Any) -> Any:
        first = next(value for value in given if isinstance(value, tl.tensor))
        data = [value.handle.data if isinstance(value, tl.tensor) else value for value in given]
        out = np.asarray(function(*data)).astype(first.handle.data.dtype)
        return tl.tensor(TensorHandle(out, first.dtype.scalar), first.type)

    return call


LIBDEVICE = types.SimpleNamespace(
    nearbyint=_lift(np.rint), floor=_lift(np.floor), trunc=_lift(np.trunc), sqrt=_lift(np.sqrt), exp=_lift(np.exp),
    rsqrt=_lift(lambda x: 1 / np.sqrt(x)), pow=_lift(np.power), tanh=_lift(np.tanh), cos=_lift(np.cos), sin=_lift(np.sin),
    erf=_lift(lambda x: torch.erf(torch.from_numpy(np.array(x))).numpy()), abs=_lift(np.abs), isnan=_lift(np.isnan),
    isinf=_lift(np.isinf),
)  # fmt: skip


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, *_: Any, scale: float
) -> Any:
    assert not dropout
    return [attention.sdpa(query, key, value, scale, causal)]


def _efficient(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, lse: bool, *_: Any, scale: float) -> Any:
    assert not any(_)  # no dropout, not causal
    scores = query.float() @ key.float().transpose(-1, -2) * scale + bias.float()
    out = (scores.softmax(-1) @ value.float()).to(query.dtype)
    return [out.transpose(1, 2).contiguous().transpose(1, 2)]  # as the kernel lays it out


ELSEWHERE = {
    "torch._C._dynamo.guards._empty_strided_cuda": "_empty",
    "torch.ops.aten._scaled_dot_product_flash_attention.default": "_flash",
    "torch.ops.aten._scaled_dot_product_efficient_attention.default": "_efficient",
}


def load(source: str) -> Any:
    """The `call` of a generated module, for CPU tensors. Whatever it asks of a device by name is in ELSEWHERE."""
    for name, ours in ELSEWHERE.items():
        source = re.sub(rf"(?<!['\w]){re.escape(name)}(?!['\w])", ours, source)
    space = {
        "_empty": lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
        "_flash": _flash,
        "_efficient": _efficient,
        "__name__": "generated",
        "__file__": "generated",
    }
    exec(compile(source, "generated", "exec"), space)
    return space["call"]


class Compiled:
    """A program for the fake device, called with CPU tensors in place of what it was compiled for."""

    def __init__(self, program: Any, real: Any, given: tuple[Tensor, ...]):
        module = backends.inductor(program)
        named = {id(value): ("held", name) for name, value in module._orig_mod.state_dict(keep_vars=True).items()}
        named |= {id(attrgetter(name)(module._orig_mod)): ("held", name) for name in program.constants}
        named |= {id(value): ("given", place) for place, value in enumerate(given)}
        self.made = generated.generate_from(module, given)
        self._order = [named[id(value)] for value in self.made.inputs]
        self._held = {**real.state_dict, **real.constants}

    def __call__(self, given: tuple[Tensor, ...], change: tuple[str, str] | None = None) -> Any:
        source = self.made.source
        if change is not None:
            source, count = re.subn(*change, source)
            assert count, f"no kernel says {change[0]}"
        values = [self._held[what] if kind == "held" else given[what] for kind, what in self._order]
        return load(source)([value.detach() for value in values])


def requests(program: str, made: Any, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
    """What the program is asked, by case: ordinary requests, and those that ties and quotas decide."""
    generator = torch.Generator().manual_seed(3)
    if program == "vision":
        pixels = models.pixels(1).to(dtype)
        # Patches that are all alike differ by their places, in bfloat16 by no more than what a fused kernel does not round.
        alike = {"all patches alike": (torch.zeros_like(pixels),)} if dtype == torch.float32 else {}
        return {"random": (pixels,), **alike}
    schedule = made.schedule
    n, groups = schedule.image_tokens, schedule.group_tokens()
    rows = tuple(TEXT + tokens + ROOM for tokens in groups)
    caches = lambda: [torch.randn(s, generator=generator).to(dtype) for s in schedule.cache_shapes(1, rows) for _ in "kv"]  # noqa: E731
    if program == "decode":
        ids, removed = torch.tensor([[7]]), torch.tensor([[groups[0] - tokens] for tokens in groups])
        return {
            "random": (ids, torch.tensor([0]), torch.tensor([rows[0] - 5]), torch.tensor([rows[0] - 5]), removed, *caches())
        }
    ids = torch.randint(3, models.IMAGE, (1, TEXT + n), generator=generator)
    visual, positions = torch.arange(4, 4 + n)[None], torch.arange(TEXT + n).repeat(1, 1, 1)
    features = torch.randn(1, n, 64, generator=generator).to(dtype)
    equal = features.clone()
    equal[:, 3:17] = 0
    labels = {
        "few clusters": torch.arange(n) % 3,
        "uneven clusters": (torch.arange(n) ** 2 // n) % 5,
        "one big cluster": (torch.arange(n) > n - 4).long() + (torch.arange(n) > n - 2).long(),
        "more clusters than budget": torch.arange(n),
        "without a center": torch.where(torch.arange(n) % 4 == 0, -1, torch.arange(n) % 6),
    }
    given = {name: (features, found) for name, found in labels.items()} | {"equal rows": (equal, labels["few clusters"])}
    return {
        name: (ids, torch.tensor([TEXT + n - 3]), positions, rows_, visual, found[None], *caches())
        for name, (rows_, found) in given.items()
    }


def differences(ours: Any, theirs: Any) -> dict[str, float]:
    integers, floats = 0, 0.0
    for a, b in zip(ours, theirs, strict=True):
        if b.is_floating_point():
            floats = max(floats, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-9)))
        else:
            integers += int((a != b).sum())
    return {"integers": integers, "floats": floats}


def main() -> None:
    dtype = getattr(torch, sys.argv[1])
    triton_helpers.libdevice = LIBDEVICE
    stock = models.llava(LAYERS, 2).to(dtype)
    with torch.no_grad():
        # The first layer adds nothing, so that equal rows stay equal up to the stage that merges.
        first = stock.model.language_model.layers[0]
        first.self_attn.o_proj.weight.zero_()
        first.mlp.down_proj.weight.zero_()
        eager = optimize(stock, CONFIG, backend="eager")
        rows = tuple(TEXT + tokens + ROOM for tokens in eager.schedule.group_tokens())
        real = {
            "vision": eager.programs.export_vision(1),
            "prefill": eager.programs.export_prefill(1, TEXT, 1, rows),
            "decode": eager.programs.export_extend(1, 1, rows),
        }
    generated.install("sm_80", build=False)
    with fake_cuda() as mode, torch.no_grad():
        config = stock.config
        made = optimize(LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval(), CONFIG)
        faked = {
            "vision": made.programs.export_vision(1),
            "prefill": made.programs.export_prefill(1, TEXT, 1, rows),
            "decode": made.programs.export_extend(1, 1, rows),
        }
        found: dict[str, Any] = {}
        for name, program in faked.items():
            with unset_fake_temporarily(), torch.device("cpu"):
                asked = requests(name, eager, dtype)
            example = tuple(mode.from_tensor(value).to("cuda") for value in next(iter(asked.values())))
            for value in example[-2 * LAYERS :] if name != "vision" else ():
                torch._dynamo.mark_static_address(value, guard=False)
            compiled = Compiled(program, real[name], example)
            with unset_fake_temporarily(), torch.device("cpu"):
                found |= compare(name, compiled, real[name], asked, dtype)
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1))


def compare(
    name: str, compiled: Compiled, real: Any, asked: dict[str, tuple[Tensor, ...]], dtype: torch.dtype
) -> dict[str, Any]:
    found, module = {}, real.module(check_guards=False)
    controls = {control: change for control, change in CONTROLS.items() if dtype == torch.float32 and change[2] == name}
    for case, given in asked.items():
        own = tuple(value.clone() for value in given)
        expected = [*module(*own), *own]
        changes = {f"{control}: ": change[:2] for control, change in controls.items() if case in change[3]}
        for label, change in {"": None, **changes}.items():
            held = tuple(value.clone() for value in given)
            outputs = compiled(held, change)
            found[f"{label}{name}, {case}"] = differences([*outputs, *held], expected)
            print(f"{label}{name}, {case}", found[f"{label}{name}, {case}"], file=sys.stderr)
    return found


if __name__ == "__main__":
    main()
