"""The file a check compares with: settings, environment, and the facts and timed measures of every subject; and where the
compiled models of its subjects come from."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NotRequired

import torch
from pydantic import AfterValidator, Field, ValidationError, model_validator, with_config
from pydantic.dataclasses import dataclass
from transformers import AutoModelForImageTextToText, PreTrainedModel
from typing_extensions import TypedDict

from .. import store
from ..backends import backend_of
from ..bench import Request, Shape, environment, stored
from ..bench.stored import STRICT
from ..config import DEFAULT_PRESET, ViTCoPConfig
from ..errors import ConfigError, UnsupportedError
from ..optimized import OptimizedModel
from ..pipeline import optimize
from . import cuda
from .compare import Measure, Timing, flatten

FORMAT: Final = 1
# build(config, backend) -> a fresh model, none of whose programs is compiled yet.
Build = Callable[[ViTCoPConfig, str], OptimizedModel]
Source = PreTrainedModel | Build | None

TOY, GIVEN = "toy", "given"
_SIZES = ("hidden", "layers", "vision_hidden", "vision_layers")
Width = Annotated[int, Field(ge=64, multiple_of=64)]  # of heads
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Settings:
    """The subjects of a baseline, one for every preset, and the rounds of each timing.

    model: "toy", a random LLaVA of the four sizes; "given", a model or builder that the caller hands in; or a LLaVA-1.5 folder
    or model on the hub, loaded in float32. The sizes are None for all but "toy". batch: prompts per call; text_tokens and
    new_tokens: of each prompt; rounds: interleaved rounds of one timing; cuda: architectures, of `cuda.ARCHITECTURES`, for
    which code is generated, built and counted without a device. Raises pydantic's ValidationError, a ValueError, for values
    out of range and for a backend that is unknown or cannot work here.
    """

    model: str = TOY
    hidden: Width | None = 512
    layers: Annotated[int, Field(ge=3)] | None = 8
    vision_hidden: Width | None = 256
    vision_layers: Annotated[int, Field(ge=2)] | None = 4
    presets: Annotated[tuple[str, ...], Field(min_length=1)] = (DEFAULT_PRESET,)
    backend: str = "inductor"
    batch: Count = 1
    text_tokens: Count = 64
    new_tokens: Count = 64
    rounds: Count = 9
    cuda: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Settings:
        unsized = [name for name, size in self.sizes.items() if size is None]
        if unsized and self.model == TOY:
            raise ValueError(f"the random model has no {', '.join(unsized)}")
        if len(set(self.presets)) != len(self.presets):
            raise ValueError(f"presets={', '.join(self.presets)}: name each setting to measure once")
        for preset in self.presets:
            ViTCoPConfig.preset(preset)
        backend_of(self.backend)
        unknown = [name for name in self.cuda if name not in cuda.ARCHITECTURES]
        if unknown or len(set(self.cuda)) != len(self.cuda):
            raise ValueError(f"cuda={', '.join(self.cuda)}: name architectures once, of {', '.join(cuda.ARCHITECTURES)}")
        if self.cuda and self.model == GIVEN:
            raise ValueError(
                "cuda: code for a fake device is generated in another process, which cannot build a model handed in"
            )
        return self

    @property
    def sizes(self) -> dict[str, Any]:
        """Those of the random model."""
        return {name: getattr(self, name) for name in _SIZES}

    def of(self, source: Source) -> Settings:
        """The settings of a `source` that is handed in, which is no random model; these, for None."""
        unsized: Any = {"model": GIVEN, **dict.fromkeys(_SIZES)}
        return self if source is None or self.model != TOY else dataclasses.replace(self, **unsized)

    @property
    def request(self) -> Request:
        """The request that every subject serves."""
        return Request(self.batch, self.text_tokens, self.new_tokens)


@with_config(STRICT)
class Environment(TypedDict):
    """What facts and timings depend on."""

    processor: str
    threads: int
    torch: str
    transformers: str
    device: str
    triton: NotRequired[str]


@dataclass(frozen=True, config=STRICT)
class Record:
    """Facts and timed measures of one subject; no timed measures where only facts were stored."""

    facts: Annotated[dict[str, Any], AfterValidator(lambda facts: flatten(facts) and facts)]  # integers, or refused
    timed: dict[Measure, Timing]


@dataclass(frozen=True, config=STRICT)
class Baseline:
    """shape: `ModelShape` as JSON has it; subjects: by preset."""

    format: Literal[1]
    settings: Settings
    environment: Environment
    shape: dict[str, Any]
    subjects: dict[str, Record]

    @model_validator(mode="after")
    def _check(self) -> Baseline:
        if self.subjects.keys() != set(self.settings.presets):
            raise ValueError(f"its subjects are not its presets, {', '.join(self.settings.presets)}")
        return self


def settings_of(base: Settings, options: dict[str, Any]) -> Settings:
    """`base` with the `options` that are not None in their place. Raises ConfigError for values out of range."""
    given = {name: value for name, value in options.items() if value is not None}
    model = given.get("model", base.model)
    sizes = sorted(given.keys() & set(_SIZES))
    if model != TOY:
        if sizes:
            raise ConfigError(f"{', '.join(sizes)} were given with model={model!r}: sizes are for the random model alone")
        given |= dict.fromkeys(_SIZES)
    elif base.model != TOY:
        given = Settings().sizes | given
    try:
        return dataclasses.replace(base, **given)
    except ValidationError as error:
        raise ConfigError(stored.said(error)) from None


def builder(source: Source, settings: Settings) -> Build:
    """How to make a compiled model of the subject. Raises UnsupportedError for a model that cannot be loaded."""
    if settings.model == GIVEN and source is None:
        raise ConfigError("this baseline is of a model that was handed in: call regress.check(model, baseline) instead")
    if source is not None and not isinstance(source, PreTrainedModel):
        return source
    model = source if source is not None else _load(settings)

    def build(config: ViTCoPConfig, backend: str) -> OptimizedModel:
        with store.off():  # graphs and kernels are counted as they are compiled
            return optimize(model, config, backend=backend)

    return build


def _load(settings: Settings) -> PreTrainedModel:
    if settings.model == TOY:
        return Shape(**settings.sizes).model()
    try:
        return AutoModelForImageTextToText.from_pretrained(settings.model, dtype=torch.float32).eval()
    except (OSError, ValueError, ImportError) as error:
        raise UnsupportedError(f"--model {settings.model} cannot be loaded: {str(error).splitlines()[0]}") from None


def here(device: torch.device) -> Environment:
    """The environment that facts and timings of a model on `device` depend on."""
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    found = environment() | {"device": f"{device.type} {name}", "triton": cuda.triton()}
    return {key: found[key] for key in Environment.__annotations__}  # type: ignore[return-value]


def versions(environment: Environment) -> str:
    """Torch and transformers; builds of one torch version trace alike."""
    return f"torch {environment['torch'].split('+')[0]}, transformers {environment['transformers']}"


def toolchain(environment: Environment) -> str:
    """What code for CUDA depends on."""
    return f"{versions(environment)}, triton {environment.get('triton', 'none')}"


def machine(environment: Environment) -> str:
    """What timings depend on."""
    return f"{environment['processor']}, {environment['threads']} threads, {environment['device']}"


def save(baseline: Baseline, path: Path) -> None:
    """Writes the file, aside first and then moved into place. Raises ConfigError."""
    text = json.dumps(dataclasses.asdict(baseline), indent=2) + "\n"
    stored.save(path, lambda aside: aside.write_text(text), ConfigError)


def load(path: Path) -> Baseline:
    """Reads what `save` wrote. Raises ConfigError for a missing file, another format, or numbers out of range."""
    if not path.exists():
        raise ConfigError(f"the baseline {path} does not exist: measure one with --update")
    return stored.load(path, Baseline, ConfigError, "remove it and measure one anew with --update")
