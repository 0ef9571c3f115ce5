"""From the tokens of an answer to its text as it comes: whole characters alone, and nothing of a stop string."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from .requests import Token

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BROKEN = "�"
# Bytes of the longest character of UTF-8.
_CHARACTER = 4


class TokenText(NamedTuple):
    """A token for a table of log-probabilities: its text, and its bytes where they are no whole characters."""

    text: str
    raw: bytes


class Told(NamedTuple):
    """The log-probability of a token that was chosen, and of the likeliest: (id, logprob); start: characters of the answer
    before it."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    start: int


class Piece(NamedTuple):
    """What an answer goes on with; finish: "stop" or "length" at its end."""

    text: str
    told: tuple[Told, ...] = ()
    finish: str | None = None


class Detokenizer:
    """Text of tokens as they come. Joined, it is what the tokenizer decodes of all of them, special ones left out."""

    def __init__(self, tokenizer: Any):
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._special = specials(tokenizer)
        # Ids since the last token whose text was whole, how many of these came with it, and what was told of all of them.
        self._ids: list[int] = []
        self._whole, self._told = 0, ""

    def push(self, token: int) -> str:
        """What is certain now."""
        if token in self._special:
            return ""
        self._ids.append(token)
        text = self._decode(self._ids)
        # Bytes that are no character yet: of more than a character can lack, the first never become one.
        broken = len(text) - len(text.rstrip(_BROKEN))
        sure = text[: len(text) - min(broken, _CHARACTER - 1)]
        if broken:
            # Some decoders take bytes in a row for all text or none: then it does not begin with what was told either.
            new = sure[len(self._told) :] if sure.startswith(self._told) else ""
            self._told += new
            return new
        new = self._rest(text)
        if new:
            # The window starts with text again, so that a tokenizer treats what follows as within a sentence.
            self._ids = self._ids[self._whole :]
            self._whole, self._told = len(self._ids), self._decode(self._ids)
        return new

    def end(self) -> str:
        """What was held back: the beginning of a character that never came to its end."""
        return self._rest(self._decode(self._ids)) if self._ids else ""

    def _rest(self, text: str) -> str:
        """What was not told of the text of the window, or where bytes have broken that, of the tokens that are new."""
        return text[len(self._told) :] if text.startswith(self._told) else self._decode(self._ids[self._whole :])


class Stops:
    """Text up to the first of some strings to be complete, whatever pieces it comes in."""

    def __init__(self, strings: Sequence[str]):
        self._strings, self._held = tuple(strings), ""

    def push(self, text: str) -> tuple[str, bool]:
        """(what can be shown, whether a string is complete: then nothing more is)."""
        self._held += text
        found = [(at + len(string), at) for string in self._strings if (at := self._held.find(string)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)[1]], ""
            return shown, True
        shown, self._held = (
            self._held[: len(self._held) - self._beginning()],
            self._held[len(self._held) - self._beginning() :],
        )
        return shown, False

    def end(self) -> str:
        """What was held back and belongs to no string."""
        text, self._held = self._held, ""
        return text

    def _beginning(self) -> int:
        """Characters at the end of what is held that may become a string."""
        longest = 0
        for string in self._strings:
            for length in range(min(len(string) - 1, len(self._held)), longest, -1):
                if self._held.endswith(string[:length]):
                    longest = length
                    break
        return longest


class Answer:
    """One answer. ends: tokens that end it and are not shown; stops: strings that do; logprobs: whether these are told."""

    def __init__(self, tokenizer: Any, ends: Collection[int], stops: Sequence[str], logprobs: bool):
        self._text, self._stops, self._ends, self._logprobs = Detokenizer(tokenizer), Stops(stops), ends, logprobs
        self._read = self._shown = 0  # characters that came, and that were shown
        self._waiting: list[Told] = []
        self.tokens = 0
        self.ended = False

    def token(self, token: Token) -> Piece:
        """What one more token adds."""
        self.tokens += 1
        if token.id in self._ends:
            return Piece("")
        if self._logprobs and token.logprob is not None:
            self._waiting.append(Told(token.id, token.logprob, token.top, self._read))
        new = self._text.push(token.id)
        self._read += len(new)
        shown, stopped = self._stops.push(new)
        self._shown += len(shown)
        self.ended = stopped
        # Those of text that is held back wait with it; those of a stop string are never told.
        count = sum(told.start < self._shown for told in self._waiting)
        if not stopped and self._shown == self._read:
            count = len(self._waiting)
        told, self._waiting = tuple(self._waiting[:count]), [] if stopped else self._waiting[count:]
        return Piece(shown, told, "stop" if stopped else None)

    def finish(self, reason: str) -> Piece:
        """What was held back, and the end."""
        self.ended = True
        shown, stopped = self._stops.push(self._text.end())
        if stopped:
            return Piece(shown, tuple(told for told in self._waiting if told.start < self._shown + len(shown)), "stop")
        return Piece(shown + self._stops.end(), tuple(self._waiting), reason)


def specials(tokenizer: Any) -> frozenset[int]:
    """Tokens that have no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}


class TokenTexts:
    """Texts of single tokens, as they read within a sentence."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._decode = functools.partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        special = specials(tokenizer)
        # Some word, behind which others are not at the beginning of a sentence.
        self._before = next(
            ([id] for id in range(len(tokenizer)) if id not in special and self._decode([id]).strip().isalpha()), []
        )
        self._of = functools.lru_cache(maxsize=1 << 14)(self._read)

    def __call__(self, id: int) -> TokenText:
        """The text of a token."""
        return self._of(id)

    def _read(self, id: int) -> TokenText:
        first = self._decode(self._before) if self._before else ""
        text = self._decode([*self._before, id])
        text = text[len(first) :] if text.startswith(first) else self._decode([id])
        if _BROKEN not in text:
            return TokenText(text, text.encode())
        name = self._tokenizer.convert_ids_to_tokens(id)
        if found := _BYTE.fullmatch(name):
            return TokenText(text, bytes.fromhex(found[1]))
        letters = _byte_letters()
        if all(letter in letters for letter in name):
            return TokenText(text, bytes(letters[letter] for letter in name))
        return TokenText(text, text.encode())


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The letters that stand for bytes in a vocabulary of bytes: printable ones for themselves, from 256 on for the others."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(other)}
