"""How one answer is drawn, by transformers' own logits processors; an answer's draws depend on nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..errors import VitcopError
from .requests import Sampling


class Drawn(NamedTuple):
    """A token, with what was asked for of log-probabilities; or why there is none."""

    id: int = 0
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: Exception | None = None


class SaidPenalty(LogitsProcessor):
    """OpenAI's presence and frequency penalties: taken off the logits of tokens behind the first `prompt`, the one once, the
    other as often as they were said."""

    def __init__(self, presence: float, frequency: float, prompt: int):
        self._presence, self._frequency, self._prompt = presence, frequency, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        said = input_ids[:, self._prompt :]
        times = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self._presence * (times > 0) - self._frequency * times


class Draw:
    """Draws answer number `choice` to the prompt `ids` int64 [1, T] of a model that ends by `ends`.

    plain: whether the likeliest token is all that is asked for; stops: tokens that end it. Processors come in the order of
    transformers' `generate`, and a seed draws what `torch.manual_seed` makes that draw: of answer number i, its seed plus i.
    """

    def __init__(self, sampling: Sampling, ids: Tensor, ends: Sequence[int], choice: int, device: torch.device):
        length = ids.shape[1]
        self.stops = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_end else frozenset(ends))
        self._logprobs = sampling.logprobs
        self._steps = LogitsProcessorList(_processors(sampling, length, sorted(self.stops), device))
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator(device)
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed((sampling.seed + choice) % 2**64)
        self.plain = not self._steps and self._generator is None
        self.quiet = self.plain and self._logprobs is None
        self._said = length
        if not self.plain:
            self._ids = torch.zeros(1, length + sampling.max_new_tokens, dtype=torch.int64, device=device)
            self._ids[:, :length].copy_(ids)

    def next(self, logits: Tensor, likeliest: int) -> Drawn:
        """The next token by logits [1, vocab], of which `likeliest` is the largest. Raises VitcopError where there is none."""
        whole = logits.float()
        token = likeliest
        if not self.plain:
            scores = self._steps(self._ids[:, : self._said], whole)  # type: ignore[arg-type]
            if self._generator is None:
                chosen = scores.argmax(-1, keepdim=True)
            else:
                odds = scores.softmax(-1)
                if not bool(odds.isfinite().all()):
                    raise VitcopError("penalties leave no token that could be drawn: make them smaller")
                chosen = torch.multinomial(odds, 1, generator=self._generator)
            self._ids[:, self._said : self._said + 1].copy_(chosen)
            self._said += 1
            token = int(chosen)
        if self._logprobs is None:
            return Drawn(token)
        logs = whole.log_softmax(-1)[0]
        values, names = logs.topk(min(self._logprobs, len(logs)))
        top = tuple(zip(names.tolist(), values.tolist(), strict=True))
        return Drawn(token, float(logs[token]), top)


def _processors(sampling: Sampling, length: int, stops: list[int], device: torch.device) -> list[LogitsProcessor]:
    """What changes the logits of an answer to a prompt of `length` tokens, in order."""
    found: list[LogitsProcessor] = []
    if sampling.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.presence_penalty or sampling.frequency_penalty:
        found.append(SaidPenalty(sampling.presence_penalty, sampling.frequency_penalty, length))
    if sampling.min_new_tokens and stops:
        ends = torch.tensor(stops, device=device)
        found.append(MinNewTokensLengthLogitsProcessor(length, sampling.min_new_tokens, ends, str(device)))  # type: ignore[arg-type]
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            found.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
    return found


def draw(logits: Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> list[Drawn]:
    """The next token of each of `draws`, by its row of logits [B, vocab]. Of those that only want the likeliest token, one
    argmax of the batch is all; an error of one is its own."""
    values, ids = logits.max(-1)  # NaN is larger than anything
    largest, likeliest = values.tolist(), ids.tolist()
    found = []
    for row, own in zip(rows, draws, strict=True):
        if not largest[row] < float("inf"):
            found.append(Drawn(error=VitcopError("the model's logits are not finite: nothing can be drawn from them")))
        elif own.quiet:
            found.append(Drawn(likeliest[row]))
        else:
            try:
                found.append(own.next(logits[row : row + 1], likeliest[row]))
            except Exception as error:
                found.append(Drawn(error=error))
    return found
