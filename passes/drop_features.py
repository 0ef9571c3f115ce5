"""Makes a decoder of tokens of text alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from ..errors import RewriteError
from .token_axis import finish

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


def drop_features(module: fx.GraphModule, number: int) -> fx.GraphModule:
    """Removes the last `number` inputs, features [B, t, D] that are added to the hidden state where a token is of an image:
    for text they would be zeros. Skipped for none.

    Raises RewriteError where one of them is used otherwise than as one side of an addition.
    """
    graph = module.graph
    inputs = graph.find_nodes(op="placeholder")
    for features in inputs[len(inputs) - number :]:
        for user in list(features.users):
            others = [node for node in user.all_input_nodes if node is not features]
            if user.target not in _ADDITIONS or len(others) != 1 or user.kwargs:
                raise RewriteError(f"{user.name} does more with {features.name} than to add it to another value")
            user.replace_all_uses_with(cast(fx.Node, others[0]))
            graph.erase_node(user)
        graph.erase_node(features)
    return finish(module)
