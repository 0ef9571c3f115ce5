"""The registry of model families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedError
from ..isolation import shell
from ..schedule import ModelShape


@dataclass(frozen=True)
class Family:
    """The stock parts of one model, as callables over its own parameters. C: encoder width, D: decoder width.

    patches(pixels [B, channels, height, width]) -> [B, prefix + patches, C]: the encoder's input tokens.
    encoder([B, t, C]) -> [B, t, C]: all encoder layers; the passes cut it at `shape.feature_layer`.
    projector([B, n, C]) -> [B, n, D].
    embedding(ids [B, t]) -> [B, t, D]; decoder(embeddings [B, t, D], positions [dims, B, t]) -> [B, t, D];
    head([B, t, D]) -> [B, t, vocab]. position_dims: coordinates of a position.
    """

    shape: ModelShape
    image_token_id: int
    pixel_shape: tuple[int, int, int]
    patches: nn.Module
    encoder: nn.Module
    projector: nn.Module
    embedding: nn.Module
    decoder: nn.Module
    head: nn.Module
    position_dims: int = 1


@dataclass(frozen=True)
class Entry:
    """shape: from a config alone; parts: from a model."""

    shape: Callable[[PretrainedConfig], ModelShape]
    parts: Callable[[PreTrainedModel], Family]


FAMILIES: dict[str, Entry] = {}


def register(architecture: str, shape: Callable, parts: Callable) -> None:
    """Adds a family under the class name of its transformers model."""
    FAMILIES[architecture] = Entry(shape, parts)


def family_of(model: PreTrainedModel) -> Family:
    """The parts of a `shell` of `model`. Raises UnsupportedError, naming the supported classes, for any other model."""
    entry = FAMILIES.get(type(model).__name__)
    if entry is None:
        raise UnsupportedError(f"{type(model).__name__} is not a supported model: use one of {', '.join(sorted(FAMILIES))}")
    return entry.parts(shell(model))


def shape_of(config: PretrainedConfig) -> ModelShape:
    """The shape of the model that `config` describes. Raises UnsupportedError as `family_of` does."""
    names = config.architectures or [f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"]
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name].shape(config)
    raise UnsupportedError(f"{', '.join(names)} is not a supported model: use one of {', '.join(sorted(FAMILIES))}")


class Call(nn.Module):
    """A module around a function of tensors, holding the modules it uses so that export finds their parameters."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module):
        super().__init__()
        self._function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *inputs: torch.Tensor) -> Tensor:
        return self._function(self, *inputs)
