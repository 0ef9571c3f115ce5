"""What TensorRT cannot take, found in an ONNX graph before a build, with the node and the way out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .onnx import check_nodes

MOST_TOPK = 3840
_LISTED = 10
# What the parser imports. torch's decompositions reach for others: `torch.eye` counts in uint16.
_TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL")


def check_graph(path: Path, kind: str) -> dict[str, list[str]]:
    """Names of the nodes of every operator in an ONNX file.

    Raises UnsupportedError, listing nodes and remedies, for what no TensorRT builder takes: operators outside the standard
    domain or with sizes that depend on data, TopK beyond its limit, double precision and other types the parser lacks, and
    an Attention node whose query, key and value are one tensor, which crashes the builder.
    """
    import onnx_ir

    model = onnx_ir.load(path)
    check_nodes(model, kind)
    problems = [*_types(model.graph), *(problem for node in model.graph.all_nodes() for problem in _problems(node))]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UnsupportedError(f"{kind} cannot become an engine: {'; '.join(problems[:_LISTED])}{more}")
    operators: dict[str, list[str]] = defaultdict(list)
    for node in model.graph.all_nodes():
        operators[node.op_type].append(node.name or "(unnamed)")
    return dict(operators)


def _problems(node: Any) -> Iterator[str]:
    for value in node.outputs:
        if remedy := _remedy(value):
            yield f"node {node.name} ({node.op_type}) gives {value.dtype.name}: {remedy}"
    if node.op_type == "TopK":
        yield from _topk(node)
    if node.op_type == "Attention" and len({id(value) for value in node.inputs[:3]}) == 1:
        yield f"node {node.name} (Attention) takes one tensor as query, key and value: project them apart, or use opset 18"


def _topk(node: Any) -> Iterator[str]:
    count = _constant(node.inputs[1])
    if count is None:
        yield f"node {node.name} (TopK) takes a K that is no constant: export it at static budgets"
    elif count > MOST_TOPK:
        yield (
            f"node {node.name} (TopK) takes K={count}, the most is {MOST_TOPK}: lower the budget of that stage (retention, "
            "mean_tokens or budgets of the configuration), or the image size"
        )


def _constant(value: Any) -> int | None:
    tensor = value.const_value
    if tensor is None and value.producer() is not None and value.producer().op_type == "Constant":
        attributes = value.producer().attributes
        if "value" in attributes:
            tensor = attributes["value"].value
        elif "value_ints" in attributes:
            return int(attributes["value_ints"].value[0])
        elif "value_int" in attributes:
            return int(attributes["value_int"].value)
    return None if tensor is None else int(tensor.numpy().reshape(-1)[0])


def _types(graph: Any) -> Iterator[str]:
    for value in (*graph.inputs, *graph.initializers.values()):
        if remedy := _remedy(value):
            yield f"tensor {value.name} is {value.dtype.name}: {remedy}"


def _remedy(value: Any) -> str | None:
    """How to be rid of a tensor's type; None for a type TensorRT takes, or an unknown one."""
    if value.dtype is None or value.dtype.name in _TYPES:
        return None
    return "compute in float32" if value.dtype.name == "DOUBLE" else f"use one of {', '.join(_TYPES)}"
