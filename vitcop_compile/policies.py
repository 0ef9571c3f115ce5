"""What a stage keeps: one small function a policy, in a registry. A policy sees a `Site` and makes a `Choice`."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .ops import cls_saliency, density_peaks, keep_lowest, key_norm, mean_by_cluster, merge_by_cluster
from .ops.indexing import lowest, take_rows
from .ops.saliency import attention_received
from .schedule import Stage


@dataclass(frozen=True)
class Site:
    """What a policy may look at, in `blocks` of one segment each. B: samples, b: B times the segments that are reduced each
    for itself, n: candidates of one of them. Fields that the policy does not need are None.

    at: int64 [b, n], the candidates' rows among the t rows of their sample; hidden: [b, n, D], what leaves the layer before;
    query, key, value: [B, heads, t, hd] of that layer, with `scale` on its logits; centered: whether norms of keys are those
    of their distance from the mean of their segment; sizes: of the segments that the n candidates are of, where those
    that share a budget are one once they have been reduced together; score, features: [b, n] and [b, prefix + n, K], what the
    stage's tap made of these, and the keys, with a stage that looks at more layers [b, n, layers]; state: what the policies
    before left behind, each [b, n]; real: bool [b, n], the candidates that are no padding, None for all; blocks: the n
    candidates are those of so many segments, equally many each, one after another; prefix: rows before the first candidate;
    grid: (rows, columns) of the candidates of an unpruned segment; places: [b, n, 2], in units of its longer side, or with
    time before that [b, n, 3], None where they follow from the grid; exact: whether there is float64.

    before: [b, n, D], the candidates as they entered the layer before; whole: [B, t, D], `hidden` of all rows of a sample;
    entry: [B, t, D], those rows as they entered the language model; text: bool [B, t], which are text that has seen all
    images; last: int64 [B], the row of the prompt's last token. counts: int64 [b, n], how many tokens each candidate stands
    for, None where that is one or nobody counts."""

    at: Tensor
    hidden: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scale: float | None = None
    centered: bool = False
    sizes: tuple[int, ...] = ()
    score: Tensor | None = None
    features: Tensor | None = None
    state: tuple[Tensor, ...] = ()
    blocks: int = 1
    prefix: int = 0
    grid: tuple[int, int] = (0, 0)
    places: Tensor | None = None
    real: Tensor | None = None
    exact: bool = True
    before: Tensor | None = None
    whole: Tensor | None = None
    entry: Tensor | None = None
    text: Tensor | None = None
    last: Tensor | None = None
    counts: Tensor | None = None

    def candidates(self, values: Tensor) -> Tensor:
        """Of values [B, t] those of the candidates, [b, n]."""
        batch = values.shape[0]
        return values.gather(1, self.at.reshape(batch, -1)).reshape(self.at.shape)

    def key_norms(self) -> Tensor:
        """fp32 [b, n]: the norm of each candidate's key, by which small is important."""
        assert self.key is not None
        if not self.centered:
            return self.candidates(key_norm(self.key))
        keys = take_rows(self.key.float().mean(1), self.at.reshape(self.key.shape[0], -1))
        parts = keys.reshape(*self.at.shape, -1).split(self.sizes or self.at.shape[1], dim=1)
        return torch.linalg.vector_norm(torch.cat([part - part.mean(1, keepdim=True) for part in parts], 1), dim=-1)


@dataclass(frozen=True)
class Choice:
    """index: int64 [b, budget], ascending: which candidates stay; rows: [b, budget, D] in place of their hidden state, None
    where it is as it was; state: added to the state of those that stay, each [b, budget]."""

    index: Tensor
    rows: Tensor | None = None
    state: tuple[Tensor, ...] = ()


Tap = Callable[[Tensor, Tensor, float, int, Tensor | None], Tensor]


@dataclass(frozen=True)
class Policy:
    """choose(site, budget, **options) -> Choice; needs: the fields of `Site` beside `at` and `state` that it looks at;
    tap(query, key, scale, prefix, real) -> score: all that it looks at of a layer beside the keys, so that it can choose
    later, once the candidates have been put together; merges: whether it returns `rows`; adds: how many tensors, int64, it
    adds to the state, or where it renews the state, has it consist of; the last that one adds which merges says how many
    tokens each that stays stands for."""

    choose: Callable[..., Choice]
    needs: frozenset[str]
    tap: Tap | None = None
    merges: bool = False
    adds: int = 0
    renews: bool = False


# Policies of users' own methods, here as long as those are.
OWNED: WeakValueDictionary[str, Policy] = WeakValueDictionary()
NAMED: dict[str, Policy] = {}
POLICIES: ChainMap[str, Policy] = ChainMap(NAMED, OWNED)


def tap_of(stage: Stage) -> Tap | None:
    """What scores candidates of an encoder for a stage, None if it looks at none of its layers. Raises KeyError for a policy
    that is not known."""
    return policy_of(stage.tap or stage.policy).tap


def behind(stage: Stage) -> bool:
    """Whether the policy of a stage can choose behind an encoder: by hidden states, scores, keys and places alone."""
    policy, tap = policy_of(stage.policy), tap_of(stage)
    within = {"before", "value", "whole", "entry", "text", "last"}
    within |= {"score", "features"} if tap is None else set()
    # Of a policy that has a tap, only that looks at these.
    within |= {"query", "key"} if policy.tap is None else set()
    return not policy.needs & within


def states_of(stages: Sequence[Stage]) -> int:
    """Tensors of state behind `stages`."""
    number = 0
    for stage in stages:
        policy = policy_of(stage.policy)
        number = policy.adds + (0 if policy.renews else number)
    return number


def counted_in(stages: Sequence[Stage]) -> int | None:
    """Which tensor of the state behind `stages` says how many tokens each that stays stands for; None where none weighs."""
    found = None
    for i, stage in enumerate(stages):
        if stage.weighs:
            found = states_of(stages[: i + 1]) - 1
    return found


def register(
    name: str, *needs: str, tap: Tap | None = None, merges: bool = False, adds: int = 0, renews: bool = False
) -> Callable[[Callable[..., Choice]], Callable]:
    """Adds a policy under `name`."""

    def add(choose: Callable[..., Choice]) -> Callable[..., Choice]:
        wired = frozenset(needs) | (frozenset(("query", "key", "scale")) if tap else frozenset())
        POLICIES[name] = Policy(choose, wired, tap, merges, adds, renews)
        return choose

    return add


def tap_cls(query: Tensor, key: Tensor, scale: float, prefix: int, real: Tensor | None) -> Tensor:
    """Attention of the CLS token. No encoder that has one pads its rows."""
    assert real is None
    return cls_saliency(query, key, scale, prefix)


@register("attention_received", tap=attention_received, adds=1)
@register("cls_attention", tap=tap_cls, adds=1)
def keep_salient(site: Site, budget: int, *, centers: int, density_width: float, reach: float) -> Choice:
    """Keeps the patches of most attention, and clusters them by their keys (ViTCoP, vision stage)."""
    assert site.score is not None and site.features is not None
    kept = lowest(-site.score, budget)
    features = take_rows(site.features, kept + site.prefix if site.prefix else kept)
    places = patch_positions(kept, site.grid) if site.places is None else take_rows(site.places, kept)
    return Choice(kept, state=(density_peaks(features, places, centers, density_width, reach, site.exact),))


@register("merge_by_cluster", "hidden", "key", merges=True)
def merge_clusters(site: Site, budget: int) -> Choice:
    """Keeps each cluster's most important tokens and merges its others (ViTCoP, shallow stage). State: the clusters."""
    assert site.hidden is not None
    saliency, (labels, *_) = site.key_norms(), site.state
    rows, index = merge_by_cluster(site.hidden, saliency, labels, budget, site.blocks)
    return Choice(index, rows)


@register("merge_to_means", "hidden", "key", merges=True, adds=1)
def merge_clusters_to_means(site: Site, budget: int) -> Choice:
    """As `merge_clusters`, but what merges becomes its mean, no longer than other tokens. State: the clusters; adds sizes."""
    assert site.hidden is not None
    saliency, (labels, *_) = site.key_norms(), site.state
    rows, index, sizes = mean_by_cluster(site.hidden, saliency, labels, budget, site.blocks, site.counts)
    return Choice(index, rows, (sizes,))


@register("keep_lowest", "key")
def keep_least_norm(site: Site, budget: int) -> Choice:
    """Keeps the tokens of least key norm (ViTCoP, deep stage)."""
    return Choice(keep_lowest(site.key_norms(), budget))


def patch_positions(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """(row, column) of raster indices [B, n] as fp32 [B, n, 2], in units of the longer side of `grid`."""
    columns = grid[1]
    return torch.stack((index // columns, index % columns), -1).float() / max(grid)


def policy_of(name: str) -> Policy:
    """The policy `name`. Raises KeyError, listing the known ones."""
    if name not in POLICIES:
        raise KeyError(f"policy {name!r} is unknown: use one of {', '.join(NAMED)}")
    return POLICIES[name]
