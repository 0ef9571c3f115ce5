"""What pruning changes in an answer, told without labels: distance of the first token's distribution to the dense model's,
agreement of the first tokens, and the saliency that is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .optimized import OptimizedModel
from .passes import rewrite, tower_passes
from .policies import tap_of


@dataclass(frozen=True)
class Comparison:
    """Of every prompt of a request: kl [B], KL(dense || pruned) of the first token's distribution in nats; agreed int64 [B],
    how many of the first `tokens` greedy ones are the dense model's, up to the first that differs; saliency [B], the share of
    its patches' saliency that the tokens which enter the language model hold, None where a method has none."""

    kl: Tensor
    agreed: Tensor
    tokens: int
    saliency: Tensor | None = None


@torch.no_grad()
def compare(dense: Any, pruned: OptimizedModel, inputs: Mapping[str, Any], tokens: int = 8) -> Comparison:
    """Asks both models one request, greedily, for `tokens` tokens.

    dense: the stock model, or the same with nothing pruned through `optimize`; inputs: what a processor makes, input_ids int64
    [B, T] among it. Raises InputError for a count below 1."""
    if tokens < 1:
        raise InputError(f"tokens={tokens} is below 1: compare 1 or more")
    answers = [_answer(model, inputs, tokens) for model in (dense, pruned)]
    (said, logits), (found, own) = answers
    first, other = (values.float().log_softmax(-1) for values in (logits, own))
    kl = (first.exp() * (first - other)).sum(-1).clamp_min(0)
    agreed = (said == found).long().cumprod(1).sum(1)
    return Comparison(kl.cpu(), agreed.cpu(), tokens, kept_saliency(pruned, inputs))


def _answer(model: Any, inputs: Mapping[str, Any], tokens: int) -> tuple[Tensor, Tensor]:
    """(tokens int64 [B, tokens], the first one's logits [B, vocab])."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    return out.sequences[:, -tokens:], out.logits[0]


@torch.no_grad()
def kept_saliency(pruned: OptimizedModel, inputs: Mapping[str, Any]) -> Tensor | None:
    """fp32 [B]: of the saliency of a prompt's patches, by the layer that scores them, the share of those that enter the
    language model; None for a method that scores none before that, and where tokens are put together behind the encoder, whose
    scores its programs keep to themselves. One more pass of the encoder, operator by operator, and of the request's first
    step."""
    schedule = pruned.schedule
    stage = schedule.vision
    if stage is None or tap_of(stage) is None or stage.also:
        return None
    programs = pruned.programs
    if programs.captured.encoder is None or schedule.shape.packed:
        return None
    pixels = inputs[pruned.host.inputs[0]]
    tower = rewrite(programs.captured.encoder, tower_passes(schedule, programs.attn_implementation))
    _, score, _ = tower(programs.family.patches(pixels.to(pruned.device, pruned.dtype)))
    kept = pruned(**inputs).past_key_values.selection.kept
    share = score.flatten().reshape(kept.shape[0], -1)
    held = torch.where(kept >= 0, share.gather(1, kept.clamp_min(0)), 0)
    return (held.sum(1) / share.sum(1)).cpu()
