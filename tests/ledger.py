"""What tests of the scheduler share: programs that say what they are told to, a clock that is set, and a ledger of events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vitcop_compile import InputError
from vitcop_compile.serve.requests import Event, Failed, Finished, Sampling, Token
from vitcop_compile.serve.scheduler import SlotScheduler

WORDS, END = 20, 1  # END ends an answer
PREFILL, DECODE = 1 / 16, 1 / 64  # seconds; sums of such fractions are exact


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Said:
    """A request to `Script`: the tokens of each answer."""

    key: Any
    says: list[int]
    number: int = 0  # as the test counts
    text_tokens: int = 3
    image_tokens: int = 0
    ids: Tensor = field(default_factory=lambda: torch.tensor([[2, 3, 4]]))


class Script:
    """Programs of `count` slots that say what each request is made of, take time on `clock`, and fail when told to; whatever
    a scheduler may not do is an AssertionError.

    log: ("prefill", requests, whether anything was being decoded) and ("decode",) in order.
    """

    ends, device = (END,), torch.device("cpu")

    def __init__(self, count: int, clock: Clock, batches: tuple[int, ...] = (1, 2, 4)):
        self.count, self.clock, self.batches = count, clock, batches
        self.holds: list[list[int] | None] = [None] * count
        self.log: list[tuple[Any, ...]] = []
        self.failing: set[str] = set()
        self.cleared = 0

    def examine(self, inputs: Mapping[str, Any], sampling: Sampling) -> Said:
        if sampling.n > self.count:
            raise InputError("too many answers")
        return Said(inputs["key"], list(inputs["says"]), inputs.get("number", 0))

    def prefill(self, requests: Sequence[Said], places: Sequence[Sequence[int]]) -> Tensor:
        taken = [slot for slots in places for slot in slots]
        assert len(set(taken)) == len(taken) and len(requests) == len(places)
        assert all(self.holds[slot] is None for slot in taken), "a slot is taken twice"
        assert len({request.key for request in requests}) == 1
        assert len(requests) in self.batches or len(requests) < self.batches[0]
        busy = any(held is not None for held in self.holds)
        self.log.append(("prefill", list(requests), busy))
        self.clock.now += PREFILL
        for request, slots in zip(requests, places, strict=True):
            for slot in slots:
                self.holds[slot] = list(request.says)
        if "prefill" in self.failing:
            raise RuntimeError("prefill")
        return _logits([request.says[0] for request in requests])

    def decode(self, tokens: Sequence[int]) -> Tensor:
        self.log.append(("decode",))
        self.clock.now += DECODE
        if "decode" in self.failing:
            raise RuntimeError("decode")
        nexts = []
        for token, held in zip(tokens, self.holds, strict=True):
            assert token == (held.pop(0) if held else 0), "a slot is fed what it did not say"
            nexts.append(held[0] if held else 0)
        return _logits(nexts)

    def free(self, slots: Sequence[int]) -> None:
        assert slots and len(set(slots)) == len(slots)
        for slot in slots:
            assert self.holds[slot] is not None, "a slot is let go twice"
            self.holds[slot] = None

    def clear(self) -> None:
        self.holds = [None] * self.count
        self.cleared += 1

    def counts(self) -> dict[str, float]:
        return {"padded_rows": 0, "text_rows": 0, "feature_hits": 0, "feature_misses": 0}


def _logits(tokens: Sequence[int]) -> Tensor:
    """Of which `tokens` are the largest; negative ones are no numbers."""
    logits = torch.nn.functional.one_hot(torch.tensor(tokens).clamp_min(0), WORDS).float()
    logits[torch.tensor(tokens) < 0] = torch.nan
    return logits


@dataclass
class Heard:
    """Listens to one request, and checks what it hears: nothing after an end."""

    sampling: Sampling
    tokens: list[list[Token]] = field(init=False)
    ends: list[str] = field(init=False)
    error: Exception | None = None
    hook: Callable[[Event], None] | None = None

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in range(self.sampling.n)]
        self.ends = ["" for _ in range(self.sampling.n)]

    def __call__(self, event: Event) -> None:
        if self.hook is not None:
            self.hook(event)
        match event:
            case Token(choice=choice):
                assert not self.ends[choice]
                self.tokens[choice].append(event)
            case Finished(choice=choice, reason=reason):
                assert not self.ends[choice]
                self.ends[choice] = reason
            case Failed(error=error):
                assert not self.over
                self.ends, self.error = [end or "failed" for end in self.ends], error

    @property
    def over(self) -> bool:
        return all(self.ends)

    def ids(self, choice: int = 0) -> list[int]:
        return [token.id for token in self.tokens[choice]]


def ask(scheduler: SlotScheduler, inputs: Mapping[str, Any], hook: Callable[[Event], None] | None = None, **settings: Any):
    """(ticket, what is heard) of a request with the sampling `settings`."""
    heard = Heard(Sampling(**settings), hook=hook)
    return scheduler.submit(inputs, heard.sampling, heard), heard


def serve(scheduler: SlotScheduler, rounds: int = 10_000) -> int:
    """Rounds until there is nothing to do; how many those were."""
    for done in range(rounds):
        if scheduler.step() is None and not scheduler.counts()["queued"]:
            return done
    raise AssertionError("the scheduler does not come to an end")


def says(length: int, key: Any = "a", ends: bool = False, first: int = 2) -> dict[str, Any]:
    return {"key": key, "says": [*(first + i % 9 for i in range(length)), *([END] if ends else [5, 6] * 9)]}
