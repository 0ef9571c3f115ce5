"""ZSPAPrune: what the prompt asks for first, and what is unlike it after."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..layout import Layout
from ..ops.greedy import cosines, farthest, unit
from ..ops.indexing import compact, lowest
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, register
from .cdpruner import mean_text


@policy("core_and_diversity", "hidden", "whole", "text")
def keep_core(site: Site, budget: int, *, core: float) -> Choice:
    """A share `core` of the budget most like the mean of the prompt's text, then, one by one, the token least like those
    chosen."""
    assert site.hidden is not None and site.whole is not None and site.text is not None
    number = min(budget, max(1, round(core * budget)))
    wide = torch.float64 if site.exact else torch.float32
    prompt = unit(mean_text(site.whole, site.text).to(wide)).repeat_interleave(site.at.shape[0] // site.whole.shape[0], 0)
    alike = (unit(site.hidden.to(wide)) @ prompt.unsqueeze(2)).squeeze(2)
    first = torch.zeros_like(alike, dtype=torch.bool).scatter(1, lowest(-alike, number), True)
    return Choice(compact(farthest(1 - cosines(site.hidden, site.exact), first, budget - number), budget)[0])


@register("zspaprune")
@dataclass(frozen=True, kw_only=True)
class ZSPAPrune(Budgeted):
    """ZSPAPrune (arXiv 2510.17197): of the tokens before the decoder's first layer a share `core` by likeness to the prompt's
    mean embedding, and the rest by distance from those. They keep their positions. Raises ConfigError for a core out of
    range."""

    core: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.core, bool) or not isinstance(self.core, int | float) or not 0 < self.core <= 1:
            raise ConfigError(f"zspaprune: core={self.core!r} is out of range: choose a ratio in (0, 1]")

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, at the entry of the decoder."""
        return (Stage("decoder", 0, "core_and_diversity", self.budgets(shape, layout), (("core", self.core),)),)
