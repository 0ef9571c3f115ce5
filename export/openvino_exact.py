"""What stays in float32 of a program that OpenVINO computes in less: all that decides which tokens are kept, and angles.

OpenVINO lowers whole graphs to bfloat16 or float16 but for operators that carry an attribute, which its Python does not set:
it is written into the graph's text, of which the weights are no part while that is read back.
"""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

_FLOATS = ("f32", "f16", "bf16")
_LAYERS = ("MatMul", "Convolution", "GroupConvolution")
_AROUND_WEIGHTS = ("Convert", "Transpose", "Reshape", "Squeeze", "Unsqueeze")
_ATTRIBUTE = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:f16,bf16"}
_MARK = "exact"
# Constants beyond so many bytes are not written into the text.
_HELD_BYTES = 1024


def keep_exact(ov: Any, core: Any, model: Any) -> Any:
    """`model`, an ov.Model which is used up, with float32 marked for what is rounded to no decision.

    Decisions are comparisons and top-k of floats, and what becomes an integer. What they are made of is marked, back to layers
    with weights, whose results are rounded to the chosen precision anyhow, and so are the angles of rotary embeddings. Sums
    before a product are rounded all the same, but for rows less their mean, which become a product.
    """
    decisions = [node for node in model.get_ordered_ops() if _decides(node)]
    _leave_rotations_apart(ov, model, decisions)
    angles = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos")]
    for number, node in enumerate(_leading_to([*decisions, *angles])):
        lasting = _LASTING.get(node.get_type_name(), lambda ov, node: [node])(ov, node)
        for part in lasting:
            part.set_friendly_name(f"{_MARK} {number} {part.get_friendly_name()}")
    return _marked(ov, core, model)


def _decides(node: Any) -> bool:
    """Whether floats become something else here."""
    taken = any(_is_float(value.get_source_output()) for value in node.inputs())
    return taken and any(not _is_float(value) for value in node.outputs())


def _leading_to(nodes: Iterable[Any]) -> list[Any]:
    """The nodes, and whatever floats come from, up to layers that have weights."""
    found: dict[str, Any] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if _key(node) in found:
            continue
        found[_key(node)] = node
        sources = [value.get_source_output() for value in node.inputs()]
        for source in sources:
            before = source.get_node()
            if _is_float(source) and before.get_type_name() not in ("Constant", "Parameter") and not _has_weights(before):
                waiting.append(before)
    return list(found.values())


def _has_weights(node: Any) -> bool:
    return node.get_type_name() in _LAYERS and any(_is_constant(value.get_source_output()) for value in node.inputs())


def _is_constant(value: Any) -> bool:
    node = value.get_node()
    while node.get_type_name() in _AROUND_WEIGHTS:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant"


def _is_float(value: Any) -> bool:
    return value.get_element_type().get_type_name() in _FLOATS


def _key(node: Any) -> str:
    """Its name in the graph, which is its own, as the friendly one need not be."""
    return node.get_name()


def _leave_rotations_apart(ov: Any, model: Any, decisions: list[Any]) -> None:
    """Rewrites x * cos + (-b, a) * sin as x * cos - (b, -a) * sin, the same number, where tables follow a decision.

    OpenVINO makes the former one operator and keeps in float32 whatever its tables come from: here, by way of the rows that
    are kept, all layers before the last selection.
    """
    ops = ov.opset13
    behind = {_key(node) for node in decisions}
    for node in model.get_ordered_ops():
        if any(_key(value.get_source_output().get_node()) in behind for value in node.inputs()):
            behind.add(_key(node))
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Add":
            continue
        for straight, turned in ((0, 1), (1, 0)):
            product = node.input_value(turned).get_node()
            if product.get_type_name() != "Multiply":
                continue
            halves, table = product.input_value(0).get_node(), product.input_value(1)
            if halves.get_type_name() != "Concat" or halves.get_input_size() != 2 or _key(table.get_node()) not in behind:
                continue
            minus = halves.input_value(0).get_node()
            if minus.get_type_name() != "Negative":
                continue
            parts = [minus.input_value(0), ops.negative(halves.input_value(1)).output(0)]
            other = ops.multiply(ops.concat(parts, halves.get_attributes()["axis"]), table)
            _replace(node, ops.subtract(node.input_value(straight), other))
            break


def _product(ov: Any, node: Any) -> list[Any]:
    """One that transposes by itself what is transposed before it."""
    taken = node.get_attributes()
    values, turned = [node.input_value(0), node.input_value(1)], [taken["transpose_a"], taken["transpose_b"]]
    for side in (0, 1):
        before = values[side].get_node()
        order = before.input_value(1).get_node() if before.get_type_name() == "Transpose" else None
        if order is None or order.get_type_name() != "Constant":
            continue
        axes = order.get_vector().tolist()
        if axes == [*range(len(axes) - 2), len(axes) - 1, len(axes) - 2]:
            values[side], turned[side] = before.input_value(0), not turned[side]
    if values == [node.input_value(0), node.input_value(1)]:
        return [node]
    other = ov.opset13.matmul(*values, *turned)
    _replace(node, other)
    return [other]


def _difference(ov: Any, node: Any) -> list[Any]:
    """Rows less their mean as one product, I - 1/n times the rows: a sum would be rounded before a product, marked or not."""
    mean = node.input_value(1).get_node()
    rows = node.input_value(0)
    if mean.get_type_name() != "ReduceMean" or mean.input_value(0) != rows:
        return [node]
    axes = mean.input_value(1).get_node()
    shape = rows.get_partial_shape()
    if axes.get_type_name() != "Constant" or shape.is_dynamic or axes.get_vector().tolist() not in ([-2], [len(shape) - 2]):
        return [node]
    count = shape[-2].get_length()
    other = ov.opset13.matmul(ov.opset13.constant(np.eye(count, dtype=np.float32) - 1 / np.float32(count)), rows, False, False)
    _replace(node, other)
    return [other]


# What OpenVINO would write otherwise, and forget the mark, written so.
_LASTING: dict[str, Callable[[Any, Any], list[Any]]] = {"MatMul": _product, "Subtract": _difference}


def _replace(node: Any, other: Any) -> None:
    other.output(0).set_names(node.output(0).get_names())
    for target in list(node.output(0).get_target_inputs()):
        target.replace_source_output(other.output(0))


def _marked(ov: Any, core: Any, model: Any) -> Any:
    """`model` with the attribute where names begin with the mark. Large constants step aside meanwhile, and are not copied."""
    held: dict[str, Any] = {}
    for number, node in enumerate(model.get_ordered_ops()):
        if node.get_type_name() == "Constant" and node.get_byte_size() > _HELD_BYTES:
            value = node.output(0)
            stand_in = ov.opset13.parameter(value.get_partial_shape(), value.get_element_type())
            stand_in.set_friendly_name(f"held {number}")
            for target in list(value.get_target_inputs()):
                target.replace_source_output(stand_in.output(0))
            model.add_parameters([stand_in])
            held[stand_in.get_friendly_name()] = node
    with tempfile.TemporaryDirectory(prefix="vitcop-") as folder:
        text, constants = Path(folder) / "model.xml", Path(folder) / "model.bin"
        ov.serialize(model, text, constants)
        tree, data = ElementTree.parse(text), np.fromfile(constants, np.uint8)
    for layer in tree.iterfind("layers/layer"):
        if layer.get("name", "").startswith(_MARK):
            ElementTree.SubElement(ElementTree.SubElement(layer, "rt_info"), "attribute", _ATTRIBUTE)
    read = core.read_model(ElementTree.tostring(tree.getroot()), ov.Tensor(data))
    for stand_in in read.get_parameters():
        node = held.get(stand_in.get_friendly_name())
        if node is not None:
            for target in list(stand_in.output(0).get_target_inputs()):
                target.replace_source_output(node.output(0))
            read.remove_parameter(stand_in)
    read.validate_nodes_and_infer_types()
    return read
