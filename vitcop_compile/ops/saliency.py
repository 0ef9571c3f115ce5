"""Scores of visual tokens: attention of the CLS token, and norms of keys."""

import torch
from torch import Tensor

from .indexing import lowest


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


def key_norm(key: Tensor) -> Tensor:
    """L2 norm of the mean over kv heads of every token's key; small means important (ViTCoP, LLM stages).

    key: [B, kv_heads, n, head_dim]; before or after rotary embedding is the same number. Returns fp32 [B, n].
    """
    return torch.linalg.vector_norm(key.float().mean(1), dim=-1)


def keep_highest(saliency: Tensor, tokens: int, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """The `tokens` entries of most saliency [B, n], ascending; ties go to the lower index.

    Returns (index int64 [B, tokens], keep int64 [B, prefix + tokens]): `keep` addresses rows behind `prefix` others, which
    are kept as well.
    """
    index = lowest(-saliency, tokens)
    order = torch.arange(prefix, device=index.device).expand(index.shape[0], prefix)
    return index, torch.cat((order, index + prefix), 1)
