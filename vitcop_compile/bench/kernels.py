"""Which kernel attention runs on, in words: asked of torch rather than assumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend
from torch.overrides import TorchFunctionMode

from ..backends import BACKENDS

_WORDS = {"FLASH_ATTENTION": "flash", "EFFICIENT_ATTENTION": "efficient", "CUDNN_ATTENTION": "cudnn"}
# Backends whose programs call torch's operators; the compiled ones choose when they trace, by the same rules.
_TORCH = ("eager", "inductor", "aotinductor")


class _Called(TorchFunctionMode):
    """Collects the kernel that torch chooses for every call of `F.scaled_dot_product_attention`, and whether it has a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            name = SDPBackend(torch._fused_sdp_choice(*args, **kwargs)).name
            word = _WORDS.get(name, name.lower())
            masked = kwargs.get("attn_mask", args[3] if len(args) > 3 else None) is not None
            self.found[_masked(f"flash ({args[0].device.type})" if word == "flash" else word, masked)] = None
        return func(*args, **kwargs)


def recorded(call: Callable[[], Any]) -> str:
    """The kernels that `call` runs `F.scaled_dot_product_attention` on, e.g. "flash (cpu)" or "efficient with a mask".

    Distinct ones in order of appearance, joined by commas; "none" if it is not called. Runs `call` once, in eager mode:
    what a compiled program runs is not seen.
    """
    with torch.no_grad(), _Called() as called:
        call()
    return ", ".join(called.found) or "none"


def backend_kernel(
    backend: str,
    query_shape: Sequence[int],
    kv_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    causal: bool = False,
    decode: bool = False,
) -> str:
    """The kernel of one attention in a program of `backend`; decode: one query against a cache, of which a mask [B, 1, s, t]
    says how far it is filled.

    query_shape: [B, heads, s, head_dim]; kv_shape: [B, kv_heads, t, head_dim]. Backends of torch call torch's, of which one
    call on zeros is looked at, but for decoding on a CPU, where compiled ones have ours; "onnxruntime" gets matrix products,
    and masks for causality; other engines choose for themselves and do not say, which is said.
    """
    if backend == "onnxruntime":
        return _masked("MatMul, Softmax (onnx)", causal or decode)
    # Seen with a mask are the encoders of packed images, whose queries are many.
    if decode and query_shape[-2] == 1 and device.type == "cpu" and backend in BACKENDS and BACKENDS[backend].kernels:
        return "vitcop_cpu"
    if backend not in _TORCH:
        return f"chosen by {backend}"
    query, key = (torch.zeros(tuple(shape), dtype=dtype, device=device) for shape in (query_shape, kv_shape))
    mask = torch.ones(query.shape[0], 1, query.shape[-2], key.shape[-2], dtype=torch.bool, device=device) if decode else None
    grouped = query.dim() == 4 and query.shape[1] != key.shape[1]
    return recorded(lambda: F.scaled_dot_product_attention(query, key, key, mask, is_causal=causal, enable_gqa=grouped))


def _masked(kernel: str, masked: bool) -> str:
    return f"{kernel} with a mask" if masked else kernel
