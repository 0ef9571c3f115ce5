"""VScan: globally and locally salient patches, then what the last token of the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ConfigError
from ..layout import Layout
from ..ops.greedy import unit
from ..ops.indexing import compact, count, earlier, lowest
from ..policies import Choice, Site
from ..policies import register as policy
from ..schedule import ModelShape, Stage
from .base import Budgeted, check_count, is_number, placing, register, scaled, scoring_layer
from .floors import grid_of
from .visionzip import merge_into


@policy("local_and_global", "hidden", "score", merges=True, adds=1)
def keep_scanned(site: Site, budget: int, *, window: int) -> Choice:
    """Half of the budget by windows and an early layer, the rest by a late one; what nobody took is merged into what is most
    like it. State: sizes."""
    assert site.hidden is not None and site.score is not None
    local, whole = site.score.unbind(-1)
    taken = torch.zeros_like(local, dtype=torch.bool)
    if budget > 1:
        row, column, rows, columns = grid_of(site)
        down, across = (rows // window).clamp_min(1), (columns // window).clamp_min(1)
        place = torch.minimum(row // window, down - 1) * across + torch.minimum(column // window, across - 1)
        limit = (budget // 2 + down * across - 1) // (down * across)
        ahead = local.unsqueeze(1) > local.unsqueeze(2)  # [b, n, n]: j goes before i
        ahead = ahead | ((local.unsqueeze(1) == local.unsqueeze(2)) & earlier(local.shape[1], local.device))
        own = count(ahead & (place.unsqueeze(1) == place.unsqueeze(2)))
        free = own < limit if site.real is None else (own < limit) & site.real
        turn = count(ahead & free.unsqueeze(1))
        taken = free & (turn < budget // 2)
    # What windows could not give goes to the late layer as well.
    order = torch.where(taken, -torch.inf, -whole)
    chosen = lowest(order, budget)
    kept = torch.zeros_like(taken).scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    index = compact(kept, budget)[0]
    rest = kept if site.real is None else site.real | kept
    rest = torch.ones_like(kept) if site.real is None else rest
    merged, sizes = merge_into(site, unit(site.hidden.float()), index, kept, rest)
    return Choice(index, merged, (sizes,))


@register("vscan")
@dataclass(frozen=True, kw_only=True)
class VScan(Budgeted):
    """VScan (arXiv 2505.22654): half of the tokens that leave the vision side by the attention of an early layer, equally many
    of every window, half by a late layer, and the others merged into those; then, before the decoder's middle layer, what the
    last token of the prompt attends to, two thirds fewer. Raises ConfigError for values out of range.

    early: the encoder layer of the windows, of 24, in proportion to other depths; window: its side in tokens; middle: the
    decoder layer, of 32; last: what stays there, of what the vision side keeps. With `retention` both together make the mean;
    `tokens` is what the vision side keeps."""

    early: int = 6
    window: int = 6
    middle: int = 16
    last: float = 1 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self.name, "early", self.early, 0)
        check_count(self.name, "window", self.window)
        check_count(self.name, "middle", self.middle)
        if not is_number(self.last, 0, 1):
            raise ConfigError(f"vscan: last={self.last!r} is out of range: choose a share of 0 to 1")

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One on either side of the decoder's entry. Raises ConfigError for layers out of range, a retention that the last
        stage leaves out of reach, and clips whose frames share a budget."""
        if any(segment.grid[0] > 1 for segment in layout):
            raise ConfigError("vscan: a clip is no grid of two dimensions: give frames budgets of their own")
        (middle,) = scaled((self.middle,), shape.layers, self.name)
        late = scoring_layer(shape)
        early = min(round(self.early * shape.vision_layers / 24), late - 1)
        scored = [layer for layer in shape.scored_layers if layer < late]
        if shape.scored_layers:
            early = scored[0] if scored else late
        if self.retention is None:
            tokens = self.budgets(shape, layout)
        else:
            whole = (middle + self.last * (shape.layers - middle)) / shape.layers
            if self.retention > whole + 1e-9:
                raise ConfigError(
                    f"vscan: retention={self.retention} cannot be met, as {self.last:.4g} of the tokens are left from layer "
                    f"{middle} of {shape.layers} on: choose {whole:.4f} or less, or a greater last"
                )
            share = min(1.0, self.retention / whole)
            tokens = type(self)(**(vars(self) | {"retention": share})).budgets(shape, layout)
        then = tuple(max(1, round(self.last * count)) for count in tokens)
        also = (early,) if early < late else (late,)
        return (
            Stage(
                "entry",
                late,
                "local_and_global",
                tokens,
                (("window", self.window),),
                placing(shape),
                tap=shape.saliency,
                also=also,
            ),
            Stage("decoder", middle, "last_attention", then),
        )
