"""The command `view`: what methods keep of a picture, and what the model then answers, on one page."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import demo, picture, toy
from ..config import NAMED_PRESETS
from ..errors import ConfigError, InputError
from ..methods.named import method_from, split
from ..progress import Steps
from ..schedule import Method
from .shared import (
    METHOD_HELP,
    PRESET_NAMES,
    cannot_load,
    console,
    errors_as_lines,
    methods_asked,
    model_host,
    request_of,
    without_future_warnings,
)

_METHODS = ("vitcop", "visionzip", "divprune", "uniform")
_RETENTIONS = ("1/3", "2/9", "1/9", "1/18")
_QUESTION = "What is in the picture?"
_TARGETS = {"tokens", "retention", "mean_tokens", "budgets"}


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A model and a request. normal: the mean and deviation of its processor; read: ids to text."""

    model: Any
    inputs: dict[str, Any]
    name: str
    normal: tuple[Any, Any] | None
    read: Any = None


def view_command(
    model: Annotated[
        str | None, typer.Option(help="A folder or a model on the hub; default: the small one in examples/models.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture; default: one that comes with the model.")] = None,
    prompt: Annotated[str, typer.Option(help="The question about it.")] = _QUESTION,
    method: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(_METHODS)}. {METHOD_HELP}")] = None,
    retention: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Share of the visual tokens, mean over layers; repeat for several; default: {', '.join(_RETENTIONS)}."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 24,
    output: Annotated[Path, typer.Option(help="The page; a picture goes beside it, as .png.")] = Path("vitcop-view.html"),
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    random: Annotated[bool, typer.Option("--random", help="A small model with random weights.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
) -> None:
    """Write a page that shows what methods keep of a picture, stage by stage, and what is then answered."""
    with errors_as_lines(), without_future_warnings():
        from ..view import Collector, save_page, sheet

        shares = retention or list(_RETENTIONS)
        methods = _methods(methods_asked(method or _METHODS), shares)
        drawn = _check(output, dtype, max_new_tokens, model, random)
        photo = picture.load_image(image)
        steps = Steps(Console(stderr=True))
        with steps.step("building the model" if random else "loading the model"):
            subject = _random(photo, prompt, seed, dtype) if random else _loaded(model, photo, prompt, dtype)
        with steps.step("capturing the graphs, and the dense answer"):
            seen = Collector(subject.model, subject.inputs, read=subject.read, new_tokens=max_new_tokens)
        found = seen.record(
            methods, shares, [photo], steps, model=subject.name, prompt=prompt, normal=subject.normal, random=random
        )
        with steps.step("drawing"):
            save_page(found, output)
            picture.save(sheet(found), drawn)
        for name, runs in found.runs.items():
            for share, run in zip(shares, runs, strict=True):
                if run.left_out:
                    console().print(Text(f"{name} at {share} left out: {run.left_out}", style="yellow"), soft_wrap=True)
        console().print(Text(f"page: {output}\npicture: {drawn}"), soft_wrap=True)


def _methods(texts: list[str], shares: list[str]) -> dict[str, list[Method]]:
    """Every method at every retention; one that says its own target is the same at all."""
    if double := sorted(
        {text for text in texts if texts.count(text) > 1} | {text for text in shares if shares.count(text) > 1}
    ):
        raise ConfigError(f"{', '.join(double)} was given twice: give every method and retention once")
    for share in shares:
        _check_share(share)
    found: dict[str, list[Method]] = {}
    for text in texts:
        own = {} if _TARGETS & split(text)[1].keys() else {"retention": ""}
        found[text] = [method_from(text, **{name: share for name in own}) for share in shares]
    return found


def _check_share(text: str) -> None:
    """Raises ConfigError for a retention that is none, which methods that say their own target would not read."""
    try:
        inside = text in NAMED_PRESETS or 0 < Fraction(text) <= 1
    except (ValueError, ZeroDivisionError):
        inside = False
    if not inside:
        raise ConfigError(
            f"--retention {text} is no share of the visual tokens: give a number in (0, 1], such as 0.1 or 1/9, or for vitcop "
            f"one of {PRESET_NAMES}"
        )


def _check(output: Path, dtype: str, new_tokens: int, model: str | None, random: bool) -> Path:
    """Where the picture goes. Raises for what cannot work, before anything slow."""
    picture.require_matplotlib()
    if dtype not in demo.DTYPES:
        raise ConfigError(f"--dtype {dtype} is unknown: use one of {', '.join(demo.DTYPES)}")
    if new_tokens < 1:
        raise InputError(f"--max-new-tokens {new_tokens} is below 1: ask for 1 or more")
    if random and model is not None:
        raise ConfigError(f"--random and --model {model} were given: choose one")
    if not random and model is None and not (demo.TRAINED / "model.safetensors").is_file():
        raise ConfigError(f"no model was given, and {demo.TRAINED} holds none: give --model, or --random for random weights")
    drawn = output.with_suffix(".png")
    folder = output.absolute().parent
    if not folder.is_dir() or output.is_dir() or output == drawn:
        raise InputError(f"--output {output} cannot be written: name an .html file in an existing folder")
    if model is not None:
        model_host(model)  # before gigabytes of weights are loaded for nothing
    return drawn


def _random(photo: Image.Image, prompt: str, seed: int, dtype: str) -> _Subject:
    model = toy.small_llava(**demo.SMALL, seed=seed, dtype=demo.DTYPES[dtype])  # type: ignore[arg-type]
    inputs = toy.request(f"USER: <image>\n{prompt} ASSISTANT:", photo, model.config)
    how = toy.processor(model.config)
    return _Subject(model, dict(inputs), "LLaVA-1.5 at small size, random weights", (how.image_mean, how.image_std))


def _loaded(name: str | None, photo: Image.Image, prompt: str, dtype: str) -> _Subject:
    name = str(demo.TRAINED) if name is None else name
    try:
        processor = AutoProcessor.from_pretrained(name)
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=demo.DTYPES[dtype]).eval()
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load(name, error) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = processor.image_processor
    mean, deviation = getattr(how, "image_mean", None), getattr(how, "image_std", None)
    normal = None if mean is None or deviation is None else (mean, deviation)
    inputs = dict(request_of(processor, photo, prompt).to(device))
    return _Subject(model.to(device), inputs, Path(name).name if Path(name).is_dir() else name, normal, processor.decode)
