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
