"""DART: a few pivots, and what is least like them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import Layout
from ..ops.greedy import unit
from ..ops.indexing import compact, least, lowest, take_rows
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, at_layer, check_count, register


@policy("duplication", "hidden", "whole", "key", "text")
def keep_unlike(site: Site, budget: int, *, visual_pivots: int, text_pivots: int) -> Choice:
    """The visual pivots, and of the others those least like each pivot in turn, visual ones and of text."""
    assert site.hidden is not None and site.whole is not None and site.key is not None and site.text is not None
    batch, own = site.whole.shape[0], min(visual_pivots, budget)
    each = site.at.shape[0] // batch
    norm = site.key.float().abs().sum((1, 3))
    first = lowest(-site.candidates(norm), own)
    rows_in = norm.shape[1]  # a symbol where text is a dynamic axis
    asked = min(text_pivots, rows_in) if isinstance(rows_in, int) else text_pivots
    asking = lowest(torch.where(site.text, -norm, torch.inf), asked)
    # Where a prompt has fewer tokens of text, what was taken in their stead is no pivot.
    there = site.text.gather(1, asking)
    wide = torch.float64 if site.exact else torch.float32
    rows = unit(site.hidden.to(wide))
    words = unit(take_rows(site.whole, asking).to(wide)).repeat_interleave(each, 0)
    alike = torch.cat((take_rows(rows, first), words), 1) @ rows.transpose(1, 2)  # [b, pivots, n]
    real = torch.cat((there.new_ones(batch, own), there), 1).repeat_interleave(each, 0)
    kept = torch.zeros_like(rows[..., 0], dtype=torch.bool).scatter(1, first, True)
    for turn, share in enumerate(_shares(budget - own, real)):
        kept = kept | least(torch.where(kept, torch.inf, alike[:, turn]).float(), share.float())
    return Choice(compact(kept, budget)[0])


def _shares(left: int, real: Tensor) -> list[Tensor]:
    """int64 [b, 1] of each pivot: what it takes of `left`, the first ones one more; real: bool [b, pivots]."""
    count = real.sum(1, keepdim=True)
    turns = real.long().cumsum(1) - 1
    total = torch.full_like(count, left)  # ONNX divides tensors alone
    shares = torch.where(real, total // count + (turns < total % count), 0)
    return list(shares.split(1, 1))


@register("dart")
@dataclass(frozen=True, kw_only=True)
class Dart(Budgeted):
    """DART (arXiv 2502.11494, section 3): before decoder layer `layer` pivots are the tokens of greatest L1 norm of key,
    visual ones and of text; the visual ones stay, and each pivot takes its share of the tokens least like it. Tokens are
    compared as they enter the layer, and keep their positions. Raises ConfigError for pivots that are no counts."""

    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "visual_pivots", self.visual_pivots)
        check_count(self.name, "text_pivots", self.text_pivots)

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, in the decoder. Raises ConfigError for a layer out of range."""
        layer = at_layer(self.layer, shape.layers, self.name)
        options = (("visual_pivots", self.visual_pivots), ("text_pivots", self.text_pivots))
        return (Stage("decoder", layer, "duplication", self.budgets(shape, layout, layer), options),)
