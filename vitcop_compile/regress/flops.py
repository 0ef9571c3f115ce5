"""FLOPs of an exported program, counted node by node from its shapes and from nothing the schedule says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..errors import UnsupportedError

Formula = Callable[[fx.Node], int]
# By the operator's qualified name without its overload. A multiply-add counts as two.
FORMULAS: dict[str, Formula] = {}

# Further operators of ATen that multiply matrices. One without a formula would be counted as nothing.
_CONTRACTIONS = {
    "aten::_cdist_forward",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_mm",
    "aten::addbmm",
    "aten::addmv",
    "aten::addr",
    "aten::baddbmm",
    "aten::bilinear",
    "aten::cdist",
    "aten::chain_matmul",
    "aten::conv1d",
    "aten::conv3d",
    "aten::conv_transpose2d",
    "aten::convolution",
    "aten::dot",
    "aten::einsum",
    "aten::inner",
    "aten::linalg_multi_dot",
    "aten::mv",
    "aten::outer",
    "aten::tensordot",
    "aten::vdot",
}


def register(*operators: str) -> Callable[[Formula], Formula]:
    """Adds a formula for `operators`, named as in "aten::linear"."""

    def add(formula: Formula) -> Formula:
        FORMULAS.update(dict.fromkeys(operators, formula))
        return formula

    return add


def count(program: ExportedProgram) -> int:
    """FLOPs of one call of `program`: its matrix products, convolutions and attention; elementwise work counts as nothing.

    Causal attention counts the pairs that are seen, as the schedule does. Raises UnsupportedError for an operator that
    multiplies matrices, or that comes from a library other than ATen, and has no formula.
    """
    return sum(_of(node) for node in program.graph.nodes if node.op == "call_function")


def _of(node: fx.Node) -> int:
    name = getattr(getattr(node.target, "_schema", None), "name", None)
    if name in FORMULAS:
        return FORMULAS[name](node)
    if name is not None and (name in _CONTRACTIONS or not name.startswith(("aten::", "prims::"))):
        raise UnsupportedError(
            f"{name} has no FLOP formula, so that node {node.name} would count as nothing: add one with regress.flops.register"
        )
    if name is None and isinstance(node.target, torch._ops.HigherOrderOperator):
        raise UnsupportedError(f"{node.target} has no FLOP formula: programs are made of plain operators")
    return 0


@register("aten::linear", "aten::matmul", "aten::mm", "aten::bmm", "vitcop::linear")
def _product(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(node.args[0])[-1]


@register("aten::addmm")
def _addmm(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node)) * _shape(node.args[1])[-1]


@register("aten::conv2d")
def _convolution(node: fx.Node) -> int:
    return 2 * math.prod(_shape(node)) * math.prod(_shape(node.args[1])[1:])


@register("aten::scaled_dot_product_attention", "vitcop::attention", "vitcop::flash_prefill")
def _attention(node: fx.Node) -> int:
    schema: Any = getattr(node.target, "_schema", None)
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args)} | node.kwargs
    causal = bool(given.get("is_causal", given.get("causal", False)))
    (batch, heads, queries, width), keys = _shape(node.args[0]), _shape(node.args[1])[2]
    pairs = sum(min(query + 1, keys) for query in range(queries)) if causal else queries * keys
    return 2 * batch * heads * pairs * (width + _shape(node.args[2])[3])


@register("vitcop::flash_decode")
def _decode_attention(node: fx.Node) -> int:
    batch, heads, queries, width = _shape(node.args[0])
    return 4 * batch * heads * queries * _shape(node.args[1])[2] * width


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
