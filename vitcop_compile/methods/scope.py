"""SCOPE: tokens that cover the others, weighed by saliency."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..layout import Layout
from ..ops.greedy import cosines, most_coverage
from ..ops.indexing import compact
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, is_number, placing, register, scoring_layer


@policy("coverage", "hidden", "score")
def keep_covering(site: Site, budget: int, *, alpha: float) -> Choice:
    """Greedily the token of greatest coverage gain times saliency**alpha."""
    assert site.hidden is not None and site.score is not None
    similar = cosines(site.hidden, site.exact)
    saliency = site.score.to(similar.dtype) if site.real is None else site.score.clamp_min(0).to(similar.dtype)
    return Choice(compact(most_coverage(similar, saliency**alpha, budget, site.real), budget)[0])


@register("scope")
@dataclass(frozen=True, kw_only=True)
class Scope(Budgeted):
    """SCOPE (arXiv 2510.24214): greedy coverage gain weighted by saliency. Saliency is that of the encoder's last layer but
    one; tokens are compared as they leave that layer, and where they are put together behind the encoder, as they leave the
    projector. Raises ConfigError for an alpha, the power of saliency, out of range."""

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.alpha, 0):
            raise ConfigError(f"scope: alpha={self.alpha!r} is out of range: choose a power of 0 or more")

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, in the encoder or behind the projector."""
        tokens, options = self.budgets(shape, layout), (("alpha", self.alpha),)
        side = "entry" if shape.packed else "encoder"
        return (Stage(side, scoring_layer(shape), "coverage", tokens, options, placing(shape), tap=shape.saliency),)
