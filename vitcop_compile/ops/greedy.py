"""Choices made one by one, each by all before: an operator a choice, which backends that lack it have unrolled.

Every function returns bool [b, n]. On a tie the lower index goes first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def unit(rows: Tensor) -> Tensor:
    """rows [..., D] of length 1; zeros stay zeros."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(length > 0, length, 1)


def cosines(rows: Tensor, exact: bool = True) -> Tensor:
    """rows [b, n, D] -> [b, n, n], in fp64 where `exact`, else in fp32."""
    rows = unit(rows.to(torch.float64 if exact else torch.float32))
    return rows @ rows.transpose(1, 2)


def first_most(values: Tensor) -> Tensor:
    """One true entry a row: the first of the greatest values [b, n]."""
    n = values.shape[1]
    order = torch.arange(n, device=values.device)
    first = torch.where(values == values.amax(1, keepdim=True), order, n).amin(1, keepdim=True)
    return order == first


def _row_of(matrix: Tensor, chosen: Tensor) -> Tensor:
    """The row of matrix [b, n, n] that is true in chosen [b, n]."""
    return (matrix * chosen.unsqueeze(2).to(matrix.dtype)).sum(1)


def _farthest(distance: Tensor, start: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    nearest = torch.where(start.unsqueeze(1), distance, torch.inf).amin(2)
    chosen, free = start, ~start if real is None else real & ~start
    for _ in range(count):
        new = first_most(torch.where(free, nearest, -torch.inf))
        chosen, free = chosen | new, free & ~new
        nearest = torch.minimum(nearest, _row_of(distance, new))
    return chosen


def _most_volume(kernel: Tensor, count: int) -> Tensor:
    gain = kernel.diagonal(dim1=1, dim2=2)
    chosen = torch.zeros_like(gain, dtype=torch.bool)
    columns: list[Tensor] = []
    for _ in range(count):
        new = first_most(torch.where(chosen, -torch.inf, gain))
        chosen = chosen | new
        column = _row_of(kernel, new)
        if columns:
            before = torch.stack(columns, 1)  # [b, chosen, n]
            at = (before * new.unsqueeze(1).to(before.dtype)).sum(2, keepdim=True)
            column = column - (before * at).sum(1)
        own = (gain * new.to(gain.dtype)).sum(1, keepdim=True)
        # Once the chosen span everything nothing is left to gain, and rounding would decide.
        column = torch.where(own > 0, column / torch.where(own > 0, own, 1).sqrt(), 0)
        columns.append(column)
        gain = gain - column * column
    return chosen


def _most_coverage(similar: Tensor, weight: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    chosen = torch.zeros_like(weight, dtype=torch.bool)
    covered = torch.zeros_like(weight)
    for _ in range(count):
        added = (similar - covered.unsqueeze(2)).clamp_min(0)  # of every token (row) by every candidate
        if real is not None:
            added = added * real.unsqueeze(2).to(added.dtype)
        free = ~chosen if real is None else real & ~chosen
        new = first_most(torch.where(free, added.sum(1) * weight, -torch.inf))
        chosen = chosen | new
        covered = torch.maximum(covered, _row_of(similar, new))
    return chosen


@torch.library.custom_op("vitcop::farthest", mutates_args=())
def farthest(distance: Tensor, start: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    """`start`, and one by one `count` more, each the one whose nearest chosen one is farthest.

    distance: [b, n, n]; start: bool [b, n], one at least; real: bool [b, n], what may be chosen, None for all.
    """
    return _farthest(distance, start, count, real).clone()


@farthest.register_fake
def _(distance: Tensor, start: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    return torch.empty_like(start)


@torch.library.custom_op("vitcop::most_volume", mutates_args=())
def most_volume(kernel: Tensor, count: int) -> Tensor:
    """Greedily the `count` whose determinant of kernel [b, n, n] is greatest, by the incremental Cholesky factor of Chen et
    al. (arXiv 1709.05135, algorithm 1)."""
    return _most_volume(kernel, count)


@most_volume.register_fake
def _(kernel: Tensor, count: int) -> Tensor:
    return kernel.new_empty(kernel.shape[:2], dtype=torch.bool)


@torch.library.custom_op("vitcop::most_coverage", mutates_args=())
def most_coverage(similar: Tensor, weight: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    """Greedily the `count` of greatest gain: what they add to each token's greatest similarity to a chosen one, 0 at first,
    summed and weighed.

    similar: [b, n, n]; weight: [b, n]; real: bool [b, n], tokens that are no padding, None for all.
    """
    return _most_coverage(similar, weight, count, real)


@most_coverage.register_fake
def _(similar: Tensor, weight: Tensor, count: int, real: Tensor | None = None) -> Tensor:
    return torch.empty_like(weight, dtype=torch.bool)


# operator -> what it is, step by step.
LOOPS: dict[torch._ops.OpOverload, Callable[..., Tensor]] = {
    torch.ops.vitcop.farthest.default: _farthest,
    torch.ops.vitcop.most_volume.default: _most_volume,
    torch.ops.vitcop.most_coverage.default: _most_coverage,
}
