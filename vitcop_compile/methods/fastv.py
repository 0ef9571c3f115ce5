"""FastV: what the last token of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass

from ..layout import Layout
from ..ops.indexing import lowest
from ..ops.saliency import last_attention
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, at_layer, register


@policy("last_attention", "query", "key", "scale", "last")
def keep_attended(site: Site, budget: int) -> Choice:
    """The tokens that the row `last` attends to most, mean over heads."""
    assert site.query is not None and site.key is not None and site.scale is not None and site.last is not None
    return Choice(lowest(-site.candidates(last_attention(site.query, site.key, site.scale, site.last)), budget))


@register("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(Budgeted):
    """FastV (arXiv 2403.06764): before decoder layer `layer` the tokens stay that the prompt's last token attends to most in
    the layer before, mean over heads; they keep their positions. In a turn on a filled cache attention is that within the
    turn."""

    layer: int = 2

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, in the decoder. Raises ConfigError for a layer out of range."""
        layer = at_layer(self.layer, shape.layers, self.name)
        return (Stage("decoder", layer, "last_attention", self.budgets(shape, layout, layer)),)
