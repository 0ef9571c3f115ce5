"""Gives every attention anchor its kernel."""

from typing import Any

from torch import fx

from ..attention import ANCHOR, LOWERINGS, sdpa_marked, visible, weighed
from ..errors import RewriteError
from .attach_cache import attend
from .token_axis import finish, marks_of, sizes_of

_PADDING = 5  # which argument of an anchor says what is padding
_MASK = 5  # and which of `attend` is its mask


def lower_attention(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Replaces anchors, and the `attend` marks of a graph over caches, by the functions registered in LOWERINGS under `name`.

    Those of padded segments and those with marks or sizes get torch's, whatever the name: no other takes a mask. Of marks, and
    of sizes, a mask is made in the graph, once for all layers that share them and a window. Raises RewriteError for an unknown
    name or a graph without attention.
    """
    if name not in LOWERINGS:
        raise RewriteError(f"attn_implementation={name!r} is unknown: use one of {', '.join(LOWERINGS)}")
    plain, cached = LOWERINGS[name]
    found = [node for node in module.graph.nodes if node.op == "call_function" and node.target in (ANCHOR, attend)]
    if not found:
        raise RewriteError("the graph holds no attention: there is nothing to lower")
    masks: dict[tuple[Any, ...], fx.Node] = {}
    for node in found:
        if node.target is attend:
            masked = len(node.args) > _MASK
            node.target = LOWERINGS["sdpa"][1] if masked else cached
        elif (marks := marks_of(node)) is not None:
            if marks not in masks:
                with module.graph.inserting_before(node):
                    masks[marks] = module.graph.call_function(visible, marks)
            node.target, node.args = sdpa_marked, (*node.args[:4], masks[marks])
        elif (sizes := sizes_of(node)) is not None:
            given = (sizes, node.args[4], node.meta["val"].dtype)
            if given not in masks:
                with module.graph.inserting_before(node):
                    masks[given] = module.graph.call_function(weighed, given)
            node.target, node.args = sdpa_marked, (*node.args[:4], masks[given])
        else:
            padded = len(node.args) > _PADDING and node.args[_PADDING] is not None
            node.target = LOWERINGS["sdpa"][0] if padded else plain
    return finish(module)
