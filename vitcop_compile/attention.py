"""The anchor every captured model is rewritten around, and what it lowers to.

`vitcop::attention` is registered with transformers' AttentionInterface, so a stock model traces to one such node per layer,
whose arguments are the layer's rotated queries, keys and values. The name is absent from transformers' mask registry:
no mask is built, and causality stays an attribute of the node instead of a [tokens, tokens] tensor. It holds the word
"flash", by which encoders of packed images decide to attend to all of them in one call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PretrainedConfig

from .errors import UnsupportedError

ANCHOR_NAME = "vitcop_flash"
# The window that the model being traced states: an anchor without marks has none, so no prompt may be longer.
_WINDOW: ContextVar[int | None] = ContextVar("window", default=None)
# Whether the decoder being traced is one whose family hands it marks in place of a mask.
_MARKS: ContextVar[bool] = ContextVar("marks", default=False)


@torch.library.custom_op("vitcop::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    real: Tensor | None = None,
    marks: Tensor | None = None,
    window: int = 0,
    sizes: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention. query [B, heads, s, hd], key and value [B, kv_heads, s, hd] -> [B, heads, s, hd].

    real: bool [B, s], the keys that are no padding; None is all. marks: int64 [B, 2, 1, s], of every row its block, -1 for
    none, and its position: what a mask is made of in place of `causal`, with `window`, see `visible`. sizes: int64 [B, s], how
    many tokens each stands for, see `weighed`.
    """
    if sizes is not None:
        return sdpa_marked(query, key, value, scale, weighed(sizes, causal, query.dtype)).clone()
    if marks is not None:
        return sdpa_marked(query, key, value, scale, visible(marks, window)).clone()
    return sdpa(query, key, value, scale, causal, real).clone()


@attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    causal: bool,
    real: Tensor | None = None,
    marks: Tensor | None = None,
    window: int = 0,
    sizes: Tensor | None = None,
) -> Tensor:
    return torch.empty_like(query)


ANCHOR = torch.ops.vitcop.attention.default


def _interface(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    causal = bool(getattr(module, "is_causal", False))
    marked = _MARKS.get() and causal
    if attention_mask is not None and not marked:
        raise UnsupportedError("the model hands its own mask to attention; only pure causal or full attention is captured")
    if marked and not _is_marks(attention_mask):
        found = "nothing" if attention_mask is None else f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
        raise UnsupportedError(f"the model's family states marks of its tokens, and a layer got {found}: its mask is another")
    unsupported = sorted(name for name in ("softcap", "s_aux") if kwargs.get(name) is not None)
    if unsupported:
        raise UnsupportedError(f"attention with {', '.join(unsupported)} is not supported")
    window, stated = kwargs.get("sliding_window"), _WINDOW.get()
    if not marked and window is not None and (stated is None or window < stated):
        raise UnsupportedError(
            f"a layer attends within a window of {window} tokens, and the model's family states "
            f"{'none' if stated is None else stated}: prompts would be served beyond it"
        )
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if marked:
        given = (query, key, value, float(scale), True, None, attention_mask, window or 0)
        return torch.ops.vitcop.attention(*given).transpose(1, 2), None
    segments = kwargs.get("cu_seq_lens_q")
    if segments is None:
        return torch.ops.vitcop.attention(query, key, value, float(scale), causal).transpose(1, 2), None
    if segments.dtype != torch.bool or segments.dim() != 2:
        raise UnsupportedError(
            "the model packs sequences of its own into one: only those of encoders whose family declares them are captured"
        )
    # In place of boundaries a family hands bool [segments, rows]: which rows of equally long segments are no padding.
    q, k, v = (tensor[0].unflatten(1, segments.shape).transpose(0, 1) for tensor in (query, key, value))
    out = torch.ops.vitcop.attention(q, k, v, float(scale), causal, segments)
    return out.transpose(1, 2).flatten(0, 1).unsqueeze(0), None


def _is_marks(mask: Tensor | None) -> bool:
    """Whether what came to a layer as its mask is what the capture handed in: a model may have made another of it."""
    return mask is not None and mask.dtype == torch.int64 and mask.dim() == 4 and mask.shape[1] == 2


AttentionInterface.register(ANCHOR_NAME, _interface)


@contextlib.contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Within the context `module` and all in it are in evaluation mode; afterwards each is as it was."""
    training = [child for child in module.modules() if child.training]
    try:
        for child in training:
            child.training = False
        yield
    finally:
        for child in training:
            child.training = True


@contextlib.contextmanager
def anchored(*modules: torch.nn.Module, window: int | None = None, marks: bool = False) -> Iterator[None]:
    """Within the context `modules` trace to anchors, in evaluation mode; afterwards they are as they were.

    window, marks: those of `ModelShape`. A layer with a narrower window is refused while it is traced, but where
    there are marks; and so is a mask that is none of marks, and a causal layer without marks where they are stated.
    """
    found = (getattr(child, "config", None) for module in modules for child in module.modules())
    configs = {id(config): config for config in found if isinstance(config, PretrainedConfig)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    tokens = (_WINDOW.set(window), _MARKS.set(marks))
    try:
        for config in configs:
            config._attn_implementation = ANCHOR_NAME
        with contextlib.ExitStack() as stack:
            for module in modules:
                stack.enter_context(evaluating(module))
            yield
    finally:
        _WINDOW.reset(tokens[0])
        _MARKS.reset(tokens[1])
        for config, name in before:
            config._attn_implementation = name


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, real: Tensor | None = None) -> Tensor:
    """Prefill or encoder attention through torch's fused kernels; causality is a flag, and no mask exists but for the padding
    of packed encoders, `real` bool [B, s]."""
    grouped = query.shape[1] != key.shape[1]
    mask = None if real is None else real[:, None, None]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def visible(marks: Tensor, window: int = 0) -> Tensor:
    """bool [B, 1, s, s]: which rows see which others, by marks int64 [B, 2, 1, s]: those of no later position, and all of
    their own block; of these, with a `window`, those that are less than so many positions before them, or behind them."""
    block, position = marks[:, :1].transpose(2, 3), marks[:, 1:].transpose(2, 3)
    seen = (marks[:, 1:] <= position) | ((marks[:, :1] == block) & (block >= 0))
    return seen & (position - marks[:, 1:] < window) if window else seen


def weighed(sizes: Tensor, causal: bool, dtype: torch.dtype) -> Tensor:
    """[B, 1, s, s], or [B, 1, 1, s] where all rows see all: what is added to logits where each row stands for so many tokens,
    sizes int64 [B, s], and counts as often: log sizes (proportional attention, ToMe, arXiv 2210.09461, Eq. 1), -inf where a
    row is not seen. dtype: that of the query, which is what kernels take."""
    if not causal:
        return _log(sizes).to(dtype)
    order = torch.arange(sizes.shape[1], device=sizes.device)
    return torch.where(order <= order.unsqueeze(1), _log(sizes), -torch.inf).to(dtype)


def weighed_cached(at: Tensor, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, s, r]: as `weighed`, of rows that stand at `at` int64 [B, s] of caches whose rows have sizes int64 [B, r]."""
    rows = torch.arange(sizes.shape[1], device=at.device)
    return torch.where((rows <= at.unsqueeze(-1)).unsqueeze(1), _log(sizes), -torch.inf).to(dtype)


def weighed_before(at: Tensor, sizes: Tensor) -> Tensor:
    """fp32 [B, 1, 1, r]: as `weighed`, of the rows of caches, with sizes int64 [B, r], before at[:, 0]."""
    held = torch.arange(sizes.shape[1], device=at.device) < at[:, :1, None, None]
    return torch.where(held, _log(sizes), -torch.inf)


def _log(sizes: Tensor) -> Tensor:
    return sizes.float().log()[:, None, None]


def sdpa_marked(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
    """`sdpa` with mask [B, 1, s, s] of every sample, bool or what is added to logits. Keys are repeated for the heads that
    share them: with `enable_gqa` and a mask, torch is left with its math kernel."""
    shared = query.shape[1] // key.shape[1]
    if shared != 1:
        key, value = (rows.unsqueeze(2).expand(-1, -1, shared, -1, -1).flatten(1, 2) for rows in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def visible_cached(at: Tensor, marks: Tensor, places: Tensor, window: int, blocks: bool) -> Tensor:
    """bool [B, 1, s, r]: as `visible`, of rows that stand at `at` int64 [B, s] of caches whose rows have positions `places`
    int64 [B, r]: none of those before them is of their blocks. blocks: whether they are of any."""
    rows = torch.arange(places.shape[1], device=at.device)
    seen = rows <= at.unsqueeze(-1)
    if blocks:
        own = marks[:, 0, 0]
        there = torch.full_like(places, -1).scatter(1, at, own).unsqueeze(1)
        own = own.unsqueeze(-1)
        seen = seen | ((there == own) & (own >= 0))
    if window:
        seen = seen & (marks[:, 1, 0].unsqueeze(-1) - places.unsqueeze(1) < window)
    return seen.unsqueeze(1)


def within(at: Tensor, marks: Tensor, places: Tensor, window: int) -> Tensor:
    """bool [B, 1, s, r]: which rows of caches with `places` int64 [B, r], before those of `marks`, these see, which belong at
    `at` int64 [B, s] but are not there yet."""
    held = torch.arange(places.shape[1], device=at.device) < at[:, :1, None]
    return (held & (marks[:, 1, 0].unsqueeze(-1) - places.unsqueeze(1) < window)).unsqueeze(1)


def sdpa_cached(query: Tensor, key: Tensor, value: Tensor, scale: float, at: Tensor, mask: Tensor | None = None) -> Tensor:
    """Queries [B, heads, s, hd] that stand in rows `at` int64 [B, s] of caches [B, kv_heads, r, hd], each over all rows up to
    its own, or those of mask [B, 1, s, r], bool or what is added to logits.

    Heads that share a key stand as rows of one query: with `enable_gqa` and a mask, torch is left with its math kernel.
    """
    rows = torch.arange(key.shape[2], device=key.device)
    valid = (rows <= at.unsqueeze(-1)).unsqueeze(1) if mask is None else mask  # [B, 1, s, r]
    if query.shape[1] == key.shape[1]:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=valid, scale=scale)
    batch, heads, count, width = query.shape
    shared = heads // key.shape[1]
    grouped = query.reshape(batch, key.shape[1], shared * count, width)
    valid = valid if count == 1 else valid.repeat(1, 1, shared, 1)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=valid, scale=scale)
    return out.reshape(batch, heads, count, width)


@torch.library.custom_op("vitcop::flash_prefill", mutates_args=())
def flash_prefill(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """`sdpa` through the flash-attn package (CUDA, fp16 or bf16)."""
    from flash_attn import flash_attn_func

    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return flash_attn_func(q, k, v, softmax_scale=scale, causal=causal).transpose(1, 2)


@flash_prefill.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    return _as_flash_attn_lays_out(query)


@torch.library.custom_op("vitcop::flash_cached", mutates_args=())
def flash_cached(query: Tensor, key: Tensor, value: Tensor, scale: float, at: Tensor) -> Tensor:
    """`sdpa_cached` through the flash-attn package (CUDA, fp16 or bf16)."""
    from flash_attn import flash_attn_with_kvcache

    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    lengths = (at[:, -1] + 1).to(torch.int32)
    # Causal there means aligned at the end: the last query sees `lengths` rows, each before it one fewer.
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, softmax_scale=scale, causal=True).transpose(1, 2)


@flash_cached.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, at: Tensor) -> Tensor:
    return _as_flash_attn_lays_out(query)


def _as_flash_attn_lays_out(query: Tensor) -> Tensor:
    """[B, heads, s, hd] in memory as [B, s, heads, hd]: what a layer asks for next, so that nothing is copied."""
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)


# name -> (what an anchor becomes in encoder and prefill, what it becomes over caches). Of a custom operation it is the
# operator that a graph may hold, and not the Python object that defined it.
LOWERINGS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "sdpa": (sdpa, sdpa_cached),
    "flash_attention_2": (torch.ops.vitcop.flash_prefill.default, torch.ops.vitcop.flash_cached.default),
}


def check_lowering(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raises UnsupportedError if attention cannot be lowered to `name` on `device` in `dtype`."""
    if name not in LOWERINGS:
        raise UnsupportedError(f"attn_implementation={name!r} is unknown: use one of {', '.join(LOWERINGS)}")
    if name != "flash_attention_2":
        return
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError(
            f"attn_implementation='flash_attention_2' runs on CUDA in float16 or bfloat16, not on {device.type} in {dtype}: "
            "use 'sdpa'"
        )
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"attn_implementation='flash_attention_2' needs the flash-attn package ({error}): "
            "pip install 'vitcop-compile[flash-attn]', or use 'sdpa'"
        ) from None
