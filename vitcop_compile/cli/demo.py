"""The command `demo`: dense against pruned on one photograph."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..demo import Options, run
from ..errors import UnsupportedError
from .shared import PRESET_NAMES, console, errors_as_lines, model_host, without_future_warnings


def demo_command(
    image: Annotated[Path | None, typer.Option(help="A photograph; default: one that comes with the model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A LLaVA-1.5 folder or model on the hub; default: the small one in examples/models.")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"A published setting: {PRESET_NAMES}.")] = Options.preset,
    backend: Annotated[str, typer.Option(help="What the programs compile with: inductor, eager.")] = Options.backend,
    prompt: Annotated[str | None, typer.Option(help="The question; default: those that come with the picture.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = Options.max_new_tokens,
    output: Annotated[Path, typer.Option(help="Where to write the picture.")] = Options.output,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = Options.seed,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: float32 on CPU, float16 on CUDA.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = Options.rounds,
    random: Annotated[bool, typer.Option("--random", help="A small model with random weights, of any size of image.")] = False,
) -> None:
    """Compile a dense and a pruned model, measure both on a photograph and draw what was pruned."""
    with errors_as_lines():
        if model is not None:
            host = model_host(model)  # before gigabytes of weights are loaded for nothing
            if host.shape.packed:
                raise UnsupportedError(
                    f"--model {model} puts images together behind its encoder, which the demo cannot draw: use a LLaVA-1.5"
                )
        options = Options(image, model, preset, backend, prompt, max_new_tokens, output, seed, dtype, rounds, random)
        with without_future_warnings():
            run(options, console())
