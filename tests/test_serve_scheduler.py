"""The scheduler alone, on programs that say what they are told to and a clock that is set."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from ledger import DECODE, END, PREFILL, Clock, Heard, Script, ask, says, serve
from models import exhaustive, slow

from vitcop_compile import ConfigError, InputError
from vitcop_compile.serve.queues import Pace
from vitcop_compile.serve.requests import Overloaded, Sampling
from vitcop_compile.serve.scheduler import SlotScheduler

EVERY, COMPANY, MOST = 3, 1 / 128, 6


def made(slots: int = 4, batches: tuple[int, ...] = (1, 2, 4), **options: Any) -> tuple[SlotScheduler, Script, Clock]:
    clock = Clock()
    script = Script(slots, clock, batches)
    options = {"every": EVERY, "company": COMPANY, "threaded": False} | options
    return SlotScheduler(script, clock=clock, **options), script, clock


class Requests(RuleBasedStateMachine):
    """Arrivals, cancels, stops and errors in any order; a ledger of its own says what may be heard."""

    @initialize(slots=st.integers(1, 5), batches=st.sampled_from([(1,), (1, 2, 4), (2, 4), (3,)]))
    def begin(self, slots: int, batches: tuple[int, ...]) -> None:
        self.scheduler, self.script, self.clock = made(slots, batches, most_queued=MOST)
        self.asked: list[tuple[Any, Heard, dict[str, Any]]] = []
        self.spoilt: set[int] = set()  # whose listener fails
        self.cancelled: set[int] = set()
        self.dropped: set[tuple[int, int]] = set()  # answers
        self.arrived: list[float] = []
        self.rejected = 0

    @rule(
        keys=st.lists(st.sampled_from("aaabc"), min_size=1, max_size=4), length=st.integers(0, 9), ends=st.booleans(),
        new=st.integers(1, 12), n=st.sampled_from([1, 1, 1, 2, 3]), spoil=st.sampled_from([False] * 9 + [True]),
    )  # fmt: skip
    def arrive_together(self, keys: list[str], **settings: Any) -> None:
        for key in keys:
            self.arrive(key, **settings)

    def arrive(self, key: str, length: int, ends: bool, new: int, n: int, spoil: bool) -> None:
        place, waiting = len(self.asked), self.scheduler.counts()["queued"]
        inputs = says(length, key, ends, first=2 + place % 7) | {"number": place}

        def hook(event: Any) -> None:
            if place in self.spoilt:
                raise RuntimeError("a listener")

        try:
            ticket, heard = ask(self.scheduler, inputs, hook, max_new_tokens=new, n=n)
        except InputError:
            assert n > self.script.count
        except Overloaded as full:
            assert waiting == MOST and full.retry_after > 0
            self.rejected += 1
        else:
            assert n <= self.script.count and waiting < MOST
            self.asked.append((ticket, heard, inputs))
            self.arrived.append(self.clock.now)
            if spoil:
                self.spoilt.add(place)

    @precondition(lambda self: len(self.asked) > 0)
    @rule(data=st.data(), anyone=st.booleans())
    def cancel(self, data: st.DataObject, anyone: bool) -> None:
        going = [place for place, (_, heard, _) in enumerate(self.asked) if anyone or (any(heard.tokens) and not heard.over)]
        for place in data.draw(st.lists(st.sampled_from(going), max_size=2)) if going else []:
            ticket, heard, _ = self.asked[place]
            choice = data.draw(st.sampled_from([None, *range(heard.sampling.n)]))
            ticket.cancel(choice)
            self.dropped |= {(place, each) for each in range(heard.sampling.n) if choice in (None, each)}
            if all((place, each) in self.dropped or heard.ends[each] for each in range(heard.sampling.n)):
                self.cancelled.add(place)

    @rule(failing=st.sampled_from([set()] * 6 + [{"prefill"}, {"decode"}]), rounds=st.integers(1, 4))
    def work(self, failing: set[str], rounds: int) -> None:
        self.script.failing = failing
        for _ in range(rounds):
            self.clock.now += self.round() or 0
        self.script.failing = set()

    def round(self) -> float | None:
        """One step, which serves whom it has to."""
        admitted = {request.number for entry in self.script.log if entry[0] == "prefill" for request in entry[1]}
        waiting = [place for place in range(len(self.asked)) if place not in admitted | self.cancelled]
        free, begun = self.script.holds.count(None), len(self.script.log)
        idle, apart = free == self.script.count, self.apart()
        wait = self.scheduler.step()
        new = [entry for entry in self.script.log[begun:] if entry[0] == "prefill"]
        assert len(new) <= 1
        head = waiting[0] if waiting else None
        if new:
            (_, requests, _), alike = new[0], [place for place in waiting if self.key(place) == self.key(waiting[0])]
            assert [request.number for request in requests] == alike[: len(requests)]
        elif wait:  # for company of the oldest, and nothing is decoded meanwhile
            assert head is not None and self.script.holds == [None] * self.script.count
            assert 0 < wait <= self.arrived[head] + COMPANY - self.clock.now
        elif head is not None:
            assert self.asked[head][1].sampling.n > free or (apart < EVERY and not idle)
        assert all(self.asked[place][1].over for place in self.cancelled - self.spoilt)
        assert all(self.asked[place][1].ends[choice] for place, choice in self.dropped if place not in self.spoilt)
        held = {(answer.job, answer.choice) for answer in self.scheduler._answers if answer}
        assert not held & {(self.asked[place][0], choice) for place, choice in self.dropped}
        return wait

    def key(self, place: int) -> str:
        return self.asked[place][2]["key"]

    def apart(self) -> int:
        """Decode steps since the last prefill."""
        kinds = [entry[0] for entry in self.script.log]
        return kinds[::-1].index("prefill") if "prefill" in kinds else EVERY

    @rule(seconds=st.sampled_from([1 / 1024, 1 / 256, 1 / 32]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule(now=st.sampled_from([True, *[False] * 5]))
    def sometimes_rest(self, now: bool) -> None:
        if now:
            self.rest()

    def teardown(self) -> None:
        if hasattr(self, "asked"):
            self.rest()

    def rest(self) -> None:
        """Nobody waits for ever: what is queued comes to an end when nothing else arrives."""
        for _ in range(2000):
            self.clock.now += 1 / 1024
            self.round()
            if self.scheduler.step() is None:
                break
        assert all(heard.over or place in self.spoilt for place, (_, heard, _) in enumerate(self.asked))
        assert self.script.holds == [None] * self.script.count
        counts = self.scheduler.counts()
        assert counts["occupied"] == counts["queued"] == counts["oldest_queued_s"] == 0

    @invariant()
    def slots_are_those_of_the_programs(self) -> None:
        counts = self.scheduler.counts()
        assert counts["occupied"] == sum(held is not None for held in self.script.holds)
        running = {id(answer.job) for answer in self.scheduler._answers if answer}
        ended = counts["finished"] + counts["cancelled"] + counts["failed"]
        assert counts["submitted"] == len(self.asked) == ended + counts["queued"] + len(running)
        assert counts["prefills"] <= sum(entry[0] == "prefill" for entry in self.script.log)
        assert counts["rejected"] == self.rejected

    @invariant()
    def prefills_are_apart(self) -> None:
        steps = EVERY
        for kind, *rest in self.script.log:
            if kind == "decode":
                steps += 1
            else:
                assert not rest[1] or steps >= EVERY
                steps = 0

    @invariant()
    def answers_are_what_was_said(self) -> None:
        for place, (_, heard, inputs) in enumerate(self.asked):
            whole = inputs["says"][: heard.sampling.max_new_tokens]
            whole = whole[: whole.index(END) + 1] if END in whole else whole
            for choice, end in enumerate(heard.ends):
                said = heard.ids(choice)
                assert said == whole[: len(said)]
                if end in ("stop", "length"):
                    assert said == whole and end == ("stop" if whole[-1] == END else "length")
                elif end == "failed":
                    assert heard.error is not None
            assert place not in self.spoilt or not any(heard.tokens)


@pytest.mark.parametrize("examples", [80, slow(400), exhaustive(2000)])
def test_any_order_of_arrivals_cancels_stops_and_errors(examples: int) -> None:
    run_state_machine_as_test(Requests, settings=settings(max_examples=examples, stateful_step_count=40))


def test_a_prompt_that_comes_alone_waits_for_company_once() -> None:
    """A moment for others with its key, none when a batch is full, when the rest must wait anyway, or while something is
    decoded."""
    scheduler, script, clock = made(slots=5)
    ask(scheduler, says(9), max_new_tokens=9)
    assert scheduler.step() == COMPANY and not script.log
    clock.now += COMPANY / 2
    ask(scheduler, says(9), max_new_tokens=9)
    ask(scheduler, says(9, "b"), max_new_tokens=9)
    assert scheduler.step() == COMPANY / 2 and not script.log
    clock.now += COMPANY / 2
    assert scheduler.step() == 0
    assert [(entry[0], len(entry[1])) for entry in script.log if entry[0] == "prefill"] == [("prefill", 2)]
    for _ in range(EVERY - 1):
        scheduler.step()
    assert len(script.log) == 1 + EVERY
    scheduler.step()  # the other key came long ago
    assert [entry[0] for entry in script.log][-2:] == ["prefill", "decode"]
    for _ in range(EVERY - 1):
        scheduler.step()
    ask(scheduler, says(9, "c"), max_new_tokens=1)
    assert scheduler.counts()["occupied"] > 0
    scheduler.step()  # and this one now, beside what is decoded
    assert [entry[0] for entry in script.log][-2:] == ["prefill", "decode"]
    serve(scheduler)
    for _ in range(4):  # a batch is full at once
        ask(scheduler, says(3), max_new_tokens=1)
    assert scheduler.step() == 0 and len(script.log[-1][1]) == 4
    ask(scheduler, says(3), max_new_tokens=1, n=3)
    ask(scheduler, says(3), max_new_tokens=1, n=3)  # does not fit beside it
    assert scheduler.step() == 0 and len(script.log[-1][1]) == 1


def test_answers_that_need_many_slots_are_not_passed() -> None:
    scheduler, _, _ = made(slots=3, company=0)
    _, long = ask(scheduler, says(9), max_new_tokens=9)
    scheduler.step()
    _, many = ask(scheduler, says(3, "b"), max_new_tokens=3, n=3)
    _, later = ask(scheduler, says(2, "a"), max_new_tokens=1)
    while not many.tokens[0]:
        assert not later.tokens[0]
        scheduler.step()
    assert long.ends == ["length"]
    serve(scheduler)
    assert many.ends == ["length"] * 3 and later.ends == ["length"]
    assert [many.ids(choice) for choice in range(3)] == [[2, 3, 4]] * 3


def test_nobody_is_passed_by_one_with_the_same_key() -> None:
    """Though there would be a slot."""
    scheduler, script, _ = made(slots=3, company=0)
    heard = [ask(scheduler, says(3) | {"number": place}, max_new_tokens=3, n=n)[1] for place, n in enumerate((1, 3, 1))]
    serve(scheduler)
    order = [[request.number for request in entry[1]] for entry in script.log if entry[0] == "prefill"]
    assert order == [[0], [1], [2]] and all(each.over for each in heard)


def test_what_is_cancelled_ends_with_the_next_round() -> None:
    """All its answers, wherever they are, once; the others go on."""
    scheduler, script, _ = made(slots=3, company=0)
    ticket, heard = ask(scheduler, says(9), max_new_tokens=9, n=2)
    _, other = ask(scheduler, says(9, "b"), max_new_tokens=9)
    late, never = ask(scheduler, says(9, "c"), max_new_tokens=9)
    for _ in range(1 + EVERY):
        scheduler.step()
    for _ in range(2):
        ticket.cancel()
        late.cancel()
    said = len(heard.ids())
    scheduler.step()
    assert heard.ends == ["cancelled"] * 2 and len(heard.ids()) == said and never.ends == ["cancelled"]
    ticket, heard = ask(scheduler, says(9), max_new_tokens=9)
    serve(scheduler)
    ticket.cancel()
    scheduler.step()
    assert other.ends == heard.ends == ["length"] and scheduler.counts()["cancelled"] == 2
    ticket, heard = ask(scheduler, says(9), max_new_tokens=9)
    scheduler.step()
    ticket.cancel()  # while nobody waits
    scheduler.step()
    assert heard.ends == ["cancelled"] and script.holds == [None] * 3


def test_one_answer_of_several_is_cancelled_alone() -> None:
    """Its slot is free with the next round, or with its first token where it waited; the prompt ends with its last answer."""
    scheduler, script, _ = made(slots=3, company=0)
    ticket, heard = ask(scheduler, says(9), max_new_tokens=6, n=2)
    late, waiting = ask(scheduler, says(9, "b"), max_new_tokens=6, n=2)
    scheduler.step()
    ticket.cancel(1)
    late.cancel(0)
    ticket.cancel(5)  # there is none
    scheduler.step()
    assert heard.ends == ["", "cancelled"] and script.holds.count(None) == 2 and waiting.ends == ["cancelled", ""]
    while waiting.ids(1) == []:
        scheduler.step()
    assert script.holds.count(None) == 1 and waiting.ids(0) == []
    serve(scheduler)
    assert heard.ends == ["length", "cancelled"] and waiting.ends == ["cancelled", "length"]
    assert len(heard.ids(0)) == len(waiting.ids(1)) == 6
    assert scheduler.counts()["finished"] == 2 and not scheduler.counts()["cancelled"]
    ticket, heard = ask(scheduler, says(9), max_new_tokens=6, n=2)
    scheduler.step()
    for choice in (0, 1):
        ticket.cancel(choice)
        scheduler.step()
    assert heard.ends == ["cancelled"] * 2 and scheduler.counts()["cancelled"] == 1 and script.holds == [None] * 3


@pytest.mark.parametrize("choice", [0, None])
def test_who_cancels_does_not_iterate_over_what_the_scheduler_changes(choice: int | None) -> None:
    class Changing(set[int]):
        def __iter__(self) -> Any:
            raise RuntimeError("Set changed size during iteration")

    scheduler, _, _ = made(slots=3, company=0)
    ticket, heard = ask(scheduler, says(9), max_new_tokens=6, n=2)
    scheduler.step()
    ticket.open = Changing(ticket.open)
    ticket.cancel(choice)
    scheduler.step()
    assert heard.ends == ["cancelled", "cancelled" if choice is None else ""]
    scheduler.close(drain=False)
    assert heard.ends == ["cancelled"] * 2


def test_a_listener_that_fails_is_let_go() -> None:
    """At once, without a word to it, and with its slots; nobody else is told of it."""
    scheduler, script, _ = made(slots=3, company=0)

    def hook(event: Any) -> None:
        if len(bad.ids()) == 2:
            raise RuntimeError("a listener")

    _, bad = ask(scheduler, says(9), hook, max_new_tokens=9)
    _, good = ask(scheduler, says(9), max_new_tokens=9)
    for _ in range(3):
        scheduler.step()
    assert scheduler.counts()["occupied"] == 1 and scheduler.counts()["cancelled"] == 1
    serve(scheduler)
    assert bad.ends == [""] and len(bad.ids()) == 2 and good.ends == ["length"] and script.holds == [None] * 3


def test_a_logit_that_is_no_number_ends_its_request_alone() -> None:
    scheduler, script, _ = made(slots=4)
    _, good = ask(scheduler, says(5), max_new_tokens=5)
    _, bad = ask(scheduler, {"key": "a", "says": [3, 4, -1, 5]}, max_new_tokens=4, n=2)
    _, worse = ask(scheduler, {"key": "a", "says": [-1, 5]}, max_new_tokens=2)
    serve(scheduler)
    assert good.ends == ["length"] and good.ids() == [2, 3, 4, 5, 6]
    assert bad.ends == ["failed"] * 2 and bad.ids(1) == [3, 4] and "not finite" in str(bad.error)
    assert worse.ends == ["failed"] and not worse.tokens[0]
    assert script.holds == [None] * 4 and scheduler.counts()["failed"] == 2 and script.cleared == 0


def test_an_error_of_decoding_ends_what_was_decoded_and_nothing_else() -> None:
    scheduler, script, _ = made(slots=2, company=0)
    heard = [ask(scheduler, says(4), max_new_tokens=4)[1] for _ in range(4)]
    scheduler.step()
    script.failing = {"decode"}
    scheduler.step()
    script.failing = set()
    serve(scheduler)
    assert [each.ends for each in heard] == [["failed"], ["failed"], ["length"], ["length"]]
    assert str(heard[0].error) == "decode" and script.cleared == 1


def test_too_many_are_told_when_to_come_back() -> None:
    """By the rate at which requests were served: two a batch, which takes a prefill and five steps."""
    scheduler, script, clock = made(slots=2, most_queued=2, company=0)
    for _ in range(2):
        ask(scheduler, says(6), max_new_tokens=6)
    with pytest.raises(Overloaded, match="2 requests wait") as full:
        ask(scheduler, says(6), max_new_tokens=6)
    assert full.value.retry_after == 1.0  # nobody knows
    serve(scheduler)
    clock.now += 60  # without work
    for _ in range(2):
        ask(scheduler, says(6), max_new_tokens=6)
    with pytest.raises(Overloaded) as full:
        ask(scheduler, says(6), max_new_tokens=6)
    assert full.value.retry_after == pytest.approx(3 * (PREFILL + 5 * DECODE) / 2)
    assert scheduler.counts()["rejected"] == 2 and scheduler.counts()["queued"] == 2
    assert script.count == 2


def test_pace_follows_what_happens_of_late() -> None:
    pace = Pace()
    for _ in range(100):
        pace.note(1.0, 1)
    assert pace.seconds(5) == pytest.approx(5)
    for _ in range(100):
        pace.note(0.5, 0)
        pace.note(0.5, 4)
    assert pace.seconds(8) == pytest.approx(2, rel=1e-3)


def test_queues_and_heartbeat_are_told() -> None:
    scheduler, _, clock = made(slots=1, company=0)
    clock.now += 7
    assert scheduler.counts()["heartbeat_age_s"] == 7
    scheduler.step()
    assert scheduler.counts()["heartbeat_age_s"] == 0
    ask(scheduler, says(9), max_new_tokens=9)
    clock.now += 2
    ask(scheduler, says(9, "b"), max_new_tokens=9)
    counts = scheduler.counts()
    assert (counts["queued"], counts["oldest_queued_s"], counts["slots"], counts["occupied"]) == (2, 2, 1, 0)
    scheduler.step()
    counts = scheduler.counts()
    assert counts["queued"] == counts["occupied"] == counts["prefills"] == counts["decode_steps"] == 1
    assert counts["oldest_queued_s"] == PREFILL + DECODE


@pytest.mark.parametrize("drain", [True, False])
def test_close(drain: bool) -> None:
    scheduler, script, _ = made(slots=2)
    heard = [ask(scheduler, says(3), max_new_tokens=3)[1] for _ in range(5)]
    while not heard[0].tokens[0]:
        script.clock.now += COMPANY
        scheduler.step()
    scheduler.close(drain)
    assert all(each.over for each in heard) and script.holds == [None] * 2
    ends = {end for each in heard for end in each.ends}
    assert ends == ({"length"} if drain else {"cancelled"})
    with pytest.raises(Overloaded, match="closing"):
        ask(scheduler, says(3))
    scheduler.close()


def test_what_is_no_setting_is_refused() -> None:
    for name, value in (("most_queued", 0), ("every", 0), ("company", -0.1), ("company", float("nan"))):
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            made(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0), ("min_new_tokens", 9), ("temperature", -1), ("temperature", float("nan")),
        ("temperature", 1e-9), ("top_p", 0), ("top_p", 1.1), ("top_k", -1), ("repetition_penalty", 0), ("presence_penalty", 3),
        ("frequency_penalty", -3), ("logprobs", 21), ("n", 0),
    ],
)  # fmt: skip
def test_a_setting_of_sampling_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        Sampling(**({"max_new_tokens": 8} | {name: value}))
