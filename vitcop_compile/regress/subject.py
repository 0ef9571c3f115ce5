"""What a baseline is about: the settings it is measured under, and where its compiled models come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..backends import backend_of
from ..bench import Request
from ..bench.stored import STRICT, said
from ..config import DEFAULT_PRESET, ViTCoPConfig
from ..errors import ConfigError, UnsupportedError
from ..optimized import OptimizedModel
from ..pipeline import optimize
from ..toy import small_llava

# build(config, backend) -> a fresh model, none of whose programs is compiled yet.
Build = Callable[[ViTCoPConfig, str], OptimizedModel]
Source = PreTrainedModel | Build | None

TOY, GIVEN = "toy", "given"
_SIZES = ("hidden", "layers", "vision_hidden", "vision_layers")
_HEAD = 64
Width = Annotated[int, Field(ge=_HEAD, multiple_of=_HEAD)]  # of heads
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class Settings:
    """The subjects of a baseline, one for every preset, and the rounds of each timing.

    model: "toy", a random LLaVA of the four sizes; "given", a model or builder that the caller hands in; or a LLaVA-1.5 folder
    or model on the hub, loaded in float32. The sizes are None for all but "toy". batch: prompts per call; text_tokens and
    new_tokens: of each prompt; rounds: interleaved rounds of one timing. Raises pydantic's ValidationError, a ValueError, for
    values out of range and for a backend that is unknown or cannot work here.
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

    @model_validator(mode="after")
    def _check(self) -> Settings:
        unsized = [name for name in _SIZES if getattr(self, name) is None]
        if unsized and self.model == TOY:
            raise ValueError(f"the random model has no {', '.join(unsized)}")
        if len(set(self.presets)) != len(self.presets):
            raise ValueError(f"presets={', '.join(self.presets)}: name each setting to measure once")
        for preset in self.presets:
            ViTCoPConfig.preset(preset)
        backend_of(self.backend)
        return self

    @property
    def request(self) -> Request:
        """The request that every subject serves."""
        return Request(self.batch, self.text_tokens, self.new_tokens)


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
        given = {name: getattr(Settings(), name) for name in _SIZES} | given
    try:
        return dataclasses.replace(base, **given)
    except ValidationError as error:
        raise ConfigError(said(error)) from None


def builder(source: Source, settings: Settings) -> Build:
    """How to make a compiled model of the subject. Raises UnsupportedError for a model that cannot be loaded."""
    if settings.model == GIVEN and source is None:
        raise ConfigError("this baseline is of a model that was handed in: call regress.check(model, baseline) instead")
    if source is not None and not isinstance(source, PreTrainedModel):
        return source
    model = source if source is not None else _load(settings)
    return lambda config, backend: optimize(model, config, backend=backend)


def _load(settings: Settings) -> PreTrainedModel:
    if settings.model != TOY:
        try:
            return AutoModelForImageTextToText.from_pretrained(settings.model, dtype=torch.float32).eval()
        except (OSError, ValueError, ImportError) as error:
            raise UnsupportedError(f"--model {settings.model} cannot be loaded: {str(error).splitlines()[0]}") from None
    hidden, layers, width, depth = (getattr(settings, name) for name in _SIZES)
    return small_llava(
        hidden=hidden,
        layers=layers,
        heads=hidden // _HEAD,
        intermediate=-(-hidden * 8 // 3 // _HEAD) * _HEAD,
        vision_hidden=width,
        vision_layers=depth,
        vision_heads=width // _HEAD,
    )
