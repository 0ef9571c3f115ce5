"""Prompts that other processes answer: what becomes of them when a replica is lost, full, slow or told to stop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import doors
import pytest
import torch
from doors import Spoken, events_of, ids_of, post
from wires import remote

from vitcop_compile import ConfigError, InputError, VitcopError
from vitcop_compile.serve.door import Door
from vitcop_compile.serve.refusals import Refused
from vitcop_compile.serve.remote import summed
from vitcop_compile.serve.replica import Coalescer, Replica, pack, unpack
from vitcop_compile.serve.requests import Failed, Finished, Overloaded, Sampling, Token

HELLO = {"input_ids": torch.tensor([[1, *ids_of("Hello?")]])}


class Ears:
    """Hears one request to its end."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self._changed = threading.Condition()

    def __call__(self, event: Any) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def until(self, true: Callable[[list[Any]], bool]) -> list[Any]:
        with self._changed:
            assert self._changed.wait_for(lambda: true(self.events), timeout=30), self.events
            return list(self.events)

    def end(self, answers: int = 1) -> list[Any]:
        """All of it."""
        return self.until(
            lambda events: (
                sum(isinstance(one, Finished) for one in events) >= answers or isinstance(events[-1], Failed)
                if events
                else False
            )
        )


def said(events: list[Any], choice: int = 0) -> str:
    ids = [event.id for event in events if isinstance(event, Token) and event.choice == choice]
    return bytes(id - doors.FIRST for id in ids if doors.FIRST <= id < doors.IMAGE).decode()


def door_of(scheduler: Any) -> Door:
    return Door([doors.served(scheduler)])


def test_a_chat_through_replicas_is_the_same() -> None:
    here, there = Spoken("Né!"), Spoken("Né!")
    scheduler, _ = remote(there, Spoken())
    bodies = []
    for one in (here, scheduler):
        at = door_of(one)
        asked: dict[str, Any] = {
            "messages": [{"role": "user", "content": [doors.shown(doors.picture()), {"type": "text", "text": "?"}]}]
        }
        whole = post(at, **asked, n=2, logprobs=True, top_logprobs=1).json()
        *parts, done = events_of(post(at_again(one), **asked, stream=True).text)
        texts = [part["choices"][0]["delta"].get("content", "") for part in parts]
        bodies.append((whole["choices"], whole["usage"], "".join(texts), done))
    assert bodies[0] == bodies[1]
    mine, other = here.asked[0].inputs, there.asked[0].inputs
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    assert here.asked[0].sampling == there.asked[0].sampling


def at_again(scheduler: Any) -> Door:
    """A door whose application may end without closing what is behind it."""
    at = door_of(scheduler)
    at.close = lambda: None  # type: ignore[method-assign]
    return at


@pytest.mark.parametrize("words", [0, 1])  # before it has taken the prompt, and after, without a token
@pytest.mark.parametrize("silent", [False, True])
def test_a_replica_that_is_lost_before_a_token_is_replaced_by_another(words: int, silent: bool) -> None:
    first, second = Spoken("one"), Spoken("two")
    first.allow(0)
    scheduler, local = remote(first, second, lost={"a": words}, silent=silent)
    ears = Ears()
    ticket = scheduler.submit(HELLO, Sampling(), ears)
    assert said(ears.end()) == "two" and ears.events[-1] == Finished(0, "stop")
    # Who has not said a word has no name.
    assert local.asked == [("a", frozenset()), ("b", frozenset("a" if words else ""))]
    assert (ticket.text_tokens, ticket.image_tokens) == (7, 0)
    scheduler.close()
    assert "failed" not in first.wait() + second.wait()


def test_it_is_tried_once_more_and_not_again() -> None:
    scheduler, local = remote(Spoken(), Spoken(), Spoken(), lost={"a": 0, "b": 0})
    with pytest.raises(Refused, match="no engine replica was there") as refused:
        scheduler.submit(HELLO, Sampling(), Ears())
    assert refused.value.status == 503 and [name for name, _ in local.asked] == ["a", "b"]
    local.lost = {"c": 0}
    answer = post(at_again(scheduler))
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "replica_lost" and "retry-after" in answer.headers
    scheduler.close()


@pytest.mark.parametrize("silent", [False, True])
def test_after_a_token_the_loss_is_told(silent: bool) -> None:
    spoken = Spoken("Hello")
    spoken.allow(1)
    scheduler, local = remote(spoken, Spoken(), lost={"a": 2}, silent=silent)
    ears = Ears()
    scheduler.submit(HELLO, Sampling(), ears)
    token, failed = ears.end()
    assert token.id == ids_of("H")[0] and isinstance(failed, Failed) and "in the middle of the answer" in str(failed.error)
    assert len(local.asked) == 1 and spoken.wait() == ["cancelled"]
    local.gone, local.lost = set(), {"a": 2}
    *parts, last = events_of(post(at_again(scheduler), stream=True).text)
    assert last["error"]["code"] == "replica_lost" and parts[1]["choices"][0]["delta"]["content"] == "H"
    local.gone, local.lost = set(), {"a": 2}
    assert post(at_again(scheduler)).status_code == 503
    scheduler.close()


def test_a_replica_that_does_not_answer_in_time_is_lost() -> None:
    slow = Spoken()
    held = threading.Event()
    real = slow.submit
    slow.submit = lambda *given: held.wait(30) and real(*given)  # type: ignore[method-assign, assignment]
    scheduler, _ = remote(slow, patience=0.05)
    with pytest.raises(Refused, match="no engine replica was there"):
        scheduler.submit(HELLO, Sampling(), Ears())
    held.set()
    # What it was about to take is cancelled once it has.
    slow.wait_asked(2)
    with slow.wake:
        assert slow.wake.wait_for(lambda: all(each.cancelled or each.ended for each in slow.asked), timeout=30)
    scheduler.close()


def test_only_all_of_them_refuse() -> None:
    full, free = Spoken(most=0), Spoken("here")
    scheduler, local = remote(full, free)
    ears = Ears()
    scheduler.submit(HELLO, Sampling(), ears)
    assert said(ears.end()) == "here" and [name for name, _ in local.asked] == ["a", "b"]
    scheduler.close()
    other = Spoken(most=0)
    other.retry_after = 1.5
    scheduler, local = remote(full, other)
    with pytest.raises(Overloaded, match="all 2 replicas refuse: no more can wait") as error:
        scheduler.submit(HELLO, Sampling(), Ears())
    assert error.value.retry_after == 1.5 and scheduler.counts()["rejected"] == 1
    answer = post(at_again(scheduler))
    assert answer.status_code == 429 and answer.headers["retry-after"] == "2"
    # The last one is asked twice, and says then that it is to be avoided.
    assert [avoid for _, avoid in local.asked[:3]] == [frozenset(), frozenset("a"), frozenset("ab")]
    scheduler.close()
    # Lost, and the other is full: not the one that was lost is tried again.
    scheduler, local = remote(Spoken(), Spoken(most=0), lost={"a": 1})
    ears = Ears()
    scheduler.submit(HELLO, Sampling(), ears)
    (failed,) = ears.end()
    assert isinstance(failed.error, Overloaded)
    scheduler.close()


def test_what_no_replica_takes_is_told_by_the_first() -> None:
    scheduler, local = remote(Spoken(refuse=InputError("900 text tokens in a prompt")), Spoken())
    with pytest.raises(InputError, match="900 text tokens"):
        scheduler.submit(HELLO, Sampling(), Ears())
    assert len(local.asked) == 1
    assert post(at_again(scheduler)).status_code == 400
    scheduler.close()


def test_a_program_that_fails_is_told_as_it_is() -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int):  # cannot be read from a pickle
            super().__init__("odd")

    scheduler, _ = remote(Spoken(lambda *_: Odd(1, 2)))
    ears = Ears()
    scheduler.submit(HELLO, Sampling(), ears)
    (failed,) = ears.end()
    assert type(failed.error) is VitcopError and "Odd: odd" in str(failed.error)
    assert post(at_again(scheduler)).status_code == 500
    scheduler.close()


def test_cancels_travel() -> None:
    spoken = Spoken("x" * 40)
    spoken.allow(2)
    scheduler, _ = remote(spoken)
    ears = [Ears() for _ in range(4)]
    tickets = [scheduler.submit(HELLO, Sampling(n=2), each) for each in ears]
    for each in ears:
        each.until(lambda events: len(events) == 2)
    threads = [threading.Thread(target=ticket.cancel) for ticket in (*tickets, *tickets)]
    for thread in threads:
        thread.start()
    for each in ears:
        assert each.end(2)[-2:] == [Finished(0, "cancelled"), Finished(1, "cancelled")] and len(each.events) == 4
    for thread in threads:
        thread.join()
    assert spoken.wait(4) == ["cancelled"] * 4
    scheduler.close()
    assert not scheduler.counts()["queued"]


def test_one_answer_of_several_is_cancelled_here_and_its_replica_told_with_the_last() -> None:
    spoken = Spoken(lambda inputs, sampling, choice: [*ids_of(("ab", "x" * 5000)[choice]), doors.END])
    spoken.allow(2)
    scheduler, _ = remote(spoken)
    ears = Ears()
    ticket = scheduler.submit(HELLO, Sampling(n=2, max_new_tokens=6000), ears)
    ears.until(lambda events: len(events) == 2)
    for _ in range(2):
        ticket.cancel(1)
    ears.until(lambda events: events[-1] == Finished(1, "cancelled"))
    assert not spoken.asked[0].cancelled
    spoken.allow(20)
    events = ears.end(2)
    assert events[-1] == Finished(0, "stop") and said(events) == "ab" and said(events, 1) == "x"
    assert spoken.wait() == ["cancelled"]
    scheduler.close()


def test_a_cancel_does_not_wait_for_a_replica_that_hangs() -> None:
    spoken = Spoken("x" * 40)
    spoken.allow(1)
    scheduler, local = remote(spoken, deaf=True)
    ears = Ears()
    ticket = scheduler.submit(HELLO, Sampling(), ears)
    ears.until(lambda events: len(events) == 1)
    ticket.cancel()
    assert ears.end()[-1] == Finished(0, "cancelled")
    scheduler.close()
    assert local.wires[0].cancels
    spoken.allow(100)


def test_who_waits_for_a_replica_is_told_that_the_door_closes() -> None:
    slow, held = Spoken(), threading.Event()
    real = slow.submit
    slow.submit = lambda *given: held.wait(30) and real(*given)  # type: ignore[method-assign, assignment]
    scheduler, local = remote(slow)
    found: list[Exception] = []

    def submit() -> None:
        try:
            scheduler.submit(HELLO, Sampling(), Ears())
        except Overloaded as error:
            found.append(error)

    thread = threading.Thread(target=submit)
    thread.start()
    while not local.asked:
        time.sleep(0.001)
    scheduler.close(drain=False)
    thread.join(30)
    assert "closing" in str(found[0])
    held.set()


def test_a_door_that_is_cancelled_tells_it() -> None:
    spoken = Spoken("x" * 40)
    spoken.allow(1)
    scheduler, _ = remote(spoken)
    ears = Ears()
    scheduler.submit(HELLO, Sampling(), ears)
    scheduler.close(drain=False)
    assert ears.end()[-1] == Finished(0, "cancelled") and spoken.wait() == ["cancelled"]
    with pytest.raises(Overloaded, match="closing"):
        scheduler.submit(HELLO, Sampling(), Ears())
    scheduler.close()


def test_a_listener_that_fails_ends_its_request() -> None:
    spoken = Spoken("x" * 40)
    scheduler, _ = remote(spoken)

    def fail(event: Any) -> None:
        raise RuntimeError("deaf")

    scheduler.submit(HELLO, Sampling(), fail)
    scheduler.close()
    assert spoken.wait() in (["cancelled"], ["finished"])


def test_counts_are_of_all_replicas_and_grow_old() -> None:
    assert summed([{"slots": 4.0, "heartbeat_age_s": 1.0}, {"slots": 2.0, "heartbeat_age_s": 0.5, "queued": 1.0}]) == {
        "slots": 6.0, "heartbeat_age_s": 1.0, "queued": 1.0,
    }  # fmt: skip
    now = [50.0]
    spoken, other = Spoken(), Spoken()
    spoken.age = 3.0
    spoken.allow(0)
    scheduler, _ = remote(spoken, other, polled=0.001, clock=lambda: now[0])
    deadline = time.monotonic() + 30
    while "slots" not in (counts := scheduler.counts()) and time.monotonic() < deadline:
        pass
    assert counts["slots"] == 8.0 and counts["heartbeat_age_s"] == 3.0 and counts["queued"] == 0
    ears = Ears()
    scheduler.submit(HELLO, Sampling(), ears)
    now[0] = 60.0
    counts = scheduler.counts()
    assert (counts["queued"], counts["oldest_queued_s"]) == (1, 10.0)
    spoken.allow(100)
    ears.end()
    scheduler.close()
    # Nobody says anything any more.
    scheduler, _ = remote(spoken, polled=0.001, clock=lambda: now[0], broken=ConnectionError("gone"))
    now[0] = 130.0
    assert scheduler.counts()["heartbeat_age_s"] == 70.0 and door_of(scheduler).stalled == ["spoken"]
    scheduler.close()
    with pytest.raises(ConfigError, match="patience=0 is not above 0"):
        remote(spoken, patience=0)


def test_a_replica_whose_thread_stands_still_is_not_well() -> None:
    spoken = Spoken()
    replica = Replica("a", {"m": spoken})
    spoken.age = 9.0
    replica.check(10)
    spoken.age = 11.0
    with pytest.raises(VitcopError, match="step thread of m has not gone round for 11 s, the limit is 10"):
        replica.check(10)
    replica.close()
    assert spoken.closed is True


def test_a_model_that_a_replica_has_not_is_declined() -> None:
    async def main() -> Any:
        return [said async for said in Replica("a", {"m": Spoken()}).answer("other", {}, Sampling())]

    (declined,) = asyncio.run(main())
    assert declined.why == "input" and "other is none of the models here: m" in declined.message


def test_tensors_travel_as_arrays() -> None:
    given = {"input_ids": torch.tensor([[1, 2]]), "other": None, "pixel_values": torch.rand(1, 3, 2, 2)}
    packed = pack(given)
    packed["pixel_values"].flags.writeable = False  # as shared memory is
    found = unpack(packed)
    assert found["other"] is None and all(torch.equal(found[name], given[name]) for name in ("input_ids", "pixel_values"))
    found["pixel_values"].add_(1)  # its own


def test_events_are_taken_in_chunks() -> None:
    """The first at once, then those of 30 ms together, the last at once; by no clock but the test's."""
    events = Coalescer(answers=1, every=0.03)
    tokens = [Token(0, number) for number in range(6)]
    assert events.due(0.0) is None
    assert events.add(tokens[0]) and events.due(0.0) == 0.0 and events.take(0.0) == (tokens[0],)
    assert events.due(1.0) is None
    assert events.add(tokens[1]) and not events.add(tokens[2])
    assert events.due(0.01) == pytest.approx(0.02) and events.due(0.03) == 0.0
    assert events.take(0.03) == (tokens[1], tokens[2])
    assert events.add(tokens[3]) and events.due(0.031) == pytest.approx(0.029) and not events.over
    end = Finished(0, "stop")
    assert events.add(end) and events.over and events.due(0.031) == 0.0 and events.take(0.031) == (tokens[3], end)
    # Of several answers, all have to end; a failure ends them all.
    events = Coalescer(answers=2)
    events.add(Finished(1, "stop"))
    assert not events.over
    events.add(Failed(VitcopError("x")))
    assert events.over


def test_chunks_of_a_replica_by_its_clock() -> None:
    """A token every 10 ms, by a clock that goes on with the waits alone; the end comes with the last."""
    now, taken = [0], []  # milliseconds
    script = [(10 * number, Token(0, number)) for number in range(1, 9)] + [(80, Finished(0, "length"))]

    class Scripted:
        text_tokens, image_tokens, cancelled = 1, 0, False

        def submit(self, inputs: Any, sampling: Sampling, listen: Any) -> Any:
            self.listen = listen
            return self

        def cancel(self) -> None:
            self.cancelled = True

    scripted = Scripted()

    async def pause(event: asyncio.Event, seconds: float | None) -> None:
        until = script[0][0] if seconds is None else now[0] + round(1000 * seconds)
        while script and script[0][0] <= until:
            now[0], said = script.pop(0)
            scripted.listen(said)
        now[0] = until if script else now[0]

    async def main() -> None:
        replica = Replica("a", {"m": scripted}, 0.03, clock=lambda: now[0] / 1000, pause=pause)  # type: ignore[dict-item]
        async for said in replica.answer("m", pack(HELLO), Sampling()):
            taken.append((now[0], [getattr(event, "id", "end") for event in said] if now[0] else said))

    asyncio.run(main())
    assert taken == [(0, ("a", 1, 0)), (10, [1]), (40, [2, 3, 4]), (70, [5, 6, 7]), (80, [8, "end"])]
    assert scripted.cancelled  # which is nothing to one that has ended
