"""Text of answers as it comes: whole characters, stop strings, log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import doors
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from vitcop_compile.serve.answers import Answer, Detokenizer, Piece, Stops, TokenTexts
from vitcop_compile.serve.requests import Token

WORDS = ("hello", "world", "wor", "ld", "naïve", ".", ",", "日", "本", "!")


@functools.cache
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: words with a mark for the space before them, and bytes for what is no word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *(f"▁{word}" for word in WORDS), *WORDS]
    vocab = [(piece, -float(place + 1)) for place, piece in enumerate(dict.fromkeys(pieces))]
    made = Tokenizer(kinds.Unigram(vocab, unk_id=0, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": doors.tokenizer, "sentencepiece": sentencepiece}
BOTH = pytest.mark.parametrize("name", TOKENIZERS)


def streamed(tokenizer: object, ids: Sequence[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.push(id) for id in ids), stream.end()]


@BOTH
@given(text=st.text(st.sampled_from("ab .é日本🙂👩‍👩‍👧hello world\n"), max_size=30))
@example("hello world, naïve 日本!")
@example("🙂🙂 🙂")
@example("  two  spaces ")
def test_what_is_streamed_is_what_is_decoded(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    parts = streamed(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert not any("�" in part for part in parts)
    if name == "bytes":
        # A character is there with its last byte: not before, not later.
        ends = [at for at in range(len(ids)) if at + 1 == len(ids) or (ids[at + 1] - doors.FIRST) & 0xC0 != 0x80]
        assert [at for at, part in enumerate(parts) if part] == ends


@given(ids=st.lists(st.sampled_from([*range(doors.FIRST, doors.IMAGE), doors.END, doors.PAD]), max_size=40))
@example([doors.FIRST + byte for byte in (0x80, 0x80, 0x80, 0xF0, 0x9F, 0x99, 0x82, 0x41)])
@example([doors.FIRST + 0xF0] * 20)
def test_bytes_that_are_no_text_end_as_they_are_decoded(ids: list[int]) -> None:
    tokenizer = doors.tokenizer()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@given(ids=st.lists(st.integers(0, 270), max_size=30))
def test_pieces_that_are_no_text_break_nothing(ids: list[int]) -> None:
    streamed(sentencepiece(), [id % len(sentencepiece()) for id in ids])


def test_a_broken_byte_behind_a_character_takes_nothing_back() -> None:
    """This decoder takes bytes in a row for all text or none."""
    tokenizer = sentencepiece()
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in (0xE2, 0x82, 0xAC, 0xFF, 0xFF)]
    word = tokenizer.convert_tokens_to_ids("▁hello")
    assert tokenizer.decode(ids) == "�" * 5
    assert streamed(tokenizer, [*ids, word, word]) == ["", "", "€", "", "", "�" * 2 + " hello", " hello", ""]
    assert streamed(tokenizer, ids)[-1] == "�" * 2


def test_special_tokens_between_words_have_no_text() -> None:
    tokenizer = sentencepiece()
    hello, world = (tokenizer.convert_tokens_to_ids(word) for word in ("▁hello", "▁world"))
    parts = streamed(tokenizer, [1, hello, 2, 1, world, 2])
    assert parts == ["", "hello", "", "", " world", "", ""]


def naive_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Letter by letter: the first moment at which some string is complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(
    parts=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
@example(["ab", "ab", "c"], ["abc"])
@example(["a"], ["aab", "ab"])
def test_a_stop_string_ends_wherever_its_pieces_fall(parts: list[str], stops: list[str]) -> None:
    held, shown, stopped = Stops(stops), "", False
    for part in parts:
        text, stopped = held.push(part)
        shown += text
        # What is shown cannot be taken back: it is part of the answer whatever comes.
        assert naive_stop("".join(parts), stops)[0].startswith(shown)
        if stopped:
            break
    assert (shown if stopped else shown + held.end(), stopped) == naive_stop("".join(parts), stops)


def answered(text: str, stops: Sequence[str] = (), logprobs: bool = False, ends: Sequence[int] = (doors.END,)) -> list[Piece]:
    answer = Answer(doors.tokenizer(), ends, stops, logprobs)
    out = []
    for at, id in enumerate([*doors.ids_of(text), doors.END]):
        out.append(answer.token(Token(0, id, -float(at), ((id, -float(at)),) if logprobs else ())))
        if answer.ended:
            return out
    return [*out, answer.finish("stop")]


def test_text_that_may_become_a_stop_string_is_held_back() -> None:
    parts = [piece.text for piece in answered("one END two", ["END!", "END?"])]
    assert parts == ["o", "n", "e", " ", "", "", "", "END ", "t", "w", "o", "", ""]
    parts = answered("one END! two", ["END!", "END?"])
    assert [piece.text for piece in parts] == ["o", "n", "e", " ", "", "", "", ""] and parts[-1].finish == "stop"
    # At the end of an answer it is none.
    assert answered("one EN", ["END"])[-1] == Piece("EN", (), "stop")


def test_log_probabilities_are_told_with_their_text() -> None:
    parts = answered("né END!", ["END!"], logprobs=True)
    assert [piece.text for piece in parts] == ["n", "", "é", " ", "", "", "", ""]
    # Of "é" two tokens, the first of which has no text of its own; of the stop string none.
    assert [[told.start for told in piece.told] for piece in parts] == [[0], [1], [1], [2], [], [], [], []]
    parts = answered("a EN", ["END"], logprobs=True)
    assert [len(piece.told) for piece in parts] == [1, 1, 0, 0, 0, 2] and parts[-1].told[0].logprob == -2.0


def test_the_token_that_ends_an_answer_is_not_shown() -> None:
    answer = Answer(doors.tokenizer(), (*doors.ids_of("."), doors.END), (), False)
    assert [answer.token(Token(0, id)).text for id in doors.ids_of("Hi.")] == ["H", "i", ""]
    assert answer.finish("stop") == Piece("", (), "stop") and answer.tokens == 3


def test_texts_of_single_tokens() -> None:
    texts, tokenizer = TokenTexts(doors.tokenizer()), doors.tokenizer()
    assert texts(doors.FIRST + ord("a")) == ("a", b"a")
    assert texts(doors.FIRST + ord(" ")) == (" ", b" ")
    assert texts(doors.FIRST + 0xF0) == ("�", b"\xf0")
    assert texts(doors.END) == ("</s>", b"</s>")
    words = TokenTexts(sentencepiece())
    of = sentencepiece().convert_tokens_to_ids
    assert words(of("▁hello")) == (" hello", b" hello")
    assert words(of("ld")) == ("ld", b"ld")
    assert words(of("<0xC3>")).raw == b"\xc3"
    assert len(tokenizer) == doors.IMAGE + 1
