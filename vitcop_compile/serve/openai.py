"""The HTTP server: OpenAI's chat and text completions of the models behind a door."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import Answer, Piece
from .door import Door, Served
from .metrics import CONTENT_TYPE_LATEST
from .refusals import Refused, closing, refusal_of, refusal_of_body, stopped
from .replies import ChatReply, CompletionReply, Reply, joined, usage_of
from .requests import Failed, Overloaded, Sampling, Token
from .schemas import MOST_MARKS, ChatRequest, CompletionRequest
from .streams import Stream

_log = logging.getLogger("vitcop_compile")
# Nobody reads it: the client has gone. The number is nginx's.
_GONE = 499
# Bodies beyond the limit are read on, up to so many times it, for a client that reads no answer before it has sent all.
_PATIENCE = 4
# Bytes of a body that is read in the event loop: more take longer than a thread does to take over.
_SMALL = 16 << 10


def create_app(door: Door) -> FastAPI:
    """The application. As it ends, it closes the door, and the schedulers behind it once they have served what they hold."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        door.shut()
        await anyio.to_thread.run_sync(door.close)

    app = FastAPI(title="vitcop-compile", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Counting, door=door)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answered(door, request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answered(door, request, CompletionRequest)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_card(door, name) for name in door.models]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return _card(door, door.model(name).name)

    @app.get("/health")
    async def health() -> Response:
        status = "closing" if door.closing else "stopped" if door.stopped else "stalled" if door.stalled else "ok"
        ages = {name: {"heartbeat_age_s": counts["heartbeat_age_s"]} for name, counts in door.counts().items()}
        return JSONResponse({"status": status, "models": ages}, 200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(door.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        said = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(said.body, error.status_code, error.headers)

    return app


class _Counting:
    """Lets requests in while the door is open, and counts those inside to the last byte of their answers."""

    def __init__(self, app: ASGIApp, door: Door):
        self._app, self._door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        if self._door.closing:
            said = closing()
            return await JSONResponse(said.body, said.status, said.headers)(scope, receive, send)
        status = _GONE

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        scope.setdefault("state", {})["model"] = ""
        self._door.active += 1
        try:
            await self._app(scope, receive, sending)
        finally:
            self._door.active -= 1
            self._door.metrics.requests.labels(scope["state"]["model"], status).inc()


async def _answered(door: Door, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
    """The answer to a request, or the beginning of it."""
    try:
        body = await _body(request, door.limits.body, door.limits.body_seconds)
    except ClientDisconnect:
        return Response(status_code=_GONE)
    stream = Stream(door.clock)
    answering = _Answering(door, request, stream)
    door.streams.add(stream)
    kept = False
    try:
        found = await _unless_gone(request.receive, answering.begin(body, kind))
        if found is None:
            door.metrics.vanished.labels(request.scope["state"]["model"]).inc()
            return Response(status_code=_GONE)
        kept = isinstance(found, _Events)
        return found
    except Exception as error:
        raise _refusal(door, error) from error
    finally:
        if not kept:
            door.streams.discard(stream)
            stream.close()


class _Answering:
    """One request, from its body to the last piece of its answers."""

    def __init__(self, door: Door, request: Request, stream: Stream):
        self._door, self._request, self._stream = door, request, stream
        self._began = door.clock()

    async def begin(self, body: bytes, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        """A whole answer, or a stream whose first token is there. Raises Refused and what `refusal_of` takes."""
        door = self._door
        if door.preparing >= door.limits.preparing:
            raise Refused(429, f"{door.preparing} requests are being read already: send it again", None, "overloaded", 1.0)
        door.preparing += 1
        try:
            asked = await self._read(body, kind)
            served = door.model(asked.model)
            self._request.scope["state"]["model"] = served.name
            sampling = asked.sampling(served.max_new_tokens)
            count = 1 if isinstance(asked, ChatRequest) else len(asked.prompts)
            if count * sampling.n > door.limits.answers:
                most = f"a request may have {door.limits.answers} in all"
                raise Refused(400, f"{count} prompts with n={sampling.n} answers each: {most}", "n")
            await self._submit(served, asked, sampling)
        finally:
            door.preparing -= 1
        ends = frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_end else served.ends)
        told = sampling.logprobs is not None
        answers = [Answer(served.prompts.tokenizer, ends, asked.stop, told) for _ in range(count * sampling.n)]
        pieces = self._pieces(served, answers, sampling.n)
        first = await anext(pieces)
        reply = (ChatReply if isinstance(asked, ChatRequest) else CompletionReply)(served.name, served.texts, told)
        if asked.stream:
            return _Events(self._events(served, reply, first, pieces, answers, asked.usage_streamed), self._leave)
        found: list[list[Piece]] = [[] for _ in answers]
        found[first[0]].append(first[1])
        async for number, piece in pieces:
            found[number].append(piece)
        return JSONResponse(reply.whole([joined(parts) for parts in found], self._usage(answers)))

    async def _read(self, body: bytes, kind: type[ChatRequest] | type[CompletionRequest]) -> ChatRequest | CompletionRequest:
        if len(body) <= _SMALL:
            return _parsed(body, kind)
        return await anyio.to_thread.run_sync(_parsed, body, kind, limiter=self._door.workers)

    async def _submit(self, served: Served, asked: ChatRequest | CompletionRequest, sampling: Sampling) -> None:
        """Loads pictures, makes inputs and queues them, none of it in the event loop.

        One thread does all that from bytes to the queue: no more requests than threads hold decoded pictures.
        """
        door, scheduler = self._door, served.scheduler
        counts = scheduler.counts()
        if counts.get("stopped"):
            raise stopped(served.name)
        if served.queue is not None and counts["queued"] >= served.queue:
            raise Overloaded(
                f"{served.queue} prompts wait for {served.name}, which is all that may", counts["oldest_queued_s"]
            )
        loading = door.limits.pictures
        urls = asked.picture_urls if isinstance(asked, ChatRequest) else []
        fetched: list[bytes] | None = None
        if any(url[:5].lower() != "data:" for url in urls):
            fetched = await anyio.to_thread.run_sync(loading.read, urls, limiter=door.fetchers)

        def submit() -> None:
            if isinstance(asked, ChatRequest):
                pictures = loading.decode(loading.read(urls) if fetched is None else fetched)
                prompts = [served.prompts.chat(asked.messages, pictures)]
            else:
                prompts = served.prompts.completions(asked.prompts)
            self._stream.submit(scheduler, prompts, sampling)

        try:
            await anyio.to_thread.run_sync(submit, limiter=door.workers)
        except Overloaded as error:
            if not scheduler.counts().get("stopped"):
                raise
            _log.error("%s has stopped: %s", served.name, error)
            raise stopped(served.name) from None

    async def _pieces(self, served: Served, answers: list[Answer], each: int) -> AsyncIterator[tuple[int, Piece]]:
        """(answer, what it goes on with), until all have ended. Raises Refused, and what programs failed with."""
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        while not all(answer.ended for answer in answers):
            prompt, event, at = await self._stream.next()
            if isinstance(event, Failed):
                if served.scheduler.counts().get("stopped"):
                    _log.error("%s has stopped: %s", served.name, event.error)
                    raise stopped(served.name) from None
                raise event.error
            number = prompt * each + event.choice
            answer = answers[number]
            if answer.ended:
                continue
            if isinstance(event, Token):
                if not first:
                    self._door.metrics.ttft.labels(served.name).observe(at - self._began)
                first.setdefault(number, at)
                last[number] = at
                piece = answer.token(event)
            elif event.reason == "cancelled":
                # Not by the client, who would not be here any more.
                raise closing()
            else:
                piece = answer.finish(event.reason)
            if answer.ended:
                if answer.tokens > 1:
                    pace = (last[number] - first[number]) / (answer.tokens - 1)
                    self._door.metrics.tpot.labels(served.name).observe(pace)
                # A stop string is nothing that a scheduler knows of.
                self._stream.tickets[prompt].cancel(event.choice)
            yield number, piece

    async def _events(
        self,
        served: Served,
        reply: Reply,
        first: tuple[int, Piece],
        pieces: AsyncIterator[tuple[int, Piece]],
        answers: list[Answer],
        usage: bool,
    ) -> AsyncGenerator[bytes]:
        more = {"usage": None} if usage else {}
        try:
            for chunk in reply.first(len(answers)):
                yield _event(chunk | more)
            async for number, piece in _after(first, pieces):
                if piece.text or piece.told or piece.finish:
                    yield _event(reply.chunk(number, piece) | more)
            if usage:
                yield _event(reply.counted(self._usage(answers)))
            yield b"data: [DONE]\n\n"
        except Exception as error:
            # Headers are out: the status cannot say it any more.
            self._door.metrics.broken.labels(served.name).inc()
            said = _refusal(self._door, error)
            yield _event({"error": said.body["error"] | {"code": said.code or said.status}})

    def _usage(self, answers: list[Answer]) -> dict[str, Any]:
        prompt = [(ticket.text_tokens, ticket.image_tokens) for ticket in self._stream.tickets]
        return usage_of(prompt, sum(answer.tokens for answer in answers))

    def _leave(self, whole: bool) -> None:
        if not whole:
            self._door.metrics.vanished.labels(self._request.scope["state"]["model"]).inc()
        self._door.streams.discard(self._stream)
        self._stream.close()


class _Events(Response):
    """Server-sent events, until they end or the client goes. leave: called then, with whether all were sent."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], leave: Callable[[bool], None]):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._leave = events, leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending() -> bool:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return True

        whole = None
        try:
            whole = await _unless_gone(receive, sending())
        except OSError:
            pass  # how some servers say that the client has gone
        finally:
            self._leave(bool(whole))


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """What `work` gives, or None once the client has gone: then it is cancelled."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _refusal(door: Door, error: Exception) -> Refused:
    return closing() if door.closing and isinstance(error, Overloaded) else refusal_of(error)


async def _body(request: Request, limit: int, seconds: float) -> bytes:
    """The body. Raises Refused: 413 beyond `limit` bytes, 408 if it is not there in time."""
    declared = request.headers.get("content-length", "")
    said = Refused(413, f"the body has over {limit} bytes, the limit: send smaller pictures", None, "too_large")
    if declared.isdecimal() and int(declared) > limit and "expect" in request.headers:
        raise said  # the client asks before it sends
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    parts.append(part)
                else:
                    parts.clear()
                if size > _PATIENCE * limit:
                    break
    except TimeoutError:
        raise Refused(408, f"the body was not there within {seconds:g} s", None, "timeout") from None
    if size > limit:
        raise said
    return b"".join(parts)


def _parsed(body: bytes, kind: type[ChatRequest] | type[CompletionRequest]) -> ChatRequest | CompletionRequest:
    marks = sum(map(body.count, (b",", b"[", b"{")))
    if marks > MOST_MARKS:
        raise Refused(400, f"the body has {marks} commas and brackets, the limit is {MOST_MARKS}: send less", None, "too_many")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise refusal_of_body(error) from None


async def _after(first: Any, others: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for other in others:
        yield other


def _event(values: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


def _card(door: Door, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": door.created, "owned_by": "vitcop-compile"}
