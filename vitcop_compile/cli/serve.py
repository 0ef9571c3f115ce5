"""The command `serve`: models behind an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..backends import BACKENDS
from ..config import DEFAULT_PRESET
from ..errors import ConfigError, UnsupportedError
from ..export.engine import RUNTIMES
from ..export.manifest import DTYPES
from .shared import ONE_METHOD_HELP, PRESET_NAMES, console, errors_as_lines, image_size_of, without_future_warnings

# What means something with --ray alone, and what it is without.
RAY_ALONE: dict[str, Any] = {"replicas": 1, "fronts": 1, "cpus": 1, "gpus": 0, "ray_address": None}


def serve_command(
    model: Annotated[
        str | None, typer.Argument(help="What `export` wrote, or a model, a folder or on the hub; its name is the folder's.")
    ] = None,
    model_name: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER or NAME=MODEL: one more, asked for by that name; repeat for several.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; anybody who reaches it may ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.")] = 8000,
    slots: Annotated[
        int | None,
        typer.Option(help="Answers of a model that are decoded together; default: a folder's largest batch, or 8."),
    ] = None,
    queue: Annotated[int, typer.Option(help="Prompts that wait for a slot, of each model; more are refused, 429.")] = 64,
    max_text_len: Annotated[
        int | None, typer.Option(help="Text tokens of the longest prompt; default: a folder's own, 512 of a model.")
    ] = None,
    processor: Annotated[
        str | None, typer.Option(help="A folder with processor files and a chat template, for models that have none.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The most of an answer; default: a folder's own, 256 of a model.")
    ] = None,
    image_hosts: Annotated[
        list[str] | None, typer.Option(help="NAME or NAME:PORT that pictures are fetched from; repeat; default: none.")
    ] = None,
    max_body_mib: Annotated[float, typer.Option(help="The most of a request's body, MiB.")] = 20,
    max_megapixels: Annotated[
        float, typer.Option(help="The most of all pictures of a request, before they are decoded.")
    ] = 40,
    drain_seconds: Annotated[float, typer.Option(help="After SIGTERM, how long admitted requests may take.")] = 60,
    stalled_seconds: Annotated[float, typer.Option(help="Without a step, after which /health is 503.")] = 60,
    access_log: Annotated[bool, typer.Option(help="A line for every request.")] = False,
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
    ray: Annotated[bool, typer.Option("--ray", help="As an application of Ray Serve, see docs/ray.md.")] = False,
    replicas: Annotated[int, typer.Option(help="With --ray: processes that hold the models.")] = 1,
    fronts: Annotated[int, typer.Option(help="With --ray: processes that speak HTTP and decode pictures.")] = 1,
    cpus: Annotated[float, typer.Option(help="With --ray: CPUs, and threads, of a replica.")] = 1,
    gpus: Annotated[float, typer.Option(help="With --ray: GPUs of a replica.")] = 0,
    ray_address: Annotated[
        str | None, typer.Option(help="With --ray: the cluster, auto or HOST:PORT; default: this machine alone.")
    ] = None,
) -> None:
    """Serve models by OpenAI's API: chat, pictures, streams, and continuous batching."""
    with errors_as_lines(), without_future_warnings():
        require_extra()
        if not ray:
            refuse_ray_alone(replicas=replicas, fronts=fronts, cpus=cpus, gpus=gpus, ray_address=ray_address)
        elif access_log:
            raise ConfigError("--access-log is uvicorn's: with --ray, Serve's own log has a line for every request")
        if not drain_seconds >= 0:
            raise ConfigError(f"--drain-seconds {drain_seconds} is below 0: give 0 or more")
        cluster = cluster_of(
            {
                "models": named_sources(model, model_name or []), "replicas": replicas, "fronts": fronts, "cpus": cpus,
                "gpus": gpus, "processor": processor, "slots": slots, "queue": queue, "max_text_len": max_text_len,
                "max_new_tokens": max_new_tokens, "image_hosts": image_hosts or [], "max_body_mib": max_body_mib,
                "max_megapixels": max_megapixels, "drain_seconds": drain_seconds, "stalled_seconds": stalled_seconds,
                "retention": retention, "method": method, "backend": backend, "images": images or [1], "dtype": dtype,
                "image_sizes": [image_size_of(text) for text in image_size or ()], "runtime": runtime, "verify": verify,
            }
        )  # fmt: skip
        from ..serve.door import Door
        from ..serve.prompts import load_processor
        from ..serve.server import Server, bound, url_of

        opening, limits = cluster.opening(), cluster.limits()
        # Whatever can be refused before gigabytes are read.
        for source in cluster.models.values():
            opening.check(source)
        processors = {name: load_processor(cluster.processor_of(name)) for name in cluster.models}
        if ray:
            return _serve_by_ray(cluster, host, port, ray_address)
        with bound(host, port) as held:
            served = [opening.open(name, source, processors[name]) for name, source in cluster.models.items()]

            def ready() -> None:
                names = ", ".join(f"{one.name} (answers to {one.max_new_tokens} tokens)" for one in served)
                most = f"{queue} prompts waiting, bodies to {max_body_mib:g} MiB, pictures to {max_megapixels:g} megapixels"
                console().print(Text(f"{url_of(held)}/v1: {names}; {most}"), soft_wrap=True)

            Server(Door(served, limits), drain_seconds, access_log, ready).run(sockets=[held])


def named_sources(model: str | None, names: Sequence[str]) -> dict[str, str]:
    """Folders and models by the names that they are asked for. Raises ConfigError for none, and for two of one name."""
    found: list[tuple[str, str]] = []
    if model is not None:
        found.append((Path(model).name or Path(model).resolve().name, model))
    for text in names:
        name, equals, source = text.partition("=")
        if not equals or not name.strip() or not source:
            raise ConfigError(f"--model-name {text!r} is not NAME=FOLDER, such as llava-1_9=engines/llava-1_9")
        found.append((name.strip(), source))
    if not found:
        raise ConfigError("nothing to serve: name a folder or a model, or several with --model-name NAME=FOLDER")
    twice = {name for name, _ in found if [other for other, _ in found].count(name) > 1}
    if twice:
        raise ConfigError(f"two models are named {min(twice)}: give each a name of its own, --model-name NAME=FOLDER")
    return dict(found)


def refuse_ray_alone(**given: Any) -> None:
    """Raises ConfigError for options that mean something with --ray alone."""
    if wrong := [name for name, value in given.items() if value != RAY_ALONE[name]]:
        raise ConfigError(f"--{wrong[0].replace('_', '-')} is of a cluster: add --ray, or leave it out")


def cluster_of(values: dict[str, Any]) -> Any:
    """A `serve.cluster.Cluster`. Raises ConfigError for what it cannot be."""
    from pydantic import ValidationError

    from ..serve.cluster import Cluster

    try:
        return Cluster(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        raise ConfigError(f"--{name.replace('_', '-')} {values.get(name)}: {first['msg']}") from None


def _serve_by_ray(cluster: Any, host: str, port: int, address: str | None) -> None:
    from ..serve.server import bound, url_of

    with bound(host, port) as held:
        url, port = url_of(held), held.getsockname()[1]
    from ..serve.ray_app import serve_until_signal

    def ready() -> None:
        names = ", ".join(cluster.models)
        console().print(Text(f"{url}/v1: {names}; {cluster.replicas} replicas"), soft_wrap=True)

    serve_until_signal(cluster, host, port, address, ready)


def require_extra() -> None:
    """Raises UnsupportedError where what serves is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"serving needs {error.name}, which is missing: pip install 'vitcop-compile[serve]'") from None
