"""Gives products of few rows by int8 weights a form in which the weights are read once, as bytes."""

import torch
from torch import fx

from .token_axis import finish

# Rows up to which sums are faster than a product by weights that are widened first (docs/quantised.md).
_FEW = 4
_WIDENING = (torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype)
_TURNING = (torch.ops.aten.t.default, torch.ops.aten.permute.default, torch.ops.aten.transpose.int)


def lower_int8(module: fx.GraphModule) -> fx.GraphModule:
    """Replaces fp32 `aten.mm` on the CPU of at most four rows by an int8 weight, widened in the graph, by sums of products.

    What torchao traces widens the whole weight for every product: a byte read, and four written and read again for each
    number, more than a float weight costs. Inductor makes one loop of a sum, which widens in registers. Skipped for more rows,
    other types and devices; for half precision inductor does the like itself.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.mm.default:
            continue
        value, (rows, wide) = node.meta.get("val"), node.args[:2]
        weight = _int8(wide)
        if weight is None or value is None or value.device.type != "cpu" or value.dtype != torch.float32:
            continue
        if value.shape[0] > _FEW:
            continue
        with module.graph.inserting_before(node):
            call = module.graph.call_function
            numbers = call(torch.ops.aten._to_copy.default, (weight,), {"dtype": torch.float32})
            products = call(torch.ops.aten.mul.Tensor, (call(torch.ops.aten.unsqueeze.default, (rows, 1)), numbers))
            total = call(torch.ops.aten.sum.dim_IntList, (products, [-1]))
        total.meta["val"] = value
        node.replace_all_uses_with(total)
    return finish(module)


def _int8(wide: fx.Node) -> fx.Node | None:
    """The weight int8 [N, K] that `wide` is, turned and widened."""
    turned = wide.args[0] if wide.target in _WIDENING else None
    weight = turned.args[0] if isinstance(turned, fx.Node) and turned.target in _TURNING else None
    if not isinstance(weight, fx.Node):
        return None
    value = weight.meta.get("val")
    return weight if value is not None and value.dtype == torch.int8 and value.dim() == 2 else None
