"""Replicas in this process, which answer as those in others do, and are lost when they are told to be."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vitcop_compile.serve.remote import RemoteScheduler
from vitcop_compile.serve.replica import Replica
from vitcop_compile.serve.requests import Sampling, Scheduler


class Wire:
    """What a replica says, in a task of its own; every word goes through pickle. words: after which it is lost, or ends
    without a word where `silent`; deaf: whether it heeds no cancel."""

    def __init__(self, stream: Any, words: float, silent: bool, deaf: bool):
        self._stream, self._words, self._silent, self._deaf = stream, words, silent, deaf
        self._said: asyncio.Queue[Any] = asyncio.Queue()
        self.task = asyncio.ensure_future(self._pump())
        self.cancels = 0

    async def _pump(self) -> None:
        end: BaseException = StopAsyncIteration()
        try:
            while self._words > 0:
                try:
                    said = await anext(self._stream)
                except StopAsyncIteration:
                    return
                self._words -= 1
                self._said.put_nowait(pickle.loads(pickle.dumps(said)))
            end = StopAsyncIteration() if self._silent else ConnectionError("the process has died")
        except BaseException as error:
            end = ConnectionError(repr(error))
            raise
        finally:
            await self._stream.aclose()
            if not self._deaf or isinstance(end, StopAsyncIteration):
                self._said.put_nowait(end)

    def __aiter__(self) -> Wire:
        return self

    async def __anext__(self) -> Any:
        said = await self._said.get()
        if isinstance(said, BaseException):
            raise said
        return said

    def cancel(self) -> None:
        self.cancels += 1
        if not self._deaf:
            self.task.cancel()


@dataclass
class Local:
    """Replicas by name, of one model "m": the first is asked that need not be avoided and is not known to be lost. lost: by
    name, after so many words; asked: (name, what was to be avoided) of every prompt."""

    replicas: Mapping[str, Replica]
    lost: dict[str, float] = field(default_factory=dict)
    silent: bool = False
    deaf: bool = False
    asked: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    wires: list[Wire] = field(default_factory=list)
    broken: Exception | None = None  # of whoever counts

    def ask(self, inputs: Mapping[str, Any], sampling: Sampling, avoid: frozenset[str]) -> Wire:
        left = [name for name in self.replicas if name not in self.gone]
        name = next((name for name in left if name not in avoid), (left or ["a"])[0])
        self.asked.append((name, avoid))
        inputs, sampling = pickle.loads(pickle.dumps((inputs, sampling)))
        stream = self.replicas[name].answer("m", inputs, sampling, avoid)
        words = self.lost.pop(name, 0 if name in self.gone else float("inf"))
        if words < float("inf"):
            self.gone.add(name)
        self.wires.append(Wire(stream, words, self.silent, self.deaf))
        return self.wires[-1]

    async def counts(self) -> Sequence[Mapping[str, float]]:
        if self.broken is not None:
            raise self.broken
        return [replica.counts()["m"] for replica in self.replicas.values()]


def remote(*schedulers: Scheduler, patience: float = 20, polled: float = 0, every: float = 0, **more: Any) -> Any:
    """(a scheduler over replicas "a", "b", ... of these, the replicas)."""
    replicas = {name: Replica(name, {"m": scheduler}, every) for name, scheduler in zip("abc", schedulers)}
    clock = {"clock": more.pop("clock")} if "clock" in more else {}
    local = Local(replicas, **more)
    return RemoteScheduler(local, patience=patience, polled=polled, **clock), local
