"""Which kernel attention runs on, in words: asked of torch, or of the ONNX exporter, rather than assumed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..attention import sdpa
from ..passes.attach_cache import attend_apart

# ATen's fused operators; a call that dispatches to none of them is composed of matrix products and a softmax.
_FUSED = {
    "_scaled_dot_product_flash_attention_for_cpu": "flash (cpu)",
    "_scaled_dot_product_flash_attention": "flash (cuda)",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_scaled_dot_product_cudnn_attention": "cudnn",
    "_scaled_dot_product_fused_attention_overrideable": "overrideable",
}
_COMPOSED = "math"
# Backends whose programs call torch's operators; the compiled ones choose when they trace, by the same rules.
_TORCH = ("eager", "inductor", "aotinductor")
# What the backend "onnxruntime" writes.
_OPSET = 18


class _Dispatched(TorchDispatchMode):
    """Collects the fused attention operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if name in _FUSED:
            self.found.append(_FUSED[name])
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    """Collects, for every call of `F.scaled_dot_product_attention`, the kernel it dispatches to and whether it has a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        masked = kwargs.get("attn_mask", args[3] if len(args) > 3 else None) is not None
        with _Dispatched() as dispatched:
            out = func(*args, **kwargs)
        self.found.append((dispatched.found[0] if dispatched.found else _COMPOSED, masked))
        return out


def recorded(call: Callable[[], Any]) -> str:
    """The kernels that `call` runs `F.scaled_dot_product_attention` on, e.g. "flash (cpu)" or "efficient with a mask".

    Distinct ones in order of appearance, joined by commas; "none" if it is not called. Runs `call` once, in eager mode:
    what a compiled program runs is not seen.
    """
    with torch.no_grad(), _Called() as called:
        call()
    return _words(called.found)


def sdpa_kernel(
    query_shape: Sequence[int],
    kv_shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
    causal: bool,
    mask: bool,
) -> str:
    """The kernel that torch chooses for these shapes: "flash (cpu)", "flash (cuda)", "efficient", "cudnn" or "math".

    query_shape: [B, heads, s, head_dim]; kv_shape: [B, kv_heads, t, head_dim]; mask: whether a bool mask [B, 1, s, t] is
    given. One call on zeros is dispatched and looked at, so the shapes' memory is needed for a moment.
    """
    query = torch.zeros(tuple(query_shape), dtype=dtype, device=device)
    key = torch.zeros(tuple(kv_shape), dtype=dtype, device=device)
    given = None
    if mask:
        given = torch.ones(query_shape[0], 1, query_shape[-2], kv_shape[-2], dtype=torch.bool, device=device)
    grouped = len(query_shape) == 4 and query_shape[1] != kv_shape[1]
    with torch.no_grad(), _Called() as called:
        F.scaled_dot_product_attention(query, key, key, attn_mask=given, is_causal=causal, enable_gqa=grouped)
    return called.found[0][0]


def onnx_kernel(query_shape: Sequence[int], kv_shape: Sequence[int], causal: bool, decode: bool, opset: int = _OPSET) -> str:
    """What one attention becomes in an ONNX file: "Attention (onnx)" or "MatMul, Softmax (onnx)", and " with a mask".

    Shapes as in `sdpa_kernel`; decode: one query against a cache that is filled up to a row given at run time. Exports the
    very function that programs call, alone, through the exporter of the programs.
    """
    from ..export.onnx import WeightStore, op_counts, write_onnx

    query, key = torch.zeros(tuple(query_shape)), torch.zeros(tuple(kv_shape))
    inputs: tuple[Tensor, ...] = (query, key, key)
    if decode:
        row = torch.zeros(*kv_shape[:2], 1, kv_shape[3])
        inputs = (query, key, key, row, row, torch.zeros(query_shape[0], dtype=torch.int64))
    program = torch.export.export(_Decode() if decode else _Prefill(causal), inputs, strict=False)
    with tempfile.TemporaryDirectory(prefix="vitcop-") as folder:
        path = Path(folder) / "attention.onnx"
        names = [f"in_{i}" for i in range(len(inputs))]
        write_onnx(program, path, WeightStore(path.with_name("weights.bin")), names, ["out"], opset)
        counts = op_counts(path)
    # A mask is added to the scores, as a constant where it is small, or chosen in their place; nothing else here does either.
    masked = bool(counts["Add"] or counts["Where"])
    return _words([("Attention (onnx)" if counts["Attention"] else "MatMul, Softmax (onnx)", masked)])


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
    """The kernel of one attention in a program of `backend`, in words; shapes as in `sdpa_kernel`.

    Backends of torch call torch's, "onnxruntime" what its graph holds; other engines choose for themselves and do not say,
    which is said. decode: one query against a cache.
    """
    if backend in _TORCH:
        kernel = sdpa_kernel(query_shape, kv_shape, dtype, device, causal, decode)
        return _words([(kernel, decode)])
    if backend == "onnxruntime":
        return onnx_kernel(query_shape, kv_shape, causal, decode)
    return f"chosen by {backend}"


def _words(found: list[tuple[str, bool]]) -> str:
    return ", ".join(dict.fromkeys(f"{kernel} with a mask" if masked else kernel for kernel, masked in found)) or "none"


class _Prefill(nn.Module):
    """What an anchor lowers to in encoder and prefill."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sdpa(query, key, value, query.shape[-1] ** -0.5, self.causal)


class _Decode(nn.Module):
    """What it lowers to where a decode program must not write its caches."""

    def forward(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, slot: Tensor
    ) -> Tensor:
        return attend_apart(query, key_cache, value_cache, key, value, query.shape[-1] ** -0.5, slot.unsqueeze(1))
