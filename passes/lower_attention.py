"""Gives every attention anchor its kernel."""

from torch import fx

from ..attention import ANCHOR, LOWERINGS
from ..errors import RewriteError
from .attach_cache import attend
from .token_axis import finish

_PADDING = 5  # which argument of an anchor says what is padding


def lower_attention(module: fx.GraphModule, name: str) -> fx.GraphModule:
    """Replaces anchors, and the `attend` marks of a graph over caches, by the functions registered in LOWERINGS under `name`.

    Anchors of padded segments get torch's, whatever the name. Raises RewriteError for an unknown name or a graph without
    attention.
    """
    if name not in LOWERINGS:
        raise RewriteError(f"attn_implementation={name!r} is unknown: use one of {', '.join(LOWERINGS)}")
    plain, cached = LOWERINGS[name]
    targets = {ANCHOR: plain, attend: cached}
    found = [node for node in module.graph.nodes if node.op == "call_function" and node.target in targets]
    if not found:
        raise RewriteError("the graph holds no attention: there is nothing to lower")
    for node in found:
        padded = node.target is ANCHOR and len(node.args) > _PADDING and node.args[_PADDING] is not None
        node.target = LOWERINGS["sdpa"][0] if padded else targets[node.target]
    return finish(module)
