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
    # Segments have raters of their own, those that run as a batch as well.
    visual = site.at.unflatten(0, (site.entry.shape[0], -1))
    chosen = raters(site.entry, site.text, visual)
    wide = torch.float64 if site.exact else torch.float32  # sums over many rows: equal ones are to stay equal
    score = attention_by(site.query, site.key, site.scale, chosen, dtype=wide).gather(2, visual)
    return Choice(lowest(-score.flatten(0, 1), budget))


def raters(entry: Tensor, text: Tensor, visual: Tensor) -> Tensor:
    """bool [B, s, t]: the rows of text whose share of the attention of each of s segments, mean over visual rows of
    softmax(H_v H_q^T) over text, is the mean or above (section 3.2). entry: [B, t, D]; text: bool [B, t]; visual: int64
    [B, s, n]."""
    rows, text = entry.float(), text.unsqueeze(1)
    logits = torch.where(text, take_rows(rows, visual.flatten(1)) @ rows.transpose(1, 2), -torch.inf)
    share = logits.softmax(-1).unflatten(1, visual.shape[1:]).mean(2)
    return text & (share * text.sum(2, keepdim=True) >= 1 - _EQUAL)


@register("sparsevlm")
@dataclass(frozen=True, kw_only=True)
class SparseVLM(PyramidDrop):
    """SparseVLM (arXiv 2410.04417): text tokens that are relevant to the image rate its tokens by their attention, before each
    of `layers`, in the layer before. Raters are chosen by what enters the language model, of an image by those of its tokens
    that are left, where the published code chooses them once. Layers and shares as `PyramidDrop` has them, before 3, 7 and 16
    of 32: budgets by the rank of the attention matrix depend on data, and recycling of pruned tokens is left out."""

    layers: tuple[int, ...] = (3, 7, 16)

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One at each of `layers`."""
        return tuple(Stage("decoder", stage.layer, "rated_attention", stage.tokens) for stage in super().stages(shape, layout))
