"""HoloV: budgets for parts of the picture, by attention and by how varied they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout
from ..ops.indexing import compact, count, earlier
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, check_count, is_number, placing, register, scoring_layer
from .floors import count_of


@policy("holistic", "hidden", "score")
def keep_holistic(site: Site, budget: int, *, crops: int, alpha: float) -> Choice:
    """A budget for each crop by its mean score, and in it the tokens of most attention."""
    assert site.hidden is not None and site.score is not None
    wide = torch.float64 if site.exact else torch.float32
    batch, n = site.at.shape
    total = count_of(site)
    place = torch.arange(n, device=site.at.device).expand(batch, n)
    size, more = total // crops, total % crops
    longer = more * (size + 1)
    crop = torch.where(place < longer, place // (size + 1), more + (place - longer) // size.clamp_min(1))
    real = place < total
    member = ((crop.unsqueeze(1) == torch.arange(crops, device=crop.device).unsqueeze(1)) & real.unsqueeze(1)).to(wide)
    seen = torch.where(real, site.score, 0).to(wide) * 1e3
    scores, own = _scores(site.hidden.to(wide), seen, crop, real, member, alpha), member.sum(2)
    share = _shares(scores, own, budget)
    quota = (member * share.unsqueeze(2)).sum(1)
    same = (crop.unsqueeze(1) == crop.unsqueeze(2)) & real.unsqueeze(1)
    ahead = (seen.unsqueeze(1) > seen.unsqueeze(2)) | ((seen.unsqueeze(1) == seen.unsqueeze(2)) & earlier(n, seen.device))
    return Choice(compact(real & (count(ahead & same) < quota), budget)[0])


def _scores(hidden: Tensor, seen: Tensor, crop: Tensor, real: Tensor, member: Tensor, alpha: float) -> Tensor:
    """[b, crops]: mean over each crop of attention and scaled context; member: [b, crops, n]."""
    n = hidden.shape[1]
    rows = hidden / (torch.linalg.vector_norm(hidden, dim=-1, keepdim=True) + 1e-6)
    same = (crop.unsqueeze(1) == crop.unsqueeze(2)) & real.unsqueeze(1)
    others = (same & ~torch.eye(n, dtype=torch.bool, device=crop.device)).to(rows.dtype)
    alike = (rows @ rows.transpose(1, 2)) * others
    number = others.sum(2).clamp_min(1)
    mean = alike.sum(2) / number
    # A token's own cosine counts as 0, and is one of those whose variance it is.
    off = (alike - mean.unsqueeze(2)) ** 2 * (others + torch.eye(n, dtype=rows.dtype, device=crop.device))
    context = torch.where(others.sum(2) > 0, off.sum(2) / number, 0)
    size = member.sum(2).clamp_min(1)
    attention, varied = ((member * values.unsqueeze(1)).sum(2) / size for values in (seen, context))
    return attention + alpha * attention / (varied + 1e-6) * varied


def _shares(scores: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """[b, crops]: what each crop keeps, `budget` together: by score, rounded down, and what is left in turns, by score, to
    those that have more."""
    crops = scores.shape[1]
    scores = torch.where(sizes > 0, scores, 0)
    total = scores.sum(1, keepdim=True) + 1e-6
    share = torch.minimum(sizes, (scores / total * budget).floor())
    room, left = sizes - share, budget - share.sum(1, keepdim=True)
    rounds = torch.arange(1, budget + 1, device=scores.device, dtype=scores.dtype)
    given = torch.minimum(room.unsqueeze(2), rounds).sum(1)  # [b, budget], by so many rounds
    whole = (given <= left).to(scores.dtype).sum(1, keepdim=True)
    share, room = share + torch.minimum(room, whole), room - torch.minimum(room, whole)
    left = budget - share.sum(1, keepdim=True)
    ahead = (scores.unsqueeze(1) > scores.unsqueeze(2)) | (
        (scores.unsqueeze(1) == scores.unsqueeze(2)) & earlier(crops, scores.device)
    )
    turn = count(ahead & (room > 0).unsqueeze(1))
    return share + ((room > 0) & (turn < left)).to(scores.dtype)


@register("holov")
@dataclass(frozen=True, kw_only=True)
class HoloV(Budgeted):
    """HoloV (arXiv 2510.02912): runs of the raster, `crops` of them, get budgets by their attention and by how varied their
    tokens are among themselves; in each the tokens of most attention stay. alpha: weight of the variety. Raises ConfigError
    for values out of range."""

    crops: int = 9
    alpha: float = 0.09

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "crops", self.crops)
        if not is_number(self.alpha, 0):
            raise ConfigError(f"holov: alpha={self.alpha!r} is out of range: choose a weight of 0 or more")

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, behind the projector."""
        options = (("crops", self.crops), ("alpha", self.alpha))
        tokens = self.budgets(shape, layout)
        return (Stage("entry", scoring_layer(shape), "holistic", tokens, options, placing(shape), tap=shape.saliency),)
