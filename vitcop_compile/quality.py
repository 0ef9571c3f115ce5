"""What pruning changes in an answer, told without labels: distance of the first token's distribution to the dense model's,
agreement of the first tokens, and the saliency that is kept."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cache import CACHE_NAME, Selection
from .errors import InputError
from .optimized import OptimizedModel
from .passes import rewrite, tower_passes
from .policies import tap_of


@dataclass(frozen=True)
class Comparison:
    """Of every prompt of a request: kl [B], KL(dense || pruned) of the first token's distribution in nats; said int64 [B], how
    many tokens the dense model says, its end among them, `tokens` at most; agreed int64 [B], how many of these the pruned one
    says too, up to the first that differs; saliency [B], the share of its patches' saliency that the tokens which enter the
    language model hold, nan for a prompt without images, None where a method has none."""

    kl: Tensor
    agreed: Tensor
    said: Tensor
    tokens: int
    saliency: Tensor | None = None


@dataclass(frozen=True)
class Answer:
    """What a model says to a request. tokens: int64 [B, t], greedily, with anything behind an end; said: int64 [B], how many
    of them are up to the end, which counts; first: fp32 [B, vocab], log-probabilities of the first; kept: int64 [B, n], as
    `Selection` has it, None where nothing was pruned before the decoder."""

    tokens: Tensor
    said: Tensor
    first: Tensor
    kept: Tensor | None = None


@torch.no_grad()
def answer(model: Any, inputs: Mapping[str, Any], tokens: int = 8) -> Answer:
    """Asks a model, a stock one or of `optimize`, one request: `tokens` tokens at most. inputs: what a processor makes,
    input_ids int64 [B, T] among it. Raises InputError for a count below 1."""
    if tokens < 1:
        raise InputError(f"tokens={tokens} is below 1: compare 1 or more")
    settings = {"max_new_tokens": tokens, "do_sample": False, "num_beams": 1}
    out = model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    found = out.sequences[:, -len(out.logits) :]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ended = torch.isin(found, found.new_tensor(ends)) if ends else torch.zeros_like(found, dtype=torch.bool)
    said = (ended.long().cumsum(1) - ended.long() == 0).sum(1)
    selection = getattr(out[CACHE_NAME], "selection", Selection())
    return Answer(found, said, out.logits[0].float().log_softmax(-1), selection.kept)


def compare(dense: Any, pruned: OptimizedModel, inputs: Mapping[str, Any], tokens: int = 8) -> Comparison:
    """Asks both models one request, for `tokens` tokens at most: `distance` of their answers, and the saliency.

    dense: the stock model, or the same with nothing pruned through `optimize`. Raises InputError as `answer` does."""
    found, own = answer(dense, inputs, tokens), answer(pruned, inputs, tokens)
    kl, agreed = distance(found, own)
    return Comparison(kl, agreed, found.said.cpu(), tokens, _saliency(pruned, inputs, own.kept))


def distance(dense: Answer, pruned: Answer) -> tuple[Tensor, Tensor]:
    """(kl [B], agreed int64 [B]) of two answers to one request, as `Comparison` has them."""
    kl = (dense.first.exp() * (dense.first - pruned.first)).sum(-1).clamp_min(0)
    width = min(dense.tokens.shape[1], pruned.tokens.shape[1])
    same = dense.tokens[:, :width] == pruned.tokens[:, :width]
    same &= torch.arange(width, device=same.device) < dense.said.unsqueeze(1)
    return kl.cpu(), same.long().cumprod(1).sum(1).cpu()


@torch.no_grad()
def kept_saliency(pruned: OptimizedModel, inputs: Mapping[str, Any]) -> Tensor | None:
    """fp32 [B]: of the saliency of a prompt's patches, by the layer that scores them, the share of those that enter the
    language model, nan for a prompt without images; None for a method that scores none before that, and where tokens are put
    together behind the encoder, whose scores its programs keep to themselves. One more pass of the encoder, operator by
    operator, and of the request's first step."""
    return _saliency(pruned, inputs, None) if _scores(pruned) else None


def _scores(pruned: OptimizedModel) -> bool:
    stage = pruned.schedule.vision
    return stage is not None and tap_of(stage) is not None and not stage.also and not pruned.schedule.shape.packed


@torch.no_grad()
def _saliency(pruned: OptimizedModel, inputs: Mapping[str, Any], kept: Tensor | None) -> Tensor | None:
    """As `kept_saliency`, of what was kept already, if that is known."""
    if not _scores(pruned):
        return None
    layouts = pruned.layouts_of(**inputs)
    shares = torch.full((len(layouts),), torch.nan)
    if not any(layouts):
        return shares
    scores = _scored(pruned, inputs)
    kept = pruned(**inputs)[CACHE_NAME].selection.kept if kept is None else kept
    ends = list(itertools.accumulate(map(len, layouts)))
    for sample, (end, images) in enumerate(zip(ends, layouts, strict=True)):
        if images:
            score, own = torch.cat(scores[end - len(images) : end]), kept[sample]
            shares[sample] = score[own[own >= 0]].sum() / score.sum()
    return shares


def _scored(pruned: OptimizedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    """fp32 [candidates] of every image, in the order of the prompts."""
    host, programs = pruned.host, pruned.programs
    given = {name: inputs[name] for name in host.inputs if inputs.get(name) is not None}
    images = host.read(given, inputs["input_ids"], pruned.device, pruned.dtype)
    passes = tower_passes(pruned.schedule, programs.attn_implementation)
    framed = [layout[0].kind == "video" for layout in images.layouts]
    found: dict[int, Tensor] = {}
    for kind in set(framed):
        own, frames = [i for i, frame in enumerate(framed) if frame == kind], programs.family.frames
        patches, encoder = programs.family.patches, programs.captured.encoder
        if kind and frames is not None:
            patches, encoder = frames.patches, programs.captured.frames
        assert encoder is not None
        _, score, _ = rewrite(encoder, passes)(patches(images.pixels[own]))
        found |= dict(zip(own, score.float(), strict=True))
    return [found[i].flatten() for i in range(len(framed))]
