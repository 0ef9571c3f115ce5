"""Prunes the patches after one layer of the vision encoder, and clusters those that stay."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

from ..ops import cls_saliency, density_peaks
from ..ops.indexing import take_rows
from ..ops.saliency import keep_highest
from ..schedule import VisionStage
from .token_axis import anchors, finish, layer_exit, output_node, reroute


def prune_patches(
    hidden: Tensor, query: Tensor, key: Tensor, scale: float, *, tokens: int, prefix: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the prefix and the `tokens` patches with the most CLS attention, in raster order.

    hidden: [B, prefix + patches, C]; query, key: [B, heads, prefix + patches, hd] of the scoring layer. Returns
    (hidden [B, prefix + tokens, C], keep int64 [B, prefix + tokens], kept patches int64 [B, tokens]).
    """
    kept, keep = keep_highest(cls_saliency(query, key, scale, prefix), tokens, prefix)
    return take_rows(hidden, keep), keep, kept


def cluster_patches(
    key: Tensor,
    kept: Tensor,
    *,
    grid: tuple[int, int],
    prefix: int,
    centers: int,
    density_width: float,
    reach: float,
    exact: bool,
) -> Tensor:
    """Labels int64 [B, n] of the kept patches [B, n], clustered by the keys [B, heads, t, hd] of the scoring layer."""
    features = take_rows(key.transpose(1, 2).flatten(2), kept + prefix)
    return density_peaks(features, patch_positions(kept, grid), centers, density_width, reach, exact)


def patch_positions(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """(row, column) of raster indices [B, n] as fp32 [B, n, 2], in units of the longer side of `grid`."""
    columns = grid[1]
    return torch.stack((index // columns, index % columns), -1).float() / max(grid)


def prune_encoder(
    module: fx.GraphModule, stage: VisionStage | None, grid: tuple[int, int], prefix: int, exact: bool = True
) -> fx.GraphModule:
    """Inserts `prune_patches` and `cluster_patches` after layer `stage.layer`; later layers run on kept tokens only.

    The graph then returns (hidden [B, n, C] without prefix, kept int64 [B, n], labels int64 [B, n]). Without a stage it
    returns (hidden [B, patches, C],). Raises RewriteError if the layer does not exist or has no single exit.
    """
    graph = module.graph
    output = output_node(graph)
    if stage is None:
        _drop_prefix(graph, output, prefix, ())
        return finish(module)
    cut = layer_exit(graph, stage.layer)
    query, key, _, scale = anchors(graph)[stage.layer].args[:4]
    with graph.inserting_after(cut):
        pruned = graph.call_function(prune_patches, (cut, query, key, scale), {"tokens": stage.tokens, "prefix": prefix})
    with graph.inserting_after(pruned):
        hidden = graph.call_function(operator.getitem, (pruned, 0))
    with graph.inserting_after(hidden):
        keep = graph.call_function(operator.getitem, (pruned, 1))
    with graph.inserting_after(keep):
        kept = graph.call_function(operator.getitem, (pruned, 2))
    hidden.meta["val"] = cut.meta["val"]
    reroute(graph, cut, hidden, keep, renumber=False)
    with graph.inserting_before(output):
        settings: Any = {
            "grid": grid,
            "prefix": prefix,
            "centers": stage.centers,
            "density_width": stage.density_width,
            "reach": stage.reach,
            "exact": exact,
        }
        labels = graph.call_function(cluster_patches, (key, kept), settings)
    _drop_prefix(graph, output, prefix, (kept, labels))
    return finish(module)


def _drop_prefix(graph: fx.Graph, output: fx.Node, prefix: int, others: tuple[fx.Node, ...]) -> None:
    (hidden,) = cast(tuple[fx.Node, ...], output.args[0])
    with graph.inserting_before(output):
        patches = graph.call_function(operator.getitem, (hidden, (slice(None), slice(prefix, None))))
    output.args = ((patches, *others),)
