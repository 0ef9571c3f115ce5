"""What the commands share: how errors and tables are printed, and how options become a model's shape or settings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from PIL.Image import Image
from rich.console import Console
from rich.text import Text
from transformers import AutoConfig

from ..config import DEFAULT_PRESET, NAMED_PRESETS
from ..errors import ConfigError, UnsupportedError, VitcopError
from ..families.registry import host_of
from ..host import Host
from ..methods.named import DENSE, method_names

_PLACEHOLDER = "<image>\n"
TABLE_WIDTH = 120
# The columns of a benchmark.
WIDE_TABLE_WIDTH = 240
PRESET_NAMES = ", ".join(NAMED_PRESETS)
# Of a method that is named without a target.
DEFAULT_RETENTION = NAMED_PRESETS[DEFAULT_PRESET][2]
_ALL = "all"
_NAMES = f"names: {', '.join(method_names())}; calibrated+NAME counts merged tokens for as many as they took in."
_ONE = "NAME or NAME:setting=value,setting=value, such as fastv:layer=2,tokens=64"
# Of an option that takes one, and of one that `methods_asked` reads.
ONE_METHOD_HELP = f"{_ONE}; {_NAMES}"
METHOD_HELP = f"{_ONE}; repeat for several, `{_ALL}` alone for all; {_NAMES}"


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """What this package raises on purpose becomes one red line and exit code 2; anything else stays a traceback."""
    try:
        yield
    except VitcopError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None


@contextmanager
def without_future_warnings() -> Iterator[None]:
    """Hides what torch's compiler and exporter warn about their own internals: a user could not act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def console(width: int = TABLE_WIDTH) -> Console:
    """Standard output; at least `width` columns where it is no terminal, so that tables stay whole."""
    out = Console()
    return out if out.is_terminal else Console(width=max(out.width, width))


def model_host(model: str) -> Host:
    """What is known of the model in a folder or on the hub, from its configuration alone. Raises UnsupportedError."""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise UnsupportedError(f"--model {model} is not a folder: give one with config.json, or a name on the hub")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise cannot_load(model, error) from None
    return host_of(config)


def methods_asked(texts: Sequence[str]) -> list[str]:
    """The methods that `--method` names; `all` is every name of one that prunes. Raises ConfigError for `all` with others."""
    if _ALL not in texts:
        return list(texts)
    if len(texts) > 1:
        raise ConfigError(f"--method {_ALL} was given with others: choose either")
    return [name for name in method_names() if name != DENSE]


def question_of(processor: Any, prompt: str, image: bool = True) -> str:
    """A turn of the user's that asks `prompt`, about an image or about none: by the chat template of `processor`, without one
    (as where that is None) as LLaVA-1.5 is asked."""
    if getattr(processor, "chat_template", None):
        content = [*([{"type": "image"}] if image else []), {"type": "text", "text": prompt}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"USER: {_PLACEHOLDER if image else ''}{prompt} ASSISTANT:"


def image_size_of(text: str) -> tuple[int, int]:
    """(height, width) of "WIDTHxHEIGHT"."""
    width, found, height = text.lower().partition("x")
    if not found or not width.isdecimal() or not height.isdecimal():
        raise ConfigError(f"--image-size {text} is not WIDTHxHEIGHT, such as 1344x896")
    return int(height), int(width)


def cannot_load(model: str, error: Exception) -> UnsupportedError:
    """The error for a `--model` that transformers refused with `error`."""
    return UnsupportedError(f"--model {model} cannot be loaded: {str(error).splitlines()[0]}")


def request_of(processor: Any, image: Image, prompt: str) -> Any:
    """What `processor` makes of a question about a picture: by its chat template, or else as LLaVA-1.5 is asked."""
    return processor(images=image, text=question_of(processor, prompt), return_tensors="pt")
