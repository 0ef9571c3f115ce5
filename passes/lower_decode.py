"""Gives attention of one query on a CPU its kernel."""

import torch
from torch import fx

from ..kernels import load
from .token_axis import finish

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def lower_decode(module: fx.GraphModule) -> fx.GraphModule:
    """Replaces `vitcop.decode_attention` of float32, bfloat16 and float16 on the CPU by `vitcop_cpu.decode_attention`, which
    reads no row of a cache that holds nothing yet, and each row once for all the heads that share it."""
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.vitcop.decode_attention.default:
            continue
        value = node.meta.get("val")
        if value is not None and value.device.type == "cpu" and value.dtype in _TYPES:
            load()
            node.target = torch.ops.vitcop_cpu.decode_attention.default
    return finish(module)
