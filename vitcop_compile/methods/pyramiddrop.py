"""PyramidDrop: FastV's score, a share at a time."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from ..layout import Layout
from ..schedule import ModelShape, Stage
from .base import Budgeted, is_count, register, scaled


@register("pyramiddrop")
@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Budgeted):
    """PyramidDrop (arXiv 2410.17247): at the end of each stage of the decoder tokens go, by the attention of the prompt's last
    token in its last layer; what is left of the n tokens before `layers` is n s, n s^2, n s^3. They keep their positions.

    layers: of a decoder of 32, in proportion to other depths. With `tokens` that is what the last stage keeps, and the share s
    follows; with `retention` the share that makes the mean over layers come out. Raises ConfigError for layers that do not
    ascend.
    """

    layers: tuple[int, ...] = (8, 16, 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = isinstance(self.layers, tuple) and all(map(is_count, self.layers))
        if not counts or not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ConfigError(f"{self.name}: layers={self.layers!r} are no decoder layers: choose a tuple that ascends from 1")

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One at each of `layers`. Raises ConfigError for a target that they cannot meet."""
        layers = scaled(self.layers, shape.layers, self.name)
        kept = [self._kept(shape.layers, layers, segment.candidates) for segment in layout]
        return tuple(
            Stage("decoder", layer, "last_attention", tuple(own[i] for own in kept)) for i, layer in enumerate(layers)
        )

    def _kept(self, depth: int, layers: tuple[int, ...], n: int) -> list[int]:
        if self.tokens is not None:
            if self.tokens > n:
                raise ConfigError(
                    f"{self.name}: tokens={self.tokens} exceeds the {n} of a segment: lower it, or set retention"
                )
            share = (self.tokens / n) ** (1 / len(layers))
            return [*(max(self.tokens, round(n * share**i)) for i in range(1, len(layers))), self.tokens]
        assert self.retention is not None
        spans = [stop - start for start, stop in zip((0, *layers), (*layers, depth))]
        if self.retention * depth <= spans[0]:
            raise ConfigError(
                f"{self.name}: retention={self.retention} cannot be met, as the first {spans[0]} of {depth} layers see all: "
                f"choose more than {spans[0] / depth:.4f}, or earlier layers than {self.layers}"
            )
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            mean = sum(span * middle**i for i, span in enumerate(spans)) / depth
            low, high = (middle, high) if mean < self.retention else (low, middle)
        return [max(1, round(n * high**i)) for i in range(1, len(spans))]
