"""int8 weights in an ONNX graph: those of linear layers, as standard DequantizeLinear nodes that runtimes fuse into products.

Only weights are rounded. What is computed in between, scores, distances and sums among them, keeps its type in the graph.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir

from .manifest import QuantisedTensor

# A symmetric range, so that zero is zero; -128 is left out.
_MOST = 127
# An output channel's scale where all its weights are zero: any would do.
_UNUSED = 1.0


def names_of_linears(model: Any) -> dict[str, str]:
    """{name of a transposed weight: name of the parameter} of every linear layer: before constants are folded, it is a
    Transpose of a parameter."""
    return {
        node.outputs[0].name: node.inputs[0].name
        for node in model.graph.all_nodes()
        if node.op_type == "Transpose" and node.inputs[0].is_initializer()
    }


def keep_int8(model: Any) -> dict[str, QuantisedTensor]:
    """Casts of int8 weights before products, as torchao's int8 weights are traced, become DequantizeLinear in place: their
    values and scales stay what they are, and no runtime folds them into floats. Scales that are not found behind the product
    stay where they are applied.

    Call it before constants are folded. Returns what it found by name.
    """
    found = {}
    for node in list(model.graph.all_nodes()):
        weight = node.inputs[0] if node.op_type == "Cast" else None
        source = weight.producer() if weight is not None else None
        held = source.inputs[0] if source is not None and source.op_type == "Transpose" else None
        if held is None or not held.is_initializer() or held.const_value.dtype != onnx_ir.DataType.INT8:
            continue
        (out,) = node.outputs
        rows, columns = held.shape
        scale = np.ones(rows, dtype=onnx_ir.DataType(node.attributes["to"].value).numpy())
        if (applied := _scaled(out, rows)) is not None:
            multiply, values = applied
            scale = values.astype(scale.dtype)
            product = next(value for value in multiply.inputs if value.producer() and value.producer().op_type == "MatMul")
            onnx_ir.convenience.replace_all_uses_with(multiply.outputs[0], product)
            model.graph.remove(multiply, safe=True)
        # As `plain_weights` calls what it takes apart.
        name = re.sub(r"\.parametrizations\.(\w+)\.original\d+$", r".\1", held.name)
        _dequantize(model.graph, node, weight, scale, f"{name}_scale", out)
        found[name] = QuantisedTensor(name, "int8_given", (columns, rows), 1)
    return found


def _scaled(weight: Any, outputs: int) -> tuple[Any, np.ndarray] | None:
    """(the Mul, scales [outputs]) where the one product with `weight` is multiplied by scales of its outputs, as they are
    held: by an initializer that is reshaped or cast at most."""
    (product, _), *more = weight.uses() or [(None, 0)]
    if product is None or more or product.op_type != "MatMul" or len(product.outputs[0].uses()) != 1:
        return None
    ((multiply, index),) = product.outputs[0].uses()
    if multiply.op_type != "Mul" or product.outputs[0].is_graph_output():
        return None
    held = multiply.inputs[1 - index]
    while held is not None and held.producer() is not None and held.producer().op_type in ("Cast", "Reshape", "Identity"):
        held = held.producer().inputs[0]
    if held is None or not held.is_initializer() or held.const_value.size != outputs:
        return None
    return multiply, held.const_value.numpy().reshape(-1)


def quantise(model: Any, names: dict[str, str]) -> dict[str, QuantisedTensor]:
    """Rounds the weight of every linear layer to int8 with a scale for each output channel, in place.

    names: as `names_of_linears` has them. Returns what it rounded, by name of the parameter. A weight W float [K, N] becomes
    q int8 [K, N] = round(W / scale), scale [N] = max |W| / 127 over K, so that q * scale is within half a scale of W.
    """
    found, graph = {}, model.graph
    for node in list(graph.all_nodes()):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.name not in names or not weight.is_initializer():
            continue
        name, values = names[weight.name], weight.const_value.numpy()
        if values.ndim != 2 or values.dtype == np.int8:
            continue
        whole, scale = rounded(values)
        stored = onnx_ir.Value(name=f"{name}_int8", const_value=onnx_ir.Tensor(whole))
        stored.shape, stored.dtype = onnx_ir.Shape(whole.shape), onnx_ir.DataType.INT8
        graph.register_initializer(stored)
        out = onnx_ir.Value(name=f"{name}_dequantized", shape=weight.shape, type=weight.type)
        _dequantize(graph, node, stored, scale, f"{name}_scale", out)
        for user, index in list(weight.uses()):
            user.replace_input_with(index, out)
        del graph.initializers[weight.name]
        found[name] = QuantisedTensor(name, "int8_channel", whole.shape, 1)
    return found


def rounded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 [K, N], scale [N] of the type of `values`) of values [K, N]; the scales are rounded to their type first."""
    wide = values.astype(np.float32, copy=False)
    scale = (np.abs(wide).max(0) / _MOST).astype(values.dtype)
    scale = np.where(scale == 0, np.asarray(_UNUSED, values.dtype), scale)
    whole = np.rint(wide / scale.astype(np.float32)).clip(-_MOST, _MOST)
    return whole.astype(np.int8), scale


def _dequantize(graph: Any, before: Any, weight: Any, scale: np.ndarray, name: str, out: Any) -> None:
    """Puts `out` = weight * scale, of the weight's second axis, before the node `before`, or in its place if that makes it."""
    held = graph.initializers.get(name)
    if held is None:
        tensor = onnx_ir.Tensor(scale)
        held = onnx_ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))
        graph.register_initializer(held)
    inputs, axis = [weight, held], [onnx_ir.AttrInt64("axis", 1)]
    if out.producer() is None:
        graph.insert_before(before, onnx_ir.Node("", "DequantizeLinear", inputs, axis, outputs=[out]))
        return
    node = onnx_ir.Node("", "DequantizeLinear", inputs, axis, num_outputs=1)
    (new,) = node.outputs
    new.name, new.shape, new.type = f"{name.removesuffix('_scale')}_dequantized", out.shape, out.type
    graph.insert_before(before, node)
    for user, index in list(out.uses()):
        user.replace_input_with(index, new)
    graph.remove(before, safe=True)
