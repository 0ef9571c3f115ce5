"""The server itself: the real client of OpenAI, curl as the documentation has it, signals, and connections that are real."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import doors
import httpx
import openai
import pytest
from doors import END, Spoken, door, ids_of

from vitcop_compile import ConfigError
from vitcop_compile.serve import server as serve_server
from vitcop_compile.serve.door import Door, Limits
from vitcop_compile.serve.server import Server, bound, url_of

ROOT = Path(__file__).parent.parent


@contextmanager
def running(at: Door) -> Iterator[str]:
    """A server on loopback, in a thread; its URL."""
    listening = threading.Event()
    with bound("127.0.0.1", 0) as held:
        server = Server(at, ready=listening.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [held]})
        thread.start()
        try:
            assert listening.wait(30)
            yield url_of(held)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def client_of(url: str) -> openai.OpenAI:
    local = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30, http_client=local)


def test_the_client_of_openai() -> None:
    spoken = Spoken(lambda inputs, sampling, choice: [*ids_of(f"Né {choice}"), END])
    at = door(spoken, Spoken(most=0))
    hello: Any = {"model": "spoken", "messages": [{"role": "user", "content": "Hello?"}]}
    with running(at) as url, client_of(url) as client:
        assert [model.id for model in client.models.list()] == ["spoken", "other"]
        whole = client.chat.completions.create(**hello, n=2, logprobs=True, top_logprobs=1, extra_body={"top_k": 5})
        assert [choice.message.content for choice in whole.choices] == ["Né 0", "Né 1"]
        assert whole.choices[0].finish_reason == "stop" and whole.usage and whole.usage.completion_tokens == 12
        told = whole.choices[0].logprobs
        assert told and told.content and [entry.token for entry in told.content] == ["N", "�", "�", " ", "0"]
        assert spoken.asked[-1].sampling.top_k == 5
        parts = list(client.chat.completions.create(**hello, stream=True, stream_options={"include_usage": True}))
        assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == "Né 0"
        assert parts[-1].usage and parts[-1].usage.completion_tokens == 6
        # What the client says of an answer can be said back.
        turns = [*hello["messages"], whole.choices[0].message, {"role": "user", "content": "More."}]
        assert client.chat.completions.create(model="spoken", messages=turns).choices[0].message.content == "Né 0"
        shown: Any = [{"role": "user", "content": [doors.shown(doors.picture()), {"type": "text", "text": "What?"}]}]
        seen = client.chat.completions.create(model="spoken", messages=shown, stop=" ")
        assert seen.choices[0].message.content == "Né"
        assert client.completions.create(model="spoken", prompt=["a", "b"]).choices[1].text == "Né 0"
        with pytest.raises(openai.BadRequestError, match="tools is not supported here"):
            client.chat.completions.create(**hello, tools=[{"type": "function", "function": {"name": "f"}}])
        with pytest.raises(openai.NotFoundError, match="'nobody' is not served here"):
            client.chat.completions.create(model="nobody", messages=hello["messages"])
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError, match="no more can wait"):
                client.chat.completions.create(model="other", messages=hello["messages"], stream=stream)  # type: ignore[call-overload]
    assert set(spoken.wait()) <= {"finished", "cancelled"} and spoken.closed is True


def test_a_failure_in_a_stream_raises_in_the_client_of_openai() -> None:
    at = door(Spoken(lambda *_: ids_of("He")))
    with running(at) as url, client_of(url) as client:
        parts = []
        with pytest.raises(openai.APIError, match="failed on this request"):
            for part in client.chat.completions.create(
                model="spoken", messages=[{"role": "user", "content": "Hello?"}], stream=True
            ):
                parts.append(part.choices[0].delta.content)
        assert parts == ["", "H", "e"]


def test_addresses_that_cannot_be_served_at() -> None:
    with bound("127.0.0.1", 0) as held:
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port} cannot be served at .*: choose another --port"):
            bound("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"203.0.113.7:1 cannot be served at"):  # an address of nobody
        bound("203.0.113.7", 1)
    for none in (-1, 65_536):
        with pytest.raises(ConfigError, match=f"--port {none} is none: give one from 0 to 65535"):
            bound("127.0.0.1", none)


def test_signals_close_the_door_first() -> None:
    """By a clock that stands still unless it is told: 503 at once, the end once nobody is inside, or when time is up."""
    now = [0.0]

    def made() -> tuple[Door, Server]:
        at = door(Spoken(), clock=lambda: now[0])
        return at, Server(at, drain=10)

    def tick(server: Server) -> bool:
        return asyncio.run(server.on_tick(1))

    at, server = made()
    assert not tick(server) and not at.closing
    at.active = 1
    server.handle_exit(signal.SIGTERM, None)
    assert not tick(server) and at.closing and not at.cancelled
    now[0] = 9.9
    assert not tick(server) and not at.cancelled
    at.active = 0
    assert tick(server)
    # Time is up: what is inside is cancelled, and what does not end with that is left.
    at, server = made()
    at.active = 1
    server.handle_exit(signal.SIGTERM, None)
    assert not tick(server)
    now[0] += 10.1
    assert not tick(server) and at.cancelled
    now[0] += 5.1
    assert tick(server)
    # A second signal does not wait.
    at, server = made()
    at.active = 1
    server.handle_exit(signal.SIGINT, None)
    server.handle_exit(signal.SIGINT, None)
    assert not tick(server) and at.cancelled
    at.active = 0
    assert tick(server)


def test_a_scheduler_that_does_not_end_is_left(caplog: pytest.LogCaptureFixture) -> None:
    """By a clock: 20 s after the last request, and while the drain lasts no sooner, but for a second signal."""

    class Left(Exception):
        pass

    for signals, until, least in ((0, 0.0, 20), (1, 0.0, 20), (1, 35.0, 35), (2, 35.0, 20)):
        looks: list[float] = []

        def clock(looks: list[float] = looks) -> float:
            looks.append(len(looks) + 1.0)
            return looks[-1]

        server = Server(door(Spoken(), clock=clock), drain=10)
        server._signals, server._until = signals, until
        with (
            mock.patch.object(serve_server.os, "_exit", side_effect=Left) as left,
            mock.patch.object(serve_server.asyncio, "sleep", mock.AsyncMock()),
            pytest.raises(Left),
        ):
            asyncio.run(server._watch())
        left.assert_called_once_with(1)
        assert least < looks[-1] <= least + 3, (signals, looks)
    assert "a scheduler did not end within 20 s" in caplog.text


def commands(document: Path) -> list[str]:
    """The blocks of a document that ask a server by curl."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)
    return [block for block in blocks if block.startswith("curl")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_curl_as_the_documentation_has_it(document: str, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(doors.picture(1200, 900, "JPEG"))
    found = commands(ROOT / document)
    assert found
    at = Door([doors.served(Spoken("A red wall."), name) for name in ("llava-dense", "llava-1_9")])
    with running(at) as url:
        for command in found:
            script = command.replace("http://localhost:8000", url)
            assert url in script, command
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                env={"PATH": os.environ["PATH"], "no_proxy": "*"},
            )  # fmt: skip
            assert done.returncode == 0 and done.stdout, (command, done.stderr)
            if "/metrics" in command:
                assert "vitcop_slots{" in done.stdout
            elif '"stream": true' in command:
                assert done.stdout.endswith("data: [DONE]\n\n") and '"error"' not in done.stdout
            elif "%{http_code}" in command:
                status = re.search(r"# (\d{3})", command)
                assert status and done.stdout.strip().endswith(status[1]) and '"error"' in done.stdout
            else:
                assert "error" not in json.loads(done.stdout)


SERVED = """
import sys
sys.path.insert(0, {tests!r})
from doors import END, Spoken, door, ids_of
from vitcop_compile.serve.server import Server, bound, url_of
spoken = Spoken(lambda *_: [*ids_of("Hello"), END])
spoken.allow(2)
import threading
threading.Thread(target=lambda: (sys.stdin.readline(), spoken.allow(100)), daemon=True).start()
with bound("127.0.0.1", 0) as held:
    Server(door(spoken), ready=lambda: print(url_of(held), flush=True)).run(sockets=[held])
print(spoken.closed, spoken.wait(), flush=True)
"""


@pytest.mark.slow
def test_sigterm() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVED.format(tests=str(ROOT / "tests"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert process.stdin and process.stdout
    try:
        url = process.stdout.readline().strip()
        with httpx.Client(trust_env=False, base_url=url, timeout=30) as client:
            body = doors.asked(stream=True)
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = answer.iter_lines()
                assert any('"content":"e"' in line for line in lines)
                process.send_signal(signal.SIGTERM)
                until = time.monotonic() + 20
                while client.get("/health").status_code == 200:
                    assert time.monotonic() < until
                late = client.post("/v1/chat/completions", json=doors.asked())
                assert late.status_code == 503 and late.headers["retry-after"] == "5"
                process.stdin.write("\n")
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert process.stdout.read() == "True ['finished']\n"
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


HANGING = """
import sys, threading
sys.path.insert(0, {tests!r})
from doors import Spoken, door
from vitcop_compile.serve import server
server._ENDING = server._LAST = 0.5
spoken = Spoken()
spoken.close = lambda drain: (print("closing", flush=True), threading.Event().wait())
with server.bound("127.0.0.1", 0) as held:
    server.Server(door(spoken), ready=lambda: print("ready", flush=True)).run(sockets=[held])
"""


@pytest.mark.slow
def test_sigterm_ends_a_process_whose_scheduler_hangs() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING.format(tests=str(ROOT / "tests"))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "closing\n"
        # A second one, since the first waits for the drain, which is a minute.
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 1 and "a scheduler did not end within 1 s of the shutdown" in said
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_connections_that_break_and_that_nobody_reads() -> None:
    """By real sockets: six that are reset in their streams, and one that reads nothing while others are answered."""
    spoken = Spoken(lambda inputs, *_: [*ids_of("x" * (300 if "many" in doors.text_of(inputs) else 3)), END])
    at = Door([doors.served(spoken, new=1000)])
    with running(at) as url:
        host, port = url.removeprefix("http://").split(":")
        long = json.dumps(doors.asked({"type": "text", "text": "many"}, stream=True, logprobs=True, top_logprobs=20))
        request = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(long)}\r\n\r\n{long}".encode()
        lazy = socket.create_connection((host, int(port)))
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(request)
        spoken.wait(1)  # told everything, to nobody
        spoken.allow(5)
        for _ in range(6):
            with socket.create_connection((host, int(port))) as gone:
                gone.sendall(request)
                assert b"200 OK" in gone.recv(1000)
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        spoken.allow(float("inf"))
        with client_of(url) as client:
            answers = [
                client.chat.completions.create(model="spoken", messages=[{"role": "user", "content": "few"}]) for _ in range(5)
            ]
        assert all(answer.choices[0].message.content == "xxx" for answer in answers)
        ended = spoken.wait(12)
        assert ended[0] == "finished" and ended[7:] == ["finished"] * 5
        # The lazy one has all of it, when it reads at last.
        got = b""
        while b"[DONE]" not in got:
            part = lazy.recv(1 << 20)
            assert part
            got += part
        lazy.close()
        until = time.monotonic() + 20
        while at.active:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert not at.streams


@pytest.mark.slow
def test_a_body_of_30_mb_by_the_client_of_openai() -> None:
    at = door(Spoken(), limits=Limits())
    huge: Any = [{"role": "user", "content": [doors.shown("data:image/png;base64," + "A" * 30_000_000)]}]
    with running(at) as url, client_of(url) as client:
        with pytest.raises(openai.APIStatusError, match="the body has over 20971520 bytes") as caught:
            client.chat.completions.create(model="spoken", messages=huge)
        assert caught.value.status_code == 413
