"""The plugin of lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval): `lmms-eval --model vitcop_compile`.

Found through the entry point group `lmms_eval.models`; imports lmms_eval, and nothing else of the package imports this.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from .errors import ConfigError, InputError, UnsupportedError, VitcopWarning
from .evaluation import Evaluator, Question, method_of_words
from .pipeline import optimize

MODEL = "vitcop_compile"
_DTYPES = {"auto": "auto"} | {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# What lmms-eval puts into `until` of every task that says nothing: the delimiter of examples, of which a chat has none.
_BLANK_LINE = "\n\n"
# Settings in the files of tasks that speak to the preprocessing of other models.
_OF_OTHERS = ("image_aspect_ratio",)


def manifest() -> ModelManifest:
    """What lmms-eval's registry is told: the model for chats, and for `--force_simple`."""
    here = f"{__name__}."
    return ModelManifest(MODEL, simple_class_path=here + "VitcopCompileSimple", chat_class_path=here + "VitcopCompile")


class VitcopCompile(lmms):
    """A pruned model that lmms-eval asks in messages.

    The arguments are those of `--model_args`. pretrained: a folder or a model on the hub; method, retention, preset, config:
    what is pruned, as `evaluation.method_of_words` says; backend, attn_implementation: as in `optimize`; dtype: auto, float32,
    float16 or bfloat16; device: cuda where there is one; batch_size; system_prompt: a text, or a file that holds it;
    max_new_tokens: of tasks that say nothing; chat_template: a file, in place of the processor's; min_pixels, max_pixels: of
    Qwen's processors; num_frames, fps: of videos; stop_at_blank_line: whether a blank line ends an answer where lmms-eval says
    so, which it does of every task without stop strings of its own. A text in quotes may hold commas. Raises ConfigError for
    others, and for settings of videos where the model takes none.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        method: str | None = None,
        retention: Any = None,
        preset: str | None = None,
        config: str | None = None,
        backend: str = "inductor",
        attn_implementation: str = "sdpa",
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        system_prompt: str | None = None,
        max_new_tokens: int = 1024,
        chat_template: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        num_frames: int | None = None,
        fps: float | None = None,
        stop_at_blank_line: bool = False,
        **others: Any,
    ):
        super().__init__()
        if others:
            raise ConfigError(f"model_args: {', '.join(sorted(others))} unknown: use some of {', '.join(_ARGUMENTS)}")
        if pretrained is None:
            raise ConfigError("model_args names no model: write pretrained=FOLDER, or a name on the hub")
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype={dtype!r} is unknown: use one of {', '.join(_DTYPES)}")
        if num_frames is not None and fps is not None:
            raise ConfigError(f"num_frames={num_frames} and fps={fps} both choose the frames of a video: leave one out")
        if not isinstance(stop_at_blank_line, bool):
            raise ConfigError(f"stop_at_blank_line={stop_at_blank_line!r} is neither true nor false")
        pruning = method_of_words(_plain(method), _plain(retention), _plain(preset), _plain(config))
        size, self._blank_line = _batch_size(batch_size), stop_at_blank_line
        self._device = self._place(device)
        template = None if chat_template is None else _read(_plain(chat_template))
        frames = {name: value for name, value in (("num_frames", num_frames), ("fps", fps)) if value is not None}
        pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        model, processor = _load(_plain(pretrained), dtype, pixels, frames)
        fast = optimize(model.to(self._device).eval(), pruning, backend=backend, attn_implementation=attn_implementation)
        self.evaluator = Evaluator(
            fast, processor, batch_size=size, max_new_tokens=max_new_tokens, chat_template=template, frames=frames
        )
        self.system_prompt = self._resolve_system_prompt(_plain(system_prompt)) if system_prompt else None
        if self.system_prompt:
            self.evaluator.check_system(self.system_prompt)

    def _place(self, device: str | None) -> torch.device:
        """One device for each process that `accelerate launch` starts."""
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
            return accelerator.device
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def device(self) -> torch.device:
        """Where the programs run."""
        return self._device

    @property
    def batch_size(self) -> int:
        """Prompts that go through the programs together."""
        return self.evaluator.batch_size

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """What is said to each request, in their order."""
        asked = [self._asked(request.args) for request in requests]
        return self._generate([question for question, _ in asked], [settings for _, settings in asked])

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of each request's rounds, in their order; the task says after each round what the next one asks."""
        said: list[list[str]] = [[] for _ in requests]
        told: list[Any] = [None] * len(requests)
        going = list(range(len(requests)))
        for number in range(_MOST_ROUNDS + 1):
            questions, settings, left = [], [], []
            for at in going:
                found = self._round(requests[at].args, number, list(said[at]), told[at])
                if found is not None:
                    question, own, told[at] = found
                    questions.append(question)
                    settings.append(own)
                    left.append(at)
            going = left
            if not going:
                return said
            for at, answer in zip(going, self._generate(questions, settings), strict=True):
                said[at].append(answer.text)
        raise InputError(
            f"a task asks for more than {_MOST_ROUNDS} rounds of a conversation: its doc_to_text has to end it before"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """What lmms-eval has for tasks of choices, in `--force_simple` alone."""
        raise InputError("likelihoods are asked in texts and pictures, not in messages: add --force_simple")

    def _asked(self, given: tuple) -> tuple[Question, dict[str, Any]]:
        _, messages_of, settings, number, task, split = given
        return lambda: self._conversation(messages_of(self.task_dict[task][split][number])), settings

    def _round(self, given: tuple, number: int, said: list[str], told: Any) -> tuple[Question, dict[str, Any], Any] | None:
        """(question, settings, what the task remembers) of a round; None behind the last one."""
        _, messages_of, settings, document, task, split = given
        if not number:
            return *self._asked(given), None
        found = messages_of(
            self.task_dict[task][split][document], round_idx=number, previous_output=said, previous_round_info=told
        )
        if not isinstance(found, tuple):
            return None
        messages, ends, _, told = found
        return None if ends else (lambda: self._conversation(messages), settings, told)

    def _generate(self, questions: list[Question], settings: list[dict[str, Any]]) -> list[GenerationResult]:
        own = [self._settings(given) for given in settings]
        with tqdm(total=len(questions), disable=self.rank != 0, desc="Model Responding") as bar:
            answers = self.evaluator.answer(questions, own, bar.update)
        return [GenerationResult(said.text, TokenCounts(said.prompt, said.tokens)) for said in answers]

    def _settings(self, given: dict[str, Any]) -> dict[str, Any]:
        own = dict(given)
        if told := [name for name in _OF_OTHERS if own.pop(name, None) is not None]:
            warnings.warn(f"{', '.join(told)} of a task tells other models how to see: left out", VitcopWarning, stacklevel=2)
        until = own.get("until")
        if until and not self._blank_line:
            own["until"] = [stop for stop in ([until] if isinstance(until, str) else until) if stop != _BLANK_LINE]
        return own

    def _conversation(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages of lmms-eval as a processor takes them, behind the system prompt."""
        found = []
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else [_part(part) for part in content]
            found.append({"role": message["role"], "content": parts})
        return self._apply_system_prompt(found, self.system_prompt)


class VitcopCompileSimple(VitcopCompile):
    """The same, asked in texts and pictures: `--force_simple`, the only way in which lmms-eval asks for likelihoods."""

    is_simple = True

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """What `Evaluator.score` finds, in their order, with the sign that the request is read with.

        lmms-eval takes the smallest number of a task of choices for the best, as its own models return losses: such requests,
        whose continuation is a text, get the negative log-likelihood. Of tasks of one likelihood, whose continuation is a
        function, it takes exp(-mean) for the perplexity: they get the log-likelihood.
        """
        questions, texts, same, signs = [], [], [], []
        for request in requests:
            if len(request.args) != 6:
                raise InputError(
                    "a choice without its question is asked for acc_mutual_info, whose numbers lmms-eval pairs wrongly: use "
                    "acc or acc_norm"
                )
            context, target, visuals_of, number, task, split = request.args
            questions.append(self._question(context, visuals_of, number, task, split))
            texts.append(target(self.task_dict[task][split][number]) if callable(target) else target)
            same.append((task, split, number, context))
            signs.append(1 if callable(target) else -1)
        with tqdm(total=len(questions), disable=self.rank != 0, desc="Model Responding") as bar:
            found = self.evaluator.score(questions, texts, same, bar.update)
        # Of what a model returns, lmms-eval passes on the content of a GenerationResult as it is, and makes words of a pair.
        pairs = [(sign * total, likeliest) for sign, (total, likeliest) in zip(signs, found, strict=True)]
        return [GenerationResult(pair) for pair in pairs]  # type: ignore[arg-type]

    def _asked(self, given: tuple) -> tuple[Question, dict[str, Any]]:
        context, settings, visuals_of, number, task, split = given
        return self._question(context, visuals_of, number, task, split), settings

    def _round(self, given: tuple, number: int, said: list[str], told: Any) -> tuple[Question, dict[str, Any], Any] | None:
        context, settings, visuals_of, text_of, document, task, split = given
        if not number:
            return *self._asked((context, settings, visuals_of, document, task, split)), None
        visuals, context, ends, _, told = text_of(
            self.task_dict[task][split][document], round_idx=number, previous_output=said, previous_round_info=told
        )
        return None if ends else (lambda: self._conversation(_messages(context, visuals)), settings, told)

    def _question(self, context: str, visuals_of: Callable[[Any], Any], number: int, task: str, split: str) -> Question:
        def ask() -> list[dict[str, Any]]:
            return self._conversation(_messages(context, visuals_of(self.task_dict[task][split][number])))

        return ask


# A task that never ends a conversation would be asked for ever.
_MOST_ROUNDS = 64
_ARGUMENTS = tuple(name for name in inspect.signature(VitcopCompile.__init__).parameters if name not in ("self", "others"))


def _messages(context: str, visuals: Any) -> list[dict[str, Any]]:
    """A question behind its pictures and videos."""
    parts: list[dict[str, Any]] = []
    for visual in visuals or []:
        name = visual if isinstance(visual, str) else None
        kind = "image" if isinstance(visual, Image.Image) or (name and name.lower().endswith(_PICTURES)) else "video"
        parts.append({"type": "audio" if isinstance(visual, dict) and "array" in visual else kind, "url": visual})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """A part of a message, whose picture or video stands under its own name."""
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "video"):
        raise InputError(f"a question with {kind}: choose tasks with texts, images and videos")
    given = part["url"] if "url" in part else part[kind]
    if isinstance(given, dict) or part.get("start_time") is not None or part.get("end_time") is not None:
        raise InputError("a part of a video is asked about, and videos are read whole: choose tasks without start and end")
    if isinstance(given, Image.Image):
        given = given.convert("RGB")
    return {"type": kind, kind: given}


def _plain(word: Any) -> Any:
    """A word without the quotes that hold its commas together."""
    if isinstance(word, str) and len(word) > 1 and word[0] == word[-1] and word[0] in "\"'":
        return word[1:-1]
    return word


def _batch_size(given: int | str) -> int:
    if not str(given).isdecimal():
        raise ConfigError(f"batch_size={given!r} is no count: programs are compiled for a size, write one, such as 8")
    return int(given)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"chat_template={path} cannot be read: {error.strerror}") from None


def _load(pretrained: str, dtype: str, pixels: dict[str, int | None], frames: dict[str, Any]) -> tuple[Any, Any]:
    """(stock model on the CPU, its processor)"""
    asked = {name: value for name, value in pixels.items() if value is not None}
    try:
        model = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=_DTYPES[dtype])
        processor = AutoProcessor.from_pretrained(pretrained, **asked)
    except (OSError, ValueError, ImportError) as error:
        raise UnsupportedError(f"pretrained={pretrained} cannot be loaded: {str(error).splitlines()[0]}") from None
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    size = getattr(getattr(processor, "image_processor", None), "size", None) or {}
    for name, value in asked.items():
        if dict(size).get(edges[name]) != value:
            raise ConfigError(f"{name}={value} is no setting of {type(processor).__name__}: leave it out")
    if frames and getattr(processor, "video_processor", None) is None:
        told = ", ".join(f"{name}={value}" for name, value in frames.items())
        raise ConfigError(f"{told} is no setting of {type(processor).__name__}, which takes no videos: leave it out")
    return model, processor
