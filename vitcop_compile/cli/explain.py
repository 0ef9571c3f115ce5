"""The command `explain`: the schedule of a setting, printed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..config import DEFAULT_PRESET, ViTCoPConfig
from ..errors import ConfigError
from ..explain import TEXT_TOKENS, table
from ..schedule import ModelShape
from .shared import PRESET_NAMES, console, errors_as_lines, model_shape, settings_of_share


def explain_command(
    model: Annotated[
        str | None, typer.Option(help="A folder with config.json, or a model on the hub; default: LLaVA-1.5-7B's shape.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help=f"A published setting: {PRESET_NAMES}; default: {DEFAULT_PRESET}.")
    ] = None,
    retention: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, mean over layers.")] = None,
    mean_tokens: Annotated[float | None, typer.Option(help="Visual tokens to keep, mean over layers.")] = None,
    config: Annotated[Path | None, typer.Option(help="A file written by ViTCoPConfig.save.")] = None,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = TEXT_TOKENS,
    layers: Annotated[int | None, typer.Option(help="Decoder layers, in place of the model's own.")] = None,
) -> None:
    """Print the schedule: tokens, KV rows and FLOPs of every layer. No model is loaded."""
    with errors_as_lines():
        settings = _settings(preset, retention, mean_tokens, config)
        shape = _shape(model, layers)
        console().print(table(settings.schedule(shape), text_tokens))


def _settings(preset: str | None, retention: float | None, mean_tokens: float | None, path: Path | None) -> ViTCoPConfig:
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


def _load(path: Path) -> ViTCoPConfig:
    try:
        return ViTCoPConfig.load(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _shape(model: str | None, layers: int | None) -> ModelShape:
    shape = ModelShape() if model is None else model_shape(model)
    if layers is None:
        return shape
    if layers < 1:
        raise ConfigError(f"--layers {layers} is below 1: give a number of decoder layers")
    return dataclasses.replace(shape, layers=layers)
