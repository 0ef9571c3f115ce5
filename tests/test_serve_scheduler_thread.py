"""The scheduler with a thread of its own: callers of many threads, and what happens when it ends."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
from ledger import Clock, Script, ask, says

from vitcop_compile import VitcopError
from vitcop_compile.serve.requests import Overloaded
from vitcop_compile.serve.scheduler import SlotScheduler


def test_many_threads_are_served_by_one() -> None:
    clock, heard, ready = Clock(), [], threading.Barrier(5)
    script = Script(3, clock)
    with contextlib.closing(SlotScheduler(script, most_queued=200, company=0, clock=clock)) as scheduler:
        threads: set[int] = set()

        def talk(place: int) -> None:
            ready.wait()
            for i in range(10):
                inputs = says(i % 5, place % 2, ends=i % 2 == 0)
                ticket, own = ask(scheduler, inputs, lambda _: threads.add(threading.get_ident()), max_new_tokens=4)
                heard.append(own)
                if i % 4 == 3:
                    ticket.cancel()

        talkers = [threading.Thread(target=talk, args=(place,)) for place in range(5)]
        for talker in talkers:
            talker.start()
        for talker in talkers:
            talker.join()
    assert len(heard) == 50 and all(each.over for each in heard)
    assert len(threads) == 1 and script.holds == [None] * 3
    counts = scheduler.counts()
    assert counts["submitted"] == 50 == counts["finished"] + counts["cancelled"]


def test_what_is_being_prefilled_is_cancelled_too() -> None:
    """When it is closed without draining meanwhile."""
    inside, go, script = threading.Event(), threading.Event(), Script(2, Clock())
    prefill = script.prefill

    def slowly(*asked: Any) -> Any:
        inside.set()
        assert go.wait(10)
        return prefill(*asked)

    script.prefill = slowly  # type: ignore[method-assign]
    scheduler = SlotScheduler(script, company=0)
    _, heard = ask(scheduler, says(15), max_new_tokens=15)
    assert inside.wait(10)
    with pytest.raises(VitcopError, match="threaded=False"):
        scheduler.step()
    closing = threading.Thread(target=scheduler.close, args=(False,))
    closing.start()
    while not scheduler._dropped:
        closing.join(0.01)
    go.set()
    closing.join(10)
    assert heard.ends == ["cancelled"] and len(heard.ids()) <= 2 and script.holds == [None] * 2


def test_a_listener_cannot_close_what_it_listens_to() -> None:
    caught: list[Exception] = []

    def hook(event: Any) -> None:
        try:
            scheduler.close()
        except VitcopError as error:
            caught.append(error)

    with contextlib.closing(SlotScheduler(Script(1, Clock()), company=0)) as scheduler:
        _, heard = ask(scheduler, says(1), hook, max_new_tokens=1)
    assert heard.over and "another thread" in str(caught[0])


def test_a_defect_of_the_scheduler_leaves_nobody_waiting() -> None:
    script = Script(2, Clock())
    script.free = lambda slots: 1 / 0  # type: ignore[method-assign]
    scheduler = SlotScheduler(script, company=0, threaded=False)
    _, heard = ask(scheduler, says(3), max_new_tokens=30)
    _, ended = ask(scheduler, says(0, ends=True), max_new_tokens=3)
    scheduler._run()  # what its thread does, once both wait
    assert heard.ends == ["failed"] and ended.over
    with pytest.raises(VitcopError, match="ZeroDivisionError") as stopped:
        ask(scheduler, says(3))
    assert not isinstance(stopped.value, Overloaded) and scheduler.counts()["stopped"] == 1  # it is not worth a second try
    scheduler.close()
