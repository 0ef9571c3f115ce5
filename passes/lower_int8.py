"""Gives products by int8 weights a kernel that reads the weights once, as bytes."""

from collections.abc import Callable, Sequence

import torch
from torch import fx

from ..kernels import Rule, rule
from .token_axis import finish

_aten = torch.ops.aten
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDENING = (_aten._to_copy.default, _aten.to.dtype)
_TURNING = (_aten.t.default, _aten.permute.default, _aten.transpose.int)
# What torchao adds to make bytes without a sign of those with one.
_SHIFT = 128


def lower_int8(module: fx.GraphModule, rule: Callable[[torch.dtype], Rule] = rule) -> fx.GraphModule:
    """Replaces, on the CPU, products by an int8 weight [N, K] that the graph turns, as torchao traces them.

    `aten.mm` of few rows of floats, as `rule` counts them, by a weight that is widened becomes `vitcop_cpu.linear_few` on the
    weight as it is: traced, the whole weight is widened for every product, a byte read, and four written and read again for
    each number, more than a float weight costs. More rows pay for it.

    `aten._int_mm` of few rows that were rounded to int8 becomes `vitcop_cpu.linear_int8`. Traced on a processor with VNNI, the
    rows have 128 added, and every call sums up the weight to take that away again: more rows, too, become a product of int8
    by int8. Sums are exact.

    Scales stay where the graph applies them. Other types and devices are left alone.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _aten.mm.default:
            _floats(node, rule)
        elif node.target in (_aten.sub.Tensor, _aten.sub_.Tensor):
            _unsigned(node, rule)
        elif node.target is _aten._int_mm.default:
            _bytes(node, rule)
    return finish(module)


def _floats(node: fx.Node, rule: Callable[[torch.dtype], Rule]) -> None:
    value, weight = node.meta.get("val"), _weight(_argument(node.args[1], _WIDENING))
    if weight is None or value is None or value.device.type != "cpu" or value.dtype not in _TYPES:
        return
    if value.shape[0] <= rule(value.dtype).few:
        node.target, node.args = torch.ops.vitcop_cpu.linear_few.default, (node.args[0], weight, None)


def _unsigned(node: fx.Node, rule: Callable[[torch.dtype], Rule]) -> None:
    """`node` takes from a product of bytes without a sign what is too much."""
    product, over = node.args
    if not isinstance(product, fx.Node) or product.target is not _aten._int_mm.default or len(product.users) != 1:
        return
    shifted, turned = product.args
    value, weight, sums = node.meta.get("val"), _weight(turned), _argument(over, (_aten.mul.Tensor,), _SHIFT)
    if weight is None or value is None or value.device.type != "cpu":
        return
    if _argument(sums, (_aten.sum.dim_IntList,), [0]) is not turned:
        return
    unsigned: list[fx.Node] = []
    rows: object = shifted
    for targets, second in ((_WIDENING, torch.uint8), ((_aten.add.Tensor,), _SHIFT), (_WIDENING, None)):
        if (inner := _argument(rows, targets, second)) is None:
            return
        unsigned, rows = [*unsigned, *inner.users], inner
    if not isinstance(rows, fx.Node) or rows.meta["val"].dtype != torch.int8:
        return
    node.target, node.args = _aten._int_mm.default, (rows, turned)
    _bytes(node, rule)
    # Asserted types would keep alive what nothing reads any more.
    for user in unsigned:
        if user.target is _aten._assert_tensor_metadata.default and user.args[0] is not rows:
            user.graph.erase_node(user)


def _bytes(node: fx.Node, rule: Callable[[torch.dtype], Rule]) -> None:
    rows, turned = node.args
    value, weight = rows.meta.get("val") if isinstance(rows, fx.Node) else None, _weight(turned)
    if weight is None or value is None or value.device.type != "cpu" or value.dtype != torch.int8:
        return
    if value.shape[0] <= rule(torch.int8).few:
        node.target, node.args = torch.ops.vitcop_cpu.linear_int8.default, (rows, weight)


def _argument(node: object, targets: Sequence[object], second: object = None) -> fx.Node | None:
    """What `node` calls one of `targets` of, together with `second`, if it does."""
    if not isinstance(node, fx.Node) or node.target not in targets:
        return None
    first, *others = node.args
    given = (others or [node.kwargs.get("dtype")])[0]
    return first if isinstance(first, fx.Node) and (second is None or given == second) else None


def _weight(turned: object) -> fx.Node | None:
    """The weight int8 [N, K] that `turned` is, turned."""
    weight = _argument(turned, _TURNING)
    value = None if weight is None else weight.meta.get("val")
    return weight if value is not None and value.dtype == torch.int8 and value.is_contiguous() else None
