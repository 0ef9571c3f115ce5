"""The command `tune`: the settings that meet a target on one's own pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForImageTextToText, AutoProcessor

from .. import demo
from ..config import PRESETS
from ..errors import ConfigError, InputError
from ..methods.named import method_from, split
from ..picture import load_image
from ..progress import Steps
from ..schedule import Method
from .shared import METHOD_HELP, cannot_load, console, errors_as_lines, methods_asked, request_of, without_future_warnings

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_METHODS = ("vitcop", "visionzip", "divprune", "fastv", "uniform")


def tune_command(
    model: Annotated[str, typer.Option(help="A folder or a model on the hub, of a supported family.")],
    images: Annotated[Path, typer.Option(help="A folder of pictures such as yours.")],
    target: Annotated[str, typer.Option(help="ttft=MILLISECONDS, kv=MEBIBYTES or kl=NATS: what must be met.")],
    prompt: Annotated[str, typer.Option(help="The question asked about each.")] = "What is in the picture?",
    method: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(_METHODS)}. {METHOD_HELP}")] = None,
    retention: Annotated[
        list[str] | None,
        typer.Option(help=f"Shares of the visual tokens, for methods without a target; default: {', '.join(PRESETS)}."),
    ] = None,
    backend: Annotated[str, typer.Option(help="What times are measured with.")] = "inductor",
    limit: Annotated[int, typer.Option(help="Pictures to look at, in the order of their names.")] = 16,
    tokens: Annotated[int, typer.Option(help="First tokens that are compared.")] = 8,
    rounds: Annotated[int, typer.Option(help="Measured rounds.")] = 7,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; default: float32 on CPU, float16 on CUDA.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where to write the settings and their evidence.")] = Path("vitcop-tuned.json"),
) -> None:
    """Search presets and methods on your own pictures, and write the settings that meet a target with the evidence."""
    with errors_as_lines(), without_future_warnings():
        from ..tune import TARGETS, check, tune

        name, _ = check(target, backend, tokens, rounds)
        device, kind = demo.place(dtype)
        if not output.absolute().parent.is_dir() or output.is_dir():
            raise InputError(f"--output {output} cannot be written: name a file in an existing folder")
        methods = _methods(methods_asked(method or _METHODS), retention or list(PRESETS))
        pictures = _pictures(images, limit)
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(model, dtype=kind)
            processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise cannot_load(model, error) from None
        requests = [dict(request_of(processor, load_image(path), prompt).to(device)) for path in pictures]
        found = tune(
            loaded.to(device).eval(),
            requests,
            methods,
            target,
            backend=backend,
            tokens=tokens,
            rounds=rounds,
            steps=Steps(Console(stderr=True)),
        )
        on = f"{found.backend}, {found.device}, {found.dtype}"
        table = Table(title=f"{len(pictures)} pictures, {target} {TARGETS[name]}; {on}")
        for column in ("method", "visual tokens", "FLOPs", "KV MiB", "KL nats", f"first {tokens} agree", "TTFT ms"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for own in found.candidates:
            sizes = (f"{own.tokens:.1f}", f"/ {own.flops:.2f}", f"{own.kv:.2f}")
            measured = (_cell(own.kl), _share(own.agreed), _cell(own.ttft))
            table.add_row(own.name, *sizes, *measured, style="bold green" if own.name == found.chosen else None)
        console().print(table)
        for label, why in found.left_out.items():
            console().print(Text(f"{label} left out: {why}", style="yellow"), soft_wrap=True)
        found.save(output)
        console().print(Text(f"{found.chosen} -> {output}"), soft_wrap=True)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _methods(texts: list[str], retentions: list[str]) -> dict[str, Method]:
    """Every method that says no target at every retention."""
    found: dict[str, Method] = {}
    for text in texts:
        if {"tokens", "retention", "mean_tokens", "budgets"} & split(text)[1].keys():
            found[text] = method_from(text)
            continue
        for share in retentions:
            found[f"{text}{',' if ':' in text else ':'}retention={share}"] = method_from(text, retention=share)
    return found


def _pictures(folder: Path, limit: int) -> list[Path]:
    if limit < 1:
        raise ConfigError(f"--limit {limit} is below 1: look at 1 picture or more")
    if not folder.is_dir():
        raise InputError(f"--images {folder} is not a folder")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise InputError(f"--images {folder} holds no picture: {', '.join(_SUFFIXES)} are read")
    return found[:limit]
