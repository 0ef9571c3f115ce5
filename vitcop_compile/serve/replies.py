"""Answers in OpenAI's shapes, whole and in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from .answers import Piece, TokenTexts, Told

# What OpenAI writes for the logarithm of 0, for which JSON has no number.
_LEAST = -9999.0


class Reply:
    """What the answers to one request are told as. prefix: of its id; kind: of a whole one, chunk: of a part."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(self, model: str, texts: TokenTexts, logprobs: bool):
        self.id, self.created, self.model = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time()), model
        self.texts, self._logprobs = texts, logprobs

    def whole(self, answers: Sequence[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """All answers, each as one piece."""
        choices = [
            self._choice(number, piece) | {"logprobs": self._told(piece.told) if self._logprobs else None}
            for number, piece in enumerate(answers)
        ]
        return self._around(self.kind, choices) | {"usage": usage}

    def first(self, answers: int) -> list[dict[str, Any]]:
        """Chunks before any token."""
        return []

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """A part of answer `number`."""
        told = self._told(piece.told) if self._logprobs and piece.told else None
        return self._around(self.chunk_kind, [self._part(number, piece) | {"logprobs": told}])

    def counted(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk, which counts tokens."""
        return self._around(self.chunk_kind, []) | {"usage": usage}

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _part(self, number: int, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _told(self, told: Sequence[Told]) -> dict[str, Any]:
        raise NotImplementedError


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, answers: int) -> list[dict[str, Any]]:
        """Who speaks."""
        return [
            self._around(self.chunk_kind, [_delta(number, {"role": "assistant", "content": ""}, None)])
            for number in range(answers)
        ]

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": number, "message": message, "finish_reason": piece.finish}

    def _part(self, number: int, piece: Piece) -> dict[str, Any]:
        return _delta(number, {"content": piece.text} if piece.text or not piece.finish else {}, piece.finish)

    def _told(self, told: Sequence[Told]) -> dict[str, Any]:
        content = [
            self._entry(one.id, one.logprob) | {"top_logprobs": [self._entry(*other) for other in one.top]} for one in told
        ]
        return {"content": content, "refusal": None}

    def _entry(self, id: int, logprob: float) -> dict[str, Any]:
        text = self.texts(id)
        return {"token": text.text, "logprob": max(_LEAST, logprob), "bytes": list(text.raw)}


class CompletionReply(Reply):
    """Of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, number: int, piece: Piece) -> dict[str, Any]:
        return {"index": number, "text": piece.text, "finish_reason": piece.finish}

    def _part(self, number: int, piece: Piece) -> dict[str, Any]:
        return self._choice(number, piece)

    def _told(self, told: Sequence[Told]) -> dict[str, Any]:
        return {
            "tokens": [self.texts(one.id).text for one in told],
            "token_logprobs": [max(_LEAST, one.logprob) for one in told],
            "top_logprobs": [{self.texts(id).text: max(_LEAST, logprob) for id, logprob in one.top} for one in told],
            "text_offset": [one.start for one in told],
        }


def usage_of(prompt: Sequence[tuple[int, int]], tokens: int) -> dict[str, Any]:
    """prompt: (text tokens, placeholders of pictures) of each; tokens: generated, those that ended answers among them."""
    text, images = sum(one for one, _ in prompt), sum(other for _, other in prompt)
    return {
        "prompt_tokens": text + images,
        "completion_tokens": tokens,
        "total_tokens": text + images + tokens,
        "prompt_tokens_details": {"text_tokens": text, "image_tokens": images},
    }


def joined(pieces: Sequence[Piece]) -> Piece:
    """One answer of its pieces."""
    told = tuple(one for piece in pieces for one in piece.told)
    return Piece("".join(piece.text for piece in pieces), told, next((piece.finish for piece in pieces if piece.finish), None))


def _delta(number: int, delta: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}
