"""The floors that a method has to beat: tokens at random, every k-th token, the features at a lower resolution."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..layout import Layout, Segment
from ..ops.indexing import lowest
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, check_count, in_encoder, placing, register, scoring_layer


@policy("random")
def keep_random(site: Site, budget: int, *, seed: int) -> Choice:
    """A subset drawn from `seed`, the same for every image of as many candidates."""
    # Drawn on the host, once: a generator of torch would be part of the graph, and draw anew in every run.
    generator = random.Random(seed)
    drawn = torch.tensor([generator.random() for _ in range(site.at.shape[1])], device=site.at.device)
    order = drawn.expand(site.at.shape)
    return Choice(lowest(order if site.real is None else torch.where(site.real, order, torch.inf), budget))


@policy("uniform")
def keep_uniform(site: Site, budget: int) -> Choice:
    """floor((i + 1/2) n / budget) of the raster."""
    steps = 2 * torch.arange(budget, device=site.at.device) + 1
    return Choice((steps * count_of(site) // (2 * budget)).expand(site.at.shape[0], budget))


@policy("downsample", "hidden", merges=True, adds=1)
def pool(site: Site, budget: int, *, cells: tuple[int, int]) -> Choice:
    """Means of `cells` (rows, columns) of the grid. What stands for a cell is its middle candidate. State: sizes."""
    assert site.hidden is not None and site.places is not None
    rows, columns = cells
    row, column, height, width = grid_of(site)
    down = torch.arange(rows, device=row.device)
    across = torch.arange(columns, device=row.device)
    first, stop = down * height // rows, -(-(down + 1) * height // rows)  # [b, rows]
    left, right = across * width // columns, -(-(across + 1) * width // columns)
    in_row = (row.unsqueeze(1) >= first.unsqueeze(2)) & (row.unsqueeze(1) < stop.unsqueeze(2))  # [b, rows, n]
    in_column = (column.unsqueeze(1) >= left.unsqueeze(2)) & (column.unsqueeze(1) < right.unsqueeze(2))
    inside = (in_row.unsqueeze(2) & in_column.unsqueeze(1)).flatten(1, 2)
    if site.real is not None:
        inside = inside & site.real.unsqueeze(1)
    weights, hidden = inside.float(), site.hidden
    if site.counts is not None:
        weights = weights * site.counts.unsqueeze(1)
    sizes = weights.sum(-1, keepdim=True)
    middle = ((first + stop - 1) // 2 * width).unsqueeze(2) + ((left + right - 1) // 2).unsqueeze(1)
    return Choice(middle.flatten(1), (weights / sizes @ hidden.float()).to(hidden.dtype), (sizes.squeeze(-1).long(),))


def count_of(site: Site) -> Tensor:
    """int64 [b, 1]: candidates that are no padding."""
    batch, n = site.at.shape
    return torch.full((batch, 1), n, device=site.at.device) if site.real is None else site.real.sum(1, keepdim=True)


def grid_of(site: Site) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row, column) of every candidate, int64 [b, n], and (rows, columns) of its grid, [b, 1], read from the places: those are
    in units of the longer side, and the last of it is one unit before its end."""
    assert site.places is not None
    places = site.places if site.real is None else torch.where(site.real.unsqueeze(-1), site.places, 0.0)
    most = places.amax(1)  # [b, 2]
    longer = (1 / (1 - most.amax(-1, keepdim=True))).round()
    at = (places * longer.unsqueeze(1)).round().long()
    size = (most * longer).round().long() + 1
    return at[..., 0], at[..., 1], size[:, :1], size[:, 1:]


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Budgeted):
    """Tokens at random, before the projector: the floor of every table. seed: of the subset. Raises ConfigError for one that
    is no count."""

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "seed", self.seed, 0)

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, in the encoder."""
        tokens, options = self.budgets(shape, layout), (("seed", self.seed),)
        return (Stage(in_encoder(shape), scoring_layer(shape), "random", tokens, options, placing(shape)),)


@register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Budgeted):
    """Every k-th token, before the projector."""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, in the encoder."""
        return (Stage(in_encoder(shape), scoring_layer(shape), "uniform", self.budgets(shape, layout), (), placing(shape)),)


@register("downsample")
@dataclass(frozen=True, kw_only=True)
class Downsample(Budgeted):
    """The grid of features, behind the projector, at a lower resolution: as many cells as the budget allows, as near to the
    shape of the grid as that leaves them. The floor that asks whether choosing is worth it at all (VTC-Bench)."""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, behind the projector. Raises ConfigError for clips whose frames share a budget."""
        if any(segment.grid[0] > 1 for segment in layout):
            raise ConfigError("downsample: a clip is no grid of two dimensions: give frames budgets of their own")
        cells = tuple(cells_of(segment, count) for segment, count in zip(layout, self.budgets(shape, layout), strict=True))
        tokens = tuple(rows * columns for rows, columns in cells)
        return (Stage("entry", scoring_layer(shape), "downsample", tokens, (("cells", cells),), placing(shape)),)


def cells_of(segment: Segment, budget: int) -> tuple[int, int]:
    """(rows, columns), at most `budget` together and no more than the grid has: the most cells among those whose shape is
    within a half of the grid's, then those nearest to it."""
    _, height, width = segment.grid
    aspect = math.log(height / width)
    found = [(rows, min(width, budget // rows)) for rows in range(1, min(height, budget) + 1)]
    off = {cells: abs(math.log(cells[0] / cells[1]) - aspect) for cells in found}
    near = [cells for cells in found if off[cells] <= math.log(1.5)] or [min(found, key=off.__getitem__)]
    return max(near, key=lambda cells: (cells[0] * cells[1], -off[cells]))
