"""The command line: `vitcop-compile`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text
from transformers import AutoConfig

from . import cli_bench, cli_export, cli_regress
from .config import DEFAULT_PRESET, PRESETS, ViTCoPConfig
from .demo import Options, run
from .errors import ConfigError, UnsupportedError, VitcopError
from .explain import table
from .families.registry import shape_of
from .schedule import ModelShape

TABLE_WIDTH = 120

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Visual-token pruning compiled into the graphs of large vision-language models.",
)
cli_export.register(app)
cli_bench.register(app)
cli_regress.register(app)

_PRESETS = ", ".join(PRESETS)


@app.command("explain")
def explain_command(
    model: Annotated[
        str | None, typer.Option(help="A folder with config.json, or a model on the hub; default: LLaVA-1.5-7B's shape.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"A published setting: {_PRESETS}; default: {DEFAULT_PRESET}.")] = None,
    retention: Annotated[float | None, typer.Option(help="Share of the visual tokens to keep, mean over layers.")] = None,
    mean_tokens: Annotated[float | None, typer.Option(help="Visual tokens to keep, mean over layers.")] = None,
    config: Annotated[Path | None, typer.Option(help="A file written by ViTCoPConfig.save.")] = None,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of the prompt.")] = 64,
    layers: Annotated[int | None, typer.Option(help="Decoder layers, in place of the model's own.")] = None,
) -> None:
    """Print the schedule: tokens, KV rows and FLOPs of every layer. No model is loaded."""
    with errors_as_lines():
        settings = _settings(preset, retention, mean_tokens, config)
        shape = _shape(model, layers)
        console().print(table(settings.schedule(shape, text_tokens=text_tokens)))


@app.command("demo")
def demo_command(
    image: Annotated[Path | None, typer.Option(help="A photograph; default: one that comes with matplotlib.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A LLaVA-1.5 folder or model on the hub; default: a small one, random weights.")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"A published setting: {_PRESETS}.")] = Options.preset,
    backend: Annotated[str, typer.Option(help="What the programs compile with: inductor, eager.")] = Options.backend,
    prompt: Annotated[str, typer.Option(help="The question.")] = Options.prompt,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = Options.max_new_tokens,
    output: Annotated[Path, typer.Option(help="Where to write the picture.")] = Options.output,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = Options.seed,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: float32 on CPU, float16 on CUDA.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = Options.rounds,
) -> None:
    """Compile a dense and a pruned model, measure both on a photograph and draw what was pruned."""
    with errors_as_lines():
        if model is not None:
            _shape_of(model)  # before gigabytes of weights are loaded for nothing
        options = Options(image, model, preset, backend, prompt, max_new_tokens, output, seed, dtype, rounds)
        with warnings.catch_warnings():
            # Torch's compiler warns about its own internals; nothing a user of the demo could act on.
            warnings.filterwarnings("ignore", category=FutureWarning)
            run(options, console())


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """What this package raises on purpose becomes one red line and exit code 2; anything else stays a traceback."""
    try:
        yield
    except VitcopError as error:
        Console(stderr=True).print(Text(f"error: {error}", style="red"), soft_wrap=True)
        raise typer.Exit(2) from None


def console() -> Console:
    """Standard output; wide enough for the tables where it is no terminal."""
    out = Console()
    return out if out.is_terminal else Console(width=max(out.width, TABLE_WIDTH))


def _settings(preset: str | None, retention: float | None, mean_tokens: float | None, path: Path | None) -> ViTCoPConfig:
    options = {"--preset": preset, "--retention": retention, "--mean-tokens": mean_tokens, "--config": path}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} were given: choose one of {', '.join(options)}")
    if path is not None:
        try:
            return ViTCoPConfig.load(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if mean_tokens is not None:
        return ViTCoPConfig.for_mean_tokens(mean_tokens)
    if retention is not None:
        target = retention
        nearest = min(PRESETS, key=lambda name: abs(PRESETS[name][2] - target))
        return ViTCoPConfig.preset(nearest, retention=target)
    return ViTCoPConfig.preset(preset or DEFAULT_PRESET)


def _shape(model: str | None, layers: int | None) -> ModelShape:
    shape = ModelShape() if model is None else _shape_of(model)
    if layers is None:
        return shape
    if layers < 1:
        raise ConfigError(f"--layers {layers} is below 1: give a number of decoder layers")
    return dataclasses.replace(shape, layers=layers)


def _shape_of(model: str) -> ModelShape:
    """The shape of the model in a folder or on the hub, from its configuration alone."""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise UnsupportedError(f"--model {model} is not a folder: give one with config.json, or a name on the hub")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"--model {model} cannot be loaded: {str(error).splitlines()[0]}") from None
    return shape_of(config)
