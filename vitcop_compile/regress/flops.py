"""FLOPs of an exported program, counted node by node from its shapes and from nothing the schedule says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils.flop_counter import conv_flop_count, flop_registry

from ..errors import UnsupportedError

# What an operator's name looks like if it multiplies matrices: one without a formula would be counted as nothing.
_MULTIPLIES = re.compile(r"mm$|mv$|dot$|addr$|conv|attention|matmul|linear|einsum|inner|outer|cdist")


def count(program: ExportedProgram) -> int:
    """FLOPs of one call of `program`: its matrix products, convolutions and attention; elementwise work counts as nothing.

    A multiply-add counts as two. Causal attention counts the pairs that are seen, as the schedule does, which torch's own
    formulas do not; its others are used where LACKING has none. Raises UnsupportedError for an operator that multiplies
    matrices, or that comes from a library other than ATen, and has no formula.
    """
    return sum(_of(node) for node in program.graph.nodes if node.op == "call_function")


def _of(node: fx.Node) -> int:
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None and not isinstance(node.target, torch._ops.HigherOrderOperator):
        return 0  # Python's own, as getitem
    name = str(node.target) if schema is None else schema.name
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda given: given.meta.get("val"))
    if name in LACKING:
        named = {argument.name: value for argument, value in zip(schema.arguments, args)} | kwargs
        return LACKING[name](*args, out=node.meta["val"], named=named)
    packet = getattr(node.target, "_overloadpacket", node.target)
    if packet in flop_registry and not (name.startswith("aten::") and "attention" in name):
        return flop_registry[packet](*args, **kwargs, out_val=node.meta["val"])
    if _MULTIPLIES.search(name) or not name.startswith(("aten::", "prims::")):
        raise UnsupportedError(
            f"{name} has no FLOP formula, so that node {node.name} would count as nothing: add one with "
            "torch.utils.flop_counter.register_flop_formula"
        )
    return 0


def _product(a: Tensor, *_: Any, out: Tensor, **__: Any) -> int:
    return 2 * math.prod(out.shape) * a.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, named: dict[str, Any], **__: Any) -> int:
    (batch, heads, queries, width), keys = query.shape, key.shape[2]
    causal = named.get("is_causal", named.get("causal", False))
    pairs = sum(min(row + 1, keys) for row in range(queries)) if causal else queries * keys
    return 2 * batch * heads * pairs * (width + value.shape[3])


# Formulas of (*args, out, named): composites that torch's counter takes apart, other libraries', and causality.
LACKING: dict[str, Callable[..., int]] = {
    **dict.fromkeys(
        ("aten::linear", "aten::matmul", "vitcop::linear", "vitcop_cpu::linear_few", "mkldnn::_linear_pointwise"), _product
    ),
    **dict.fromkeys(("aten::scaled_dot_product_attention", "vitcop::attention"), _attention),
    **dict.fromkeys(("vitcop::flash_prefill", "vitcop::flash_cached", "vitcop_cpu::decode_attention"), _attention),
    "aten::conv2d": lambda x, weight, *_, out, **__: conv_flop_count(x.shape, weight.shape, out.shape),
}
