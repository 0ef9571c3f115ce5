"""An engine replica's side: schedulers by model, whose tokens leave in chunks; and what such replicas say, as plain data."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, VitcopError
from .requests import Event, Failed, Finished, Overloaded, Sampling, Scheduler

# Seconds between two chunks of one answer. A stream of objects between processes carries about a thousand a second, and each
# costs both sides a fraction of a millisecond: a token alone is too small a parcel.
EVERY = 0.03


class Accepted(NamedTuple):
    """A replica queues a prompt; the tokens are as in `Ticket`."""

    replica: str
    text_tokens: int
    image_tokens: int


class Declined(NamedTuple):
    """A replica does not take a prompt: it has no room now, and says for how many seconds, or cannot ever."""

    replica: str
    why: Literal["overloaded", "input"]
    message: str
    retry_after: float = 0.0


Chunk = tuple[Event, ...]
Said = Accepted | Declined | Chunk


def pack(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors as arrays, which travel between processes without a copy in Python."""
    return {name: value.numpy() if isinstance(value, Tensor) else value for name, value in inputs.items()}


def unpack(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What `pack` was given. Arrays that came through shared memory are copied: their own may not be written."""
    return {
        name: torch.from_numpy(value if value.flags.writeable else value.copy()) if isinstance(value, np.ndarray) else value
        for name, value in inputs.items()
    }


class Coalescer:
    """Events as they come, taken in chunks: the first at once, then those of `every` seconds together, and an end at once.

    `add` may be called from any thread. All times are the caller's clock's.
    """

    def __init__(self, answers: int, every: float = EVERY):
        self._every, self._open = every, answers
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self._taken: float | None = None
        self.over = False

    def add(self, event: Event) -> bool:
        """Takes an event; whether somebody may be waiting for it: it is the first of a chunk, or the last of all."""
        with self._lock:
            self._events.append(event)
            if isinstance(event, Failed):
                self._open = 0
            elif isinstance(event, Finished):
                self._open -= 1
            self.over = self._open <= 0
            return self.over or len(self._events) == 1

    def due(self, now: float) -> float | None:
        """Seconds until there is a chunk to take, 0 for now, None as long as nothing has come."""
        with self._lock:
            if not self._events:
                return None
            if self.over or self._taken is None:
                return 0.0
            return max(0.0, self._taken + self._every - now)

    def take(self, now: float) -> Chunk:
        """All that has come."""
        with self._lock:
            found, self._events, self._taken = tuple(self._events), [], now
            return found


class Replica:
    """Schedulers by the names of their models. name: of the replica itself; every: seconds a chunk.

    clock, pause: seconds, and a wait for so many of them or for an event, whichever is first; tests bring their own.
    """

    def __init__(
        self,
        name: str,
        schedulers: Mapping[str, Scheduler],
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[asyncio.Event, float | None], Awaitable[None]] | None = None,
    ):
        self.name, self._schedulers, self._every, self._clock = name, schedulers, every, clock
        self._pause = pause or _pause

    async def answer(
        self, model: str, inputs: Mapping[str, Any], sampling: Sampling, avoid: Collection[str] = ()
    ) -> AsyncGenerator[Said]:
        """What a prompt is answered with: `Declined`, or `Accepted` and chunks of events. Whoever closes the generator, or
        cancels the task that reads it, cancels the prompt.

        avoid: names of replicas that are not to answer, which a router may have had no way to heed.
        """
        if self.name in avoid:
            yield Declined(self.name, "overloaded", "another replica was asked for", 1.0)
            return
        if model not in self._schedulers:
            yield Declined(self.name, "input", f"{model} is none of the models here: {', '.join(self._schedulers)}")
            return
        loop, come, last = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        events = Coalescer(sampling.n, self._every)

        def listen(event: Event) -> None:
            if not events.add(_portable(event)):
                return
            try:
                loop.call_soon_threadsafe(come.set)
                if events.over:
                    loop.call_soon_threadsafe(last.set)
            except RuntimeError:
                pass  # the loop has ended, and with it whoever would have read this

        submitting = asyncio.ensure_future(asyncio.to_thread(self._schedulers[model].submit, unpack(inputs), sampling, listen))
        try:
            ticket = await asyncio.shield(submitting)
        except asyncio.CancelledError:  # nobody can stop the thread: what it is about to submit is cancelled then
            submitting.add_done_callback(_cancel_late)
            raise
        except Overloaded as error:
            yield Declined(self.name, "overloaded", str(error), error.retry_after)
            return
        except InputError as error:
            yield Declined(self.name, "input", str(error))
            return
        try:
            yield Accepted(self.name, ticket.text_tokens, ticket.image_tokens)
            while True:
                wait = events.due(self._clock())
                if wait is None:
                    come.clear()
                    if events.due(self._clock()) is None:
                        await self._pause(come, None)
                elif wait:
                    await self._pause(last, wait)
                else:
                    chunk = events.take(self._clock())
                    over = events.over and events.due(self._clock()) is None
                    yield chunk
                    if over:
                        return
        finally:
            ticket.cancel()

    def counts(self) -> dict[str, dict[str, float]]:
        """Of each model's scheduler."""
        return {name: dict(scheduler.counts()) for name, scheduler in self._schedulers.items()}

    def check(self, stalled: float) -> None:
        """Raises VitcopError for a scheduler whose thread has not gone round for over `stalled` seconds."""
        for name, counts in self.counts().items():
            age = counts["heartbeat_age_s"]
            if age > stalled:
                raise VitcopError(f"the step thread of {name} has not gone round for {age:.0f} s, the limit is {stalled:g}")

    def close(self, drain: bool = True) -> None:
        """Closes all schedulers."""
        for scheduler in self._schedulers.values():
            scheduler.close(drain)


async def _pause(event: asyncio.Event, seconds: float | None) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


def _cancel_late(submitting: asyncio.Future[Any]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


def _portable(event: Event) -> Event:
    """`event` with an error that any process can read: others may hold what cannot be sent."""
    if not isinstance(event, Failed) or type(event.error) in (VitcopError, InputError):
        return event
    return Failed(VitcopError(f"{type(event.error).__name__}: {event.error}"))
