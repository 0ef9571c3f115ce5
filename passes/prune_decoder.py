"""Prunes the visual tokens at the entry of decoder layers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..errors import RewriteError
from ..ops import keep_lowest, key_norm, merge_by_cluster
from ..ops.indexing import compact, take_rows
from ..schedule import Stage
from .token_axis import anchors, content_beside, finish, layer_exit, output_node, placeholder, reroute


@dataclass(frozen=True)
class Policy:
    """reduce(hidden [B, n, D], saliency [B, n], labels [B, n], budget, images) -> (hidden [B, budget, D], index [B, budget]).

    images: n holds the tokens of so many images; merges: whether the rows it returns are more than a selection of those
    it gets.
    """

    reduce: Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
    merges: bool


POLICIES = {
    "merge_by_cluster": Policy(merge_by_cluster, merges=True),
    "keep_lowest": Policy(lambda hidden, saliency, _, budget, images: keep_lowest(hidden, saliency, budget), merges=False),
}


def prune_tokens(
    hidden: Tensor, key: Tensor, visual: Tensor, labels: Tensor, *, policy: str, tokens: int, images: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduces the visual tokens of a prompt to `tokens`; text is never touched.

    hidden: [B, t, D]; key: [B, kv_heads, t, hd] of the layer before; visual: int64 [B, n], the visual rows, ascending;
    labels: int64 [B, n], their clusters; images: n holds the tokens of so many. Returns (hidden [B, t', D], keep int64
    [B, t']: the rows that stay, visual int64 [B, tokens]: the visual rows of the new sequence, index int64 [B, tokens]: which
    of the n they are).
    """
    batch, length, _ = hidden.shape
    saliency = key_norm(key).gather(1, visual)
    reduced, index = POLICIES[policy].reduce(take_rows(hidden, visual), saliency, labels, tokens, images)
    chosen = visual.gather(1, index)
    mask = torch.ones(batch, length, dtype=torch.bool, device=hidden.device)
    mask = mask.scatter(1, visual, torch.zeros_like(visual, dtype=torch.bool))
    mask = mask.scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    keep, slot = compact(mask, length - visual.shape[1] + tokens)
    new_visual = slot.gather(1, chosen)
    if not POLICIES[policy].merges:
        return take_rows(hidden, keep), keep, new_visual, index
    # Merged rows stand behind the old ones for a moment, so that every row is moved once.
    source = keep.scatter(1, new_visual, torch.arange(length, length + tokens, device=keep.device).expand_as(new_visual))
    return take_rows(torch.cat((hidden, reduced), 1), source), keep, new_visual, index


def prune_decoder(module: fx.GraphModule, stages: tuple[Stage, ...]) -> fx.GraphModule:
    """Inserts one `prune_tokens` node before each stage's layer and moves the rest of the graph onto the shorter axis.

    Adds the inputs `visual` and `labels` (int64 [B, n]) and returns, behind the graph's own result, each stage's `index`.
    Skipped without stages. Raises RewriteError if a stage's layer is not inside the decoder, stages do not ascend, or its
    policy is unknown.
    """
    graph = module.graph
    layers = len(anchors(graph))
    before = 0
    for stage in stages:
        if not before < stage.layer < layers:
            raise RewriteError(
                f"stage at layer {stage.layer} is out of place: stages ascend between layer {before + 1} and {layers - 1}"
            )
        if stage.policy not in POLICIES:
            raise RewriteError(f"policy {stage.policy!r} is unknown: use one of {', '.join(POLICIES)}")
        before = stage.layer
    if not stages:
        return module
    visual = placeholder(graph, "visual")
    labels = placeholder(graph, "labels")
    # Found and checked before anything is inserted: a pruned table depends on content.
    cuts = [layer_exit(graph, stage.layer - 1) for stage in stages]
    for stage, cut in zip(stages, cuts, strict=True):
        beside = content_beside(graph, cut) if POLICIES[stage.policy].merges else []
        if beside:
            names = ", ".join(node.name for node in beside)
            raise RewriteError(
                f"layer {stage.layer - 1} has no single exit: {names} cross beside {cut.name}, and {stage.policy} merges "
                "tokens of the hidden state only"
            )
    selections = []
    for stage, cut in zip(stages, cuts, strict=True):
        key = anchors(graph)[stage.layer - 1].args[1]
        with graph.inserting_after(cut):
            pruned = graph.call_function(
                prune_tokens, (cut, key, visual, labels), {"policy": stage.policy, "tokens": stage.tokens}
            )
        parts = []
        after = pruned
        for i in range(4):
            with graph.inserting_after(after):
                after = graph.call_function(operator.getitem, (pruned, i))
            parts.append(after)
        hidden, keep, visual_next, index = parts
        hidden.meta["val"] = cut.meta["val"]
        reroute(graph, cut, hidden, keep, renumber=stage.positions == "index")
        with graph.inserting_after(index):
            labels = graph.call_function(torch.gather, (labels, 1, index))
        visual = visual_next
        selections.append(index)
    output = output_node(graph)
    output.args = ((*output.args[0], *selections),)  # type: ignore[misc]
    return finish(module)
