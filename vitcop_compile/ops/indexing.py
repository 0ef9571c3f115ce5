"""Gather, scatter and compaction of token rows by per-sample indices."""

import torch
from torch import Tensor


def take_rows(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, n, D], index int64 [B, m] -> [B, m, D]: per-sample selection of rows.

    Whole rows are selected from the flattened batch: with an index per element, some engines copy element by element.
    """
    batch, n, width = rows.shape
    start = torch.arange(batch, device=index.device).unsqueeze(1) * n
    return rows.reshape(batch * n, width).index_select(0, (index + start).reshape(-1)).reshape(batch, -1, width)


def put_rows(rows: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """rows [B, n, D] with rows `index` [B, m] (distinct per sample) replaced by `values` [B, m, D]."""
    batch, n, _ = rows.shape
    source = torch.arange(n, device=index.device).expand(batch, n)
    replaced = torch.arange(index.shape[1], device=index.device).expand_as(index) + n
    return take_rows(torch.cat((rows, values.to(rows.dtype)), 1), source.scatter(1, index, replaced))


def take_along(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
    """tensor [B, ..., n, ...] with n at `dim`, index int64 [B, m] -> the same with m at `dim`. B may be 1 in `tensor`.

    As in `take_rows`, what lies behind `dim` is moved as one piece.
    """
    shape, (batch, count) = tensor.shape, index.shape
    between = shape[1:dim].numel()
    rows = tensor.reshape(shape[0] * between * shape[dim], shape[dim + 1 :].numel())
    first = torch.arange(batch * between, device=index.device).reshape(batch, between, 1) * shape[dim]
    if shape[0] == 1:
        first = first[:1]
    flat = (index.unsqueeze(1) + first).reshape(-1)
    return rows.index_select(0, flat).reshape(batch, *shape[1:dim], count, *shape[dim + 1 :])


def count(mask: Tensor, keepdim: bool = False) -> Tensor:
    """True entries in the last dimension of a bool tensor, as fp32: exact up to 2^24, and engines add floats several times
    faster than integers."""
    return mask.float().sum(-1, keepdim=keepdim)


def compact(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the `count` true entries of every row, ascending.

    mask: bool [B, n] with exactly `count` true entries a row. Returns (index int64 [B, count], slot int64 [B, n]), where
    slot is the rank of each true entry. A prefix sum and one scatter: linear in n, and no size depends on data.
    """
    slot = mask.to(torch.int64).cumsum(1) - 1
    batch, n = mask.shape
    order = torch.arange(n, device=mask.device).expand(batch, n)
    # False entries all land in one spare slot behind the end. (TensorRT wants the target no shorter than the source.)
    target = torch.where(mask, slot, n)
    index = torch.zeros(batch, n + 1, dtype=torch.int64, device=mask.device).scatter(1, target, order)
    return index[:, :count], slot


def earlier(n: int, device: torch.device) -> Tensor:
    """bool [n, n]: j < i."""
    order = torch.arange(n, device=device)
    return order.unsqueeze(0) < order.unsqueeze(1)


def rank(values: Tensor) -> Tensor:
    """Ascending rank int64 [B, n] of every value [B, n], counted from all pairs; equal values rank by index."""
    of_i, of_j = values.unsqueeze(2), values.unsqueeze(1)
    return count((of_j < of_i) | ((of_j == of_i) & earlier(values.shape[1], values.device))).long()


def lowest(values: Tensor, number: int) -> Tensor:
    """Indices int64 [B, number] of the `number` least values [B, n] of every row, ascending by index; ties go to the lower.

    Only the *values* of a top-k are used. Its indices come in an order that differs between engines where values are equal;
    how many values lie below the last one does not.
    """
    last = values.topk(number, largest=False).values[:, -1:]
    return compact(_up_to(values, last, number), number)[0]


def least(values: Tensor, number: Tensor) -> Tensor:
    """bool [..., n]: the `number` least of the values of every row that are not inf; ties go to the lower index.

    values: fp32 [..., n]; number: fp32 [..., 1], below 1 is none and beyond what is finite is all.
    """
    n = values.shape[-1]
    last = values.topk(n, largest=False).values.gather(-1, (number.long() - 1).clamp(0, n - 1))
    return _up_to(values, last.clamp_max(torch.finfo(torch.float32).max), number)


def _up_to(values: Tensor, last: Tensor, number: Tensor | int) -> Tensor:
    """What lies below `last`, and of what equals it the first entries, `number` together."""
    below, equal = values < last, values == last
    return below | (equal & (equal.float().cumsum(-1) <= number - count(below, keepdim=True)))
