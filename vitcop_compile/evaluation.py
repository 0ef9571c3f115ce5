"""Answers to a set of questions, and how likely given answers are, in batches: what evaluation harnesses ask of a model.

A conversation is a list of messages as `processor.apply_chat_template` takes it. `lmms` is the adapter for lmms-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from .cache import PrunedCache
from .config import NAMED_PRESETS
from .errors import ConfigError, InputError, UnsupportedError
from .methods import load_method
from .methods.named import fields_of, method_from, split
from .optimized import OptimizedModel
from .schedule import Method

# Made when its turn has come: the pictures of a whole benchmark do not fit in memory.
Question = Callable[[], list[dict[str, Any]]]
# Settings that say the same of a method, of which one is enough.
_TARGETS = ("retention", "mean_tokens", "tokens", "budgets")
_SAMPLING = ("temperature", "top_p", "top_k")


@dataclass(frozen=True)
class Answer:
    """text: what was said, up to the first stop string; prompt: input tokens, pads left out; tokens: new ones, without end and
    pads."""

    text: str
    prompt: int
    tokens: int


def method_of_words(method: str | None, retention: Any = None, preset: str | None = None, config: str | None = None) -> Method:
    """The method that the arguments of a command name.

    method: NAME or NAME:setting=value,setting=value, "vitcop" if nothing is said; retention: a share of the visual tokens, for
    a method that names no target; preset: one of ViTCoP's; config: a file that `save` or `vitcop-compile tune` wrote, in place
    of all. Raises ConfigError for two that say the same, and for what `method_from` refuses.
    """
    given = {"method": method, "retention": retention, "preset": preset, "config": config}
    named = [name for name, value in given.items() if value is not None]
    if config is not None:
        if len(named) > 1:
            raise ConfigError(f"config={config} says what is pruned, and {named[0]}={given[named[0]]} too: leave one out")
        try:
            return load_method(config)
        except OSError as error:
            raise ConfigError(f"config={config} cannot be read: {error.strerror}") from None
    text = method or "vitcop"
    name, settings = split(text)
    if preset is not None:
        if name != "vitcop" or retention is not None:
            raise ConfigError(f"preset={preset} is one of ViTCoP's, and says its retention: leave method={text} or it out")
        if preset not in NAMED_PRESETS:
            raise ConfigError(f"preset={preset!r} is unknown: use one of {', '.join(NAMED_PRESETS)}")
        retention = preset
    if retention is None:
        return method_from(text)
    said = [target for target in _TARGETS if target in settings]
    if said:
        raise ConfigError(f"retention={retention} and method={text} both say how much stays: leave {said[0]} or retention out")
    if "retention" not in fields_of(name):
        raise ConfigError(
            f"retention={retention} is no setting of {name!r}, which has {', '.join(fields_of(name)) or 'none'}: write "
            f"method={name}:setting=value"
        )
    return method_from(text, retention=retention)


def generation_of(settings: Mapping[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(arguments of `generate`, stop strings) of a request's `settings`.

    A temperature of 0 is greedy, one above 0 samples unless `do_sample` is false; what the settings leave out is greedy, of
    `max_new_tokens`. Raises InputError for names that `generate` does not know, and for what it cannot be asked here: what
    answers are read by, such as the tokens that end them, and what needs another model or cache than a compiled one.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    until = given.pop("until", ())
    stops = tuple(filter(None, (until,) if isinstance(until, str) else until))
    if unknown := sorted(name for name in given if name not in _FIELDS):
        raise InputError(
            f"{', '.join(unknown)}: no setting of `generate`: leave it out of generation_kwargs, or use some of until, "
            "max_new_tokens, temperature, do_sample, top_p, top_k, num_beams, repetition_penalty, ..."
        )
    for name, value in list(given.items()):
        if name in _OWNED:
            raise InputError(f"{name}={value!r} cannot be chosen for an answer: {_OWNED[name]}")
        if name in _FIXED and given.pop(name) != _FIXED[name]:
            raise InputError(f"{name}={value!r} cannot be had for an answer, only {name}={_FIXED[name]}: leave it out")
    temperature = given.get("temperature")
    sample = given.pop("do_sample", temperature is not None and temperature > 0) and temperature != 0
    if not sample:
        given |= dict.fromkeys(_SAMPLING)
    return {"max_new_tokens": max_new_tokens, "num_beams": 1} | given | {"do_sample": bool(sample)}, stops


_FIELDS = {name for name in GenerationConfig().to_dict() if name[0] != "_"} - {"transformers_version"}
# Settings that are the evaluator's or the compiled model's own -> what to do about them.
_ENDS = "leave it out, the model's own is used"
_GUESSES = "leave it out, a pruned cache cannot take back tokens that were guessed"
_CACHE = "leave it out, a compiled model brings its own cache and programs"
_SEARCHES = "leave it out, or use num_beams or do_sample"
_OWNED = {
    "max_length": "use max_new_tokens",
    "min_length": "use min_new_tokens",
    "stop_strings": "use until",
    **dict.fromkeys(("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"), _ENDS),
    **dict.fromkeys(("cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"), _CACHE),
    **dict.fromkeys(("compile_config", "disable_compile", "continuous_batching_config"), _CACHE),
    **dict.fromkeys(("prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp", "speculation_type"), _GUESSES),
    **dict.fromkeys((name for name in _FIELDS if "assistant" in name or name.endswith("_lookbehind")), _GUESSES),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "diversity_penalty"), _SEARCHES),
}
# Those of which one value is what is done anyway: one answer, of text alone.
_FIXED = {
    "use_cache": True,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "guidance_scale": 1,
    "token_healing": False,
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), False),
    "return_dict_in_generate": False,
}


class Evaluator:
    """Asks `model` what conversations ask, through the chat template of `processor`.

    batch_size: prompts that are asked together, fewer filled up with copies of the last so that their number needs no programs
    of its own; max_new_tokens: of requests that say nothing; chat_template: in place of the processor's; frames: what
    the processor is told about videos, such as {"num_frames": 8}. Raises UnsupportedError for a processor without a chat
    template, ConfigError for counts below 1.
    """

    def __init__(
        self,
        model: OptimizedModel,
        processor: Any,
        *,
        batch_size: int = 1,
        max_new_tokens: int = 1024,
        chat_template: str | None = None,
        frames: Mapping[str, Any] | None = None,
    ):
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is no count of 1 or more")
        self.template = chat_template or getattr(processor, "chat_template", None)
        if not self.template:
            raise UnsupportedError(
                f"{type(processor).__name__} has no chat template, and a prompt that is made up would measure another model: "
                "pass chat_template=FILE with the one that the model was trained with"
            )
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.batch_size, self.max_new_tokens, self.frames = batch_size, max_new_tokens, dict(frames or {})
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        ends = model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self._ends = [ends] if isinstance(ends, int) else list(ends or ())

    @torch.no_grad()
    def answer(
        self, questions: Sequence[Question], settings: Sequence[Mapping[str, Any]], done: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """One answer for each question, in their order. settings: of `generate`, and `until`, stop strings, as `generation_of`
        reads them; only requests with equal ones share a batch. done: told of so many more that are answered."""
        wanted = [generation_of(own, self.max_new_tokens) for own in settings]
        groups: dict[Hashable, list[int]] = {}
        for at, request in enumerate(wanted):
            groups.setdefault(json.dumps(request, sort_keys=True, default=str), []).append(at)
        found: dict[int, Answer] = {}
        for group in groups.values():
            options, stops = wanted[group[0]]
            for first in range(0, len(group), self.batch_size):
                own = group[first : first + self.batch_size]
                for part, given in self._batches({at: questions[at]() for at in own}):
                    said = self._said(given, options, stops)
                    found |= zip(part, said[: len(part)], strict=True)
                if done is not None:
                    done(len(own))
        return [found[at] for at in range(len(questions))]

    @torch.no_grad()
    def score(
        self,
        questions: Sequence[Question],
        continuations: Sequence[str],
        same: Sequence[Hashable],
        done: Callable[[int], None] | None = None,
    ) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities of a continuation's tokens in nats, whether each of them is the most probable) for
        each question, in their order.

        The prompt is pruned as for an answer, and the continuation is told to it token by token, as if it were said. same:
        equal for those of one prompt, whose continuations share a row as far as they differ in the last token alone. Raises
        InputError for a continuation without tokens.
        """
        alike: dict[Hashable, list[int]] = {}
        for number, key in enumerate(same):
            alike.setdefault(key, []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        rows: list[_Row] = []
        for asked in alike.values():
            conversation = questions[asked[0]]()
            own: dict[tuple[int, ...], dict[int, int]] = {}
            for at in asked:
                *told, last = self._tokens(conversation, continuations[at])
                own.setdefault(tuple(told), {})[at] = last
            rows += [_Row(conversation, told, lasts) for told, lasts in own.items()]
            while len(rows) >= self.batch_size:
                found |= self._scored(rows[: self.batch_size])
                del rows[: self.batch_size]
            if done is not None:
                done(len(asked))
        found |= self._scored(rows)
        return [found[at] for at in range(len(questions))]

    def render(self, conversation: list[dict[str, Any]]) -> str:
        """The prompt as text, before the processor expands its images."""
        return self.processor.apply_chat_template(
            [_copy(conversation)], chat_template=self.template, add_generation_prompt=True, tokenize=False
        )[0]

    def check_system(self, prompt: str) -> None:
        """Raises UnsupportedError if the chat template leaves a system prompt out."""
        parts = [{"role": "system", "content": _text(prompt)}, {"role": "user", "content": _text("?")}]
        if prompt.strip() not in self.render(parts):
            raise UnsupportedError(
                f"the chat template leaves the system prompt {prompt[:40]!r} out: pass none, or chat_template=FILE with one "
                "that has a place for it"
            )

    def _batches(self, asked: Mapping[int, list[dict[str, Any]]]) -> list[tuple[list[int], dict[str, Any]]]:
        """Questions with and without images and videos apart, as processors take a batch of one kind; each with what the
        processor makes of it, filled up to a batch with copies of the last row behind the others."""
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for at, conversation in asked.items():
            parts = [part["type"] for message in conversation for part in message["content"]]
            kinds.setdefault(("image" in parts, "video" in parts), []).append(at)
        found = []
        for (_, videos), part in kinds.items():
            if videos and getattr(self.processor, "video_processor", None) is None:
                raise InputError(
                    f"{type(self.processor).__name__} takes no videos: choose tasks with images, or a model that is told of "
                    "videos, such as Qwen2-VL"
                )
            rows = part + [part[-1]] * (self.batch_size - len(part))
            given = self.processor.apply_chat_template(
                [_copy(asked[at]) for at in rows],
                chat_template=self.template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True} | (self.frames if videos else {}),
            )
            found.append((part, dict(given.to(self.model.device))))
        return found

    def _said(self, given: dict[str, Any], options: dict[str, Any], stops: tuple[str, ...]) -> list[Answer]:
        pad, ids = self.tokenizer.pad_token_id, given["input_ids"]
        more = {"stop_strings": list(stops), "tokenizer": self.tokenizer} if stops else {}
        out = self.model.generate(**given, **options, **more, pad_token_id=pad, eos_token_id=self._ends or None)
        silent = torch.tensor([*self._ends, pad], device=out.device)
        answers = []
        for row, mask in zip(out[:, ids.shape[1] :], given["attention_mask"], strict=True):
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            for stop in stops:
                text = text.partition(stop)[0]
            answers.append(Answer(text, int(mask.sum()), int((~torch.isin(row, silent)).sum())))
        return answers

    def _tokens(self, conversation: list[dict[str, Any]], continuation: str) -> list[int]:
        """Tokens of a continuation behind its prompt. White space before it is left out where the prompt ends in some."""
        prompt = self.render(conversation)
        text = continuation.lstrip() if prompt[-1:].isspace() else continuation
        before, whole = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, prompt + text))
        # A tokenizer may put the last letters of a prompt and the first ones behind it into one token: then read apart.
        behind = whole[: len(before)] == before
        tokens = whole[len(before) :] if behind else self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not tokens:
            raise InputError(f"the continuation {continuation!r} has no token: ask for the likelihood of one or more")
        return tokens

    def _scored(self, rows: Sequence[_Row]) -> dict[int, tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for part, given in self._batches({at: row.conversation for at, row in enumerate(rows)}):
            found |= self._told([rows[at] for at in part], given)
        return found

    def _told(self, rows: Sequence[_Row], given: dict[str, Any]) -> dict[int, tuple[float, bool]]:
        """The prompts of `given`, filled up behind `rows`, and token by token what these say."""
        found: dict[int, tuple[float, bool]] = {}
        count, columns = given["input_ids"].shape
        steps = 1 + max(len(row.told) for row in rows)
        cache = PrunedCache(max_length=columns + steps)
        logits: Any = self.model(**given, past_key_values=cache).logits
        total, likeliest = [0.0] * len(rows), [True] * len(rows)
        for step in range(steps):
            spoken, best = _likely(logits)
            fed = torch.zeros(count, 1, dtype=torch.int64)
            for at, row in enumerate(rows):
                if step == len(row.told):
                    for number, last in row.lasts.items():
                        found[number] = total[at] + float(spoken[at, last]), likeliest[at] and int(best[at]) == last
                elif step < len(row.told):
                    token = row.told[step]
                    total[at] += float(spoken[at, token])
                    likeliest[at] &= int(best[at]) == token
                    fed[at] = token
            if step + 1 < steps:
                logits = self.model(input_ids=fed.to(self.model.device), past_key_values=cache).logits
        return found


@dataclass(frozen=True)
class _Row:
    """A prompt, tokens told behind it, and by the number of a request, which the last one would be."""

    conversation: list[dict[str, Any]]
    told: tuple[int, ...]
    lasts: Mapping[int, int]


def _likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities fp32 [B, vocab], most probable tokens [B]) of logits [B, 1, vocab], on the host."""
    spoken = logits[:, -1].float().log_softmax(-1)
    return spoken.cpu(), spoken.argmax(-1).cpu()


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}]


def _copy(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For a processor, which writes into messages."""
    return [message | {"content": [dict(part) for part in message["content"]]} for message in conversation]
