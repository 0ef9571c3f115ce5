"""Events of one request, from the threads of schedulers to the event loop that answers it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from .requests import Event, Sampling, Scheduler, Ticket


class Heard(NamedTuple):
    """An event of the ticket of prompt number `prompt`; at: seconds, when it was told."""

    prompt: int
    event: Event
    at: float


class Stream:
    """What a request's tickets tell. Made in the event loop that reads it.

    The queue has no bound of its own: it holds at most the tokens that the request may ask for, so that a client that reads
    slowly, or not at all, holds up nobody.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._loop, self._clock = asyncio.get_running_loop(), clock
        self._queue: asyncio.Queue[Heard] = asyncio.Queue()
        self._lock = threading.Lock()
        self._closed = self._cancelled = False
        self.tickets: list[Ticket] = []

    def submit(self, scheduler: Scheduler, prompts: Iterable[Mapping[str, Any]], sampling: Sampling) -> None:
        """Submits each prompt, from any thread; nothing more once the stream is closed. Raises as `Scheduler.submit` does."""
        for number, inputs in enumerate(prompts):
            if self._closed:
                return
            ticket = scheduler.submit(inputs, sampling, partial(self._listen, number))
            with self._lock:
                self.tickets.append(ticket)
                late = self._cancelled
            if late:  # meanwhile, by whoever could not know of this one
                ticket.cancel()

    async def next(self) -> Heard:
        """The next event."""
        return await self._queue.get()

    def cancel(self) -> None:
        """Cancels what has not ended, and what is submitted from now on; whoever reads is told."""
        with self._lock:
            self._cancelled = True
            tickets = tuple(self.tickets)
        for ticket in tickets:
            ticket.cancel()

    def close(self) -> None:
        """Cancels what has not ended, and listens no more. Any number of times."""
        self._closed = True
        self.cancel()

    def _listen(self, number: int, event: Event) -> None:
        if self._closed:
            return
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, Heard(number, event, self._clock()))
        except RuntimeError:
            # The loop has ended, and with it whoever would have read this.
            self._closed = True
