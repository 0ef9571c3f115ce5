"""Options that `serve` and `batch` share, and what they say together: the models, how they are opened, and the cluster."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..backends import BACKENDS
from ..errors import ConfigError, UnsupportedError
from ..export.engine import RUNTIMES
from ..export.manifest import DTYPES
from .shared import ONE_METHOD_HELP, PRESET_NAMES

ModelNames = Annotated[
    list[str] | None, typer.Option(help="NAME=FOLDER or NAME=MODEL: one more, asked for by that name; repeat for several.")
]
Slots = Annotated[
    int | None,
    typer.Option(help="Answers of a model that are decoded together; default: a folder's largest batch, or 8."),
]
MaxTextLen = Annotated[
    int | None, typer.Option(help="Text tokens of the longest prompt; default: a folder's own, 512 of a model.")
]
Processor = Annotated[
    str | None, typer.Option(help="A folder with processor files and a chat template, for models that have none.")
]
MaxNewTokens = Annotated[int | None, typer.Option(help="The most of an answer; default: a folder's own, 256 of a model.")]
ImageHosts = Annotated[
    list[str] | None, typer.Option(help="NAME or NAME:PORT that pictures are fetched from; repeat; default: none.")
]
MaxBodyMib = Annotated[float, typer.Option(help="The most of a request's body, MiB.")]
MaxMegapixels = Annotated[float, typer.Option(help="The most of all pictures of a request, before they are decoded.")]
Retention = Annotated[
    str, typer.Option(help=f"Of models that are no folder of `export`: a published setting ({PRESET_NAMES}), or a share.")
]
Method = Annotated[str | None, typer.Option(help=f"Of these too: {ONE_METHOD_HELP}")]
Backend = Annotated[str, typer.Option(help=f"Of these too: one of {', '.join(BACKENDS)}.")]
ImageSizes = Annotated[
    list[str] | None,
    typer.Option(help="Of these too: WIDTHxHEIGHT of pictures, where a model takes any size; repeat for several."),
]
ImageCounts = Annotated[
    list[int] | None, typer.Option(help="Of these too: pictures of a prompt, default 1; repeat for several counts.")
]
Dtype = Annotated[str, typer.Option(help=f"Of these too: one of {', '.join(DTYPES)}.")]
Runtime = Annotated[
    str | None, typer.Option(help=f"What runs ONNX files: one of {', '.join(RUNTIMES)}; default: {RUNTIMES[0]}.")
]
Verify = Annotated[bool, typer.Option(help="Compare the SHA-256 of every file of a folder first.")]
Replicas = Annotated[int, typer.Option(help="With --ray: processes that hold the models.")]
Cpus = Annotated[float, typer.Option(help="With --ray: CPUs, and threads, of a replica.")]
Gpus = Annotated[float, typer.Option(help="With --ray: GPUs of a replica.")]
RayAddress = Annotated[
    str | None, typer.Option(help="With --ray: the cluster, auto or HOST:PORT; default: this machine alone.")
]

# What means something with --ray alone, and what it is without.
RAY_ALONE: dict[str, Any] = {"replicas": 1, "fronts": 1, "cpus": 1, "gpus": 0, "ray_address": None}


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


def require_extra() -> None:
    """Raises UnsupportedError where what serves is missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(f"serving needs {error.name}, which is missing: pip install 'vitcop-compile[serve]'") from None
