"""VisionZip: dominant tokens, and the rest merged into a few of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout
from ..ops.greedy import unit
from ..ops.indexing import compact, lowest, take_rows
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, placing, register, scoring_layer
from .floors import count_of


@policy("dominant_and_contextual", "hidden", "score", "features", merges=True, adds=1)
def keep_dominant(site: Site, budget: int, *, contextual: int, heads: int, doubled: bool) -> Choice:
    """The tokens of greatest score as they are, the rest merged into evenly spaced ones by their keys. State: sizes."""
    assert site.hidden is not None and site.score is not None and site.features is not None
    first = torch.zeros_like(site.score, dtype=torch.bool)
    if contextual < budget:
        most = lowest(-site.score, budget - contextual)
        first = first.scatter(1, most, torch.ones_like(most, dtype=torch.bool))
    rest = ~first if site.real is None else site.real & ~first
    if not contextual:  # what is left has nowhere to go
        rest = torch.zeros_like(first)
    turn = rest.long().cumsum(1) - 1
    step = (count_of(site) - (budget - contextual)) // max(contextual, 1)
    target = rest & (turn % step.clamp_min(1) == 0) & (turn < step * contextual)
    index = compact(first | target, budget)[0]
    keys = site.features[:, site.prefix :].float().unflatten(2, (heads, -1)).mean(2)
    # Without contextual tokens there is nothing to merge into.
    rows, sizes = merge_into(site, unit(keys), index, target, rest if contextual else target, doubled)
    return Choice(index, rows, (sizes,))


def merge_into(
    site: Site, likeness: Tensor, index: Tensor, target: Tensor, rest: Tensor, doubled: bool = False
) -> tuple[Tensor, Tensor]:
    """(rows [b, m, D] at index int64 [b, m], sizes int64 [b, m]): tokens of `rest` bool [b, n] merged into that `target`, bool
    [b, n], whose likeness [b, n, K], of length 1, is most like theirs: the mean of all, or where `doubled` the target plus the
    mean of the others. Tokens that stand for several count as often."""
    assert site.hidden is not None
    hidden, n = site.hidden, site.hidden.shape[1]
    joins = rest & ~target
    alike = likeness @ take_rows(likeness, index).transpose(1, 2)  # [b, n, m]
    alike = torch.where(target.gather(1, index).unsqueeze(1), alike, -torch.inf)
    best = alike == alike.amax(2, keepdim=True)
    order = torch.arange(index.shape[1], device=index.device)
    nearest = torch.where(best, order, n).amin(2, keepdim=True)
    share = ((nearest == order) & joins.unsqueeze(2)).transpose(1, 2).float()  # [b, m, n]
    if site.counts is not None:
        share = share * site.counts.unsqueeze(1)
    count = share.sum(2, keepdim=True)
    total, own = share @ hidden.float(), take_rows(hidden, index).float()
    if site.counts is not None and not doubled:
        mine = site.counts.gather(1, index).unsqueeze(2)
        return ((own * mine + total) / (mine + count)).to(hidden.dtype), (mine + count).squeeze(2).long()
    merged = own + total / count.clamp_min(1) if doubled else (own + total) / (1 + count)
    return merged.to(hidden.dtype), count.squeeze(2).long() + 1


@register("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(Budgeted):
    """VisionZip (arXiv 2412.04467, section 3): the tokens of most attention stay; a share `contextual` of the budget, evenly
    spaced among the others, takes in what is left by likeness of keys. Published are 54 + 10, 108 + 20 and 162 + 30 of 576.
    What is kept stands where it was.

    merge: "published" is a token plus the mean of those it takes in, about twice as long as others; "mean" that of all. Raises
    ConfigError for values out of range.
    """

    contextual: float = 10 / 64
    merge: str = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.contextual, bool) or not isinstance(self.contextual, int | float) or not 0 <= self.contextual < 1:
            raise ConfigError(f"visionzip: contextual={self.contextual!r} is out of range: choose a share in [0, 1)")
        if self.merge not in ("published", "mean"):
            raise ConfigError(f"visionzip: merge={self.merge!r} is unknown: use 'published' or 'mean'")

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, in the encoder, or where tokens are put together behind it, behind the projector."""
        tokens = self.budgets(shape, layout)
        merged = tuple(
            min(round(self.contextual * count), segment.candidates - count + round(self.contextual * count))
            for segment, count in zip(layout, tokens, strict=True)
        )
        options = (("contextual", merged), ("heads", shape.vision_heads), ("doubled", self.merge == "published"))
        side = "entry" if shape.packed else "encoder"
        return (
            Stage(side, scoring_layer(shape), "dominant_and_contextual", tokens, options, placing(shape), tap=shape.saliency),
        )
