"""A request without programs: which ones it would ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .host import Host
from .layout import Layout
from .programs import Programs
from .provider import Ask, Plan
from .schedule import Schedule, Stage


class Rehearsal:
    """A `provider.Provider` whose programs return zeros, and indices from 0 on, of the shapes that schedules say.

    asked: (name of the method, its arguments), each once, in order.
    """

    def __init__(self, provider: Any, programs: Programs):
        self._provider, self._programs = provider, programs
        self.device, self.dtype, self.position_dims = provider.device, provider.dtype, provider.position_dims
        self.asked: list[tuple[str, tuple]] = []

    @property
    def host(self) -> Host:
        """As the provider has it."""
        return self._provider.host

    @property
    def schedule(self) -> Schedule:
        """As the provider has it."""
        return self._provider.schedule

    def schedule_of(self, layout: Layout) -> Schedule:
        """As the provider has it."""
        return self._provider.schedule_of(layout)

    def plan(self, ask: Ask) -> Plan:
        """As the provider has it."""
        return self._provider.plan(ask)

    def vision(self, images: int) -> Callable[..., Any]:
        """Features, and what is kept of each image."""
        return self._note("vision", (images,), lambda: self._seen(images, self.schedule))

    def frames(self, frames: int) -> Callable[..., Any]:
        """As `vision`."""
        own = self._programs.family.frames
        assert own is not None
        return self._note("frames", (frames,), lambda: self._seen(frames, self.schedule_of(own.layout)))

    def tower(self, tiles: int, slots: int) -> Callable[..., Any]:
        """Patches alone: only `select` looks at them."""
        return self._note("tower", (tiles, slots), lambda: (self._zeros(tiles, slots, 1),))

    def select(
        self, tiles: int, slots: int, segments: int, candidates: int, taps: int, stage: Stage | None, axes: int = 2
    ) -> Callable[..., Any]:
        """Features, and what is kept of each segment."""
        tokens = candidates if stage is None else stage.total

        def answer() -> tuple[Tensor, ...]:
            features = self._zeros(segments, tokens, self.schedule.shape.feature_width)
            return (features, *([] if stage is None else self._chosen(segments, tokens)))

        return self._note("select", (tiles, slots, segments, candidates, taps, stage, axes), answer)

    def prefill(
        self, batch: int, text: int, schedule: Schedule, rows: Sequence[int], filled: bool = False
    ) -> Callable[..., Any]:
        """Logits, and what each stage keeps."""

        def answer() -> tuple[Tensor, ...]:
            return (self._logits(batch), *(self._index(batch, stage.total) for stage in schedule.decoder_stages))

        return self._note("prefill", (batch, text, schedule, tuple(rows), filled), answer)

    def extend(self, batch: int, tokens: int, rows: Sequence[int]) -> Callable[..., Any]:
        """Logits."""
        return self._note("extend", (batch, tokens, tuple(rows)), lambda: (self._logits(batch),))

    def _note(self, name: str, arguments: tuple, answer: Callable[[], tuple[Tensor, ...]]) -> Callable[..., Any]:
        if (name, arguments) not in self.asked:
            self.asked.append((name, arguments))
        return lambda *_: answer()

    def _seen(self, images: int, schedule: Schedule) -> tuple[Tensor, ...]:
        tokens = schedule.image_tokens
        features = self._zeros(images, tokens + schedule.lead, schedule.shape.feature_width)
        return (features, *(self._chosen(images, tokens) if schedule.vision_stages else []))

    def _chosen(self, rows: int, tokens: int) -> list[Tensor]:
        """What is kept, and the state of the vision stage."""
        return [self._index(rows, tokens)] * (1 + self._programs.states)

    def _logits(self, batch: int) -> Tensor:
        return self._zeros(batch, 1, self.schedule.shape.vocab)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _index(self, rows: int, tokens: int) -> Tensor:
        return torch.arange(tokens, device=self.device).repeat(rows, 1)
