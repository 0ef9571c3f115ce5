"""Density-peaks clustering of visual tokens, without a loop over data and without an [n, n, d] tensor."""

import math

import torch
from torch import Tensor

from .indexing import lowest, rank


def density_peaks(
    features: Tensor,
    positions: Tensor | None,
    centers: int,
    density_width: float = 8.0,
    reach: float = 0.6,
    exact: bool = True,
) -> Tensor:
    """Labels of a density-peaks clustering restricted to spatial neighbours (ViTCoP, vision stage).

    features: [B, n, d]; positions: [B, n, 2] in units of the image side, of the frames of a clip [B, n, 3] with time in the
    same units, None for no spatial limit; centers: clusters, 1 to
    n; density_width: of the density kernel, in feature distance; reach: that of a neighbour, in units of the image side.
    Returns int64 [B, n]: 0 to centers - 1, by descending delta * rho of the center, or -1 for a point whose chain of nearest
    denser neighbours ends in a cycle. Raises ValueError for centers out of range. Computed in fp32 whatever the input, but for
    one matmul that `exact` carries in fp64 on a CPU; without it, in engines without, equal points may count as unequal.
    """
    n = features.shape[1]
    if not 1 <= centers <= n:
        raise ValueError(f"centers={centers} is out of range for {n} tokens: choose 1 to {n}")
    distance = _distances(features, exact)
    rho = torch.exp(-((distance / density_width) ** 2)).sum(-1)
    candidate = rho.unsqueeze(1) >= rho.unsqueeze(2)  # [b, i, j]: j is at least as dense as i
    if positions is not None:
        candidate = candidate & (_spatial_distances(positions) <= reach)
    order = torch.arange(n, device=features.device)
    diagonal = order.unsqueeze(1) == order
    apart = distance.masked_fill(~candidate | diagonal, math.inf)
    # Two reductions rather than min(dim), whose index on ties is unspecified and which TensorRT cannot convert.
    delta = apart.amin(-1)
    nearest = torch.where(apart == delta.unsqueeze(-1), order, n).amin(-1)
    nearest = torch.where(torch.isinf(delta), 0, nearest)

    prominence = -(delta * rho)
    peaks = lowest(prominence, centers)
    label = torch.full_like(nearest, -1).scatter(1, peaks, rank(prominence.gather(1, peaks)))
    # A center is its own parent; after ceil(log2 n) doublings every pointer has reached the end of its chain.
    parent = torch.where(label >= 0, order, nearest)
    for _ in range(max(1, (n - 1).bit_length())):
        parent = parent.gather(1, parent)
    return label.gather(1, parent)


def _distances(features: Tensor, exact: bool) -> Tensor:
    """sqrt(|xi - xj|^2 + 1e-8) as fp32 [B, n, n] with a zero diagonal."""
    on_gpu = features.device.type == "cuda"
    squared = _squared_by_differences(features) if exact and on_gpu else _squared_by_products(features, exact)
    order = torch.arange(features.shape[1], device=features.device)
    off = (order.unsqueeze(1) != order).float()
    return torch.sqrt(squared + 1e-8) * off


def _squared_by_differences(features: Tensor) -> Tensor:
    """|xi - xj|^2 in fp32: exact for equal rows. GPUs carry fp64 at as little as 1/64 of their rate, and differences of rows
    in a kernel that writes no [n, n, d]."""
    wide = features.float()
    return torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") ** 2


def _squared_by_products(features: Tensor, exact: bool) -> Tensor:
    """|xi - xj|^2 as fp32 [B, n, n], by a product.

    The Gram form costs one matmul where differences cost [n, n, d]. It cancels, so it is carried in fp64, or centred where
    there is none, and what is left of a distance at the level of rounding is none: the ties of the method depend on equal
    rows being equal.
    """
    wide = features.double() if exact else features.float() - features.float().mean(1, keepdim=True)
    gram = wide @ wide.transpose(-1, -2)
    square = gram.diagonal(dim1=-2, dim2=-1)
    both = square.unsqueeze(-1) + square.unsqueeze(-2)
    squared = both - 2 * gram
    return torch.where(squared < both * (1e-13 if exact else 2e-6), 0.0, squared).float()


def _spatial_distances(positions: Tensor) -> Tensor:
    """Euclidean distances [B, n, n] of points [B, n, 2 or 3], fp32."""
    first, *others = (axis.unsqueeze(-1) - axis.unsqueeze(-2) for axis in positions.float().unbind(-1))
    return torch.sqrt(sum((axis * axis for axis in others), first * first))
