"""Removes the traces of tracing: assertions on metadata and guards."""

import torch
from torch import fx

from .token_axis import finish

_ASSERTIONS = {torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_scalar.default}


def clean(module: fx.GraphModule) -> fx.GraphModule:
    """Erases metadata assertions and the guard call of an exported graph. Nothing to do is no error."""
    for node in reversed(module.graph.nodes):
        if node.target in _ASSERTIONS or (node.op == "call_module" and node.target == "_guards_fn"):
            module.graph.erase_node(node)
    return finish(module)
