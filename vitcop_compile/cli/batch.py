"""The command `batch`: requests of a file, answered into another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from ..config import DEFAULT_PRESET
from . import serving_options as options
from .shared import console, errors_as_lines, image_size_of, without_future_warnings


def batch_command(
    model: Annotated[
        str, typer.Argument(help="What `export` wrote, or a model, a folder or on the hub; its name is the folder's.")
    ],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Requests, a line each, in OpenAI's batch format.")],
    output: Annotated[
        Path, typer.Argument(help="Answers, a line each as they come; those that it holds already are not made again.")
    ],
    model_name: options.ModelNames = None,
    slots: options.Slots = None,
    max_text_len: options.MaxTextLen = None,
    max_new_tokens: options.MaxNewTokens = None,
    processor: options.Processor = None,
    image_hosts: options.ImageHosts = None,
    max_body_mib: options.MaxBodyMib = 20,
    max_megapixels: options.MaxMegapixels = 40,
    retention: options.Retention = DEFAULT_PRESET,
    method: options.Method = None,
    backend: options.Backend = "inductor",
    image_size: options.ImageSizes = None,
    images: options.ImageCounts = None,
    dtype: options.Dtype = "float32",
    runtime: options.Runtime = None,
    verify: options.Verify = True,
    ray: Annotated[bool, typer.Option("--ray", help="By Ray Data, see docs/ray.md.")] = False,
    replicas: options.Replicas = 1,
    cpus: options.Cpus = 1,
    gpus: options.Gpus = 0,
    ray_address: options.RayAddress = None,
) -> None:
    """Answer a file of requests into another, a line each; the same command again goes on where it was stopped."""
    with errors_as_lines(), without_future_warnings():
        options.require_extra()
        from ..serve.batch import Output, Tally, answering, lines_of, open_door, run

        if not ray:
            options.refuse_ray_alone(replicas=replicas, cpus=cpus, gpus=gpus, ray_address=ray_address)
        cluster = options.cluster_of(
            {
                "models": options.named_sources(model, model_name or []),
                "processor": processor,
                "slots": slots,
                "max_text_len": max_text_len,
                "max_new_tokens": max_new_tokens,
                "image_hosts": image_hosts or [],
                "max_body_mib": max_body_mib,
                "max_megapixels": max_megapixels,
                "retention": retention,
                "method": method,
                "backend": backend,
                "images": images or [1],
                "dtype": dtype,
                "runtime": runtime,
                "verify": verify,
                "image_sizes": [image_size_of(text) for text in image_size or ()],
                "replicas": replicas,
                "cpus": cpus,
                "gpus": gpus,
            }
        )
        lines = lines_of(source)
        tally = Tally()
        with Output(output, lines) as written:
            left = [line for line in lines if line.key not in written.done]
            with _shown(len(lines), len(lines) - len(left), tally) as show:

                def write(answer: dict[str, Any]) -> None:
                    written.write(answer)
                    tally.add(answer)
                    show()

                if left and ray:
                    from ..serve.ray_app import batch

                    batch(cluster, ray_address, source, left, write)
                elif left:
                    door, at_once = open_door(cluster)

                    async def work() -> None:
                        async with answering(door) as answerer:
                            await run(answerer, source, left, at_once, write)

                    try:
                        asyncio.run(work())
                    except KeyboardInterrupt:
                        Console(stderr=True).print(f"stopped: {output} is whole, and the same command goes on from there")
                        raise typer.Exit(130) from None
        kept = len(lines) - len(left)
        console().print(
            Text(
                f"{output}: {tally.answered} of {len(lines)} lines answered, {kept} were there, {tally.failed} of the new "
                f"ones with an error, {tally.tokens} tokens"
            ),
            soft_wrap=True,
        )
        if tally.failed:
            raise typer.Exit(1)


@contextmanager
def _shown(total: int, done: int, tally: Any) -> Iterator[Any]:
    """A bar on a terminal's standard error; what it gives draws it anew."""
    out = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task("batch", total=total, completed=done, more="")

        def show() -> None:
            more = f"{tally.tokens} tokens" + (f", {tally.failed} errors" if tally.failed else "")
            progress.update(task, completed=done + tally.answered, more=more)

        yield show
