"""Gives products of few rows by int8 weights a kernel that reads the weights once, as bytes."""

from collections.abc import Callable

import torch
from torch import fx

from ..kernels import Rule, rule
from .token_axis import finish

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDENING = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
_TURNING = (torch.ops.aten.t.default, torch.ops.aten.permute.default, torch.ops.aten.transpose.int)


def lower_int8(module: fx.GraphModule, rule: Callable[[torch.dtype], Rule] = rule) -> fx.GraphModule:
    """Replaces `aten.mm` on the CPU of few rows, as `rule` counts them, by an int8 weight [N, K] that the graph turns and
    widens, by `vitcop_cpu.linear_few` on the weight as it is. Its scales stay where the graph applies them.

    What torchao traces widens the whole weight for every product: a byte read, and four written and read again for each
    number, more than a float weight costs. Skipped for more rows, which pay for it, and for other types and devices.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.mm.default:
            continue
        value, weight = node.meta.get("val"), _int8(node.args[1])
        if weight is None or value is None or value.device.type != "cpu" or value.dtype not in _TYPES:
            continue
        if value.shape[0] <= rule(value.dtype).few:
            node.target, node.args = torch.ops.vitcop_cpu.linear_few.default, (node.args[0], weight, None)
    return finish(module)


def _int8(wide: object) -> fx.Node | None:
    """The weight int8 [N, K] that `wide` is, turned and widened."""
    turned = wide.args[0] if isinstance(wide, fx.Node) and wide.target in _WIDENING else None
    weight = turned.args[0] if isinstance(turned, fx.Node) and turned.target in _TURNING else None
    if not isinstance(weight, fx.Node):
        return None
    value = weight.meta.get("val")
    return weight if value is not None and value.dtype == torch.int8 and value.is_contiguous() else None
