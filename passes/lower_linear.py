"""Gives fp32 matrix products on a CPU to oneDNN."""

import torch
from torch import fx

from .token_axis import finish

# A plain library definition: `torch.library.custom_op` adds some 10 us to every call, and a decode step makes hundreds.
_LIBRARY = torch.library.Library("vitcop", "FRAGMENT")
_LIBRARY.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl(_LIBRARY, "linear", "CPU")
def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")


@torch.library.register_fake("vitcop::linear", lib=_LIBRARY)
def _(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def lower_linear(module: fx.GraphModule, ahead: bool = False) -> fx.GraphModule:
    """Replaces fp32 `aten.linear` on the CPU by oneDNN's linear on the same, unpacked weights.

    Where torch was built with MKL, its fp32 products go there, which on processors with AVX-512 that are not Intel's runs
    at half of oneDNN's rate and loses more on the short sequences that pruning leaves. Nothing is packed ahead, so weights
    are not held twice. Skipped for other types and devices, and where torch has no oneDNN.

    `ahead` of time, the weights are constants of the program, and inductor takes oneDNN's own operator: it calls it without
    Python and fuses activations and sums into it. A program compiled at its first call has them as inputs, which inductor
    refuses there; so are weights that are computed in the graph. These take `vitcop::linear`.
    """
    if not torch.backends.mkldnn.is_available():
        return module
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.linear.default:
            continue
        value = node.meta.get("val")
        if value is None or value.device.type != "cpu" or value.dtype != torch.float32:
            continue
        inputs, weight, bias = (*node.args, None)[:3]
        if ahead and weight.op == "get_attr":
            node.target = torch.ops.mkldnn._linear_pointwise.default
            node.args = (inputs, weight, bias, "none", [], "")
        else:
            node.target = torch.ops.vitcop.linear.default
            node.args = (inputs, weight, bias)
    return finish(module)
