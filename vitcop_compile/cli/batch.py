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

from ..backends import BACKENDS
from ..config import DEFAULT_PRESET
from ..export.engine import RUNTIMES
from ..export.manifest import DTYPES
from .serve import cluster_of, named_sources, refuse_ray_alone, require_extra
from .shared import ONE_METHOD_HELP, PRESET_NAMES, console, errors_as_lines, image_size_of, without_future_warnings


def batch_command(
    model: Annotated[
        str, typer.Argument(help="What `export` wrote, or a model, a folder or on the hub; its name is the folder's.")
    ],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help="Requests, a line each, in OpenAI's batch format.")],
    output: Annotated[
        Path, typer.Argument(help="Answers, a line each as they come; those that it holds already are not made again.")
    ],
    model_name: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER or NAME=MODEL: one more, asked for by that name; repeat for several.")
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(help="Answers of a model that are decoded together; default: a folder's largest batch, or 8."),
    ] = None,
    max_text_len: Annotated[
        int | None, typer.Option(help="Text tokens of the longest prompt; default: a folder's own, 512 of a model.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The most of an answer; default: a folder's own, 256 of a model.")
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="A folder with processor files and a chat template, for models that have none.")
    ] = None,
    image_hosts: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:PORT that pictures are fetched from; repeat; default: none.")
    ] = None,
    max_body_mib: Annotated[float, typer.Option(help="The most of a request's body, MiB.")] = 20,
    max_megapixels: Annotated[
        float, typer.Option(help="The most of all pictures of a request, before they are decoded.")
    ] = 40,
    retention: Annotated[
        str, typer.Option(help=f"Of models that are no folder of `export`: a published setting ({PRESET_NAMES}), or a share.")
    ] = DEFAULT_PRESET,
    method: Annotated[str | None, typer.Option(help=f"Of these too: {ONE_METHOD_HELP}")] = None,
    backend: Annotated[str, typer.Option(help=f"Of these too: one of {', '.join(BACKENDS)}.")] = "inductor",
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="Of these too: WIDTHxHEIGHT of pictures, where a model takes any size; repeat for several."),
    ] = None,
    images: Annotated[
        list[int] | None, typer.Option(help="Of these too: pictures of a prompt, default 1; repeat for several counts.")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of these too: one of {', '.join(DTYPES)}.")] = "float32",
    runtime: Annotated[
        str | None, typer.Option(help=f"What runs ONNX files: one of {', '.join(RUNTIMES)}; default: {RUNTIMES[0]}.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the SHA-256 of every file of a folder first.")] = True,
    ray: Annotated[bool, typer.Option("--ray", help="By Ray Data, see docs/ray.md.")] = False,
    replicas: Annotated[int, typer.Option(help="With --ray: processes that hold the models.")] = 1,
    cpus: Annotated[float, typer.Option(help="With --ray: CPUs, and threads, of a replica.")] = 1,
    gpus: Annotated[float, typer.Option(help="With --ray: GPUs of a replica.")] = 0,
    ray_address: Annotated[
        str | None, typer.Option(help="With --ray: the cluster, auto or HOST:PORT; default: this machine alone.")
    ] = None,
) -> None:
    """Answer a file of requests into another, a line each; the same command again goes on where it was stopped."""
    with errors_as_lines(), without_future_warnings():
        require_extra()
        from ..serve.batch import Output, Tally, answering, lines_of, open_door, run

        if not ray:
            refuse_ray_alone(replicas=replicas, cpus=cpus, gpus=gpus, ray_address=ray_address)
        cluster = cluster_of(
            {
                "models": named_sources(model, model_name or []),
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
