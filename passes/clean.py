"""Removes the traces of tracing: assertions on metadata, guards, and sizes left to be inferred that are known."""

import torch
from torch import fx

from .token_axis import finish

_ASSERTIONS = {torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default}
_SHAPED = {torch.ops.aten.view.default, torch.ops.aten.reshape.default}


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Erases metadata assertions and the guard call of an exported graph, and writes widths in place of -1 in its views: to
    infer one from a number of rows that varies, export would have to prove that it divides. Nothing to do is no error."""
    for node in reversed(module.graph.nodes):
        if node.target in _ASSERTIONS or (node.op == "call_module" and node.target == "_guards_fn"):
            module.graph.erase_node(node)
        elif node.target in _SHAPED and "val" in node.meta:
            known = node.meta["val"].shape
            sizes = [known[i] if size == -1 and isinstance(known[i], int) else size for i, size in enumerate(node.args[1])]
            node.args = (node.args[0], sizes)
    return finish(module)
