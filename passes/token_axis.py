"""Analysis shared by the passes: where layers begin, which axis of a value is tokens, what crosses a cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ..attention import ANCHOR
from ..errors import RewriteError
from ..ops.indexing import take_along

TABLE = "vitcop_table"
_REAL, _MARKS = 5, 6  # which argument of an anchor
_SIZES = 8


def anchors(graph: fx.Graph) -> list[fx.Node]:
    """The attention anchors in order: entry i belongs to layer i."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is ANCHOR]


def marks_of(anchor: fx.Node) -> tuple[fx.Node, int] | None:
    """The marks that an anchor's mask is made of, and its window, 0 for none; None where it is plainly causal or full."""
    marks, window = (*anchor.args[_MARKS:_SIZES], None, 0)[:2]
    return None if marks is None else (marks, window or 0)  # type: ignore[return-value]


def sizes_of(anchor: fx.Node) -> fx.Node | None:
    """How many tokens each of an anchor's rows stands for, None where that is one."""
    return anchor.args[_SIZES] if len(anchor.args) > _SIZES else None  # type: ignore[return-value]


def give_sizes(anchor: fx.Node, sizes: fx.Node) -> None:
    """Tells an anchor how many tokens each of its rows stands for."""
    unstated = (None, None, 0)[len(anchor.args) - _REAL :]
    anchor.args = (*anchor.args, *unstated, sizes)


def first_input(graph: fx.Graph) -> fx.Node:
    """The first input: the hidden state that enters the first layer."""
    return next(node for node in graph.nodes if node.op == "placeholder")


def standing(graph: fx.Graph, cut: fx.Node) -> fx.Node:
    """Behind which node of the graph the value of `cut` is cut: itself, or the last of the inputs if it is one."""
    if cut.op != "placeholder":
        return cut
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def output_node(graph: fx.Graph) -> fx.Node:
    """The output node."""
    return next(iter(reversed(graph.nodes)))


def layer_exit(graph: fx.Graph, layer: int) -> fx.Node:
    """The hidden state [B, t, width] that leaves `layer`: the last value all that the layer computes goes through.

    Precisely: the last post-dominator of attention[layer] that does not depend on attention[layer + 1], or, for the last
    layer, the graph's result. No module name is read. Raises RewriteError if there is no such single value.
    """
    nodes, found = list(graph.nodes), anchors(graph)
    if not 0 <= layer < len(found):
        raise RewriteError(f"layer {layer} is out of range: the graph holds {len(found)} attention nodes")
    if layer == len(found) - 1:
        result = output_node(graph).args[0]
        return result[0] if isinstance(result, tuple | list) else result  # type: ignore[return-value]
    order = {node: i for i, node in enumerate(nodes)}
    anchor, behind = found[layer], found[layer + 1]
    derived, best = {anchor}, None
    live_until = max(order[user] for user in anchor.users)
    for node in nodes[order[anchor] + 1 : order[behind]]:
        if derived.isdisjoint(node.all_input_nodes):
            continue
        derived.add(node)
        # Every other derived value must have been used up for the last time by now.
        if live_until <= order[node]:
            best = node
        live_until = max([live_until, *(order[user] for user in node.users)])
    if best is None:
        raise RewriteError(f"layer {layer} has no single exit: its values reach layer {layer + 1} along several paths")
    return best


def content_beside(graph: fx.Graph, cut: fx.Node) -> list[fx.Node]:
    """Tensors with a token axis, computed from the graph's floating-point inputs, that cross `cut` beside it.

    Positions and their tables are not content; features that are still to be added to the hidden state are. Selecting tokens
    gathers content like anything else; merging tokens is defined for the hidden state alone, and must refuse a graph in which
    content takes another way.
    """
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    content = {node for node in nodes if _is_content(node)}
    for node in nodes:
        if not content.isdisjoint(node.all_input_nodes) and not isinstance(node.meta.get("val"), torch.SymInt):
            content.add(node)
    symbol, at = token_symbol(cut), order[standing(graph, cut)]
    return [
        node
        for node in nodes[: at + 1]
        if node is not cut
        and node in content
        and any(order[user] > at and not _is_size(user) for user in node.users)
        and token_dims(node, symbol)
    ]


def token_symbol(hidden: fx.Node) -> torch.SymInt:
    """The symbolic size of the token axis of a hidden state [B, t, width]."""
    value = hidden.meta["val"]
    if value.dim() != 3 or not isinstance(value.shape[1], torch.SymInt):
        raise RewriteError(f"{hidden.name} is not a hidden state with a symbolic token axis: {tuple(value.shape)}")
    return value.shape[1]


def token_dims(node: fx.Node, symbol: torch.SymInt) -> list[int]:
    """Dimensions of a tensor node that are the token axis. Raises RewriteError where the axis is only part of a size."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return []
    dims: list[int] = []
    for dim, size in enumerate(value.shape):
        if not isinstance(size, torch.SymInt) or not _mentions(size, symbol):
            continue
        if size.node.expr != symbol.node.expr:
            raise RewriteError(f"{node.name}: dimension {dim} has size {size}, which is not the token axis {symbol} itself")
        dims.append(dim)
    return dims


def reroute(graph: fx.Graph, cut: fx.Node, hidden: fx.Node, keep: fx.Node, renumber: bool) -> None:
    """Moves everything after `cut` onto the token axis of `hidden`, the pruned successor of `cut`.

    Uses of `cut` become uses of `hidden`; sizes are read anew from it; every other value that crosses the cut with tokens in
    a dimension is gathered there with `keep` int64 [B, t']. With `renumber`, values computed from positions alone are read
    from the first stage's table at row `keep` instead: a token's position becomes its index in the sequence before this cut.

    The nodes that make `hidden` and `keep` stand between the cut and the rest, and are left alone.
    """
    symbol = token_symbol(cut)
    nodes = list(graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    at, start = position[standing(graph, cut)], max(position[hidden], position[keep])
    moved: dict[fx.Node, fx.Node] = {cut: hidden}

    def shorten(value: fx.Node, dims: list[int]) -> fx.Node:
        source = value.meta.get(TABLE, value)
        new = source if renumber and _is_table(source) else value
        second = _samples_second(value, cut)
        for dim in dims:
            # Positions are [dims, B, t] where they cross as they came in.
            new = graph.call_function(torch.ops.aten.transpose.int, (new, 0, 1)) if second else new
            new = graph.call_function(take_along, (new, keep, dim))
            new = graph.call_function(torch.ops.aten.transpose.int, (new, 0, 1)) if second else new
            # The symbol stands for "tokens of the present stage", so the next cut reads these as it read the originals.
            new.meta["val"] = value.meta["val"]
        new.meta[TABLE] = source
        return new

    def successor(value: fx.Node) -> fx.Node:
        if value in moved or position.get(value, len(nodes)) > at or value.op == "get_attr":
            return moved.get(value, value)
        if isinstance(value.meta.get("val"), torch.SymInt) and _mentions(value.meta["val"], symbol):
            moved[value] = _resize(graph, value, hidden, symbol, successor)
        elif dims := token_dims(value, symbol):
            moved[value] = shorten(value, dims)
        else:
            moved[value] = value
        return moved[value]

    with graph.inserting_before(nodes[start + 1]):
        for node in nodes[start + 1 :]:
            for value in list(node.all_input_nodes):
                new = successor(value)
                if new is not value:
                    node.replace_input_with(value, new)


def finish(module: fx.GraphModule) -> fx.GraphModule:
    """The shared ending of every pass: dead code out, graph checked, code generated."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.graph.set_codegen(fx.CodeGen())
    module.recompile()
    return module


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new input, behind the inputs there are."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        return graph.placeholder(name)


def _samples_second(value: fx.Node, cut: fx.Node) -> bool:
    """Whether the samples of a value are its second axis, those of the hidden state `cut` being its first."""
    samples, sizes = cut.meta["val"].shape[0], value.meta["val"].shape[:2]
    if not isinstance(samples, torch.SymInt):
        return False
    return [isinstance(size, torch.SymInt) and size.node.expr == samples.node.expr for size in sizes] == [False, True]


def _is_size(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.sym_size.int


def _mentions(size: torch.SymInt, symbol: torch.SymInt) -> bool:
    return bool(size.node.expr.free_symbols & symbol.node.expr.free_symbols)


def _is_content(node: fx.Node) -> bool:
    """Whether a node is a floating-point input."""
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_table(node: fx.Node) -> bool:
    """Whether a value is computed from token positions alone: integer inputs and constants."""
    seen, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if TABLE in current.meta:
            raise RewriteError(
                f"{node.name} is computed from the positions of an earlier stage ({current.name}) and crosses into a stage "
                "whose positions start anew: it cannot be recomputed here"
            )
        if current.op == "placeholder" and ("val" not in current.meta or current.meta["val"].is_floating_point()):
            return False
        if current.op not in ("placeholder", "get_attr", "call_function"):
            return False
        # A size of a hidden state is not its content.
        if not _is_size(current):
            stack.extend(current.all_input_nodes)
    return True


def _resize(
    graph: fx.Graph, size: fx.Node, hidden: fx.Node, symbol: torch.SymInt, successor: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """The size expression `size`, rooted in the token axis of `hidden`."""
    if _is_size(size):
        if size.meta["val"].node.expr != symbol.node.expr:
            raise RewriteError(f"{size.name} reads the size {size.meta['val']}, not the token axis {symbol}")
        new = graph.call_function(torch.ops.aten.sym_size.int, (hidden, 1))
    else:
        new = graph.node_copy(size, successor)
    new.meta["val"] = size.meta["val"]
    return new
