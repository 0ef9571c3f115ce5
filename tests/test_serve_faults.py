"""What goes wrong: clients that vanish or read slowly, floods, bodies without end, programs that fail; nothing is left."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import doors
import pytest
import torch
from doors import END, Line, Spoken, asked, door, events_of, ids_of, post, shown

from vitcop_compile import InputError
from vitcop_compile.serve.door import Door, Limits
from vitcop_compile.serve.openai import create_app
from vitcop_compile.serve.prompts import Prompts
from vitcop_compile.serve.requests import Finished, Sampling
from vitcop_compile.serve.streams import Stream


def on(at: Door, work: Callable[[Any], Awaitable[None]]) -> None:
    """`work` with an application, after which the door is empty, but for its schedulers."""

    async def main() -> None:
        await work(create_app(at))
        assert at.active == at.preparing == 0 and not at.streams
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_client_that_vanishes_from_a_stream_cancels_it() -> None:
    spoken = Spoken(lambda *_: ids_of("x" * 1000))
    at = door(spoken)
    spoken.allow(3)

    async def work(app: Any) -> None:
        line = Line(app)
        line.give(asked(stream=True))
        await line.until(lambda: line.body.count(b'"content":"x"') == 3)
        line.go()
        await line.task
        assert b"[DONE]" not in line.body and b"error" not in line.body

    on(at, work)
    assert spoken.wait() == ["cancelled"]
    assert 'vitcop_vanished_clients_total{model="spoken"} 1.0' in at.metrics.text().decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_before_the_first_token_cancels_it(stream: bool) -> None:
    spoken = Spoken()
    at = door(spoken)
    spoken.allow(0)

    async def work(app: Any) -> None:
        line = Line(app)
        line.give(asked(stream=stream))
        await asyncio.to_thread(spoken.wait_asked, 1)
        line.go()
        await line.task

    on(at, work)
    assert spoken.wait() == ["cancelled"]


@pytest.mark.parametrize("where", ["made", "submitted"])
def test_a_client_that_vanishes_while_its_prompt_is(where: str) -> None:
    """Its thread cannot be stopped, and goes on when nobody waits for it any more."""
    spoken, begun, go = Spoken(), threading.Event(), threading.Event()
    spoken.allow(0)
    model = doors.served(spoken)
    owner, name = (model.prompts, "chat") if where == "made" else (spoken, "submit")
    real = getattr(owner, name)

    def slowly(*given: Any) -> Any:
        begun.set()
        assert go.wait(30)
        return real(*given)

    async def work(app: Any) -> None:
        line = Line(app)
        line.give(asked())
        await asyncio.to_thread(begun.wait, 30)
        line.go()
        await line.task
        go.set()
        if where == "submitted":
            await asyncio.to_thread(spoken.wait_asked, 1)

    with mock.patch.object(owner, name, slowly):
        on(Door([model]), work)
    assert spoken.wait() == ([] if where == "made" else ["cancelled"])


def test_a_client_that_vanishes_in_its_body() -> None:
    spoken = Spoken()

    async def work(app: Any) -> None:
        line = Line(app)
        line.give(b'{"model": "spo', more=True)
        line.go()
        await line.task

    on(door(spoken), work)
    assert not spoken.asked


def test_four_cancels_at_once_leave_the_fifth_as_it_was() -> None:
    spoken = Spoken(lambda *_: [*ids_of("Hello"), END])
    at = door(spoken)
    spoken.allow(2)

    async def work(app: Any) -> None:
        lines = [Line(app) for _ in range(5)]
        for line in lines:
            line.give(asked(stream=True))
        for line in lines:
            await line.until(lambda line=line: b'"content":"e"' in line.body)
        for line in lines[:4]:
            line.go()
        await asyncio.gather(*(line.task for line in lines[:4]))
        spoken.allow(100)
        await lines[4].task
        parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in events_of(lines[4].body.decode())[:-1]]
        assert "".join(parts) == "Hello"

    on(at, work)
    assert sorted(map(str, spoken.wait())) == ["cancelled"] * 4 + ["finished"]


def test_a_slow_reader_holds_up_nobody() -> None:
    spoken = Spoken(lambda *_: [*ids_of("Hello"), END])

    async def work(app: Any) -> None:
        slow, quick = Line(app), Line(app)
        slow.held.clear()  # reads nothing at all
        slow.give(asked(stream=True))
        await asyncio.to_thread(spoken.wait, 1)  # its answer has ended all the same
        quick.give(asked(stream=True))
        await quick.task
        assert quick.body.endswith(b"data: [DONE]\n\n") and slow.status is None
        slow.held.set()
        await slow.task
        assert slow.body.count(b"data: ") == quick.body.count(b"data: ")

    on(door(spoken), work)
    assert spoken.wait() == ["finished", "finished"]


def test_a_body_beyond_the_limit_is_refused_while_it_is_read() -> None:
    spoken = Spoken()
    limits = Limits(body=10_000)

    async def work(app: Any) -> None:
        line = Line(app)
        for _ in range(3):
            line.give(bytes(9_000), more=True)
        line.give(b"")  # the end of 27 KB: a client that reads nothing before has its answer then
        await line.task
        assert line.status == 413 and b"over 10000 bytes" in line.body
        line = Line(app)
        for _ in range(5):
            line.give(bytes(9_000), more=True)
        await line.task  # no end in sight
        assert line.status == 413
        # A client that asks before it sends is told at once.
        line = Line(app, headers=[(b"content-length", b"10001"), (b"expect", b"100-continue")])
        await line.task
        assert line.status == 413
        line = Line(app)
        line.give(asked(messages=[{"role": "user", "content": "x" * 9_900}]))
        await line.task
        assert line.status == 400 and b"characters of text" in line.body

    on(door(spoken, limits=limits), work)
    assert not spoken.asked


def test_a_body_of_30_mb_and_one_that_never_comes() -> None:
    answer = post(door(Spoken()), body=asked(shown("data:image/png;base64," + "A" * 30_000_000)))
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"

    async def work(app: Any) -> None:
        line = Line(app)
        line.give(b"{", more=True)
        await line.task
        assert line.status == 408 and b"not there within 0.05 s" in line.body

    on(door(Spoken(), limits=Limits(body_seconds=0.05)), work)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_are_none_are_the_clients_fault() -> None:
    spoken = Spoken()
    at = door(spoken)
    jpeg = doors.picture(300, 300, "JPEG")
    for data, message in (
        (doors.huge_png(10_000, 10_000), "10000 x 10000"),
        (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        (b"no picture", "none of JPEG"),
    ):
        answer = post(at, body=asked(shown(data), stream=True))
        assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    answer = post(at, body=asked(shown("http://169.254.169.254/latest/meta-data")))
    assert answer.status_code == 400 and "not of a host" in answer.json()["error"]["message"]
    assert not spoken.asked and at.active == 0


@pytest.mark.parametrize("stream", [False, True])
def test_overload_has_a_status_for_streams_too(stream: bool) -> None:
    """Ten times as many as there is room for: so many are answered, the others are told when to come back."""
    spoken = Spoken(most=4)
    spoken.allow(0)
    at = door(spoken)

    async def work(app: Any) -> None:
        lines = [Line(app) for _ in range(40)]
        for line in lines:
            line.give(asked(stream=stream))
        await asyncio.to_thread(spoken.wait_rejected, 36)
        spoken.allow(100)
        await asyncio.gather(*(line.task for line in lines))
        assert sorted(line.status or 0 for line in lines) == [200] * 4 + [429] * 36
        assert {line.headers["retry-after"] for line in lines if line.status == 429} == {"3"}

    on(at, work)
    assert spoken.wait() == ["finished"] * 4


def test_overload_is_seen_before_pictures_are_decoded() -> None:
    spoken = Spoken()
    spoken.allow(0)
    at = Door([doors.served(spoken, queue=1)])

    async def work(app: Any) -> None:
        first, second = Line(app), Line(app)
        first.give(asked())
        await asyncio.to_thread(spoken.wait_asked, 1)
        second.give(asked(shown(b"no picture at all")))
        await second.task
        assert second.status == 429 and b"1 prompts wait for spoken" in second.body and second.headers["retry-after"] == "1"
        spoken.allow(100)
        await first.task

    on(at, work)
    limited = door(Spoken(), limits=Limits(preparing=1))
    limited.preparing = 1
    answer = post(limited)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"


def test_one_of_several_prompts_that_is_refused_cancels_the_others() -> None:
    spoken = Spoken(most=2)
    spoken.allow(0)
    answer = post(door(spoken), "/v1/completions", {"model": "spoken", "prompt": ["a", "b", "c"]})
    assert answer.status_code == 429 and spoken.wait() == ["cancelled", "cancelled"]


@pytest.mark.parametrize("stream", [False, True])
def test_programs_that_fail_before_the_first_token(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    at = door(Spoken(lambda *_: RuntimeError("a secret path")))
    answer = post(at, stream=stream)
    assert answer.status_code == 500 and "RuntimeError" in answer.json()["error"]["message"]
    assert "secret" not in answer.text and "a secret path" in caplog.text
    answer = post(door(Spoken(lambda *_: InputError("900 text tokens"))), stream=stream)
    assert answer.status_code == 400 and "900 text tokens" in answer.json()["error"]["message"]
    assert at.active == 0 and not at.streams


def test_programs_that_fail_after_the_first_token_end_a_stream_with_an_error() -> None:
    spoken = Spoken(lambda *_: ids_of("Hel"))  # and then nothing more: a failure
    at = door(spoken)
    *chunks, last = events_of(post(at, stream=True).text)
    assert last["error"]["type"] == "server_error" and "RuntimeError" in last["error"]["message"]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "Hel"
    assert spoken.wait() == ["failed"]
    assert post(at).status_code == 500  # whole answers have a status
    assert 'vitcop_broken_streams_total{model="spoken"} 1.0' in at.metrics.text().decode()


def test_closing_answers_who_is_inside_and_nobody_else() -> None:
    spoken = Spoken(lambda *_: [*ids_of("Hello"), END])
    spoken.allow(2)
    at = door(spoken)

    async def work(app: Any) -> None:
        inside = Line(app)
        inside.give(asked(stream=True))
        await inside.until(lambda: b'"content":"e"' in inside.body)
        at.shut()
        assert not at.drained
        late = Line(app)
        late.give(asked())
        await late.task
        assert late.status == 503
        spoken.allow(100)
        await inside.task
        assert inside.body.endswith(b"[DONE]\n\n") and at.drained

    on(at, work)
    at.close()
    assert spoken.closed is True


@pytest.mark.parametrize("stream", [False, True])
def test_closing_at_once_ends_answers_with_an_error(stream: bool) -> None:
    spoken = Spoken()
    spoken.allow(2)
    at = door(spoken)

    async def work(app: Any) -> None:
        line = Line(app)
        line.give(asked(stream=stream))
        await asyncio.to_thread(spoken.wait_told, 2)
        at.cancel()
        await line.task
        assert b"the server is closing" in line.body and line.status == (200 if stream else 503)

    on(at, work)
    at.close()
    assert spoken.closed is False and spoken.wait() == ["cancelled"]


def test_a_scheduler_that_closes_before_its_door_is_no_overload() -> None:
    spoken = Spoken()
    at = door(spoken)

    def closing(*_: Any) -> Any:
        at.shut()
        return doors.text_of

    spoken.close()
    chat = at.models["spoken"].prompts.chat
    at.models["spoken"].prompts.chat = lambda *given: (closing(), chat(*given))[1]  # type: ignore[method-assign]
    assert post(at).status_code == 503


def test_nothing_is_left_open() -> None:
    """Files and threads after forty requests, pictures among them, are those after a few."""
    spoken = Spoken()
    at = door(spoken)

    async def some(app: Any, count: int) -> None:
        for number in range(count):
            line = Line(app)
            bad = number % 3 == 1
            line.give(asked(shown(b"none" if bad else doors.picture()), stream=number % 2 == 0))
            if number % 5 == 4:
                line.go()
            await line.task

    async def work(app: Any) -> None:
        await some(app, 10)
        before = len(list(Path("/proc/self/fd").iterdir()))
        await some(app, 30)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        assert at.workers.borrowed_tokens == at.fetchers.borrowed_tokens == 0

    if os.path.isdir("/proc/self/fd"):
        on(at, work)
    spoken.wait()
    for thread in spoken.threads:
        thread.join(30)


def test_threads_share_no_copy_of_a_processor() -> None:
    """A tokenizer breaks where one thread changes it while another reads."""
    using: list[int] = []
    seen: set[int] = set()
    lock, meet = threading.Lock(), threading.Barrier(2)

    class Busy:
        tokenizer, chat_template, image_token = doors.tokenizer(), "x", "<image>"

        def __deepcopy__(self, memo: Any) -> Busy:
            return Busy()

        def apply_chat_template(self, turns: Any, **_: Any) -> dict[str, Any]:
            with lock:
                assert id(self) not in using
                using.append(id(self))
                seen.add(id(self))
            meet.wait(30)  # two at a time
            with lock:
                using.remove(id(self))
            return {"input_ids": turns}

    prompts = Prompts(Busy(), (), (doors.IMAGE,), copies=2)
    threads = [threading.Thread(target=prompts.chat, args=([], [])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == 2 and not using


def test_what_is_submitted_while_its_stream_is_cancelled_is_cancelled() -> None:
    """The ticket is there when the one that cancels could not know of it."""
    spoken = Spoken()
    spoken.allow(0)

    async def main() -> None:
        stream = Stream()
        submit = spoken.submit

        def slowly(*given: Any) -> Any:
            ticket = submit(*given)
            stream.cancel()
            return ticket

        with mock.patch.object(spoken, "submit", slowly):
            await asyncio.to_thread(stream.submit, spoken, [{"input_ids": torch.tensor([[1]])}], Sampling())
        async with asyncio.timeout(30):
            assert (await stream.next()).event == Finished(0, "cancelled")
        stream.close()
        stream.close()
        stream.submit(spoken, [{}], Sampling())  # nobody would listen
        assert len(spoken.asked) == 1

    asyncio.run(main())


def test_a_loop_that_has_ended_is_told_nothing() -> None:
    async def made() -> Stream:
        return Stream()

    stream = asyncio.run(made())
    stream._listen(0, Finished(0, "stop"))  # in a scheduler's thread, which goes on
