"""V2Drop: tokens that layers leave as they are go."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout import Layout
from ..ops.indexing import lowest
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import register
from .pyramiddrop import PyramidDrop


@policy("variation", "before", "hidden")
def keep_changed(site: Site, budget: int) -> Choice:
    """The tokens that the layer before changed most, by the L2 norm of the difference."""
    assert site.before is not None and site.hidden is not None
    return Choice(lowest(-torch.linalg.vector_norm(site.hidden.float() - site.before.float(), dim=-1), budget))


@register("v2drop")
@dataclass(frozen=True, kw_only=True)
class V2Drop(PyramidDrop):
    """V2Drop (arXiv 2509.01552): stage by stage the tokens go that the layer before changed least. Layers and shares as
    `PyramidDrop` has them, before 3, 17 and 22 of 32; tokens keep their positions."""

    layers: tuple[int, ...] = (3, 17, 22)

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One at each of `layers`."""
        return tuple(Stage("decoder", stage.layer, "variation", stage.tokens) for stage in super().stages(shape, layout))
