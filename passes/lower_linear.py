"""Gives matrix products on a CPU the kernel that is fastest there."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..kernels import Rule, onednn, rule
from .token_axis import finish

# A plain library definition: `torch.library.custom_op` adds some 10 us to every call, and a program makes hundreds.
_LIBRARY = torch.library.Library("vitcop", "FRAGMENT")
_LIBRARY.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.impl(_LIBRARY, "linear", "CPU")
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return onednn(input, weight, bias)


@torch.library.register_fake("vitcop::linear", lib=_LIBRARY)
def _(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def lower_linear(module: fx.GraphModule, ahead: bool = False, rule: Callable[[torch.dtype], Rule] = rule) -> fx.GraphModule:
    """Replaces `aten.linear` on the CPU by the kernel that `rule` names for its type and number of rows, on the same weights.

    Few rows of a contiguous weight go to `vitcop_cpu.linear_few`, one row in fp32 to the kernel named for it. More stay
    with torch; or, in fp32, go to oneDNN where MKL, which torch takes when it was built with it, is slower; or, in half
    precision, are multiplied in fp32, the weights widened in every call, where the CPU is slower otherwise. Nothing is packed
    ahead, so weights are not held twice. Other types and devices are left alone.

    `ahead` of time, the weights are constants of the program, and inductor takes oneDNN's own operator: it calls it without
    Python and fuses activations and sums into it. A program compiled at its first call has them as inputs, which inductor
    refuses there; so are weights that are computed in the graph. These take `vitcop::linear`.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.linear.default:
            continue
        value, held = node.meta.get("val"), _value(module, node.args[1])
        if value is None or value.device.type != "cpu" or value.dtype not in _TYPES or not value.numel():
            continue
        found, rows = rule(value.dtype), value.numel() // value.shape[-1]
        kernel = found.kernel(value.dtype, rows)
        if kernel == "few" and (held is None or not held.is_contiguous()):
            kernel = found.many
        if kernel == "few":
            _to(node, torch.ops.vitcop_cpu.linear_few.default)
        elif kernel == "onednn":
            _to_onednn(node, ahead)
        elif kernel == "wide":
            _widen(module.graph, node)
            if rule(torch.float32).many == "onednn":
                _to_onednn(node, ahead=False)  # its weights are computed
    return finish(module)


def _value(module: fx.GraphModule, weight: Any) -> Any:
    """A tensor as large as a weight, which is held by the module or computed in the graph."""
    if weight.op != "get_attr":
        return weight.meta.get("val")
    return functools.reduce(getattr, weight.target.split("."), module)


def _to(node: fx.Node, target: torch._ops.OpOverload) -> None:
    node.target, node.args = target, (*node.args, None)[:3]


def _to_onednn(node: fx.Node, ahead: bool) -> None:
    inputs, weight, bias = (*node.args, None)[:3]
    if ahead and weight.op == "get_attr":  # type: ignore[union-attr]
        node.target = torch.ops.mkldnn._linear_pointwise.default
        node.args = (inputs, weight, bias, "none", [], "")
    else:
        _to(node, torch.ops.vitcop.linear.default)


def _widen(graph: fx.Graph, node: fx.Node) -> None:
    """Makes a product one of fp32, of which the result is rounded."""
    dtype = node.meta["val"].dtype
    with graph.inserting_before(node):
        node.args = tuple(
            given and graph.call_function(torch.ops.aten.to.dtype, (given, torch.float32)) for given in node.args
        )
    with graph.inserting_after(node):
        rounded = graph.call_function(torch.ops.aten.to.dtype, (node, dtype))
    rounded.meta["val"] = node.meta["val"]
    node.meta["val"] = node.meta["val"].to(torch.float32)
    node.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)
