"""A folder of engines, or a model, opened behind a scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from ..config import DEFAULT_PRESET, ViTCoPConfig
from ..errors import ConfigError, UnsupportedError
from ..export import EngineModel
from ..export.manifest import DTYPES, NAME
from ..families.registry import host_of
from ..host import Host
from ..layout import Layout
from ..pipeline import optimize
from ..schedule import Method
from .door import Served
from .prompts import Prompts
from .requests import Scheduler

# Of a model that is no folder, which has none of its own.
NEW_TOKENS = 256
SLOTS = 8


class Facts(NamedTuple):
    """What whoever makes a model's inputs and reads its tokens has to know of it. inputs: names of what it takes beside
    `input_ids`; token_ids: that stand for pictures; ends: that end an answer; slots: answers decoded together."""

    inputs: tuple[str, ...]
    token_ids: tuple[int, ...]
    max_new_tokens: int
    ends: frozenset[int]
    slots: int

    def served(self, name: str, scheduler: Scheduler, processor: Any, queue: int | None) -> Served:
        """The model behind a scheduler, which may be elsewhere."""
        prompts = Prompts(processor, self.inputs, self.token_ids)
        return Served(name, scheduler, prompts, self.max_new_tokens, self.ends, queue)


@dataclass(frozen=True)
class Opening:
    """How models are opened. slots: answers that are decoded together, by default a folder's largest batch, or SLOTS; queue:
    prompts that wait for one; max_text_len, max_new_tokens: tokens of a prompt's text and of an answer, by default a folder's
    own, 512 and NEW_TOKENS; runtime, verify: of folders, as `EngineModel.from_pretrained` has them.

    Of models that are no folder of engines: settings, backend and dtype, as `optimize` has them; image_sizes: (height, width)
    of pictures, where a model takes any; images: numbers of them in a prompt. Raises ConfigError for numbers below 1 and an
    unknown dtype.
    """

    slots: int | None = None
    queue: int = 64
    max_text_len: int | None = None
    max_new_tokens: int | None = None
    runtime: str | None = None
    verify: bool = True
    settings: Method = field(default_factory=lambda: ViTCoPConfig.preset(DEFAULT_PRESET))
    backend: str = "inductor"
    dtype: str = "float32"
    image_sizes: Sequence[tuple[int, int]] = ()
    images: Sequence[int] = (1,)

    def __post_init__(self) -> None:
        for name in ("slots", "queue", "max_text_len", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is below 1: give 1 or more")
        if min(self.images, default=0) < 1:
            raise ConfigError(f"images={tuple(self.images)}: text needs none of them, ask for 1 or more")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")

    def check(self, source: str) -> None:
        """Raises VitcopError for what can be refused before weights are read: no folder, no model, pictures of no size."""
        if is_folder(source):
            return
        if source.startswith((".", "/", "~")) and not Path(source).is_dir():
            raise UnsupportedError(
                f"{source} is not a folder: give one that export wrote, one of a model, or a name on the hub"
            )
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise _cannot_load(source, error) from None
        self._layouts(host_of(config))

    def open(self, name: str, source: str, processor: Any) -> Served:
        """A model behind a scheduler of its own. Raises VitcopError for what cannot be opened or has no room for that."""
        scheduler, facts = self.scheduler(source)
        return facts.served(name, scheduler, processor, self.queue)

    def scheduler(self, source: str, warm: bool = False) -> tuple[Scheduler, Facts]:
        """A scheduler of a model, and what is known of it. warm: whether every program is made and run first. Raises as
        `open`."""
        from .scheduler import SlotScheduler
        from .slots import Slots

        own: dict[str, Any] = {}
        model: Any
        if is_folder(source):
            model = EngineModel.from_pretrained(source, verify=self.verify, runtime=self.runtime)
            host, most = model.engines.host, model.manifest.max_new_tokens
            slots = self.slots or max(model.manifest.batch_sizes)
            if self.max_new_tokens is not None and self.max_new_tokens > most:
                raise ConfigError(
                    f"max_new_tokens={self.max_new_tokens} exceeds {most}, what {source} was exported for: ask for fewer"
                )
        else:
            model = self._optimized(source)
            host, most, slots = model.host, NEW_TOKENS, self.slots or SLOTS
            own = {"max_new_tokens": self.max_new_tokens or most, "layouts": self._layouts(host)}
        room = Slots(model, slots, text_tokens=self.max_text_len, **own)
        if warm:
            room.warmup()
        ends = frozenset(ends_of(model.generation_config))
        facts = Facts(tuple(host.inputs), tuple(host.token_ids), self.max_new_tokens or most, ends, slots)
        return SlotScheduler(room, most_queued=self.queue), facts

    def _optimized(self, source: str) -> Any:
        try:
            loaded: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, self.dtype))
        except (OSError, ValueError, ImportError) as error:
            raise _cannot_load(source, error) from None
        return optimize(loaded.eval(), self.settings, backend=self.backend)

    def _layouts(self, host: Host) -> list[list[Layout]] | None:
        """What prompts may hold beside text; None: an image, as the model takes them all."""
        if not self.image_sizes and not host.fixed:
            raise ConfigError(
                "the model takes pictures of any size, and slots have room for some: say which, --image-size WIDTHxHEIGHT"
            )
        if not self.image_sizes and tuple(self.images) == (1,):
            return None
        sizes = self.image_sizes or [(1, 1)]  # of a picture that any size is made to be
        return [[host.layout_of(*size, images=count)] * count for size in sizes for count in self.images]


def is_folder(source: str) -> bool:
    """Whether it is what `export` wrote."""
    return (Path(source) / NAME).is_file()


def ends_of(config: Any) -> tuple[int, ...]:
    """Token ids by which answers end, of a GenerationConfig."""
    ends = config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def _cannot_load(source: str, error: Exception) -> UnsupportedError:
    return UnsupportedError(f"{source} cannot be loaded: {str(error).splitlines()[0]}")
