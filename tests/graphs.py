"""How tests look at graphs."""

from __future__ import annotations

from torch import fx


def copy(module: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same module, with its metadata."""
    memo: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, memo))
    for old, new in memo.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(module, graph)


def calls(module: fx.GraphModule, target) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target is target]


def order(module: fx.GraphModule) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(module.graph.nodes)}


def results(module: fx.GraphModule) -> tuple:
    return next(iter(reversed(module.graph.nodes))).args[0]


def users(node: fx.Node) -> set[fx.Node]:
    """Every node computed from `node`."""
    found, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                stack.append(user)
    return found


def sources(node: fx.Node, end: set[fx.Node] = frozenset()) -> set[fx.Node]:
    """Every node that `node` is computed from, not looking behind those in `end`."""
    found, stack = set(), [node]
    while stack:
        for value in stack.pop().all_input_nodes:
            if value not in found:
                found.add(value)
                if value not in end:
                    stack.append(value)
    return found
