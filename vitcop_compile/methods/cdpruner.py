"""CDPruner: tokens that are diverse, weighed by their relevance to the prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Layout
from ..ops.greedy import cosines, most_volume, unit
from ..ops.indexing import compact
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, register


@policy("conditional_diversity", "hidden", "whole", "text")
def keep_relevant(site: Site, budget: int) -> Choice:
    """Greedy MAP of a determinantal point process with kernel diag(r) S diag(r): S the cosines of tokens, r their
    relevance."""
    assert site.hidden is not None and site.whole is not None and site.text is not None
    weights = relevance(site.hidden, mean_text(site.whole, site.text, each=True), site.exact)
    kernel = weights.unsqueeze(2) * cosines(site.hidden, site.exact) * weights.unsqueeze(1)
    return Choice(compact(most_volume(kernel, budget), budget)[0])


def mean_text(whole: Tensor, text: Tensor, each: bool = False) -> Tensor:
    """fp32 [B, D]: the mean of rows [B, t, D] of text, bool [B, t]; each: of rows of length 1."""
    rows = unit(whole.float()) if each else whole.float()
    share = text.float() / text.sum(1, keepdim=True)
    return (share.unsqueeze(1) @ rows).squeeze(1)


def relevance(hidden: Tensor, prompt: Tensor, exact: bool) -> Tensor:
    """[b, n]: the product of tokens [b, n, D], of length 1, with `prompt` [B, D], scaled to the range of its image (section
    3)."""
    wide = torch.float64 if exact else torch.float32
    per_sample = prompt.repeat_interleave(hidden.shape[0] // prompt.shape[0], 0).to(wide)
    raw = (unit(hidden.to(wide)) @ per_sample.unsqueeze(2)).squeeze(2)
    low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
    return torch.where(high > low, (raw - low + 1e-6) / torch.where(high > low, high - low, 1), 1)


@register("cdpruner")
@dataclass(frozen=True, kw_only=True)
class CDPruner(Budgeted):
    """CDPruner (arXiv 2506.10967): the most diverse tokens by a determinantal point process conditioned on the prompt, before
    the decoder's first layer. Relevance is the mean cosine to the embeddings of the prompt's text, as for models without a
    paired text encoder, which none of these has. They keep their positions."""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, at the entry of the decoder."""
        return (Stage("decoder", 0, "conditional_diversity", self.budgets(shape, layout)),)
