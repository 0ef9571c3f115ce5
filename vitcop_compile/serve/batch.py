"""Requests of a file, answered into another: OpenAI's batch format, through the same application as over HTTP."""

from __future__ import annotations

import asyncio
import fcntl
import json
import math
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, InputError, VitcopError
from .cluster import Cluster
from .door import Door
from .openai import create_app
from .prompts import load_processor

URLS = ("/v1/chat/completions", "/v1/completions")
# Of every answer as it is written.
_BEGINS = b'{"id":"batch_req_'
# Prompts that wait at most: what is under way at once is bounded elsewhere.
_QUEUE = 4096

# Times that a line is sent to a queue that is full, a second apart at least.
_TRIES = 60


class Line(NamedTuple):
    """A line of the input. number: from 1; offset, length: bytes; custom_id: None where it has none, which is an error that
    its answer says."""

    number: int
    offset: int
    length: int
    custom_id: str | None

    @property
    def key(self) -> str | int:
        """By which an answer is known to be its: a line without an id is known by its number."""
        return self.number if self.custom_id is None else self.custom_id


def lines_of(path: Path) -> list[Line]:
    """The lines of a file that are not blank, read once. Raises InputError for no file, and for two lines of one id."""
    found: list[Line] = []
    seen: dict[str, int] = {}
    offset = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    line = Line(number, offset, len(text), _id_of(text))
                    if line.custom_id is not None and (first := seen.setdefault(line.custom_id, number)) != number:
                        raise InputError(
                            f"{path}: lines {first} and {number} have one custom_id, {line.custom_id!r}, by which answers are "
                            "told apart: give each its own"
                        )
                    found.append(line)
                offset += len(text)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return found


def read_line(path: Path, offset: int, length: int) -> bytes:
    """What `Line` stands for."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(length)


class Output:
    """The file of answers, to which lines are added; each is on the disk when `write` returns. One process writes at a time.

    A last line that was cut short, as by a process that was killed, is taken away. done: keys of the lines that it answers.
    Raises ConfigError where another process writes, InputError for a file that holds something else, or answers to others than
    `lines`.
    """

    def __init__(self, path: Path, lines: Sequence[Line]):
        self.path = path
        new = not path.exists()
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from None
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(f"{path} is being written by another process: wait for it, or name another file") from None
            self.done = self._held({line.key for line in lines})
            if new:
                _sync_folder(path.parent)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, answer: Mapping[str, Any]) -> None:
        """Adds a line."""
        self._file.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.add(_key_of(answer))

    def _held(self, known: set[str | int]) -> set[str | int]:
        """Keys of what the file answers; it ends with a whole line then."""
        found: set[str | int] = set()
        whole, text = 0, b"\n"
        self._file.seek(0)
        for number, text in enumerate(self._file, 1):
            try:
                key = _key_of(_parsed(text))
            except (ValueError, KeyError, TypeError):
                if text.endswith(b"\n") or not (text.startswith(_BEGINS) or _BEGINS.startswith(text)):
                    raise InputError(f"{self.path}: line {number} is no answer of a batch: name another file") from None
                self._file.truncate(whole)
                text = b"\n"
                break
            if key not in known and isinstance(key, str):  # a line that had no id may have got one
                raise InputError(f"{self.path}: line {number} answers {key!r}, which the input has not: name another file")
            found.add(key)
            whole += len(text)
        self._file.seek(0, os.SEEK_END)
        if not text.endswith(b"\n"):
            self._file.write(b"\n")
        return found


class Answerer:
    """Answers lines through the application of a door, as its server would over HTTP. sleep: seconds, where a queue is
    full. Raises VitcopError where that does not end, as of a scheduler that has stopped."""

    def __init__(self, door: Door, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep):
        self._app, self._sleep = create_app(door), sleep

    async def answer(self, number: int, text: bytes) -> dict[str, Any]:
        """The output's line for the input's `number`, from 1: whatever it holds, there is one."""
        try:
            asked = _parsed(text)
        except ValueError as error:
            return _wrong(number, None, f"line {number} is not JSON: {error}")
        custom_id = _id_of(text)
        if custom_id is None:
            return _wrong(number, None, f"line {number} has no custom_id that is a string")
        url, body = asked.get("url", URLS[0]), asked.get("body")
        if asked.get("method", "POST") != "POST" or url not in URLS:
            return _wrong(number, custom_id, f"line {number} asks {asked.get('method')} {url}: use POST, {' or '.join(URLS)}")
        if not isinstance(body, dict):
            return _wrong(number, custom_id, f"line {number} has no body")
        if body.get("stream"):
            return _wrong(number, custom_id, f"line {number} asks for a stream: answers of a batch come whole, leave it out")
        for _ in range(_TRIES):
            status, headers, said = await _post(self._app, url, json.dumps(body).encode())
            if status == 503:  # no answer to this line: it is left to the same command, once what has stopped runs again
                raise VitcopError(f"line {number} cannot be answered now: {json.loads(said)['error']['message']}")
            if status != 429:
                break
            await self._sleep(float(headers.get("retry-after", 1)))
        else:
            raise VitcopError(f"line {number} was refused {_TRIES} times, the last time with {said.decode()}: see the log")
        response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": json.loads(said)}
        return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}


@dataclass
class Tally:
    """What was answered so far. failed: with another status than 200, or none; tokens: generated."""

    answered: int = 0
    failed: int = 0
    tokens: int = 0

    def add(self, answer: Mapping[str, Any]) -> None:
        """One more."""
        response = answer["response"] or {}
        self.answered += 1
        self.failed += response.get("status_code") != 200
        self.tokens += response.get("body", {}).get("usage", {}).get("completion_tokens", 0)


def open_door(cluster: Cluster) -> tuple[Door, int]:
    """The models of `cluster` behind a door in this process, and how many lines keep their slots full. Raises VitcopError."""
    opening = replace(cluster.opening(), queue=_QUEUE)
    for source in cluster.models.values():
        opening.check(source)
    processors = {name: load_processor(cluster.processor_of(name)) for name in cluster.models}
    served, slots = [], 0
    for name, source in cluster.models.items():
        scheduler, facts = opening.scheduler(source)
        served.append(facts.served(name, scheduler, processors[name], None))
        slots += facts.slots
    # As many again are read while these are decoded, so that those that go through prefill together are there.
    at_once = 2 * slots + 4
    return Door(served, replace(cluster.limits(), preparing=4 * at_once)), at_once


@asynccontextmanager
async def answering(door: Door) -> AsyncIterator[Answerer]:
    """An answerer, whose door is closed behind it."""
    try:
        yield Answerer(door)
    except BaseException:
        door.cancel()
        raise
    finally:
        door.shut()
        await asyncio.to_thread(door.close)


async def run(
    answerer: Answerer, source: Path, lines: Sequence[Line], at_once: int, write: Callable[[dict[str, Any]], None]
) -> None:
    """Answers `lines` of the file `source`, `at_once` at a time, and calls `write` with each answer as it comes, one at a
    time."""
    left: Iterator[Line] = iter(lines)
    writing = asyncio.Lock()

    async def work() -> None:
        for line in left:
            answer = await answerer.answer(line.number, await asyncio.to_thread(read_line, source, line.offset, line.length))
            async with writing:
                await asyncio.to_thread(write, answer)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(lines))):
                group.create_task(work())
    except BaseExceptionGroup as errors:  # the first has cancelled the others
        raise errors.exceptions[0] from None


async def _post(app: Any, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of one request to an ASGI application."""
    given, forever = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()
    status, headers, parts = 0, {}, []
    scope: dict[str, Any] = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": [], "client": None, "server": None,
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        if not given:
            await forever.wait()  # whoever asks stays until the end
        return given.pop()

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, headers, b"".join(parts)


def _parsed(text: bytes) -> Any:
    """JSON. Raises ValueError for what is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _id_of(text: bytes) -> str | None:
    try:
        found = _parsed(text)["custom_id"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _key_of(answer: Any) -> str | int:
    """Of an answer, the key of its line. Raises KeyError or TypeError for what is none."""
    custom_id, error = answer["custom_id"], answer["error"]
    answer["response"]
    if isinstance(custom_id, str):
        return custom_id
    line = error["line"]
    if isinstance(line, int):
        return line
    raise TypeError(line)


def _wrong(number: int, custom_id: str | None, message: str) -> dict[str, Any]:
    error = {"code": "invalid_line", "message": message, "line": number}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": None, "error": error}


def _sync_folder(folder: Path) -> None:
    held = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


def blocks_of(count: int) -> int:
    """Into how many parts lines are divided for Ray: one is what is lost with a replica, and made again."""
    return min(10_000, math.ceil(count / 32)) or 1
