"""What slots have room for, and every check of a request against it: on the caller's thread, before anything runs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..host import Images, blank_words
from ..layout import Layout
from ..optimized import PROMPT_BUCKETS
from ..prompt import check_ids, check_length, check_mask, finite, read, refuse_pixels
from ..provider import Ask, bucket
from ..runtime import CompiledModel
from ..schedule import Schedule
from ..turn import Turn, positions_of
from .features import Picture, pictures_of
from .requests import Sampling

_CPU = torch.device("cpu")


class Room(NamedTuple):
    """text: text tokens of the longest prompt; rows: of the caches of every slot, by group of layers; buckets: text rows of
    the programs, () where the provider says them; batches: prompts that go through prefill together, ascending; asked: the
    batch that a plan is asked for; layouts: what prompts may hold beside text, as the room was made for."""

    text: int
    rows: tuple[int, ...]
    buckets: tuple[int, ...]
    batches: tuple[int, ...]
    asked: int
    layouts: tuple[tuple[Layout, ...], ...]


class Request(NamedTuple):
    """A prompt that was read and checked. ids: int64 [1, T], without pads; turn: as the runtime has it, of one sample;
    pictures: what its images are called in the cache of features; text_tokens, image_tokens: of the prompt."""

    ids: Tensor
    turn: Turn
    pictures: tuple[Picture, ...]
    text_tokens: int
    image_tokens: int

    @property
    def schedule(self) -> Schedule:
        """What its programs follow."""
        return self.turn.schedules[0]

    @property
    def key(self) -> tuple[Any, ...]:
        """Requests with equal ones go through the same prefill program."""
        return (self.schedule.key, self.turn.text)


def room_of(
    model: CompiledModel,
    slots: int,
    text_tokens: int | None,
    max_new_tokens: int | None,
    layouts: Sequence[Sequence[Layout]] | None,
    batches: Sequence[int],
) -> Room:
    """What `slots` slots of `model` have room for, see `Slots`. Raises ConfigError for what its programs cannot be."""
    for name, value in (("slots", slots), ("text_tokens", text_tokens), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: pass 1 or more")
    if not batches or min(batches) < 1:
        raise ConfigError(f"prefill_batches={tuple(batches)}: pass numbers of prompts, each 1 or more")
    if model.device.type == "meta":
        raise ConfigError("the weights are on the meta device, which holds no values: load the model to serve it")
    fitting = sorted({size for size in batches if size <= slots})
    manifest = getattr(model, "manifest", None)  # of an engine folder
    if manifest is None:
        asked = Ask(1, text_tokens or 512, 0, None)
        text = model.provider.plan(asked).text
        prompts = _prompts(model, layouts)
        schedules = [model.schedule_of(tuple(itertools.chain(*images))) for images in ((), *prompts)]
        visual = map(max, zip(*(schedule.group_tokens() for schedule in schedules), strict=True))
        rows = tuple(text + tokens + (max_new_tokens or 256) for tokens in visual)
        return Room(text, rows, (), tuple(fitting) or (1,), 1, prompts)
    if slots not in manifest.batch_sizes:
        known = " or ".join(map(str, manifest.batch_sizes))
        raise ConfigError(
            f"slots={slots}: the folder decodes {known} sequences at a time; choose one of these, or export again with "
            f"batch_size={(*manifest.batch_sizes, slots)}"
        )
    given = {"max_new_tokens": max_new_tokens, "layouts": layouts}
    if named := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(named)}: an engine folder says that itself; leave it out, or export again")
    if text_tokens is not None and text_tokens > manifest.max_text_len:
        raise ConfigError(f"text_tokens={text_tokens} exceeds max_text_len={manifest.max_text_len} of the folder")
    text, least = text_tokens or manifest.max_text_len, manifest.batch_sizes[0]
    own = () if manifest.prompt_buckets else (*(size for size in PROMPT_BUCKETS if size < text), text)
    # A program takes fewer than it was made for as well, at the price of all.
    known_batches = tuple(size for size in fitting if size in manifest.batch_sizes) or (least,)
    return Room(text, manifest.cache_rows, own, known_batches, least, manifest.layouts)


def _prompts(model: CompiledModel, layouts: Sequence[Sequence[Layout]] | None) -> tuple[tuple[Layout, ...], ...]:
    """What the prompts that slots are made for hold beside text: by default one image, where images have one size."""
    host = model.provider.host
    if layouts is None and not host.fixed:
        raise ConfigError(
            "images have any size, and slots have room for some: say which by layouts=, such as "
            "[[model.layout_of(height, width)]] for prompts with one image, or what model.layouts_of(**inputs) says"
        )
    return ((host.layout,),) if layouts is None else tuple(tuple(tuple(image) for image in images) for images in layouts)


def examine(model: CompiledModel, room: Room, slots: int, inputs: Mapping[str, Any], sampling: Sampling) -> Request:
    """A prompt as the programs take it. Raises InputError for what they cannot take, and for what slots have no room for."""
    provider, host = model.provider, model.provider.host
    known = {"input_ids", "attention_mask", *host.inputs}
    if unknown := sorted(name for name, value in inputs.items() if value is not None and name not in known):
        raise InputError(f"{', '.join(unknown)} cannot be used with a compiled model: pass {', '.join(sorted(known))}")
    given = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    ids = check_ids(given.get("input_ids"), _CPU)
    if ids.shape[0] != 1:
        raise InputError(f"input_ids has shape {tuple(ids.shape)}: submit prompts one by one, [1, tokens]")
    if sampling.n > slots:
        raise InputError(f"n={sampling.n} answers, there are {slots} slots: ask for fewer")
    real = check_mask(given.get("attention_mask"), ids)
    said = {host.inputs[0]: None} | {name: given[name] for name in host.inputs if name in given}
    images = said[host.inputs[0]]
    if not isinstance(images, Images):
        seen = any(value is not None for name, value in said.items() if name.startswith("pixel_values"))
        images = host.read(said, ids, _CPU, model.dtype) if seen else None
    fixed = sum(segment.tokens for segment in host.layout) if host.fixed else None
    reading = read(ids, real, host.token_ids, host.shape.vocab, () if images is None else images.layouts, fixed)
    if images is not None:
        refuse_pixels(finite(images.pixels))
    (layout,), (text,) = reading.layouts, reading.text
    schedule = provider.schedule_of(layout)
    positions = taken = None
    if images is not None and schedule.placed:
        positions, taken = positions_of(host, reading, images.about)
    reach = text + schedule.image_tokens
    check_length(schedule.shape, (reach, reach if taken is None else int(taken[0])), sampling.max_new_tokens)
    padded = _fit(model, room, text, schedule, sampling.max_new_tokens, reading.images[0])
    turn = Turn(images, reading, (schedule,), padded, False, 1, positions, taken)
    pictures = () if images is None else pictures_of(images, schedule)
    words = torch.from_numpy(reading.words[reading.real])[None]
    return Request(words, turn, pictures, text, int(reading.placeholder.sum()))


def blanks(model: CompiledModel, room: Room, slots: int) -> Iterator[Request]:
    """A request for every prefill program of a batch: of each text bucket, with the images of each of the room's layouts, and
    with none."""
    host, most = model.provider.host, 0
    while most < room.text:
        most = _text_rows(model, room, most + 1, model.schedule_of(()), 1, 0)
        for images in ((), *room.layouts):
            inputs: dict[str, Any] = {"input_ids": torch.tensor([blank_words(host, images, min(most, room.text))])}
            if images:
                inputs[host.inputs[0]] = host.blank(images, _CPU, model.dtype)
            yield examine(model, room, slots, inputs, Sampling(max_new_tokens=1))


def _fit(model: CompiledModel, room: Room, text: int, schedule: Schedule, new: int, images: int) -> int:
    """Text rows of the programs that take a prompt. Raises InputError where there are none, or no room in a slot."""
    visual = schedule.group_tokens()
    if text > room.text:
        raise InputError(f"{text} text tokens in a prompt exceed the {room.text} that slots are made for: shorten it")
    rows = _text_rows(model, room, text, schedule, new, images)
    needed = [max(rows, text + new) + tokens for tokens in visual]  # pads are written too, and new tokens over them
    if any(count > most for count, most in zip(needed, room.rows, strict=True)):
        raise InputError(
            f"{text} text tokens, {visual[0]} visual ones and {new} new ones need {needed} rows by group of layers, slots "
            f"have {list(room.rows)}: shorten the prompt, lower max_new_tokens, or make slots with more room"
        )
    return rows


def _text_rows(model: CompiledModel, room: Room, text: int, schedule: Schedule, new: int, images: int) -> int:
    """Text rows of the programs that take so much text. Raises InputError where the provider has none for the prompt."""
    ask = Ask(room.asked, text, images, new, (), (), schedule.group_tokens(), (schedule.layout,))
    rows = model.provider.plan(ask).text
    return bucket(text, room.buckets, "text tokens in a prompt") if room.buckets else rows
