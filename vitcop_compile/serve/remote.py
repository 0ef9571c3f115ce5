"""A scheduler whose prompts are served by replicas in other processes."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, cast

from ..errors import ConfigError, InputError
from .refusals import Refused
from .replica import Accepted, Chunk, Declined, Said, pack
from .requests import Event, Failed, Finished, Overloaded, Sampling, Token

_log = logging.getLogger("vitcop_compile")
# Of `Scheduler.counts` of several replicas: the worst; the others are summed.
_WORST = ("heartbeat_age_s", "oldest_queued_s")


class Reply(Protocol):
    """What one replica says to a prompt, see `Replica.answer`. Reading it raises anything when the replica is lost."""

    def __aiter__(self) -> AsyncIterator[Said]: ...

    def __anext__(self) -> Any: ...

    def cancel(self) -> None:
        """Tells the replica that nobody wants the rest."""
        ...


class Replicas(Protocol):
    """All replicas of a model. Both are called in one event loop."""

    def ask(self, inputs: Mapping[str, Any], sampling: Sampling, avoid: frozenset[str]) -> Reply:
        """Sends a prompt to one of them, if it can be none of `avoid`."""
        ...

    async def counts(self) -> Sequence[Mapping[str, float]]:
        """`Scheduler.counts` of each."""
        ...


class Job:
    """A prompt on its way, the `Ticket` of its caller. replica: who answers; told: whether a token was; open: answers that
    have not ended; partial: whether one of several was cancelled, with which the replica goes on."""

    def __init__(self, inputs: Mapping[str, Any], sampling: Sampling, listen: Callable[[Event], None], owner: RemoteScheduler):
        self.inputs, self.sampling, self.listen, self._owner = inputs, sampling, listen, owner
        self.text_tokens = self.image_tokens = 0
        self.accepted: Future[None] = Future()
        self.open = set(range(sampling.n))
        self.told = self.partial = False
        self.replica = ""
        self.reply: Reply | None = None
        self.task: asyncio.Task[None] | None = None
        self.arrived = owner.clock()

    def cancel(self, choice: int | None = None) -> None:
        """As `Ticket.cancel`. A replica is told once no answer is wanted: until then it goes on with one that is not."""
        self._owner.cancel(self, choice)


class RemoteScheduler:
    """A `Scheduler` over `replicas`; its `submit` returns once one of them has queued the prompt.

    A prompt that a replica has no room for goes to another, and is refused once all have refused it. One whose replica is lost
    before the first token goes to another, once; after that, or a second time, it fails: there is always an end that is told.

    patience: seconds in which a replica has to say whether it takes a prompt, or it counts as lost; polled: seconds between
    two questions for counts, 0 for none. Raises ConfigError for a patience that is none.
    """

    def __init__(
        self,
        replicas: Replicas,
        *,
        patience: float = 15.0,
        polled: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not patience > 0:
            raise ConfigError(f"patience={patience} is not above 0")
        self._replicas, self._patience, self._polled, self.clock = replicas, patience, polled, clock
        self._lock = threading.Lock()
        self._jobs: dict[Job, None] = {}
        self._closing = False
        self._idle = threading.Condition(self._lock)
        self._rejected = 0
        self._known: dict[str, float] = {}
        self._asked = clock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vitcop-remote", daemon=True)
        self._thread.start()
        self._tasks: set[asyncio.Task[None]] = set()
        if polled:
            self._loop.call_soon_threadsafe(self._start, self._poll)

    def submit(self, inputs: Mapping[str, Any], sampling: Sampling, listen: Callable[[Event], None]) -> Job:
        """As `Scheduler.submit`; Refused, 503, where no replica answers."""
        job = Job(pack(inputs), sampling, listen, self)
        with self._lock:
            if self._closing:
                raise _closing()
            self._jobs[job] = None
        self._loop.call_soon_threadsafe(self._follow, job)
        job.accepted.result()
        return job

    def cancel(self, job: Job, choice: int | None = None) -> None:
        """Ends a prompt, or one of its answers, here; its replica is told with the last of them."""
        self._loop.call_soon_threadsafe(self._cancel, job, choice)

    def counts(self) -> dict[str, float]:
        """As `Scheduler.counts`: of all replicas together as they said last, but for what waits here, for a first token, and
        what was rejected. The heartbeat is the oldest of all."""
        with self._lock:
            now = self.clock()
            waiting = [job.arrived for job in self._jobs if not job.told]
            age = self._known.get("heartbeat_age_s", 0.0) + (now - self._asked if self._polled else 0.0)
            here = {
                "queued": len(waiting),
                "oldest_queued_s": now - min(waiting) if waiting else 0.0,
                "heartbeat_age_s": age,
                "rejected": self._rejected,
            }
            return self._known | here

    def close(self, drain: bool = True) -> None:
        """As `Scheduler.close`; the replicas themselves go on."""
        with self._lock:
            first, self._closing = not self._closing, True
            jobs = list(self._jobs)
        if not drain:
            for job in jobs:
                self.cancel(job)
        with self._idle:
            self._idle.wait_for(lambda: not self._jobs)
        if first:
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        if first:
            self._loop.close()

    def _start(self, work: Callable[..., Any], *given: Any) -> asyncio.Task[None]:
        task = self._loop.create_task(work(*given))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _follow(self, job: Job) -> None:
        job.task = self._start(self._serve, job)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _poll(self) -> None:
        """Asks for counts, again and again. As long as nobody answers, the heartbeat grows old."""
        while True:
            try:
                found = await asyncio.wait_for(self._replicas.counts(), self._patience)
                with self._lock:
                    self._known, self._asked = summed(found), self.clock()
            except Exception as error:
                _log.warning("the replicas do not say what they do: %r", error)
            await asyncio.sleep(self._polled)

    async def _serve(self, job: Job) -> None:
        """One prompt, from the first replica that is asked to its end."""
        try:
            await self._answer(job)
        except Exception as error:  # a defect of this class: whoever listens must not wait for ever
            _log.exception("a request failed on its way to a replica")
            self._fail(job, error)
        finally:
            with self._idle:
                self._jobs.pop(job, None)
                self._idle.notify_all()

    async def _answer(self, job: Job) -> None:
        refused: dict[str, Declined] = {}
        lost: set[str] = set()
        tries = 2
        while job.open:
            try:
                job.replica = ""
                job.reply = self._replicas.ask(job.inputs, job.sampling, frozenset(refused) | lost)
                declined = await self._hear(job, job.reply)
            except (Exception, asyncio.CancelledError) as error:
                if job.reply is not None:
                    job.reply.cancel()
                if not job.open:
                    return  # its end was told before: it was cancelled, or the replica went after its last word
                if isinstance(error, asyncio.CancelledError):
                    raise
                tries -= 1
                lost |= {job.replica} - {""}
                _log.warning(
                    "replica %s was lost (%s): %s", job.replica or "?", "told" if job.told else "untold", _short(error)
                )
                if job.told or not tries:
                    self._fail(job, _unavailable(job.told))
                continue
            if declined is None:
                return
            if declined.why == "input":
                return self._fail(job, InputError(declined.message))
            if declined.replica in lost and not refused:  # there is no other
                return self._fail(job, _unavailable(False))
            if declined.replica in refused or declined.replica in lost:
                return self._overloaded(job, list(refused.values()))
            refused[declined.replica] = declined

    async def _hear(self, job: Job, reply: Reply) -> Declined | None:
        """Tells what a replica says to its end; what it declines a prompt with, if it does. Raises when it is lost."""
        said = await asyncio.wait_for(reply.__anext__(), self._patience)
        if isinstance(said, Declined):
            return said
        assert isinstance(said, Accepted)
        job.replica, job.text_tokens, job.image_tokens = said
        if not job.accepted.done():
            job.accepted.set_result(None)
        async for chunk in reply:
            for event in cast(Chunk, chunk):
                self._tell(job, event)
        if job.open:
            raise ConnectionError("an answer ended without its end")
        return None

    def _tell(self, job: Job, event: Event) -> None:
        if isinstance(event, Failed):
            return self._fail(job, event.error)
        if event.choice not in job.open:
            return
        if isinstance(event, Token):
            with self._lock:
                job.told = True
        else:
            job.open.discard(event.choice)
            if job.partial and not job.open and job.reply is not None:
                job.reply.cancel()
        try:
            job.listen(event)
        except Exception:
            _log.exception("a listener has failed: its request is dropped")
            job.open.clear()
            if job.reply is not None:
                job.reply.cancel()

    def _fail(self, job: Job, error: Exception) -> None:
        """Ends a prompt: by an exception where its caller still waits, by an event after that."""
        if not job.open:
            return
        job.open.clear()
        if not job.accepted.done():
            job.accepted.set_exception(error)
        else:
            job.listen(Failed(error))

    def _overloaded(self, job: Job, refusals: Sequence[Declined]) -> None:
        with self._lock:
            self._rejected += 1
        least = min(refusals, key=lambda refusal: refusal.retry_after)
        self._fail(job, Overloaded(f"all {len(refusals)} replicas refuse: {least.message}", least.retry_after))

    def _cancel(self, job: Job, choice: int | None) -> None:
        """In the loop, where all else that ends a prompt runs too."""
        if not job.open or choice not in (None, *job.open):
            return
        if choice is not None and len(job.open) > 1:
            job.open.discard(choice)
            job.partial = True
            job.listen(Finished(choice, "cancelled"))
            return
        if job.reply is not None:
            job.reply.cancel()
        if job.task is not None:  # a replica that hangs does not even answer to that
            job.task.cancel()
        if not job.accepted.done():  # its caller waits yet: only who closes all of them knows of it
            return self._fail(job, _closing())
        left, job.open = sorted(job.open), set()
        for choice in left:
            job.listen(Finished(choice, "cancelled"))


def summed(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Counts of several schedulers as of one."""
    names = dict.fromkeys(name for one in counts for name in one)
    return {name: (max if name in _WORST else sum)(one.get(name, 0) for one in counts) for name in names}


def _closing() -> Overloaded:
    return Overloaded("the server is closing: ask another", 5.0)


def _unavailable(told: bool) -> Refused:
    if told:
        text = "the engine replica was lost in the middle of the answer: send the request again"
    else:
        text = "no engine replica was there that could answer: send the request again"
    return Refused(503, text, None, "replica_lost", 5.0)


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__
