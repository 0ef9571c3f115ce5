"""Who waits, in what order, and for how long."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar


class Waiting(Protocol):
    """What queues know of who waits. number: by which they came; slots: that it takes; key: of its queue."""

    @property
    def number(self) -> int: ...

    @property
    def slots(self) -> int: ...

    @property
    def key(self) -> Hashable: ...


_Item = TypeVar("_Item", bound=Waiting)


class Queues(Generic[_Item]):
    """A queue for every key; the one whose head came first is served first, so that nobody waits for ever."""

    def __init__(self) -> None:
        self._queues: dict[Any, deque[_Item]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, item: _Item) -> None:
        """Puts one behind those with its key."""
        self._queues.setdefault(item.key, deque()).append(item)

    def remove(self, item: _Item) -> bool:
        """Takes one out, wherever it stands; False if it does not wait."""
        queue = self._queues.get(item.key)
        if queue is None or item not in queue:
            return False
        queue.remove(item)
        if not queue:
            del self._queues[item.key]
        return True

    def all(self) -> list[_Item]:
        """Who waits, the first to come first."""
        return sorted((item for queue in self._queues.values() for item in queue), key=lambda item: item.number)

    def oldest(self) -> _Item | None:
        """Who came first."""
        return min((queue[0] for queue in self._queues.values()), key=lambda item: item.number, default=None)

    def next(self, free: int, batches: Sequence[int]) -> tuple[list[_Item], bool]:
        """(who is to be served next on so many free slots, whether more company could join them).

        The oldest, and those behind it with its key, in one of `batches`, or fewer than the first of these. Where the oldest
        needs more slots than are free it is waited for: who came later does not pass it.
        """
        head = self.oldest()
        if head is None:
            return [], False
        found: list[_Item] = []
        left = free
        for item in self._queues[head.key]:
            if len(found) == batches[-1] or item.slots > left:
                break
            found.append(item)
            left -= item.slots
        open_ = len(found) == len(self._queues[head.key]) and len(found) < batches[-1] and left > 0
        size = max((size for size in batches if size <= len(found)), default=len(found))
        return found[:size], open_


class Pace:
    """How fast requests are served, of late: what a client is told who comes too early."""

    def __init__(self) -> None:
        self._seconds = self._served = self._since = 0.0

    def note(self, seconds: float, served: int) -> None:
        """So many seconds of work, in which so many requests ended."""
        self._since += seconds
        if served:
            self._seconds, self._served = 0.9 * self._seconds + self._since, 0.9 * self._served + served
            self._since = 0.0

    def seconds(self, requests: int) -> float:
        """That so many will take, 1 as long as nobody knows."""
        return requests * self._seconds / self._served if self._served else 1.0
