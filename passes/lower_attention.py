"""Gives every attention anchor its kernel."""

from torch import fx

from ..attention import ANCHOR, LOWERINGS
from ..errors import RewriteError
from .attach_cache import attend
from .token_axis import finish


def lower_attention(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Replaces anchors, and the `attend` marks of a graph over caches, by the functions registered in LOWERINGS under `name`.

    Raises RewriteError for an unknown name or a graph without attention.
    """
    if name not in LOWERINGS:
        raise RewriteError(f"attn_implementation={name!r} is unknown: use one of {', '.join(LOWERINGS)}")
    plain, cached = LOWERINGS[name]
    targets = {ANCHOR: plain, attend: cached}
    found = [node for node in module.graph.nodes if node.op == "call_function" and node.target in targets]
    if not found:
        raise RewriteError("the graph holds no attention: there is nothing to lower")
    for node in found:
        node.target = targets[node.target]
    return finish(module)
