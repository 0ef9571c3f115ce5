"""A scheduler that says what it is told to, a model's processor of bytes, and pictures: what tests of the HTTP server need."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import itertools
import json
import struct
import threading
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers import models as kinds
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from vitcop_compile.serve.door import Door, Limits, Served
from vitcop_compile.serve.openai import create_app
from vitcop_compile.serve.prompts import Prompts
from vitcop_compile.serve.requests import Failed, Finished, Overloaded, Sampling, Token

# Tokens of the tokenizer of bytes: a byte is its number and FIRST.
PAD, BEGIN, END, FIRST, IMAGE = 0, 1, 2, 3, 259
SIDE, PATCH = 56, 14  # of the encoder of pictures: 16 placeholders
CHAT = (
    "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('a system message comes first') }}{% endif %}[{{ message.role }}]"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
Say = Callable[[Mapping[str, Any], Sampling, int], Sequence[int] | Exception]


def ids_of(text: str) -> list[int]:
    """A token for every byte of UTF-8."""
    return [FIRST + byte for byte in text.encode()]


def text_of(inputs: Mapping[str, Any]) -> str:
    """What a prompt of bytes says, pictures left out."""
    return bytes(id - FIRST for id in inputs["input_ids"][0].tolist() if FIRST <= id < IMAGE).decode()


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, a beginning that stands before every text, an end and a placeholder."""
    letters = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
    named = dict(zip((*range(33, 127), *range(161, 173), *range(174, 256)), letters, strict=True))
    rest = itertools.count(256)
    names = [named.get(byte) or chr(next(rest)) for byte in range(256)]  # as GPT-2 writes bytes
    vocab = {"<pad>": PAD, "<s>": BEGIN, "</s>": END} | {name: FIRST + byte for byte, name in enumerate(names)}
    made = Tokenizer(kinds.BPE(vocab | {"<image>": IMAGE}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BEGIN)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


@functools.cache
def processor() -> LlavaProcessor:
    """That of a small LLaVA, with a chat template."""
    side = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side), tokenizer(), patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip


class Asked:
    """A ticket, and what was asked for. told: tokens so far; cancelled: answers; ended: by what, None until
    then."""

    def __init__(
        self, inputs: Mapping[str, Any], sampling: Sampling, listen: Callable[[Any], None], wake: threading.Condition
    ):
        self.inputs, self.sampling, self.listen, self._wake = inputs, sampling, listen, wake
        ids = inputs["input_ids"]
        self.image_tokens = int((ids == IMAGE).sum())
        self.text_tokens = ids.numel() - self.image_tokens
        self.cancelled: set[int] = set()
        self.told = 0
        self.ended: str | None = None

    def cancel(self, choice: int | None = None) -> None:
        with self._wake:
            self.cancelled |= set(range(self.sampling.n)) if choice is None else {choice}
            self._wake.notify_all()


class Spoken:
    """A scheduler of threads, one for each prompt, which says what `say` says: tokens, and raises or tells errors.

    say(inputs, sampling, choice) -> tokens of the answer, or an error that its programs fail with. most: prompts that have not
    ended, beyond which it is overloaded. `allow(count)` lets every prompt say so many tokens and no more.
    """

    def __init__(self, say: Say | str = "Hello", most: int = 100, refuse: Exception | None = None):
        self._say: Say = (lambda *_: [*ids_of(say), END]) if isinstance(say, str) else say
        self._most, self._refuse = most, refuse
        self.wake = threading.Condition()
        self.allowed: float = float("inf")
        self.asked: list[Asked] = []
        self.threads: list[threading.Thread] = []
        self.closed: bool | None = None  # whether it drained
        self.age, self.rejected, self.retry_after = 0.0, 0, 2.5

    def allow(self, count: float) -> None:
        with self.wake:
            self.allowed = count
            self.wake.notify_all()

    def submit(self, inputs: Mapping[str, Any], sampling: Sampling, listen: Callable[[Any], None]) -> Asked:
        with self.wake:
            if self._refuse is not None:
                raise self._refuse
            if self.closed is not None or sum(each.ended is None for each in self.asked) >= self._most:
                self.rejected += 1
                self.wake.notify_all()
                raise Overloaded("no more can wait: come back later", self.retry_after)
            asked = Asked(inputs, sampling, listen, self.wake)
            self.asked.append(asked)
            thread = threading.Thread(target=self._answer, args=(asked,), daemon=True)
            self.threads.append(thread)
            thread.start()  # under the lock: whoever closes joins only what was started
            self.wake.notify_all()
        return asked

    def _answer(self, asked: Asked) -> None:
        said = [self._say(asked.inputs, asked.sampling, choice) for choice in range(asked.sampling.n)]
        left = {choice: list(said[choice]) for choice in range(len(said)) if not isinstance(said[choice], Exception)}
        error = next((each for each in said if isinstance(each, Exception)), None)
        spoken = [0] * len(said)
        how = "finished"
        while left and how == "finished":
            for choice in list(left):
                with self.wake:
                    self.wake.wait_for(lambda one=choice: one in asked.cancelled or asked.told < self.allowed)
                    dropped = choice in asked.cancelled
                    asked.told += not dropped
                    self.wake.notify_all()
                if dropped:
                    del left[choice]
                    asked.listen(Finished(choice, "cancelled"))
                    how = "finished" if left else "cancelled"
                    continue
                if not left[choice]:
                    how = "failed"
                    error = error or RuntimeError("a script ended before its answer")
                    break
                spoken[choice] += 1
                id = left[choice].pop(0)
                count = asked.sampling.logprobs
                top = tuple((id + other, -0.5 - other) for other in range(count or 0))
                asked.listen(Token(choice, id, None if count is None else -0.5, top))
                stops = (*asked.sampling.stop_ids, *(() if asked.sampling.ignore_end else (END,)))
                if id in stops or spoken[choice] == asked.sampling.max_new_tokens:
                    asked.listen(Finished(choice, "stop" if id in stops else "length"))
                    del left[choice]
        if error is not None and not left and how == "finished":
            how = "failed"
        if how == "failed":
            asked.listen(Failed(error or RuntimeError("unknown")))
        with self.wake:
            asked.ended = how
            self.wake.notify_all()

    def wait(self, count: int | None = None) -> list[str | None]:
        """How all that was asked, or so many, ended, once it has."""
        with self.wake:
            assert self.wake.wait_for(
                lambda: len(self.asked) >= (count or 0) and all(each.ended for each in self.asked), timeout=30
            )
            return [each.ended for each in self.asked]

    def wait_asked(self, count: int) -> None:
        """Until so many were submitted."""
        with self.wake:
            assert self.wake.wait_for(lambda: len(self.asked) >= count, timeout=30)

    def wait_rejected(self, count: int) -> None:
        """Until so many were refused."""
        with self.wake:
            assert self.wake.wait_for(lambda: self.rejected >= count, timeout=30)

    def wait_told(self, count: int) -> None:
        """Until so many tokens were told of the first."""
        with self.wake:
            assert self.wake.wait_for(lambda: bool(self.asked) and self.asked[0].told >= count, timeout=30)

    def counts(self) -> Mapping[str, float]:
        with self.wake:
            ended = [each.ended for each in self.asked]
        queued = float(ended.count(None))
        totals = {how: float(ended.count(how)) for how in ("finished", "cancelled", "failed")}
        return totals | {
            "slots": 4.0, "occupied": 1.0, "queued": queued, "oldest_queued_s": 0.25, "heartbeat_age_s": self.age,
            "submitted": float(len(ended)), "rejected": float(self.rejected), "prefills": 1.0, "decode_steps": 2.0,
            "padded_rows": 3.0, "text_rows": 8.0, "feature_hits": 1.0, "feature_misses": 2.0,
        }  # fmt: skip

    def close(self, drain: bool = True) -> None:
        with self.wake:
            self.closed = drain
            waiting, threads = list(self.asked), list(self.threads)
        if not drain:
            for each in waiting:
                each.cancel()
        for thread in threads:
            thread.join(30)


def served(scheduler: Spoken, name: str = "spoken", new: int = 64, **more: Any) -> Served:
    """A model of that scheduler."""
    prompts = Prompts(processor(), ("pixel_values",), (IMAGE,), copies=2, characters=5_000)
    return Served(name, scheduler, prompts, new, frozenset([END]), **more)


def door(*schedulers: Spoken, limits: Limits | None = None, **more: Any) -> Door:
    """A door before models "spoken", "other", ..."""
    names = ("spoken", "other", "third")
    return Door([served(scheduler, name) for scheduler, name in zip(schedulers, names)], limits, **more)


def data_url(data: bytes, kind: str = "image/png") -> str:
    """A picture as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(width: int = 60, height: int = 40, kind: str = "PNG", **more: Any) -> bytes:
    """A small picture of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 90)).save(out, kind, **more)
    return out.getvalue()


def huge_png(width: int, height: int, rows: int | None = None) -> bytes:
    """A PNG of black and white pixels, whose body is a few KB, written by the book; rows: that are there, by default all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packed, row = zlib.compressobj(9), bytes(1 + (width + 7) // 8)
    body = b"".join(packed.compress(row) for _ in range(rows or height)) + packed.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def talk(door: Door, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    """What `work` makes of a client whose requests go to the application itself, and are answered whole."""

    async def main() -> Any:
        transport = httpx.ASGITransport(create_app(door), raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://door", trust_env=False) as client:
            return await work(client)

    return asyncio.run(main())


def post(door: Door, path: str = "/v1/chat/completions", body: Any = None, **fields: Any) -> httpx.Response:
    """One request. fields: of a chat that says hello, which they replace."""
    given = body if body is not None else asked(**fields)
    sent = given if isinstance(given, bytes) else json.dumps(given).encode()
    return talk(door, lambda client: client.post(path, content=sent))


def asked(*parts: Any, **fields: Any) -> dict[str, Any]:
    """A chat's body. parts: of the message; fields: others."""
    content = list(parts) or "Hello?"
    return {"model": "spoken", "messages": [{"role": "user", "content": content}], **fields}


def shown(data: bytes | str) -> dict[str, Any]:
    """The part of a message that shows a picture."""
    return {"type": "image_url", "image_url": {"url": data if isinstance(data, str) else data_url(data)}}


def events_of(text: str) -> list[Any]:
    """What a stream of server-sent events says, by the letter of its format; [DONE] as it is."""
    blocks = text.split("\n\n")
    assert blocks.pop() == "" and all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [data if (data := block.removeprefix("data: ")) == "[DONE]" else json.loads(data) for block in blocks]


class Line:
    """A connection to an application, on which the client sends when it wants, reads when it wants, and may go.

    status, headers and body: what was sent so far. `held` stops what is sent until it is set.
    """

    def __init__(self, app: Any, path: str = "/v1/chat/completions", headers: Sequence[tuple[bytes, bytes]] = ()):
        self._scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"host", b"door"), *headers], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        self._given: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._gone = False
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.body = b""
        self.sent = asyncio.Condition()
        self.held = asyncio.Event()
        self.held.set()
        self.task = asyncio.ensure_future(app(self._scope, self._receive, self._send))

    def give(self, body: Any, more: bool = False) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._given.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def go(self) -> None:
        """As a server tells of a client that has gone: once, and again whenever it is asked."""
        self._gone = True
        self._given.put_nowait({"type": "http.disconnect"})

    async def _receive(self) -> dict[str, Any]:
        if self._gone and self._given.empty():
            return {"type": "http.disconnect"}
        return await self._given.get()

    async def _send(self, message: dict[str, Any]) -> None:
        await self.held.wait()
        async with self.sent:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            else:
                self.body += message["body"]
            self.sent.notify_all()

    async def until(self, true: Callable[[], bool]) -> None:
        """Waits until what was sent is so."""
        async with self.sent, asyncio.timeout(30):
            await self.sent.wait_for(true)


def refused(answer: Any, status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The error of an answer, in the shape that clients read."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"] and error["param"] == param, error
    return error
