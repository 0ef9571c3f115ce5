"""Reduction of visual tokens to a fixed budget: cluster-aware merging, and plain selection."""

from typing import NamedTuple

import torch
from torch import Tensor

from .indexing import compact, count, earlier, least, lowest, take_rows


def keep_lowest(saliency: Tensor, budget: int) -> Tensor:
    """The `budget` tokens of least saliency in their order (ViTCoP, deep stage).

    saliency: [B, n]; budget: 1 to n. Returns int64 [B, budget], ascending. Raises ValueError for a budget out of range.
    """
    _check(budget, saliency.shape[1])
    return lowest(saliency.float(), budget)


def merge_by_cluster(hidden: Tensor, saliency: Tensor, labels: Tensor, budget: int, images: int = 1) -> tuple[Tensor, Tensor]:
    """Merges tokens cluster by cluster down to `budget` (ViTCoP, shallow stage).

    hidden: [B, n, D]; saliency: [B, n], small is important; labels: int64 [B, n], every distinct value (-1 too) a cluster;
    budget R: 1 to n. Returns (hidden [B, R, D] in the input dtype, index int64 [B, R], ascending: where each row sits).

    images: n holds the tokens of so many images, equally many each, one after another; they share the budget. Clusters lie
    within an image: equal labels of two images are two clusters. Time and memory are linear in `images`.

    With K clusters: if K <= R each keeps a quota of its least salient tokens unchanged and merges the rest into one; if
    K > R all tokens are merged, the R - 1 clusters of least summed saliency one each and the others together. A merged
    token is `h[m] + mean(h[group])` at m, the middle member of the group. Clusters of equal sums go by their first token.
    Raises ValueError for a budget out of range, and for tokens that `images` does not divide.
    """
    plan, index = _planned(saliency, labels, budget, images)
    merged = take_rows(hidden, index).float() + _means(hidden.float(), index, plan, images)
    return merged.to(hidden.dtype), index


def mean_by_cluster(
    hidden: Tensor, saliency: Tensor, labels: Tensor, budget: int, images: int = 1, counts: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `merge_by_cluster`, but a merged token is the mean of its group, in which m is: no longer than others.

    counts: int64 [B, n], how many tokens each stands for, which its share in a mean goes by; None is one. Returns (hidden,
    index, sizes int64 [B, R]: how many tokens each row stands for).
    """
    plan, index = _planned(saliency, labels, budget, images)
    own = hidden.float()
    weights = (torch.ones_like(labels) if counts is None else counts).float().unsqueeze(2)
    given = torch.cat((own * weights, weights), 2)
    merged = _means(given, index, plan, images, sums=True)
    merged = torch.where(merged[..., -1:] == 0, take_rows(given, index), merged)
    rows, sizes = merged[..., :-1] / merged[..., -1:], merged[..., -1]
    return rows.to(hidden.dtype), index, sizes.long()


class _Plan(NamedTuple):
    """keep, seat, shared: bool [B, n]: tokens that stay as they are, tokens where a merged one sits, tokens of the one group
    that takes in whole clusters; together: bool [B * images, n / images, same]: pairs that merge within a cluster."""

    keep: Tensor
    seat: Tensor
    shared: Tensor
    together: Tensor


def _planned(saliency: Tensor, labels: Tensor, budget: int, images: int) -> tuple[_Plan, Tensor]:
    """(the plan, index int64 [B, R] of the tokens where rows sit). Raises ValueError."""
    n = labels.shape[1]
    _check(budget, n)
    if images < 1 or n % images:
        raise ValueError(f"images={images} does not divide {n} tokens: every image brings equally many")
    plan = _plan(saliency.float(), labels, budget, images)
    return plan, compact(plan.keep | plan.seat, budget)[0]


def _plan(saliency: Tensor, labels: Tensor, budget: int, images: int) -> _Plan:
    """Which tokens stay, and which merge where.

    Every quantity of a cluster is carried by each of its tokens; its first token speaks for it. Pairs of tokens are looked
    at within an image only, and images meet in vectors.
    """
    batch, n = saliency.shape
    blocks, each = batch * images, n // images
    labels, values = labels.reshape(blocks, each), saliency.reshape(blocks, each)
    order = torch.arange(each, device=saliency.device)
    before = earlier(each, saliency.device)

    same = labels.unsqueeze(2) == labels.unsqueeze(1)  # [b, i, j]
    speaker = torch.where(same, order, each).amin(-1)
    # Summed once per cluster and handed to its members, so that they agree to the last bit.
    total = torch.where(same, values.unsqueeze(1), 0.0).sum(-1).gather(1, speaker).reshape(batch, n)
    size = count(same).reshape(batch, n)
    first = (speaker == order).reshape(batch, n)
    quota, whole = _quotas(total, size, first, budget)

    of_i, of_j = values.unsqueeze(2), values.unsqueeze(1)
    precedes = same & ((of_j < of_i) | ((of_j == of_i) & before))
    keep = count(precedes) < quota.reshape(blocks, each).gather(1, speaker)
    together = same & ~keep.unsqueeze(1) & ~keep.unsqueeze(2)
    member = count(together & before)
    seat = ~keep & (member == _half(count(together)))

    shared = ~whole.reshape(blocks, each).gather(1, speaker).reshape(batch, n)
    middle = shared & (shared.float().cumsum(1) - 1 == _half(count(shared, keepdim=True)))
    return _Plan(keep.reshape(batch, n), middle | (~shared & seat.reshape(batch, n)), shared, together)


def _quotas(total: Tensor, size: Tensor, first: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """(quota fp32 [B, n], whole bool [B, n]) at the first token of each cluster: how many of its tokens stay as they are,
    and whether it forms a group of its own (all do, unless there are more clusters than `budget`)."""
    clusters = count(first, keepdim=True)
    # fp32 in this order of operations: the rounding is part of the method.
    spare = (size.shape[1] - clusters).clamp_min(1)
    quota = torch.round((size - 1) / spare * (budget - clusters))
    quota = torch.where(first, torch.minimum(quota, size - 1), 0.0)
    missing = budget - clusters - quota.sum(-1, keepdim=True)
    many = clusters > budget
    # Three questions of one kind: who takes one more, who gives one up, and who is merged alone. With no more clusters than
    # the budget, all of them are among the least `budget`.
    asked = torch.stack((first & (quota < size - 1), first & (quota > 0), first), 1)
    values = torch.where(asked, torch.stack((total, -total, total), 1), torch.inf)
    alone = torch.where(many, budget - 1.0, float(budget))
    up, down, whole = least(values, torch.stack((missing, -missing, alone), 1)).unbind(1)
    return torch.where(many, 0.0, quota + up.float() - down.float()), whole


def _half(number: Tensor) -> Tensor:
    """Half of whole fp32 numbers, rounded down."""
    return torch.floor(number * 0.5)


def _means(hidden: Tensor, index: Tensor, plan: _Plan, images: int, sums: bool = False) -> Tensor:
    """fp32 [B, R, D]: the mean of the group that merges at each row of `index`, or its sum, zero where a token stays as it
    is."""
    batch, n, width = hidden.shape

    def of(group: Tensor, rows: Tensor) -> Tensor:
        return group @ rows if sums else group @ rows / group.sum(-1, keepdim=True).clamp_min(1)

    shared = plan.shared.gather(1, index).unsqueeze(-1)
    if images == 1:
        own = take_rows(plan.together.float(), index)
        return of(torch.where(shared, plan.shared.float().unsqueeze(1), own), hidden)
    means = of(plan.together.float(), hidden.reshape(batch * images, n // images, width))
    return torch.where(shared, of(plan.shared.float().unsqueeze(1), hidden), take_rows(means.reshape_as(hidden), index))


def _check(budget: int, n: int) -> None:
    if not 1 <= budget <= n:
        raise ValueError(f"budget={budget} is out of range for {n} tokens: choose 1 to {n}")
