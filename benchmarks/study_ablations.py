"""ViTCoP with one thing changed, for the study: what a setting changes, and what none does, by policies of the study's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from vitcop_compile import ViTCoPConfig
from vitcop_compile.config import PRESETS
from vitcop_compile.layout import Layout
from vitcop_compile.methods import Calibrated, CustomMethod
from vitcop_compile.ops import density_peaks, keep_lowest, merge_by_cluster
from vitcop_compile.ops.greedy import cosines, farthest, first_most
from vitcop_compile.ops.indexing import compact, take_rows
from vitcop_compile.ops.saliency import attention_received
from vitcop_compile.policies import Choice, Site, patch_positions, tap_cls
from vitcop_compile.policies import register as policy
from vitcop_compile.schedule import Method, ModelShape, Stage

Make = Callable[[], Method]


def per_head(site: Site) -> Tensor:
    """The mean of the heads' norms, in place of the norm of their mean."""
    assert site.key is not None
    return site.candidates(torch.linalg.vector_norm(site.key.float(), dim=-1).mean(1))


def greatest(site: Site) -> Tensor:
    """Large norms are important: the opposite of what is published."""
    return -site.key_norms()


def drawn(site: Site) -> Tensor:
    """Numbers that tell nothing, by the rows' places."""
    return torch.frac(torch.sin(site.at.float() * 12.9898) * 43758.5453)


def _in_decoder(name: str, score: Callable[[Site], Tensor]) -> None:
    """Both stages of the decoder, with `score` in place of the norms of keys: the least is the most important."""

    @policy(f"study_{name}_merge_by_cluster", "hidden", "key", merges=True)
    def merge(site: Site, budget: int) -> Choice:
        assert site.hidden is not None
        rows, index = merge_by_cluster(site.hidden, score(site), site.state[0], budget, site.blocks)
        return Choice(index, rows)

    @policy(f"study_{name}_keep_lowest", "key")
    def keep(site: Site, budget: int) -> Choice:
        return Choice(keep_lowest(score(site), budget))


def keep_diverse(site: Site, budget: int, *, centers: int, density_width: float, reach: float) -> Choice:
    """The most salient patch, then, one by one, that whose nearest kept one is farthest, by the cosines of their keys; and
    clusters as published."""
    assert site.score is not None and site.features is not None
    features = site.features[:, site.prefix :]
    saliency = site.score if site.real is None else torch.where(site.real, site.score, -torch.inf)
    kept = farthest(1 - cosines(features, site.exact), first_most(saliency), budget - 1, site.real)
    index = compact(kept, budget)[0]
    places = patch_positions(index, site.grid) if site.places is None else take_rows(site.places, index)
    labels = density_peaks(take_rows(features, index), places, centers, density_width, reach, site.exact)
    return Choice(index, state=(labels,))


@cache
def register_policies() -> None:
    """Once, and only where they are asked for: whoever imports this finds the package's own policies alone."""
    for name, score in (("per_head", per_head), ("greatest", greatest), ("drawn", drawn)):
        _in_decoder(name, score)
    for tap, scored_by in (("attention_received", attention_received), ("cls_attention", tap_cls)):
        policy(f"study_diverse_{tap}", tap=scored_by, adds=1)(keep_diverse)


@dataclass(frozen=True)
class Changed(ViTCoPConfig):
    """`swapped`: the study's name for policies that stand in place of the published ones, "diverse" in the vision stage and
    others in those of the decoder."""

    swapped: str = ""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """Those of ViTCoP."""
        register_policies()
        vision, *others = super().stages(shape, layout)
        if self.swapped == "diverse":
            return replace(vision, policy=f"study_diverse_{vision.policy}"), *others
        return vision, *(replace(stage, policy=f"study_{self.swapped}_{stage.policy}") for stage in others)


def ablations(share: float) -> dict[str, Make]:
    """ViTCoP at one budget with one thing changed: the mean of visual tokens over the decoder's layers stays what it is, and
    the other stages keep more where one keeps less."""
    vision, center, _ = min(PRESETS.values(), key=lambda known: abs(known[2] - share))
    base: dict[str, Any] = {"vision_ratio": vision, "center_ratio": center, "retention": share}
    narrow = min(vision, 1.3 * share)
    changed: dict[str, dict[str, Any]] = {
        "published": {},
        "positions kept": {"positions": "original"},
        "keys raw": {"keys": "raw"},
        "keys centered": {"keys": "centered"},
        "merged to means": {"merge": "mean"},
        "vision stage keeps 1.6 times as many": {"vision_ratio": min(1.0, 1.6 * vision)},
        "vision stage keeps 1.3 of the mean": {"vision_ratio": narrow},
        "no vision stage": {"vision_ratio": 1.0},
        "a third of the clusters": {"center_ratio": center / 3},
        "three times the clusters": {"center_ratio": min(1.0, 3 * center)},
        "no deep stage": {"deep_divisor": 1},
        "mild deep stage": {"deep_divisor": 2},
        "layers 1 and 3": {"shallow_layer": 1, "deep_layer": 3},
        "layers 1 and 7": {"shallow_layer": 1, "deep_layer": 7},
        "layers 2 and 6": {"shallow_layer": 2, "deep_layer": 6},
        "scored a layer earlier": {"vision_layer": -3},
        "scored two layers earlier": {"vision_layer": -4},
    }
    swapped: dict[str, dict[str, Any]] = {
        "keys per head": {"swapped": "per_head"},
        "greatest keys kept": {"swapped": "greatest"},
        "drawn in the decoder": {"swapped": "drawn"},
        "vision stage keeps what differs": {"swapped": "diverse"},
        "that, 1.3 of the mean": {"swapped": "diverse", "vision_ratio": narrow},
    }
    found: dict[str, Make] = {name: partial(ViTCoPConfig, **(base | change)) for name, change in changed.items()}
    found |= {name: partial(Changed, **(base | change)) for name, change in swapped.items()}
    wide = base | {"vision_ratio": min(1.0, 1.6 * vision)}
    found["calibrated"] = lambda: Calibrated(ViTCoPConfig(**base))
    found["1.6 times as many, calibrated"] = lambda: Calibrated(ViTCoPConfig(**wide))
    found["1.6 times as many, calibrated, no deep stage"] = lambda: Calibrated(ViTCoPConfig(**wide, deep_divisor=1))
    found["1.6 times as many, no deep stage"] = lambda: ViTCoPConfig(**wide, deep_divisor=1)
    # Rounding gives a wide vision stage more tokens where these come in multiples: with a target that makes up for it.
    found["1.6 times as many, of 0.864"] = lambda: ViTCoPConfig(**(wide | {"retention": 0.864 * share}))
    found["2.2 times as many"] = lambda: ViTCoPConfig(**(base | {"vision_ratio": min(1.0, 2.2 * vision)}))
    return found


def no_shallow_stage(layers: int, candidates: int, share: float) -> ViTCoPConfig:
    """What the vision stage keeps stays until the deep stage."""
    _, deep = ViTCoPConfig.preset("1/3").layers(layers)
    kept = round(share * candidates * layers / (deep + (layers - deep) / 5))
    return ViTCoPConfig(budgets=(kept, kept, max(1, round(kept / 5))))


def shuffled(site: Site) -> torch.Tensor:
    """A score that tells nothing: that of the tower, in an order of its own."""
    assert site.score is not None
    order = torch.randperm(site.score.shape[1], generator=torch.Generator().manual_seed(0))
    return site.score[:, order.to(site.score.device)]


def scored(score: Callable[[Site], torch.Tensor], share: float) -> Make:
    """Tokens by the tower's own saliency, as `score` has it."""
    return lambda: CustomMethod(score=score, needs=("score",), side="entry", retention=share)
