"""What a request of the HTTP server may hold, and what reading it may cost."""

from __future__ import annotations

import asyncio
import json
import threading
import weakref
from typing import Any
from unittest import mock

import doors
import pytest
from doors import Spoken, asked, door, post, refused, shown, talk
from pydantic import ValidationError

from vitcop_compile.serve import openai as openai_app
from vitcop_compile.serve import pictures
from vitcop_compile.serve.schemas import ChatRequest, CompletionRequest


def test_bodies_of_many_values_are_refused_at_the_first() -> None:
    """What is wrong is found once, not for each of 50,000 values: a refusal has one error to choose from."""
    many = 50_000
    for kind, body, message, param in (
        (CompletionRequest, {"prompt": [0.5] * many}, "valid integer", "prompt.0"),
        (CompletionRequest, {"prompt": [{}] * many}, "valid integer", "prompt.0"),
        (CompletionRequest, {"prompt": [[0.5] * many]}, "valid integer", "prompt.0.0"),
        (CompletionRequest, {"prompt": ["a", *[1] * 200]}, "valid string", "prompt.1"),
        (CompletionRequest, {"prompt": [""] * many}, "at most 256 items", "prompt"),
        (CompletionRequest, {"prompt": [[1]] * many}, "at most 256 items", "prompt"),
        (CompletionRequest, {"prompt": 5}, "give text or token ids", "prompt"),
        (CompletionRequest, {"prompt": [1] * (2**18 + 1)}, "at most 262144 items", "prompt"),
        (CompletionRequest, {"prompt": "a", "stop": [1] * many}, "valid string", "stop.0"),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": ["a"] * many}, "valid integer", "stop_token_ids.0"),
        (CompletionRequest, {"prompt": "a", **{str(name): 1 for name in range(many)}}, "fields, of which", None),
        (ChatRequest, {"messages": [1] * 2_000}, "should be an object", "messages.0"),
        (ChatRequest, {"messages": [{"role": "user", "content": "a"}] * 2_049}, "at most 2048 items", "messages"),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * 1_000}]}, "should be an object", "messages.0.content.0"),
        (ChatRequest, {"messages": [{str(name): 1 for name in range(many)}]}, "fields, of which", "messages.0"),
    ):  # fmt: skip
        with pytest.raises(ValidationError) as caught:
            kind.model_validate_json(json.dumps({"model": "spoken"} | body))
        assert caught.value.error_count() <= 2, body.keys()
        path = "/v1/completions" if kind is CompletionRequest else "/v1/chat/completions"
        refused(post(door(Spoken()), path, {"model": "spoken"} | body), 400, message, param)
    with mock.patch.object(CompletionRequest, "model_validate_json", side_effect=AssertionError("read")):
        answer = post(door(Spoken()), "/v1/completions", b'{"prompt":[' + b"0," * 2**19 + b"0]}")
    assert refused(answer, 400, "524290 commas and brackets, the limit is 524288")["code"] == "too_many"
    answer = post(door(Spoken()), "/v1/completions", {"model": "spoken", "prompt": [[1] * 2**17] * 3})
    refused(answer, 400, "393216 token ids, the limit is 262144", "prompt")
    # A name that nobody would read to its end.
    error = refused(post(door(Spoken()), **{"x" * 100_000: 1}), 400, "is not supported here", "x" * 80 + " ...")
    assert len(json.dumps(error)) < 1_000


def test_large_bodies_are_read_in_a_thread() -> None:
    read: list[tuple[int, bool]] = []
    plain = openai_app._parsed

    def parsed(body: bytes, kind: Any) -> Any:
        read.append((len(body), threading.current_thread() is threading.main_thread()))
        return plain(body, kind)

    with mock.patch.object(openai_app, "_parsed", parsed):
        for user in ("x", "x" * 20_000):
            assert post(door(Spoken()), user=user).status_code == 200
    assert [(size > 16_384, main) for size, main in read] == [(False, True), (True, False)]


def test_characters_of_all_prompts_of_a_request_are_bounded() -> None:
    def complete(*prompts: str) -> Any:
        return post(door(Spoken()), "/v1/completions", {"model": "spoken", "prompt": list(prompts)})

    assert complete("a" * 2_500, "b" * 2_500).status_code == 200
    refused(complete("a" * 2_500, "b" * 2_501), 400, "5001 characters of text, the limit is 5000")
    # Messages and parts cost what a template makes of them.
    empty = {"role": "user", "content": ""}
    assert post(door(Spoken()), messages=[empty] * 150).status_code == 200
    refused(post(door(Spoken()), messages=[empty] * 200), 400, "a message and a part count for 16 each")


def test_as_many_requests_as_threads_hold_decoded_pictures() -> None:
    """A thread that has decoded a picture also makes inputs of it and queues them: what it holds is gone as it is free."""
    spoken = Spoken()
    at = door(spoken)
    at.workers.total_tokens = 2
    lock = threading.Lock()
    held, most, decoded = 0, 0, 0
    plain = pictures._decoded

    def gone() -> None:
        nonlocal held
        with lock:
            held -= 1

    def watched(*given: Any) -> Any:
        nonlocal held, most, decoded
        found = plain(*given)
        with lock:
            held += 1
            decoded += 1
            most = max(most, held)
        weakref.finalize(found, gone)
        return found

    async def work(client: Any) -> list[Any]:
        body = asked(shown(doors.picture(400, 400)), max_tokens=1)
        return await asyncio.gather(*(client.post("/v1/chat/completions", json=body) for _ in range(12)))

    with mock.patch.object(pictures, "_decoded", watched):
        assert {answer.status_code for answer in talk(at, work)} == {200}
    assert decoded == 12 and most <= 2
