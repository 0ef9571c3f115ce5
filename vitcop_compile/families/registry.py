"""The registry of model families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedError
from ..host import Host
from ..isolation import shell
from ..layout import Layout
from ..quantised import plain_weights
from ..schedule import ModelShape


@dataclass(frozen=True)
class Frames:
    """The encoder that frames of videos go through where they have their own, as in `Family`; layout: that of a frame, which
    is an image beside others, and one input."""

    patches: nn.Module
    encoder: nn.Module
    layout: Layout


@dataclass(frozen=True)
class Family:
    """The stock parts of one model, as callables over its own parameters. C: encoder width, D: decoder width.

    host: what the runtime knows of its images. patches(pixels [B, channels, height, width]) -> [B, prefix + patches, C]: the
    encoder's input tokens. encoder([B, t, C]) -> [B, t, C]: all encoder layers; the passes cut it at `shape.feature_layer`. Of
    images of any size patches and encoder also take real bool [B, t] and the host's `tables` [B, t, ...] of every slot.
    projector([B, n, C]), or of groups [B, n, group, C], -> [B, n, D]. embedding(ids [B, t]) -> [B, t, D], which also knows the
    id behind the vocabulary where images have protected tokens, such as line breaks, that no encoder makes; decoder(embeddings
    [B, t, D], positions [dims, B, t] [, marks int64 [B, 2, 1, t], where the shape says so]) -> [B, t, D]; head([B, t, D]) ->
    [B, t, vocab]. frames: the encoder of videos, None where they have none of their own.
    """

    host: Host
    patches: nn.Module
    encoder: nn.Module
    projector: nn.Module
    embedding: nn.Module
    decoder: nn.Module
    head: nn.Module
    frames: Frames | None = None

    @property
    def shape(self) -> ModelShape:
        """The model's numbers."""
        return self.host.shape

    @property
    def example(self) -> Tensor:
        """A parameter of the type and device that the model computes in: none of those that a quantised weight consists of."""
        return next(value for name, value in self.decoder.named_parameters() if "parametrizations" not in name)

    @property
    def image_token_id(self) -> int:
        """That of an image's placeholders."""
        return self.host.token_id

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Of one input of the encoder."""
        return self.host.pixel_shape


@dataclass(frozen=True)
class Entry:
    """host: from a config alone, with the size of its weights' type if that is known better; parts: from a model."""

    host: Callable[..., Host]
    parts: Callable[[PreTrainedModel], Family]


FAMILIES: dict[str, Entry] = {}


def register(architecture: str, host: Callable[..., Host], parts: Callable[[Any], Family]) -> None:
    """Adds a family under the class name of its transformers model."""
    FAMILIES[architecture] = Entry(host, parts)


def family_of(model: PreTrainedModel) -> Family:
    """The parts of a `shell` of `model`. Raises UnsupportedError, naming the supported classes, for any other model."""
    entry = FAMILIES.get(type(model).__name__)
    if entry is None:
        raise UnsupportedError(f"{type(model).__name__} is not a supported model: use one of {', '.join(sorted(FAMILIES))}")
    return entry.parts(plain_weights(shell(model)))


def shape_of(config: PretrainedConfig) -> ModelShape:
    """The shape of the model that `config` describes. Raises UnsupportedError as `family_of` does."""
    return host_of(config).shape


def host_of(config: PretrainedConfig) -> Host:
    """What the runtime knows of the images of the model that `config` describes. Raises UnsupportedError as `family_of`
    does."""
    names = config.architectures or [f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name].host(config)
    raise UnsupportedError(f"{', '.join(names)} is not a supported model: use one of {', '.join(sorted(FAMILIES))}")


def causal(language: nn.Module) -> Call:
    """A stock decoder whose positions are one number, behind its embedding and before its head."""
    return Call(
        lambda m, x, positions: m.model(inputs_embeds=x, position_ids=positions[0], use_cache=False).last_hidden_state,
        model=language,
    )


class Call(nn.Module):
    """A module around a function of tensors, holding the modules, parameters and buffers it uses so that export finds them."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor):
        super().__init__()
        self._function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: torch.Tensor) -> Tensor:
        return self._function(self, *inputs)
