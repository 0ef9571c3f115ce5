"""Trains one of the two models: `python -m examples.see.train llava --folder /somewhere`.

Three parts, each of which goes on where it was stopped: the tower learns what its patches show; then it stays as it is and the
decoder learns to answer from its features; then the weights are written to `model` in the folder as transformers saves
them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from . import decoder, models
from .learner import Learner
from .sample import write_sample
from .tower import Heads, features_of, pixels_of, scenes_of, tower_of

BATCH = 16


def train_tower(kind: str, model: nn.Module, steps: int, rate: float, seed: int, folder: Path, console: Console) -> Heads:
    """From nothing; then, half as many steps, with more signs, as letters are what comes last."""
    heads = Heads(tower_of(kind, model).config.hidden_size, kind == "llava")  # type: ignore[union-attr, arg-type]
    parts = nn.ModuleDict({"tower": tower_of(kind, model), "heads": heads})
    for name, length, signs in (("tower", steps, False), ("tower-signs", steps // 2, True)):

        def loss_of(rng: random.Random, signs: bool = signs) -> tuple[Tensor, dict[str, float]]:
            scenes = scenes_of(rng, BATCH, signs)
            return heads.loss(*features_of(kind, model, pixels_of(kind, scenes)), scenes)

        Learner(name, parts, length, rate, seed).run(loss_of, folder / f"{name}.pt", console)
    return heads


def main(
    kind: Annotated[str, typer.Argument(help=f"Which model: {' or '.join(models.MODELS)}.")],
    folder: Annotated[Path, typer.Option(help="Where states and, at the end, the model are kept.")],
    tower_steps: Annotated[int, typer.Option(help="Of 16 pictures.")] = 1200,
    decoder_steps: Annotated[int, typer.Option(help="Of 16 pictures and 14 questions about each.")] = 450,
    pictures: Annotated[int, typer.Option(help="Whose features the decoder learns from.")] = 5000,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of weights, pictures and questions.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: torch's choice.")] = 0,
) -> None:
    """Train a model, or go on where a training was stopped."""
    if kind not in models.MODELS:
        raise typer.BadParameter(f"{kind!r} is neither of {' and '.join(models.MODELS)}")
    if threads:
        torch.set_num_threads(threads)
    console = Console(stderr=True)
    folder.mkdir(parents=True, exist_ok=True)
    model = models.make(kind, seed)
    heads = train_tower(kind, model, tower_steps, rate, seed, folder, console)
    decoder.train(kind, model, heads, decoder_steps, pictures, rate, seed, folder, console)
    models.save(model, models.processor_of(kind), folder / "model")
    write_sample(folder / "model")


if __name__ == "__main__":
    typer.run(main)
