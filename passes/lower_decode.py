"""Gives attention of one query over caches its kernel on a CPU."""

import torch
from torch import Tensor, fx

from ..attention import sdpa_cached
from .token_axis import finish


def lower_decode(module: fx.GraphModule) -> fx.GraphModule:
    """Replaces attention over caches that has no mask of its own by `vitcop_cpu.decode_attention`, where it turns out to be of
    one query. That reads no row of a cache that holds nothing yet, and each row once for all the heads that share it.

    For programs on the CPU in float32, bfloat16 or float16, `kernels.load()` called before.
    """
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is sdpa_cached and len(node.args) == 5:
            node.target = _one_query
    return finish(module)


def _one_query(query: Tensor, key: Tensor, value: Tensor, scale: float, at: Tensor) -> Tensor:
    # How many queries there are is known when the graph is exported, at the sizes of a program.
    if query.shape[2] != 1:
        return sdpa_cached(query, key, value, scale, at)
    return torch.ops.vitcop_cpu.decode_attention(query, key, value, scale, at)
