"""What is compared: a way to serve a model, as calls that can be timed. One small builder each, in a registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import ViTCoPConfig
from ..errors import ConfigError, UnsupportedError
from .timing import Call


@dataclass(frozen=True)
class Request:
    """The request every arm serves: `batch` prompts of one image and `text_tokens`, with room for `new_tokens` more."""

    batch: int = 1
    text_tokens: int = 64
    new_tokens: int = 64


@dataclass(frozen=True)
class Arm:
    """One way to serve a request, bound to its inputs.

    stages: calls by name, of "vision" (pixels to projected features), "prefill" (prompt and features to the first logits and
    the KV cache), "decode" (one token on a filled cache), "ttft" (ids and pixels to the first logits, everything included).
    A call changes no state, and may compile when it is first made. "vision" returns the features, alone or first of a
    sequence; the others a sequence that starts with logits [B, 1, vocab]; on CUDA the next call may write over them.
    attention: the kernel of each stage's attention, in words; selection: what the arm's selection alone takes, None where
    nothing is selected or it cannot be taken apart.
    """

    stages: dict[str, Call]
    attention: dict[str, str] = field(default_factory=dict)
    selection: Call | None = None


# build(model, config, request) -> Arm; `config` is dense for an arm that does not prune.
Build = Callable[[PreTrainedModel, ViTCoPConfig, Request], Arm]
ARMS: dict[str, Build] = {}


def register(name: str) -> Callable[[Build], Build]:
    """Adds a builder under `name`."""

    def add(build: Build) -> Build:
        ARMS[name] = build
        return build

    return add


def build(name: str, model: PreTrainedModel, config: ViTCoPConfig, request: Request) -> Arm:
    """The arm `name`. Raises ConfigError, listing the known ones, for any other."""
    if name not in ARMS:
        raise ConfigError(f"arm {name!r} is unknown: use one of {', '.join(ARMS)}")
    return ARMS[name](model, config, request)


def begin_step(device: torch.device) -> None:
    """Lets CUDA graphs write over what earlier calls returned, whoever holds it; to be called before a compiled program."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


def inputs(model: Any, request: Request) -> dict[str, Any]:
    """`input_ids` int64 [B, T] with one image behind the first token, and random `pixel_values`, on the model's device.

    Raises UnsupportedError for a model whose images differ in their tokens: what is compared would depend on the image.
    """
    from ..families import family_of

    family = family_of(model)
    if family.shape.packed:
        raise UnsupportedError(
            f"{type(model).__name__} puts images together behind its encoder, and is not measured here: use a LLaVA-1.5"
        )
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, min(200, family.shape.vocab), (request.batch, request.text_tokens), generator=generator)
    text[text == family.image_token_id] = 3
    image = torch.full((request.batch, family.shape.image.tokens), family.image_token_id)
    pixels = torch.randn(request.batch, *family.pixel_shape, generator=generator)
    ids = torch.cat((text[:, :1], image, text[:, 1:]), 1)
    return {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device, model.dtype)}
