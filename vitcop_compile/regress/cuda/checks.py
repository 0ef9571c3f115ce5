"""What a program may not hold if it is to run on a GPU without waiting for the host: found in its exported graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
_MASKS = (torch.bool, torch.uint8)


def elsewhere(program: ExportedProgram, device: str = "cuda:0") -> list[str]:
    """Nodes, parameters, buffers and constants that are not on `device`, with where they are."""
    held = {**program.state_dict, **program.constants}
    named = [(name, value) for name, value in held.items() if isinstance(value, Tensor)]
    named += [(node.name, value) for node in program.graph.nodes for value in _tensors(node)]
    return [f"{name} on {value.device}" for name, value in named if str(value.device) != device]


def reads(program: ExportedProgram) -> list[str]:
    """Nodes that make the host wait for the device: a value or a shape that depends on data, an index by a mask."""
    return [f"{node.name}: {node.target}" for node in program.graph.nodes if node.op == "call_function" and _reads(node)]


def written(program: ExportedProgram) -> list[str]:
    """Inputs that the program writes to, in their order: exported graphs keep operators that work in place."""
    found = set(program.graph_signature.user_inputs_to_mutate.values())
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            arguments = zip(node.target._schema.arguments, node.args)
            written = [given for argument, given in arguments if argument.alias_info and argument.alias_info.is_write]
            found |= {_root(value).name for given in written for value in tree_leaves(given) if isinstance(value, fx.Node)}
    return [name for name in program.graph_signature.user_inputs if name in found]


def _root(node: fx.Node) -> fx.Node:
    """What a view, or the result of an operator that works in place, is of."""
    while isinstance(node.target, torch._ops.OpOverload):
        returned = node.target._schema.returns
        if not returned or not returned[0].alias_info:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def moving(program: ExportedProgram, given: Sequence[Any]) -> list[str]:
    """Inputs that the program writes to, and whose addresses nobody has promised to keep: a CUDA graph would not see them
    written, or copy them at every call. given: what it is called with."""
    places = {name: place for place, name in enumerate(program.graph_signature.user_inputs)}
    return [name for name in written(program) if not getattr(given[places[name]], "_dynamo_static_input_type", None)]


def _reads(node: fx.Node) -> bool:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    # That of an index depends on data only if it is a mask.
    if target.overloadpacket not in _INDEXING and not _DATA_DEPENDENT.isdisjoint(target.tags):
        return True
    if any(free_unbacked_symbols(value) for value in _tensors(node)):
        return True
    if target.overloadpacket in _INDEXING:
        return any(value.dtype in _MASKS for index in tree_leaves(node.args[1]) for value in _tensors(index))
    return False


def _tensors(node: Any) -> Iterator[Tensor]:
    values = tree_leaves(node.meta.get("val")) if isinstance(node, fx.Node) else []
    return (value for value in values if isinstance(value, Tensor))
