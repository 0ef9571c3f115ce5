"""What a scheduler is asked for and what it answers, as plain data: neither HTTP nor programs are known here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from ..errors import InputError, VitcopError


@dataclass(frozen=True)
class Sampling:
    """How the answers to one prompt are drawn, by the names and the meaning that transformers' `generate` has for them.

    temperature: 0 is greedy, else 1e-6 at least; top_p, top_k: 1 and 0 keep all tokens; presence_penalty, frequency_penalty:
    OpenAI's, taken off the logits of tokens that the answer holds; stop_ids: tokens that end an answer beside the model's own
    end, which `ignore_end` leaves out; seed: of random draws, by chance if None, answer number i draws with seed + i;
    logprobs: how many of the likeliest tokens are told with the log-probability of the chosen, None for neither; n: answers.

    Raises InputError for values out of range.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop_ids: tuple[int, ...] = ()
    ignore_end: bool = False
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        within = {
            "max_new_tokens": (1, None),
            "min_new_tokens": (0, self.max_new_tokens),
            "temperature": (0, 100),
            "top_p": (0, 1),
            "top_k": (0, None),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
            "logprobs": (0, 20),
            "n": (1, None),
        }
        for name, (least, most) in within.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not (least <= value and (most is None or value <= most)):  # NaN is neither
                raise InputError(f"{name}={value} is out of range: from {least}" + (f" to {most}" if most is not None else ""))
        if 0 < self.temperature < 1e-6:
            raise InputError(
                f"temperature={self.temperature} is between 0 and 1e-6, where logits overflow: pass 0, which is greedy"
            )
        for name in ("top_p", "repetition_penalty"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)} is not above 0")


class Token(NamedTuple):
    """One more token of answer number `choice`. logprob: its log-probability before temperature and penalties, where it was
    asked for, and top: (id, log-probability) of the likeliest, in order."""

    choice: int
    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Finished(NamedTuple):
    """The end of answer number `choice`. The token that stopped it is told before, as a `Token`."""

    choice: int
    reason: Literal["stop", "length", "cancelled"]


class Failed(NamedTuple):
    """The end of all answers to the prompt."""

    error: Exception


Event = Token | Finished | Failed


class Overloaded(VitcopError):
    """The queue is full, or the scheduler is closing. retry_after: seconds until it is likely not to be."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Ticket(Protocol):
    """A request that was submitted. text_tokens: of its prompt; image_tokens: placeholders of its images."""

    text_tokens: int
    image_tokens: int

    def cancel(self, choice: int | None = None) -> None:
        """Ends answer number `choice`, or all, if they have not ended, with `Finished(choice, "cancelled")`. From any thread,
        any number of times."""
        ...


class Scheduler(Protocol):
    """What serves requests, of one model. `submit` may be called from any thread."""

    def submit(self, inputs: Mapping[str, Any], sampling: Sampling, listen: Callable[[Event], None]) -> Ticket:
        """Queues a prompt: what the model's processor makes of it, `input_ids` int64 [1, T] and what belongs to images.

        listen: told of every event in order, from another thread than the caller's, which it must not hold up. Raises
        InputError for a prompt or settings that the programs cannot take, Overloaded where the queue is full; then nothing
        is told.
        """
        ...

    def counts(self) -> Mapping[str, float]:
        """What there is to measure now: "slots", "occupied", "queued", "oldest_queued_s", "heartbeat_age_s", "stopped", 1 once
        a defect has ended it, and totals since the start: "submitted", "finished", "cancelled", "failed", "rejected",
        "prefills", "decode_steps", "padded_rows", "text_rows", "feature_hits", "feature_misses"."""
        ...

    def close(self, drain: bool = True) -> None:
        """Takes nothing more. drain: what was admitted or queued is served first, else cancelled. Returns when it is done."""
        ...
