"""Load for a server, by OpenAI's API over loopback: requests leave when they were meant to, whether earlier ones are answered
or not, and every time counts from then on."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import httpx
from PIL import Image

# Words of text, each a token of the benchmark's tokenizer: in buckets of 32, 64 and 128.
TEXTS = (24, 56, 120)
NEW = (16, 32, 64)
TEXT_ONLY = 0.2


@dataclass(frozen=True)
class Item:
    """A request. at: seconds from the start, when it is meant to leave; text: words; picture: its number, None without."""

    at: float
    text: int
    new: int
    picture: int | None


@dataclass(frozen=True)
class Answered:
    """What became of it. status: of HTTP; whole: whether it ended as it should; seconds: when it was meant to leave, when the
    first token came and the last, None where none came; tokens: of the answer."""

    status: int
    whole: bool
    sent: float
    first: float | None
    last: float | None
    tokens: int

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token, from when it was meant to leave."""
        return None if self.first is None else self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds of a token after the first."""
        return (self.last - self.first) / (self.tokens - 1) if self.first is not None and self.tokens > 1 else None


def poisson(rate: float, seconds: float, seed: int) -> list[Item]:
    """Requests that come by chance, `rate` a second: three lengths of text, a fifth without a picture, three of answers."""
    draw, at, found = random.Random(seed), 0.0, []
    while (at := at + draw.expovariate(rate)) < seconds:
        found.append(_item(at, draw, len(found)))
    return found


def _item(at: float, draw: random.Random, number: int) -> Item:
    return Item(at, draw.choice(TEXTS), draw.choice(NEW), None if draw.random() < TEXT_ONLY else number)


def percentile(values: Sequence[float], part: float) -> float:
    """The value that so many of `values` do not exceed, infinite for none."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(part * 1000) * len(ordered) // 1000) - 1)] if ordered else float("inf")


def summed(found: Sequence[Answered], seconds: float) -> dict[str, float]:
    """Requests that were answered whole, a second, those refused and broken, and percentiles of TTFT and TPOT in ms; those of
    TTFT are over all that were let in."""
    whole = [one for one in found if one.whole]
    ttft = [one.ttft for one in found if one.ttft is not None]
    tpot = [one.tpot for one in whole if one.tpot is not None]
    times = {"ttft": ttft, "tpot": tpot}
    return {
        "requests": len(found),
        "whole": len(whole),
        "refused": sum(one.status == 429 for one in found),
        "broken": sum(one.status != 429 and not one.whole for one in found),
        "per_s": len(whole) / seconds,
        "tokens_per_s": sum(one.tokens for one in whole) / seconds,
    } | {f"{name}_p{part}_ms": 1e3 * percentile(values, part / 100) for name, values in times.items() for part in (50, 99)}


class Load:
    """A client of the server at `url`. side: pixels of a side of pictures, which all differ."""

    def __init__(self, url: str, side: int, patience: float = 600.0):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(base_url=url, timeout=patience, limits=limits)
        self._side = side
        self._pictures: dict[int, str] = {}

    async def open_loop(self, model: str, items: Sequence[Item]) -> list[Answered]:
        """Sends every item when it is meant to leave. Pictures are encoded before."""
        bodies = [self.body(model, item) for item in items]
        start = time.perf_counter() + 0.2
        return list(await asyncio.gather(*(self._later(start + item.at, body) for item, body in zip(items, bodies))))

    async def closed_loop(self, model: str, clients: int, each: int, seed: int) -> tuple[list[Answered], float]:
        """So many clients, each of which sends a request when the one before is answered; and seconds that it took."""
        draw = random.Random(seed)
        items = [[_item(0.0, draw, client * each + turn) for turn in range(each)] for client in range(clients)]
        bodies = [[self.body(model, item) for item in own] for own in items]

        async def client(own: list[bytes]) -> list[Answered]:
            return [await self.ask(body, time.perf_counter()) for body in own]

        start = time.perf_counter()
        found = await asyncio.gather(*map(client, bodies))
        return list(itertools.chain(*found)), time.perf_counter() - start

    async def ask(self, body: bytes, sent: float, pause: float = 0.0) -> Answered:
        """One request as a stream. sent: when it was meant to leave; pause: seconds between two reads, of a slow reader."""
        first = last = None
        tokens, whole = 0, False
        try:
            async with self._client.stream("POST", "/v1/chat/completions", content=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    return Answered(answer.status_code, False, sent, None, None, 0)
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        whole = True
                    elif line.startswith("data: "):
                        event = json.loads(line[6:])
                        usage = event.get("usage")
                        tokens = usage["completion_tokens"] if usage else tokens
                        if event.get("choices") and event["choices"][0]["delta"].get("content"):
                            last = time.perf_counter()
                            first = first or last
                    if pause:
                        await asyncio.sleep(pause)
        except httpx.HTTPError:
            return Answered(0, False, sent, first, last, tokens)
        return Answered(200, whole, sent, first, last, tokens)

    async def close(self) -> None:
        """Lets connections go."""
        await self._client.aclose()

    def body(self, model: str, item: Item) -> bytes:
        """A request, ready to be sent: tokens that end no answer, and usage at the end."""
        parts: list[dict] = [{"type": "text", "text": " ".join(["w9"] * item.text)}]
        if item.picture is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": self._picture(item.picture)}})
        return json.dumps(
            {
                "model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": item.new, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
            }
        ).encode()  # fmt: skip

    def _picture(self, number: int) -> str:
        if number not in self._pictures:
            draw, data = random.Random(number), io.BytesIO()
            small = Image.frombytes("RGB", (8, 8), draw.randbytes(192))
            small.resize((self._side, self._side), Image.Resampling.NEAREST).save(data, "PNG")
            self._pictures[number] = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        return self._pictures[number]

    async def _later(self, at: float, body: bytes) -> Answered:
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        return await self.ask(body, at)
