"""Continuous batching over static programs: requests join and leave a decode batch step by step."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, VitcopError
from ..isolation import plain
from .queues import Pace, Queues
from .requests import Event, Failed, Finished, Overloaded, Sampling, Token
from .sampling import Draw, draw

log = logging.getLogger("vitcop_compile")
# A thread without work looks around so often, seconds: what its heartbeat is told by.
_IDLE = 0.5


class Programs(Protocol):
    """What a scheduler drives: `slots.Slots`."""

    count: int
    ends: tuple[int, ...]
    device: torch.device

    @property
    def batches(self) -> tuple[int, ...]: ...

    def examine(self, inputs: Mapping[str, Any], sampling: Sampling) -> Any: ...

    def prefill(self, requests: Sequence[Any], places: Sequence[Sequence[int]]) -> Tensor: ...

    def decode(self, tokens: Sequence[int]) -> Tensor: ...

    def free(self, slots: Sequence[int]) -> None: ...

    def clear(self) -> None: ...

    def counts(self) -> dict[str, float]: ...


class Answer:
    """One answer to a prompt, in the slot where it is decoded."""

    def __init__(self, job: Job, choice: int, slot: int, draw: Draw):
        self.job, self.choice, self.slot, self.draw = job, choice, slot, draw
        self.said = self.last = 0


class Job:
    """A prompt that was submitted, the `Ticket` of its caller. open: answers that have not ended; deaf: whether its listener
    has failed."""

    def __init__(
        self,
        request: Any,
        sampling: Sampling,
        draws: list[Draw],
        listen: Callable[[Event], None],
        cancel: Callable[[Job, int | None], None],
    ):
        self.request, self.sampling, self.draws, self.listen, self._cancel = request, sampling, draws, listen, cancel
        self.text_tokens, self.image_tokens = request.text_tokens, request.image_tokens
        self.key, self.slots = request.key, sampling.n
        self.number, self.arrived = 0, 0.0
        self.open = set(range(sampling.n))
        self.deaf = False

    def cancel(self, choice: int | None = None) -> None:
        """As `Ticket.cancel`."""
        self._cancel(self, choice)


class SlotScheduler:
    """Serves requests on the `slots` of one model, see `requests.Scheduler`; made by `SlotScheduler(Slots(model, 8))`.

    One thread runs the programs, in rounds: drop what was cancelled, admit, one decode step, draw a token for each row, tell
    the listeners. The prompt that came first is admitted next, with others behind it that go through the same program, when
    there are slots for all its answers; it waits at most `company` seconds for such others, and only while nothing is
    decoded. `every`: decode steps between two prefills at least, as long as anything is decoded, which bounds the time
    between two tokens (4 by benchmarks/serving_every.py); most_queued: prompts that wait, more are refused.

    clock: seconds, monotonic; threaded: False leaves the rounds to the caller's `step`, as tests want. Raises ConfigError for
    numbers that are none.
    """

    def __init__(
        self,
        slots: Programs,
        *,
        most_queued: int = 64,
        every: int = 4,
        company: float = 0.005,
        clock: Callable[[], float] = time.monotonic,
        threaded: bool = True,
    ):
        for name, value, least in (("most_queued", most_queued, 1), ("every", every, 1), ("company", company, 0)):
            if not least <= value < float("inf"):
                raise ConfigError(f"{name}={value}: pass {least} or more")
        self._slots, self._most, self._every, self._company, self._clock = slots, most_queued, every, company, clock
        self._changed = threading.Condition()
        self._queues: Queues[Job] = Queues()
        self._answers: list[Answer | None] = [None] * slots.count
        self._joining: list[Job] = []
        self._dropped: list[tuple[Job, int]] = []
        self._news = self._closing = False
        self._broken: Exception | None = None
        self._numbers = itertools.count()
        self._since, self._pace, self._beat = every, Pace(), clock()
        names = ("submitted", "finished", "cancelled", "failed", "rejected", "prefills", "decode_steps")
        self._totals = dict.fromkeys(names, 0)
        self._thread: threading.Thread | None = None
        if threaded:
            self._thread = threading.Thread(target=self._run, name="vitcop-serve", daemon=True)
            self._thread.start()

    def submit(self, inputs: Mapping[str, Any], sampling: Sampling, listen: Callable[[Event], None]) -> Job:
        """As `Scheduler.submit`. What is wrong with a prompt is found here, on the caller's thread."""
        with self._changed:
            self._refuse_too_many()
        with plain():
            request = self._slots.examine(inputs, sampling)
            ends, device = self._slots.ends, self._slots.device
            draws = [Draw(sampling, request.ids, ends, choice, device) for choice in range(sampling.n)]
            job = Job(request, sampling, draws, listen, self._cancel)
        with self._changed:
            self._refuse_too_many()
            job.number, job.arrived = next(self._numbers), self._clock()
            self._queues.add(job)
            self._totals["submitted"] += 1
            self._wake()
        return job

    def counts(self) -> dict[str, float]:
        """As `Scheduler.counts`; what is submitted, finished, cancelled, failed, queued and rejected is prompts, the last by
        `Overloaded`."""
        with self._changed:
            now, head = self._clock(), self._queues.oldest()
            current = {
                "slots": self._slots.count,
                "occupied": sum(answer is not None for answer in self._answers),
                "queued": len(self._queues),
                "oldest_queued_s": now - head.arrived if head else 0.0,
                "heartbeat_age_s": now - self._beat,
                "stopped": float(self._broken is not None),
            }
            return current | self._totals | self._slots.counts()

    def close(self, drain: bool = True) -> None:
        """As `Scheduler.close`. Raises VitcopError in a listener, which its own thread would wait for."""
        if threading.current_thread() is self._thread:
            raise VitcopError("close() was called by a listener, and would wait for it: call it from another thread")
        with self._changed:
            self._closing = True
            if not drain:
                self._dropped += [(job, choice) for job in self._open() for choice in range(job.slots)]
            self._wake()
        if self._thread is not None:
            self._thread.join()
            return
        while not self._over():
            self.step()

    def step(self) -> float | None:
        """One round. Returns after how many seconds there may be something to do, 0 for at once, None if nobody knows.

        Raises VitcopError where a thread of the scheduler's own does that."""
        if self._thread not in (None, threading.current_thread()):
            raise VitcopError("step() was called beside the scheduler's own thread: make it with threaded=False")
        with plain():
            start = self._beat = self._clock()
            self._news = False
            ended = self._drop()
            jobs, wait = self._admit()
            if jobs:
                ended += self._prefill(jobs)
            busy = bool(jobs) or any(self._answers)
            if any(self._answers):
                ended += self._decode()
            with self._changed:
                self._beat = self._clock()
                if busy:
                    self._pace.note(self._beat - start, ended)
                return wait if wait or busy else None

    def _run(self) -> None:
        try:
            while not self._over():
                wait = self.step()
                with self._changed:
                    if wait != 0 and not self._news and not self._over():
                        self._changed.wait(_IDLE if wait is None else min(wait, _IDLE))
        except BaseException as error:  # a defect of the scheduler itself: whoever listens must not wait for ever
            log.exception("the scheduler has stopped")
            with self._changed:
                self._closing = True
                self._broken = VitcopError(f"the scheduler has stopped: {error!r}")
                jobs = self._open()
                self._queues, self._answers = Queues(), [None] * self._slots.count
            self._fail(jobs, self._broken)

    def _open(self) -> list[Job]:
        """All requests that have not ended."""
        decoded = [answer.job for answer in self._answers if answer]
        return [job for job in dict.fromkeys((*self._queues.all(), *self._joining, *decoded)) if job.open]

    def _over(self) -> bool:
        with self._changed:
            return self._closing and not len(self._queues) and not any(self._answers) and not self._dropped

    def _wake(self) -> None:
        self._news = True
        self._changed.notify_all()

    def _refuse_too_many(self) -> None:
        waiting = len(self._queues)
        if not self._closing and waiting < self._most:
            return
        if self._broken is not None:
            raise self._broken
        self._totals["rejected"] += 1
        text = "the scheduler is closing: ask another"
        if not self._closing:
            text = f"{waiting} requests wait, which is all that may: come back later"
        raise Overloaded(text, self._pace.seconds(waiting + 1))

    def _cancel(self, job: Job, choice: int | None) -> None:
        with self._changed:
            # Not by iterating over what the thread of the scheduler changes meanwhile.
            dropped = [(job, each) for each in range(job.slots) if each in job.open and choice in (None, each)]
            if dropped:
                self._dropped += dropped
                self._wake()

    def _drop(self) -> int:
        """Ends what was cancelled; how many requests ended with that."""
        with self._changed:
            dropped = {(job, choice) for job, choice in self._dropped if choice in job.open}
            self._dropped = []
            for job, choice in dropped:
                job.open.discard(choice)
            ended = [job for job in dict.fromkeys(job for job, _ in dropped) if not job.open]
            for job in ended:
                self._queues.remove(job)
        self._leave([answer for answer in self._answers if answer and (answer.job, answer.choice) in dropped])
        for job, choice in sorted(dropped, key=lambda each: (each[0].number, each[1])):
            self._tell(job, Finished(choice, "cancelled"))
        for job in ended:
            self._end(job, "cancelled")
        return len(ended)

    def _admit(self) -> tuple[list[Job], float]:
        """(who is prefilled now, seconds to wait for more of them)."""
        free, idle = self._answers.count(None), not any(self._answers)
        if not idle and self._since < self._every:
            return [], 0.0
        with self._changed:
            jobs, more = self._queues.next(free, self._slots.batches)
            if not jobs:
                return [], 0.0
            left = self._company - (self._clock() - jobs[0].arrived)
            if idle and more and left > 0 and not self._closing:
                return [], left
            for job in jobs:
                self._queues.remove(job)
            self._joining = jobs
            return jobs, 0.0

    def _prefill(self, jobs: list[Job]) -> int:
        """Puts prompts into slots and draws their first tokens; how many requests ended with that."""
        free = [slot for slot, answer in enumerate(self._answers) if answer is None]
        places = [[free.pop(0) for _ in range(job.slots)] for job in jobs]
        self._since = 0
        try:
            logits = self._slots.prefill([job.request for job in jobs], places)
        except Exception as error:
            self._slots.free([slot for slots in places for slot in slots])
            self._fail(jobs, error)
            self._joining = []
            return len(jobs)
        answers = [
            Answer(job, choice, slot, job.draws[choice])
            for job, slots in zip(jobs, places, strict=True)
            for choice, slot in enumerate(slots)
        ]
        with self._changed:
            self._totals["prefills"] += 1
            self._beat = self._clock()
            for answer in answers:
                self._answers[answer.slot] = answer
            self._joining = []
        for job in jobs:
            job.request = None  # pictures are large, and tickets may be kept
        rows = [row for row, job in enumerate(jobs) for _ in range(job.slots)]
        return self._say(answers, logits, rows)

    def _decode(self) -> int:
        """One token more of every answer; how many requests ended with it."""
        answers = [answer for answer in self._answers if answer]
        try:
            logits = self._slots.decode([answer.last if answer else 0 for answer in self._answers])
        except Exception as error:
            with self._changed:
                self._answers = [None] * self._slots.count
            self._slots.clear()
            jobs = list(dict.fromkeys(answer.job for answer in answers))
            self._fail(jobs, error)
            return len(jobs)
        self._since += 1
        with self._changed:
            self._totals["decode_steps"] += 1
        return self._say(answers, logits, [answer.slot for answer in answers])

    def _say(self, answers: list[Answer], logits: Tensor, rows: list[int]) -> int:
        """Draws a token for each answer by its row of logits, and tells; how many requests ended."""
        gone: list[Answer] = []
        ended: dict[Job, None] = {}
        for answer, drawn in zip(answers, draw(logits, rows, [answer.draw for answer in answers]), strict=True):
            job, choice = answer.job, answer.choice
            if choice not in job.open:  # it was cancelled while it waited, or another answer's draw has failed
                gone.append(answer)
            elif drawn.error is not None:
                self._fail([job], drawn.error)
                ended[job] = None
            else:
                answer.last, answer.said = drawn.id, answer.said + 1
                self._tell(job, Token(choice, drawn.id, drawn.logprob, drawn.top))
                stopped = drawn.id in answer.draw.stops
                if stopped or answer.said == job.sampling.max_new_tokens:
                    gone.append(answer)
                    self._tell(job, Finished(choice, "stop" if stopped else "length"))
                    job.open.discard(choice)
            if not job.open and job not in ended:
                self._end(job, "finished")
                ended[job] = None
            elif job.deaf and job not in ended:
                self._end(job, "cancelled")
                ended[job] = None
        left = {id(answer): answer for answer in (*gone, *(each for each in self._answers if each and each.job in ended))}
        self._leave(list(left.values()))
        return len(ended)

    def _leave(self, answers: list[Answer]) -> None:
        """Frees the slots of answers."""
        if not answers:
            return
        with self._changed:
            for answer in answers:
                self._answers[answer.slot] = None
        self._slots.free([answer.slot for answer in answers])

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        log.error("%d requests failed: %r", len(jobs), error)
        for job in jobs:
            self._tell(job, Failed(error))
            self._end(job, "failed")

    def _end(self, job: Job, how: str) -> None:
        with self._changed:
            job.open.clear()
            job.request = None
            self._totals[how] += 1

    def _tell(self, job: Job, event: Event) -> None:
        """A listener that fails is told nothing more, and its request is dropped with the round."""
        if job.deaf:
            return
        try:
            job.listen(event)
        except Exception:
            job.deaf = True
            log.exception("a listener has failed: its request is dropped")
