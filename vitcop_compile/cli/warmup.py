"""The command `warmup`: programs compiled and kept before anybody asks."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text
from transformers import AutoConfig, AutoModelForImageTextToText

from .. import store
from ..backends import backend_of
from ..config import DEFAULT_PRESET
from ..demo import place
from ..errors import ConfigError, InputError, UnsupportedError
from ..fillers import empty
from ..host import Host
from ..layout import Layout
from ..methods.named import settings_from
from ..pipeline import optimize
from ..schedule import Method
from .shared import (
    ONE_METHOD_HELP,
    PRESET_NAMES,
    cannot_load,
    console,
    errors_as_lines,
    image_size_of,
    model_host,
    without_future_warnings,
)


def warmup_command(
    model: Annotated[str, typer.Option(help="A folder or a model on the hub; its configuration is enough.")],
    retention: Annotated[
        str, typer.Option(help=f"A published setting ({PRESET_NAMES}), or the share of the visual tokens to keep.")
    ] = DEFAULT_PRESET,
    method: Annotated[str | None, typer.Option(help=ONE_METHOD_HELP)] = None,
    backend: Annotated[str, typer.Option(help="What the programs compile with: inductor, aotinductor.")] = "inductor",
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: float32.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(help="Prompts per call, default 1; repeat for several.")] = None,
    text_tokens: Annotated[
        list[int] | None, typer.Option(help="Text tokens of a prompt, default 64; repeat for several buckets.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT of an image, where a model takes any size; repeat for several layouts."),
    ] = None,
    images: Annotated[int, typer.Option(help="Images of a prompt, all of one size.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Threads of the processes to come, which is part of what is compiled; default: torch's.")
    ] = None,
    processes: Annotated[int | None, typer.Option(help="That compile at the same time, default: one a core.")] = None,
    output: Annotated[Path | None, typer.Option(help="A tar file to write everything that is kept to.")] = None,
) -> None:
    """Compile the programs of a model into the folder of kept ones, where later processes find them. No weights are loaded."""
    with errors_as_lines(), without_future_warnings():
        held = _store()
        settings: Method = settings_from(retention, method)
        _check(backend, output, threads, processes)
        _, kind = place(dtype)
        if torch.cuda.is_available():
            kind = place(dtype or "float32")[1]
        host = model_host(model)
        layouts = _layouts(host, [image_size_of(text) for text in image_size or ()], images)
        if threads is not None:
            torch.set_num_threads(threads)
        start = time.perf_counter()
        fast = optimize(_empty(model, kind), settings, backend=backend)
        if fast.on_demand.kept is None:
            raise UnsupportedError(f"programs of {model} cannot be kept; the log vitcop_compile says why")
        fast.keep(list(itertools.product(batch_size or [1], text_tokens or [64], layouts)), max_new_tokens, processes)
        made = len(fast.compiled)
        console().print(
            Text(f"{held.root}: {made} programs, {time.perf_counter() - start:.0f} s; {held.size() / 2**20:,.1f} MiB in all"),
            soft_wrap=True,
        )
        if output is not None:
            held.pack(output)
            console().print(Text(f"{output}: {output.stat().st_size / 2**20:,.1f} MiB"), soft_wrap=True)


def _store() -> store.Store:
    held = store.current()
    if held is None:
        raise ConfigError(
            f"nothing is kept: {store.FOLDER} is off, or names a folder that others may write to: set it to one of your own"
        )
    return held


def _check(backend: str, output: Path | None, threads: int | None, processes: int | None) -> None:
    """Raises VitcopError for options that cannot work, before anything slow."""
    if backend_of(backend).keeper is None:
        raise UnsupportedError(f"backend={backend!r} keeps no programs: use inductor or aotinductor")
    for name, value in (("--threads", threads), ("--processes", processes)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} is below 1: give 1 or more")
    if output is not None and (not output.absolute().parent.is_dir() or output.is_dir()):
        raise InputError(f"{output} cannot be written: name a file in an existing folder")


def _layouts(host: Host, sizes: list[tuple[int, int]], images: int) -> list[list[Layout]]:
    """The images of a prompt, for each of the sizes."""
    if images < 0:
        raise InputError(f"--images {images} is below 0: give a number of images")
    each = [host.layout_of(*size, images) for size in sizes] or [host.layout]
    return [[layout] * images for layout in each]


def _empty(model: str, dtype: torch.dtype) -> Any:
    """The model of a configuration, without values."""
    try:
        config = AutoConfig.from_pretrained(model)
        kind: Any = AutoModelForImageTextToText._model_mapping[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise cannot_load(model, error) from None
    return empty(kind, config, dtype)
