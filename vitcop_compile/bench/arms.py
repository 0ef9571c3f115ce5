"""What is compared: a way to serve a model, as calls that can be timed. One small builder each, in a registry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError, UnsupportedError
from ..host import Host
from ..layout import Layout
from ..schedule import Method
from .timing import Call


@dataclass(frozen=True)
class Request:
    """The request every arm serves: `batch` prompts of so many `images` and `text_tokens`, with room for `new_tokens` more.

    frames: those of a video that stands in place of the images, as the encoder takes them, 0 for none; side: pixels of a side
    of either, where a model takes any.
    """

    batch: int = 1
    text_tokens: int = 64
    new_tokens: int = 64
    images: int = 1
    frames: int = 0
    side: int = 336


@dataclass(frozen=True)
class Arm:
    """One way to serve a request, bound to its inputs.

    stages: calls by name, of "vision" (pixels to projected features), "prefill" (prompt and features to the first logits and
    the KV cache), "decode" (one token on a filled cache), "ttft" (ids and pixels to the first logits, everything included);
    where tokens are put together behind the encoder also of "tower" and "select", which together are "vision". A call changes
    no state, and may compile when it is first made. "vision" returns the features, alone or first of a sequence; those of
    programs a sequence, "prefill", "decode" and "ttft" one that starts with logits [B, 1, vocab]; on CUDA the next call may
    write over them.
    attention: the kernel of each stage's attention, in words; selection: what the arm's selection alone takes, None where
    nothing is selected or it cannot be taken apart.
    """

    stages: dict[str, Call]
    attention: dict[str, str] = field(default_factory=dict)
    selection: Call | None = None


# build(model, config, request) -> Arm; `config` is dense for an arm that does not prune.
Build = Callable[[PreTrainedModel, Method, Request], Arm]
ARMS: dict[str, Build] = {}


def register(name: str) -> Callable[[Build], Build]:
    """Adds a builder under `name`."""

    def add(build: Build) -> Build:
        ARMS[name] = build
        return build

    return add


def build(name: str, model: PreTrainedModel, config: Method, request: Request) -> Arm:
    """The arm `name`. Raises ConfigError, listing the known ones, for any other."""
    if name not in ARMS:
        raise ConfigError(f"arm {name!r} is unknown: use one of {', '.join(ARMS)}")
    return ARMS[name](model, config, request)


def begin_step(device: torch.device) -> None:
    """Lets CUDA graphs write over what earlier calls returned, whoever holds it; to be called before a compiled program."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


def layouts(host: Host, request: Request) -> list[Layout]:
    """Those of the images of each prompt, or of its video. Raises UnsupportedError for a model that takes no such video, or
    whose images are tiles that differ: what is compared would depend on the image."""
    if host.inputs != ("pixel_values",) and "image_grid_thw" not in host.inputs:
        raise UnsupportedError("a model that cuts images into tiles is not measured here: choose another family")
    layout = host.layout_of(request.side, request.side)
    if not request.frames:
        return [layout] * request.images
    if "pixel_values_videos" not in host.inputs:
        raise UnsupportedError(f"frames={request.frames}: this family takes frames as images, ask for so many of these")
    return [tuple(replace(segment, kind="video") for segment in layout) * request.frames]


def inputs(model: Any, request: Request) -> dict[str, Any]:
    """What a processor makes of the request, on the model's device: `input_ids` int64 [B, T] with an image behind each of the
    first tokens, random `pixel_values` or `pixel_values_videos`, and what else the model takes of them.

    Raises UnsupportedError as `layouts` does.
    """
    from ..families import family_of

    host = family_of(model).host
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, min(200, host.shape.vocab), (request.batch, request.text_tokens), generator=generator)
    text[torch.isin(text, torch.tensor(host.token_ids))] = 3
    token, each = host.token_ids[-1 if request.frames else 0], layouts(host, request)
    columns = []
    for place, layout in enumerate(each):
        tokens = sum(segment.tokens for segment in layout)
        columns += [text[:, place : place + 1], torch.full((request.batch, tokens), token)]
    ids = torch.cat((*columns, text[:, len(each) :]), 1)
    given: dict[str, Any] = {"input_ids": ids}
    rows, grids = request.batch * len(each), "image_grid_thw" in host.inputs
    if grids:
        side = math.isqrt(host.shape.group)
        grid = (len(each[0]), *(side * count for count in each[0][0].grid[1:]))
        given["video_grid_thw" if request.frames else "image_grid_thw"] = torch.tensor([grid] * rows)
        given["mm_token_type_ids"] = (ids == token).int() * (2 if request.frames else 1)
        rows *= math.prod(grid)
    pixels = torch.randn(rows, *host.pixel_shape, generator=generator).to(model.dtype)
    given["pixel_values_videos" if request.frames else "pixel_values"] = pixels
    return {name: value.to(model.device) for name, value in given.items()}
