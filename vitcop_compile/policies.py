"""What a stage keeps: one small function a policy, in a registry. A policy sees a `Site` and makes a `Choice`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import cls_saliency, density_peaks, keep_lowest, key_norm, merge_by_cluster
from .ops.indexing import lowest, take_rows
from .ops.saliency import attention_received


@dataclass(frozen=True)
class Site:
    """What a policy may look at, in `blocks` of one segment each. B: samples, b: B times the segments that are reduced each
    for itself, n: candidates of one of them. Fields that the policy does not need are None.

    at: int64 [b, n], the candidates' rows among the t rows of their sample; hidden: [b, n, D], what leaves the layer before;
    query, key, value: [B, heads, t, hd] of that layer, with `scale` on its logits; score, features: [b, n] and [b, prefix + n,
    K], what the policy's `tap` made of these; state: what the policies before left behind, each [b, n]; blocks: the n
    candidates are those of so many segments, equally many each, one after another; prefix: rows before the first candidate;
    grid: (rows, columns) of the candidates of an unpruned segment; places: [b, n, 2], in units of its longer side, None where
    they follow from the grid; exact: whether there is float64.
    """

    at: Tensor
    hidden: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    scale: float | None = None
    score: Tensor | None = None
    features: Tensor | None = None
    state: tuple[Tensor, ...] = ()
    blocks: int = 1
    prefix: int = 0
    grid: tuple[int, int] = (0, 0)
    places: Tensor | None = None
    exact: bool = True

    def candidates(self, values: Tensor) -> Tensor:
        """Of values [B, t] those of the candidates, [b, n]."""
        batch = values.shape[0]
        return values.gather(1, self.at.reshape(batch, -1)).reshape(self.at.shape)


@dataclass(frozen=True)
class Choice:
    """index: int64 [b, budget], ascending: which candidates stay; rows: [b, budget, D] in place of their hidden state, None
    where it is as it was; state: added to the state of those that stay, each [b, budget]."""

    index: Tensor
    rows: Tensor | None = None
    state: tuple[Tensor, ...] = ()


Tap = Callable[[Tensor, Tensor, float, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Policy:
    """choose(site, budget, **options) -> Choice; needs: the fields of `Site` beside `at` and `state` that it looks at;
    tap(query, key, scale, prefix) -> (score, features): all that it looks at of a layer, so that it can choose later, once the
    candidates have been put together; merges: whether it returns `rows`; adds: how many tensors it adds to the state."""

    choose: Callable[..., Choice]
    needs: frozenset[str]
    tap: Tap | None = None
    merges: bool = False
    adds: int = 0


POLICIES: dict[str, Policy] = {}


def register(
    name: str, *needs: str, tap: Tap | None = None, merges: bool = False, adds: int = 0
) -> Callable[[Callable[..., Choice]], Callable]:
    """Adds a policy under `name`."""

    def add(choose: Callable[..., Choice]) -> Callable[..., Choice]:
        wired = frozenset(needs) | (frozenset(("query", "key", "scale")) if tap else frozenset())
        POLICIES[name] = Policy(choose, wired, tap, merges, adds)
        return choose

    return add


def tap_cls(query: Tensor, key: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    """Attention of the CLS token, and keys [B, t, heads * hd]."""
    return cls_saliency(query, key, scale, prefix), key.transpose(1, 2).flatten(2)


def tap_received(query: Tensor, key: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    """Attention that each patch receives, and keys [B, t, heads * hd]."""
    return attention_received(query, key, scale, prefix), key.transpose(1, 2).flatten(2)


@register("attention_received", tap=tap_received, adds=1)
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
    assert site.hidden is not None and site.key is not None
    saliency, (labels, *_) = site.candidates(key_norm(site.key)), site.state
    rows, index = merge_by_cluster(site.hidden, saliency, labels, budget, site.blocks)
    return Choice(index, rows)


@register("keep_lowest", "key")
def keep_least_norm(site: Site, budget: int) -> Choice:
    """Keeps the tokens of least key norm (ViTCoP, deep stage)."""
    assert site.key is not None
    return Choice(keep_lowest(site.candidates(key_norm(site.key)), budget))


def patch_positions(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """(row, column) of raster indices [B, n] as fp32 [B, n, 2], in units of the longer side of `grid`."""
    columns = grid[1]
    return torch.stack((index // columns, index % columns), -1).float() / max(grid)


def policy_of(name: str) -> Policy:
    """The policy `name`. Raises KeyError, listing the known ones."""
    if name not in POLICIES:
        raise KeyError(f"policy {name!r} is unknown: use one of {', '.join(POLICIES)}")
    return POLICIES[name]
