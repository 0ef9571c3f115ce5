"""DivPrune: tokens that are as far from each other as can be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import Layout
from ..ops.greedy import cosines, farthest, first_most
from ..ops.indexing import compact
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, placing, register, scoring_layer


@policy("max_min_diversity", "hidden")
def keep_diverse(site: Site, budget: int) -> Choice:
    """First the token whose nearest other is farthest, then, one by one, that whose nearest chosen one is farthest."""
    assert site.hidden is not None
    distance = 1 - cosines(site.hidden, site.exact)
    n = distance.shape[1]
    own = torch.eye(n, dtype=torch.bool, device=distance.device)
    others = own if site.real is None else own | ~site.real.unsqueeze(1)
    nearest = torch.where(others, torch.inf, distance).amin(-1)
    if site.real is not None:
        nearest = torch.where(site.real, nearest, -torch.inf)
    start = first_most(nearest)
    return Choice(compact(farthest(distance, start, budget - 1, site.real), budget)[0])


@register("divprune")
@dataclass(frozen=True, kw_only=True)
class DivPrune(Budgeted):
    """DivPrune (arXiv 2503.02175, algorithm 1): greedy max-min diversity of the features that enter the language model, by
    cosine distance."""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, behind the projector."""
        tokens = self.budgets(shape, layout)
        return (Stage("entry", scoring_layer(shape), "max_min_diversity", tokens, (), placing(shape)),)
