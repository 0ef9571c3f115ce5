"""SparseVLM: what the tokens of text that speak of the image attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Layout
from ..ops.indexing import lowest, take_rows
from ..ops.saliency import attention_by
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import register
from .pyramiddrop import PyramidDrop

_EQUAL = 1e-6  # what rounding leaves of equal shares


@policy("rated_attention", "query", "key", "scale", "entry", "text")
def keep_rated(site: Site, budget: int) -> Choice:
    """The tokens that raters attend to most, mean over heads and raters."""
    assert site.query is not None and site.key is not None and site.scale is not None
    assert site.entry is not None and site.text is not None
    chosen = raters(site.entry, site.text, site.at.reshape(site.entry.shape[0], -1))
    return Choice(lowest(-site.candidates(attention_by(site.query, site.key, site.scale, chosen)), budget))


def raters(entry: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """bool [B, t]: the rows of text whose share of the image's attention, mean over visual rows of softmax(H_v H_q^T) over
    text, is the mean or above (section 3.2). entry: [B, t, D]; text: bool [B, t]; visual: int64 [B, n]."""
    rows = entry.float()
    logits = torch.where(text.unsqueeze(1), take_rows(rows, visual) @ rows.transpose(1, 2), -torch.inf)
    share = logits.softmax(-1).mean(1)
    return text & (share * text.sum(1, keepdim=True) >= 1 - _EQUAL)


@register("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(PyramidDrop):
    """SparseVLM (arXiv 2410.04417): text tokens that are relevant to the image rate its tokens by their attention, before each
    of `layers`, in the layer before. Raters are chosen by what enters the language model. Layers and shares as `PyramidDrop`
    has them, before 3, 7 and 16 of 32: budgets by the rank of the attention matrix depend on data, and recycling of pruned
    tokens is left out."""

    layers: tuple[int, ...] = (3, 7, 16)

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One at each of `layers`."""
        return tuple(Stage("decoder", stage.layer, "rated_attention", stage.tokens) for stage in super().stages(shape, layout))
