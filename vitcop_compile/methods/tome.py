"""ToMe: alike tokens merge, a few in every block of the encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..layout import Layout
from ..ops.greedy import unit
from ..ops.indexing import compact, least, take_rows
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, placing, register


@policy("bipartite_matching", "hidden", "key", merges=True, adds=1, renews=True)
def merge_alike(site: Site, budget: int) -> Choice:
    """Every other token draws an edge to the one of the rest whose key is most like its own; along the edges of greatest
    cosine they merge, weighed by sizes, which are the state."""
    assert site.hidden is not None and site.key is not None
    n = site.at.shape[1]
    sizes = site.state[0] if site.state else torch.ones_like(site.at)
    keys = unit(take_rows(site.key.float().mean(1), site.at))
    # The row in front of the candidates is CLS, if there is one: it counts where every other token is told.
    odd = torch.arange(site.prefix, site.prefix + n, device=keys.device) % 2 == 1
    alike = torch.where(odd, keys @ keys.transpose(1, 2), -torch.inf)
    most = alike.amax(2)
    order = torch.arange(n, device=keys.device)
    nearest = torch.where(alike == most.unsqueeze(2), order, n).amin(2)
    leaves = least(torch.where(odd, torch.inf, -most), torch.full_like(most[:, :1], n - budget))
    index = compact(~leaves, budget)[0]
    owner = torch.where(leaves, nearest, order)  # [b, n]
    share = (owner.unsqueeze(1) == index.unsqueeze(2)).float() * sizes.unsqueeze(1)  # [b, budget, n]
    totals = share.sum(2, keepdim=True)
    return Choice(index, (share @ site.hidden.float() / totals).to(site.hidden.dtype), (totals.squeeze(2).long(),))


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(Budgeted):
    """ToMe (arXiv 2210.09461): bipartite soft matching behind every block of the encoder up to the one that the model reads,
    equally many tokens each. Merged between blocks, where the paper merges between attention and MLP, and attention does not
    count how many a token stands for, unless the method is `Calibrated`. Only for encoders whose patches are the language
    model's tokens."""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One a block. Raises ConfigError for encoders whose tokens are put together behind them, and for budgets that blocks,
        which merge a half at most, cannot reach."""
        if shape.packed:
            raise ConfigError(
                "tome: this model's tokens are put together behind its encoder, of patches at their places: none can go there"
            )
        blocks = shape.feature_layer + 1
        counts = [
            self._counts(segment.candidates, kept, blocks)
            for segment, kept in zip(layout, self.budgets(shape, layout), strict=True)
        ]
        return tuple(
            Stage("encoder", block, "bipartite_matching", tuple(own[block] for own in counts), (), placing(shape))
            for block in range(blocks)
        )

    def _counts(self, n: int, kept: int, blocks: int) -> list[int]:
        counts = [n - round((n - kept) * (block + 1) / blocks) for block in range(blocks)]
        for before, after in zip((n, *counts), counts):
            if before - after > before // 2:
                raise ConfigError(
                    f"tome: from {n} tokens to {kept} in {blocks} blocks takes {before - after} of {before} in one, and half "
                    "is the most: raise the target"
                )
        return counts
