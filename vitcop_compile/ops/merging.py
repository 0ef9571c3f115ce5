"""Reduction of visual tokens to a fixed budget: cluster-aware merging, and plain selection."""

import torch
from torch import Tensor

from .indexing import compact, earlier, lowest, take_rows


def keep_lowest(hidden: Tensor, saliency: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Keeps the `budget` tokens of least saliency in their order (ViTCoP, deep stage).

    hidden: [B, n, D]; saliency: [B, n]; budget: 1 to n. Returns (hidden [B, budget, D], index int64 [B, budget], ascending).
    Raises ValueError for a budget out of range.
    """
    _check(budget, hidden.shape[1])
    index = lowest(saliency.float(), budget)
    return take_rows(hidden, index), index


def merge_by_cluster(hidden: Tensor, saliency: Tensor, labels: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Merges tokens cluster by cluster down to `budget` (ViTCoP, shallow stage).

    hidden: [B, n, D]; saliency: [B, n], small is important; labels: int64 [B, n], every distinct value (-1 too) a cluster;
    budget R: 1 to n. Returns (hidden [B, R, D] in the input dtype, index int64 [B, R], ascending: where each row sits).

    With K clusters: if K <= R each keeps a quota of its least salient tokens unchanged and merges the rest into one; if
    K > R all tokens are merged, the R - 1 clusters of least summed saliency one each and the others together. A merged
    token is `h[m] + mean(h[group])` at m, the middle member of the group. Raises ValueError for a budget out of range.
    """
    n = hidden.shape[1]
    _check(budget, n)
    keep, group = _assign(saliency.float(), labels, budget)
    together = (group.unsqueeze(2) == group.unsqueeze(1)) & ~keep.unsqueeze(2) & ~keep.unsqueeze(1)
    size = together.sum(-1)
    member = (together & earlier(n, hidden.device)).sum(-1)
    index, _ = compact(keep | (member == size // 2), budget)
    weight = take_rows(together.float(), index) / size.gather(1, index).clamp_min(1).unsqueeze(-1)
    merged = take_rows(hidden, index).float() + weight @ hidden.float()
    return merged.to(hidden.dtype), index


def _assign(saliency: Tensor, labels: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """(keep bool [B, n], group int64 [B, n]): which tokens stay as they are, and where the others are merged.

    Every quantity of a cluster is carried by each of its tokens; `first` picks one of them to speak for the cluster.
    """
    n = saliency.shape[1]
    same = labels.unsqueeze(2) == labels.unsqueeze(1)  # [b, i, j]
    order = torch.arange(n, device=saliency.device)
    first = ~(same & earlier(n, saliency.device)).any(-1)
    speaker = torch.where(same, order, n).amin(-1)
    # Summed once per cluster and handed to its members, so that they agree to the last bit.
    total = torch.where(same, saliency.unsqueeze(1), 0.0).sum(-1).gather(1, speaker)
    size = same.sum(-1)
    clusters = first.sum(-1, keepdim=True)
    before = _precedes(total, speaker)  # [b, i, j]: the cluster of j is of less total saliency than that of i
    cluster_rank = (before & first.unsqueeze(1)).sum(-1)

    # fp32 in this order of operations: the rounding is part of the method.
    spare = (n - clusters).clamp_min(1).float()
    quota = torch.round((size - 1).float() / spare * (budget - clusters).float()).long()
    quota = torch.minimum(quota, size - 1)
    missing = budget - clusters - torch.where(first, quota, 0).sum(-1, keepdim=True)
    up = first & (quota < size - 1)
    down = first & (quota > 0)
    rank_up = (before & up.unsqueeze(1)).sum(-1)
    rank_down = (_precedes(-total, speaker) & down.unsqueeze(1)).sum(-1)
    step = (up & (rank_up < missing)).long() - (down & (rank_down < -missing)).long()
    quota = (quota + step).gather(1, speaker)

    token_rank = (_precedes(saliency, order.expand_as(labels)) & same).sum(-1)
    keep = (clusters <= budget) & (token_rank < quota)
    return keep, cluster_rank.clamp_max(budget - 1)


def _precedes(value: Tensor, tie: Tensor) -> Tensor:
    """bool [B, n, n]: j comes before i by (value, tie), both [B, n]."""
    of_i, of_j = value.unsqueeze(2), value.unsqueeze(1)
    return (of_j < of_i) | ((of_j == of_i) & (tie.unsqueeze(1) < tie.unsqueeze(2)))


def _check(budget: int, n: int) -> None:
    if not 1 <= budget <= n:
        raise ValueError(f"budget={budget} is out of range for {n} tokens: choose 1 to {n}")
