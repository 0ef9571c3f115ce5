"""Scores of visual tokens: attention of the CLS token, attention received from all others, and norms of keys."""

import torch
from torch import Tensor


def cls_saliency(query: Tensor, key: Tensor, scale: float, prefix: int = 1) -> Tensor:
    """Attention the CLS token pays to every patch, summed over heads (ViTCoP, vision stage).

    query, key: [B, heads, prefix + patches, head_dim], row 0 the CLS token; scale: factor on the logits.
    Returns fp32 [B, patches]. Only the CLS row of the attention matrix is computed: a product and a sum in the order in which
    projections leave the keys, where a matrix product per head would have them moved first.
    """
    if not 1 <= prefix < key.shape[2]:
        raise ValueError(f"prefix={prefix} does not fit {key.shape[2]} tokens: CLS saliency needs a CLS row and patches")
    cls, keys = query[:, :, :1].transpose(1, 2).float(), key.transpose(1, 2).float()
    row = (cls * keys).sum(-1) * scale  # [B, prefix + patches, heads]
    return row.softmax(1)[:, prefix:].sum(-1)


def attention_received(
    query: Tensor, key: Tensor, scale: float, prefix: int = 0, real: Tensor | None = None, chunk: int = 128
) -> Tensor:
    """Attention that every patch receives, mean over heads and queries: the score of encoders without a CLS token.

    query, key: [B, heads, prefix + patches, head_dim]; scale: factor on the logits; real: bool [B, prefix + patches], what is
    no padding, None for all. Returns fp32 [B, patches]. The attention matrix is never whole: `chunk` queries are looked at
    together.
    """
    keys = (key.float() * scale).transpose(-1, -2)
    seen = None if real is None else torch.where(real, 0.0, -torch.inf)[:, None, None]
    total = torch.zeros(query.shape[0], query.shape[2], device=query.device)
    for start in range(0, query.shape[2], chunk):
        logits = query[:, :, start : start + chunk].float() @ keys
        logits = logits if seen is None else logits + seen
        # A softmax, whose division is of queries alone: the chunk is read half as often.
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        share = 1 / weights.sum(-1)
        share = share if real is None else share * real[:, None, start : start + chunk]
        total = total + (share.unsqueeze(-2) @ weights).sum((1, 2))
    queries = query.shape[2] if real is None else real.sum(1, keepdim=True)
    return total[:, prefix:] / (query.shape[1] * queries)


def key_norm(key: Tensor) -> Tensor:
    """L2 norm of the mean over kv heads of every token's key; small means important (ViTCoP, LLM stages).

    key: [B, kv_heads, n, head_dim]; before or after rotary embedding is the same number. Returns fp32 [B, n].
    """
    return torch.linalg.vector_norm(key.float().mean(1), dim=-1)


def last_attention(query: Tensor, key: Tensor, scale: float, last: Tensor) -> Tensor:
    """Attention that row `last` pays to all rows up to it, mean over heads.

    query: [B, heads, t, hd]; key: [B, kv_heads, t, hd]; scale: factor on the logits; last: int64 [B]. Returns fp32 [B, t]. One
    row of the attention matrix, whatever kernel the layer runs."""
    batch, heads, rows, width = query.shape
    own = query.gather(2, last.reshape(batch, 1, 1, 1).expand(batch, heads, 1, width)).float()
    grouped = own.reshape(batch, key.shape[1], heads // key.shape[1], width)
    logits = (grouped @ key.float().transpose(-1, -2)) * scale
    seen = torch.arange(rows, device=key.device) <= last.unsqueeze(1)
    return torch.where(seen[:, None, None], logits, -torch.inf).softmax(-1).mean((1, 2))


def attention_by(
    query: Tensor, key: Tensor, scale: float, chosen: Tensor, chunk: int = 128, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Causal attention that `chosen` rows pay to every row, mean over them and over heads.

    query: [B, heads, t, hd]; key: [B, kv_heads, t, hd]; scale: factor on the logits; chosen: bool [B, s, t], s sets of rows.
    Returns [B, s, t] of `dtype`. The attention matrix is never whole, where t is known: `chunk` queries are looked at at once.
    """
    batch, heads, rows, _ = query.shape
    shared = heads // key.shape[1]
    keys = (key.to(dtype) * scale).transpose(-1, -2).unsqueeze(2)  # [B, kv_heads, 1, hd, t]
    grouped = query.to(dtype).unflatten(1, (key.shape[1], shared))
    order = torch.arange(rows, device=key.device)
    step = chunk if isinstance(rows, int) else rows
    total = torch.zeros(batch, chosen.shape[1], rows, device=key.device, dtype=dtype)
    for start in range(0, rows, step) if isinstance(rows, int) else (0,):
        part = slice(start, start + step) if isinstance(rows, int) else slice(None)
        seen = order <= order[part].unsqueeze(1)
        weights = torch.where(seen, grouped[:, :, :, part] @ keys, -torch.inf).softmax(-1)
        total = total + chosen[:, :, part].to(dtype) @ weights.sum((1, 2))
    return total / (heads * chosen.sum(2, keepdim=True))
