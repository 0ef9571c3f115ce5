"""The command `explain`: the schedule of a setting, printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..config import DEFAULT_PRESET, ViTCoPConfig
from ..errors import ConfigError
from ..explain import TEXT_TOKENS, summary, table
from ..host import FixedImages, Host
from ..methods import load_method
from ..methods.named import method_from, settings_of_share
from ..schedule import Method, ModelShape, resolve
from .shared import (
    DEFAULT_RETENTION,
    METHOD_HELP,
    PRESET_NAMES,
    console,
    errors_as_lines,
    image_size_of,
    methods_asked,
    model_host,
)


def explain_command(
    model: Annotated[
        str | None, typer.Option(help="A folder with config.json, or a model on the hub; default: LLaVA-1.5-7B's shape.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A published setting: {PRESET_NAMES}; default: {DEFAULT_PRESET}.")
    ] = None,
    retention: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, mean over layers.")] = None,
    mean_tokens: Annotated[float | None, typer.Option(help="Visual tokens to keep, mean over layers.")] = None,
    config: Annotated[Path | None, typer.Option(help="A file written by `tune`, or by ViTCoPConfig.save.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=METHOD_HELP)] = None,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = TEXT_TOKENS,
    layers: Annotated[int | None, typer.Option(help="Decoder layers, in place of the model's own.")] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT of an image before preprocessing; again for every further image of the prompt."),
    ] = None,
) -> None:
    """Print the schedule: tokens, KV rows and FLOPs of every layer. No model is loaded."""
    with errors_as_lines():
        methods = _settings(preset, retention, mean_tokens, config, method or [])
        host = _LLAVA if model is None else model_host(model)
        sizes = [image_size_of(text) for text in image_size or ()]
        layout = tuple(segment for size in sizes for segment in host.layout_of(*size, len(sizes))) or host.layout
        schedules = {name: resolve(settings, _shape(host, layers), layout) for name, settings in methods.items()}
        if len(schedules) == 1:
            console().print(table(next(iter(schedules.values())), text_tokens))
        for name, schedule in schedules.items():
            console().print(Text(f"{name}: {summary(schedule, text_tokens)}"), soft_wrap=True)


# LLaVA-1.5-7B's.
_LLAVA = FixedImages(ModelShape(), 32000, (3, 336, 336))


def _settings(
    preset: str | None, retention: float | None, mean_tokens: float | None, path: Path | None, methods: list[str]
) -> dict[str, Method]:
    """What is to be explained, by name."""
    if methods:
        if preset or mean_tokens or path is not None:
            raise ConfigError(
                "--method says what it needs itself, or takes --retention: leave --preset, --mean-tokens, --config out"
            )
        defaults = {"retention": DEFAULT_RETENTION if retention is None else retention}
        return {name: method_from(name, **defaults) for name in methods_asked(methods)}
    return {"vitcop" if path is None else str(path): _of_options(preset, retention, mean_tokens, path)}


def _of_options(preset: str | None, retention: float | None, mean_tokens: float | None, path: Path | None) -> Method:
    options = {"--preset": preset, "--retention": retention, "--mean-tokens": mean_tokens, "--config": path}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} were given: choose one of {', '.join(options)}")
    if path is not None:
        return _load(path)
    if mean_tokens is not None:
        return ViTCoPConfig.for_mean_tokens(mean_tokens)
    if retention is not None:
        return settings_of_share(retention)
    return ViTCoPConfig.preset(preset or DEFAULT_PRESET)


def _load(path: Path) -> Method:
    try:
        return load_method(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _shape(host: Host, layers: int | None) -> ModelShape:
    if layers is None:
        return host.shape
    if layers < 1:
        raise ConfigError(f"--layers {layers} is below 1: give a number of decoder layers")
    return dataclasses.replace(host.shape, layers=layers)
