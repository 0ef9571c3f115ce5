"""From messages and pictures to what a model takes, by its processor and its chat template."""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor

from ..errors import InputError, UnsupportedError
from .schemas import ImagePart, Message, TextPart

# Files of which a folder with a processor has one.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
# Characters that a message and a part count for, beside their text: a template writes something for each.
_PIECE = 16
_ROLES = {"developer": "system"}  # OpenAI's new name of it, which templates do not know


def load_processor(source: str | Path) -> Any:
    """The processor of a folder, or of a model on the hub. Raises UnsupportedError, with the remedy, where there is none."""
    folder = Path(source).is_dir()
    if folder and not any((Path(source) / name).is_file() for name in PROCESSOR_FILES):
        raise UnsupportedError(
            f"{source} has no processor files, so that nothing turns text and pictures into tokens: pass --processor FOLDER "
            "with those of the model, or export again where they are"
        )
    try:
        processor = AutoProcessor.from_pretrained(source, local_files_only=folder, trust_remote_code=False)
    except Exception as error:  # files of any content, and packages that transformers asks for
        said = (str(error).splitlines() or [repr(error)])[0]
        raise UnsupportedError(
            f"the processor of {source} cannot be loaded ({said}): some need torchvision, pip install torchvision; or pass "
            "--processor FOLDER with another"
        ) from None
    if not hasattr(processor, "tokenizer"):
        raise UnsupportedError(
            f"{source} holds a {type(processor).__name__}, which reads no pictures: pass --processor FOLDER"
        )
    return processor


class Prompts:
    """Makes the inputs of one model. Methods may be called from any thread.

    processor: with `tokenizer`, `apply_chat_template` and a call for text; inputs: names of what the model takes beside
    `input_ids`; placeholders: token ids that stand for pictures, which no text may hold; copies: of the processor, for as many
    threads at once: a tokenizer is changed by a call while another reads it; characters: of all texts of a request.
    """

    def __init__(
        self, processor: Any, inputs: Sequence[str], placeholders: Sequence[int], copies: int = 4, characters: int = 400_000
    ):
        self.tokenizer = processor.tokenizer
        self.characters = characters
        self._inputs = ("input_ids", *inputs)
        told = [getattr(processor, name, None) for name in ("image_token", "video_token")]
        named = [*told, *self.tokenizer.convert_ids_to_tokens(list(placeholders))]
        self._reserved = tuple(dict.fromkeys(name for name in named if isinstance(name, str) and name.strip()))
        self._chats = bool(getattr(processor, "chat_template", None))
        # The processor itself decodes answers, and is not called.
        self._source, self._making, self._left = processor, threading.Lock(), copies
        self._free: queue.LifoQueue[Any] = queue.LifoQueue()

    def chat(self, messages: Sequence[Message], pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Inputs of a conversation that the assistant goes on with; pictures: those of all messages, in order."""
        if not self._chats:
            raise InputError("the model has no chat template: use /v1/completions, or start the server with --processor")
        parts = [part for message in messages for part in message.content]
        self._check([part.text for part in parts if isinstance(part, TextPart)], len(messages) + len(parts) - 2)
        left = iter(pictures)
        turns = [
            {
                "role": _ROLES.get(message.role, message.role),
                "content": [
                    {"type": "image", "image": next(left)}
                    if isinstance(part, ImagePart)
                    else {"type": "text", "text": part.text}
                    for part in message.content
                ],
            }
            for message in messages
        ]
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self._made(lambda processor: processor.apply_chat_template(turns, **how))

    def completions(self, prompts: Sequence[str | Sequence[int]]) -> list[dict[str, Tensor]]:
        """Inputs of texts as they are, or of token ids."""
        self._check([prompt for prompt in prompts if isinstance(prompt, str)])
        return [self._completion(prompt) for prompt in prompts]

    def _completion(self, prompt: str | Sequence[int]) -> dict[str, Tensor]:
        if not isinstance(prompt, str):
            return {"input_ids": torch.tensor([list(prompt)], dtype=torch.int64)}
        return self._made(lambda processor: processor.tokenizer(prompt, return_tensors="pt"))

    def _check(self, texts: Sequence[str], pieces: int = 0) -> None:
        """pieces: messages and parts beyond the first of each."""
        total = sum(map(len, texts)) + _PIECE * max(0, pieces)
        if total > self.characters:
            counted = f"; a message and a part count for {_PIECE} each" if pieces > 0 else ""
            raise InputError(f"{total} characters of text, the limit is {self.characters}: shorten the prompt" + counted)
        for name in self._reserved:
            if any(name in text for text in texts):
                raise InputError(
                    f"the text holds {name!r}, which stands for a picture: leave it out, pictures are image_url parts"
                )

    def _made(self, make: Callable[[Any], Any]) -> dict[str, Tensor]:
        try:
            with self._borrowed() as processor:
                found = make(processor)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses these messages: {error}") from None
        except (ValueError, TypeError) as error:  # processors refuse by either, and say what
            raise InputError(f"the model's processor refuses this prompt: {error}") from None
        return {name: found[name] for name in self._inputs if name in found}

    @contextmanager
    def _borrowed(self) -> Iterator[Any]:
        """A copy of the processor that nobody else uses meanwhile."""
        try:
            processor = self._free.get_nowait()
        except queue.Empty:
            processor = self._another() or self._free.get()
        try:
            yield processor
        finally:
            self._free.put(processor)

    def _another(self) -> Any:
        """A new copy, None if there are as many as may be."""
        with self._making:
            if not self._left:
                return None
            made = copy.deepcopy(self._source)
            self._left -= 1
            return made
