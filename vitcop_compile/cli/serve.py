"""The command `serve`: models behind an HTTP server that speaks OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text

from ..config import DEFAULT_PRESET
from ..errors import ConfigError
from . import serving_options as options
from .shared import console, errors_as_lines, image_size_of, without_future_warnings


def serve_command(
    model: Annotated[
        str | None, typer.Argument(help="What `export` wrote, or a model, a folder or on the hub; its name is the folder's.")
    ] = None,
    model_name: options.ModelNames = None,
    host: Annotated[str, typer.Option(help="Address to listen at; anybody who reaches it may ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0: a free one.")] = 8000,
    slots: options.Slots = None,
    queue: Annotated[int, typer.Option(help="Prompts that wait for a slot, of each model; more are refused, 429.")] = 64,
    max_text_len: options.MaxTextLen = None,
    processor: options.Processor = None,
    max_new_tokens: options.MaxNewTokens = None,
    image_hosts: options.ImageHosts = None,
    max_body_mib: options.MaxBodyMib = 20,
    max_megapixels: options.MaxMegapixels = 40,
    drain_seconds: Annotated[float, typer.Option(help="After SIGTERM, how long admitted requests may take.")] = 60,
    stalled_seconds: Annotated[float, typer.Option(help="Without a step, after which /health is 503.")] = 60,
    access_log: Annotated[bool, typer.Option(help="A line for every request.")] = False,
    retention: options.Retention = DEFAULT_PRESET,
    method: options.Method = None,
    backend: options.Backend = "inductor",
    image_size: options.ImageSizes = None,
    images: options.ImageCounts = None,
    dtype: options.Dtype = "float32",
    runtime: options.Runtime = None,
    verify: options.Verify = True,
    ray: Annotated[bool, typer.Option("--ray", help="As an application of Ray Serve, see docs/ray.md.")] = False,
    replicas: options.Replicas = 1,
    fronts: Annotated[int, typer.Option(help="With --ray: processes that speak HTTP and decode pictures.")] = 1,
    cpus: options.Cpus = 1,
    gpus: options.Gpus = 0,
    ray_address: options.RayAddress = None,
) -> None:
    """Serve models by OpenAI's API: chat, pictures, streams, and continuous batching."""
    with errors_as_lines(), without_future_warnings():
        options.require_extra()
        if not ray:
            options.refuse_ray_alone(replicas=replicas, fronts=fronts, cpus=cpus, gpus=gpus, ray_address=ray_address)
        elif access_log:
            raise ConfigError("--access-log is uvicorn's: with --ray, Serve's own log has a line for every request")
        if not drain_seconds >= 0:
            raise ConfigError(f"--drain-seconds {drain_seconds} is below 0: give 0 or more")
        cluster = options.cluster_of(
            {
                "models": options.named_sources(model, model_name or []), "replicas": replicas, "fronts": fronts, "cpus": cpus,
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


def _serve_by_ray(cluster: Any, host: str, port: int, address: str | None) -> None:
    from ..serve.server import bound, url_of

    with bound(host, port) as held:
        url, port = url_of(held), held.getsockname()[1]
    from ..serve.ray_app import serve_until_signal

    def ready() -> None:
        names = ", ".join(cluster.models)
        console().print(Text(f"{url}/v1: {names}; {cluster.replicas} replicas"), soft_wrap=True)

    serve_until_signal(cluster, host, port, address, ready)
