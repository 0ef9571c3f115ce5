"""How often a model is right, on pictures it has not learned from: `python -m examples.see.evaluate examples/models/llava`."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForImageTextToText

from .models import load_processor, prompt
from .questions import KINDS, question
from .scenes import scene

MOST_TOKENS = 6


@dataclass(frozen=True)
class Example:
    """A picture, a question about it and the right answer."""

    image: Image.Image
    question: str
    answer: str


def held_out(kind: str, number: int, seed: int = 0) -> Iterator[Example]:
    """Questions of one kind, each about a picture of its own, with names in colours and words on signs that no model has
    learned from. The same for the same seed."""
    at = found = 0
    while found < number:
        rng = random.Random(f"held out {seed} {kind} {at}")
        at += 1
        seen = scene(rng, held_out=True, signs=1 if kind == "read" else None)
        asked = question(kind, seen, rng, held_out=True)
        if asked is not None:
            found += 1
            yield Example(seen.image, *asked)


def answers(model: Any, processor: Any, kind: str, examples: Sequence[Example]) -> list[str]:
    """What a model says to each, in one batch; kind: the model's type. Greedy, the words of the answer apart."""
    batch = processor(
        images=[[one.image] for one in examples], text=[prompt(kind, one.question) for one in examples], return_tensors="pt",
        padding=True,
    )  # fmt: skip
    said = model.generate(**batch, max_new_tokens=MOST_TOKENS, do_sample=False)
    new = said[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


def interval(right: int, asked: int) -> tuple[float, float]:
    """95 % for a share (Wilson, 1927)."""
    z = 1.959964
    share, scale = right / asked, 1 + z * z / asked
    middle = (share + z * z / (2 * asked)) / scale
    half = z * sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked)) / scale
    return middle - half, middle + half


def main(
    folder: Annotated[Path, typer.Argument(help="A trained model.")],
    number: Annotated[int, typer.Option(help="Questions of each kind.")] = 100,
    batch: Annotated[int, typer.Option(help="Questions at a time.")] = 10,
    show: Annotated[int, typer.Option(help="Wrong answers to show of each kind.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: torch's choice.")] = 0,
) -> None:
    """Ask a model all kinds of questions."""
    if threads:
        torch.set_num_threads(threads)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor, console = load_processor(folder), Console()
    table = Table("kind", "right", "95 %", title=f"{folder.name}, {number} questions of each kind")
    for kind in KINDS:
        examples = list(held_out(kind, number))
        said: list[str] = []
        for at in track(range(0, number, batch), kind, console=Console(stderr=True)):
            said += answers(model, processor, model.config.model_type, examples[at : at + batch])
        right = sum(text == one.answer for text, one in zip(said, examples))
        low, high = interval(right, number)
        table.add_row(kind, f"{100 * right / number:.0f} %", f"{100 * low:.0f} to {100 * high:.0f}")
        wrong = [(one, text) for text, one in zip(said, examples) if text != one.answer]
        for one, text in wrong[:show]:
            console.print(f"{one.question} {one.answer}: {text}", markup=False)
    console.print(table)


if __name__ == "__main__":
    sys.exit(typer.run(main))
