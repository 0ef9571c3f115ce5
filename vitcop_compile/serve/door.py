"""Models behind one door: which there are, what a request may be, and whether it is still open."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import anyio

from ..errors import ConfigError
from .answers import TokenTexts
from .metrics import Metrics
from .pictures import Pictures
from .prompts import Prompts
from .refusals import Refused
from .requests import Scheduler
from .streams import Stream


@dataclass(frozen=True)
class Served:
    """A model. max_new_tokens: the most of an answer, which a chat gets where it asks for no number; ends: token ids that end
    an answer by themselves; queue: prompts that may wait, where it is known: while so many do, requests are refused before
    their pictures are decoded for nothing."""

    name: str
    scheduler: Scheduler
    prompts: Prompts
    max_new_tokens: int
    ends: frozenset[int] = frozenset()
    queue: int | None = None

    @cached_property
    def texts(self) -> TokenTexts:
        """Texts of its tokens."""
        return TokenTexts(self.prompts.tokenizer)


@dataclass(frozen=True)
class Limits:
    """What a request may be. body: bytes; body_seconds: in which it has to come; answers: prompts times `n`; preparing:
    requests whose pictures are loaded and whose text is tokenized, or that wait for it, beyond which others are refused;
    stalled: seconds without a round of a step thread after which /health says so.

    Raises ConfigError for values that allow nothing.
    """

    body: int = 20 << 20
    body_seconds: float = 60.0
    answers: int = 16
    preparing: int = 64
    stalled: float = 60.0
    pictures: Pictures = field(default_factory=Pictures)

    def __post_init__(self) -> None:
        for name in ("body", "body_seconds", "answers", "preparing", "stalled"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)} is not above 0")


class Door:
    """Models, limits, and the requests that are inside. Its attributes are the event loop's, which answers them.

    Raises ConfigError for no model, and for two of one name.
    """

    def __init__(self, models: Sequence[Served], limits: Limits | None = None, clock: Callable[[], float] = time.monotonic):
        names = [model.name for model in models]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"models are named {', '.join(names) or 'nothing'}: give one or more, each a name of its own")
        self.models = {model.name: model for model in models}
        self.limits, self.clock = limits or Limits(), clock
        self.created = int(time.time())
        self.closing = self.cancelled = False
        self.active = self.preparing = 0
        self.streams: set[Stream] = set()
        self.metrics = Metrics(self.counts)
        # Hosts that are slow to send a picture hold up no text.
        workers = min(4, os.cpu_count() or 1)
        self.workers, self.fetchers = anyio.CapacityLimiter(workers), anyio.CapacityLimiter(4 * workers)

    def model(self, name: str) -> Served:
        """The model of that name. Raises Refused, 404."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"the model {name[:80]!r} is not served here: these are {known}", "model", "model_not_found")
        return self.models[name]

    def counts(self) -> dict[str, Mapping[str, float]]:
        """Of each model's scheduler."""
        return {name: model.scheduler.counts() for name, model in self.models.items()}

    @property
    def stopped(self) -> list[str]:
        """Models whose scheduler has stopped for good."""
        return [name for name, counts in self.counts().items() if counts.get("stopped")]

    @property
    def stalled(self) -> list[str]:
        """Models whose step thread has not gone round for too long."""
        return [name for name, counts in self.counts().items() if counts["heartbeat_age_s"] > self.limits.stalled]

    @property
    def drained(self) -> bool:
        """Whether it is closing, and nobody is inside."""
        return self.closing and not self.active

    def shut(self) -> None:
        """Lets nobody in any more; who is inside is answered."""
        self.closing = True

    def cancel(self) -> None:
        """Cancels what is inside; streams end with an error event."""
        self.closing = self.cancelled = True
        for stream in tuple(self.streams):
            stream.cancel()

    def close(self) -> None:
        """Closes the schedulers, once they have served what they hold, or at once after `cancel`. Blocks; from any thread."""
        for model in self.models.values():
            model.scheduler.close(drain=not self.cancelled)
