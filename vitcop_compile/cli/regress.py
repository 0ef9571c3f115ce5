"""The command `regress`: a compiled model against a committed baseline."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..config import DEFAULT_PRESET
from ..errors import ConfigError
from .shared import PRESET_NAMES, console, errors_as_lines, without_future_warnings

# As `regress.ELSEWHERE`, repeated so that `--help` does not load the gate.
_ELSEWHERE = ("refuse", "skip", "compare")


def regress_command(
    baseline: Annotated[Path, typer.Option(help="The file to compare with, or to write with --update.")],
    update: Annotated[bool, typer.Option("--update", help="Measure the baseline anew and print what changed.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="A LLaVA-1.5 folder or model on the hub; default: toy, a random LLaVA of these sizes."),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help=f"Published settings: {PRESET_NAMES}; default: {DEFAULT_PRESET}.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="What the programs compile with; default: inductor.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the random language model; default: 512.")] = None,
    layers: Annotated[int | None, typer.Option(help="Its layers; default: 8.")] = None,
    vision_hidden: Annotated[int | None, typer.Option(help="Width of the random vision encoder; default: 256.")] = None,
    vision_layers: Annotated[int | None, typer.Option(help="Its layers; default: 4.")] = None,
    batch: Annotated[int | None, typer.Option(help="Prompts per call; default: 1.")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Text tokens of a prompt, beside its image; default: 64.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Cache rows for new tokens; default: 64.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds of one timing; default: 9.")] = None,
    cuda: Annotated[
        list[str] | None,
        typer.Option(help="Architectures to generate CUDA code for and count, sm_80 or sm_90; needs no GPU; default: none."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="With --update: timings that the tolerance is derived from; default: 7.")
    ] = None,
    counts_only: Annotated[bool, typer.Option("--counts-only", help="Facts alone: nothing is timed.")] = False,
    elsewhere: Annotated[
        str, typer.Option(help=f"Timings of another machine: {', '.join(_ELSEWHERE)}. Facts are compared everywhere.")
    ] = "refuse",
) -> None:
    """Fail where compiled models have become slower or larger than their baseline. Exit codes: 0 pass, 1 regression, 2 not
    comparable. A check takes its settings from the file; --update keeps those that are not given."""
    options = {
        "model": model, "presets": tuple(preset) if preset else None, "backend": backend, "hidden": hidden, "layers": layers,
        "vision_hidden": vision_hidden, "vision_layers": vision_layers, "batch": batch, "text_tokens": text_tokens,
        "new_tokens": new_tokens, "rounds": rounds,
        "cuda": None if not cuda else () if cuda == ["none"] else tuple(cuda),
    }  # fmt: skip
    with _not_comparable(), without_future_warnings():
        if elsewhere not in _ELSEWHERE:
            raise ConfigError(f"--elsewhere {elsewhere!r} is unknown: use one of {', '.join(_ELSEWHERE)}")
        if update:
            passed = _update(baseline, options, counts_only, repeats)
        elif repeats is not None:
            raise ConfigError(f"--repeats {repeats} belongs to --update: a check takes the tolerances of its baseline")
        else:
            passed = _check(baseline, options, counts_only, elsewhere)
    if not passed:
        raise typer.Exit(1)


def _check(path: Path, options: dict[str, Any], counts_only: bool, elsewhere: str) -> bool:
    from .. import regress  # not above: other commands start sooner without it
    from ..regress.tables import print_report

    stored = vars(regress.load(path).settings)
    other = "; ".join(
        f"--{'preset' if name == 'presets' else name.replace('_', '-')} {_text(value)}, there {_text(stored[name])}"
        for name, value in options.items()
        if value is not None and value != stored[name]
    )
    if other:
        raise ConfigError(f"{path} was measured otherwise ({other}): leave the options out, or pass --update")
    with Console(stderr=True).status("") as status:
        report = regress.check(None, path, counts_only=counts_only, elsewhere=elsewhere, say=status.update)
    print_report(report, console())
    return report.passed


def _update(path: Path, options: dict[str, Any], counts_only: bool, repeats: int | None) -> bool:
    from .. import regress
    from ..regress.tables import failures, print_update

    if not path.resolve().parent.is_dir():
        raise ConfigError(f"--baseline {path}: the folder {path.resolve().parent} does not exist: make it first")
    old = regress.load(path) if path.exists() else None
    settings = regress.settings_of(old.settings if old else regress.Settings(), options)
    times = regress.REPEATS if repeats is None else repeats
    with Console(stderr=True).status("") as status:
        new, broken = regress.update(None, path, settings, counts_only=counts_only, repeats=times, say=status.update)
    if broken:
        console().print(failures(broken))
        console().print("no baseline can allow this: nothing was written", style="red")
    else:
        print_update(old, new, console())
    return not broken


@contextmanager
def _not_comparable() -> Iterator[None]:
    """Whatever goes wrong becomes exit code 2: 1 means a regression and nothing else."""
    try:
        with errors_as_lines():
            yield
    except typer.Exit:
        raise
    except Exception:
        Console(stderr=True).print_exception()
        raise typer.Exit(2) from None


def _text(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
