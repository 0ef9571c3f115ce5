"""What methods share: a registry by name, budgets, layers in proportion to a model's depth, and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from ..config import REFERENCE_LAYERS, ViTCoPConfig
from ..errors import ConfigError
from ..layout import Layout
from ..schedule import Method, ModelShape, Schedule, resolve

VERSION = 1
METHODS: dict[str, type[Budgeted]] = {}
# name -> what makes a method of the fields of its `to_json`.
READERS: dict[str, Callable[[dict[str, Any]], Method]] = {}
_Kind = TypeVar("_Kind", bound="type[Budgeted]")


def register(name: str) -> Callable[[_Kind], _Kind]:
    """Adds a method under `name`, by which commands and files call it."""

    def add(kind: _Kind) -> _Kind:
        kind.name = name
        METHODS[name], READERS[name] = kind, kind.of
        return kind

    return add


@dataclass(frozen=True, kw_only=True)
class Budgeted:
    """Settings that all methods beside ViTCoP have: exactly one target.

    tokens: what the method's last stage keeps of a segment of the layout, such as an image; retention: mean visual tokens over
    all decoder layers, as a share of the unpruned ones, (0, 1]: what `ViTCoPConfig.retention` is, so that methods can be
    compared. Raises ConfigError for values out of range."""

    name: ClassVar[str]
    tokens: int | None = None
    retention: float | None = None

    def __post_init__(self) -> None:
        if (self.tokens is None) == (self.retention is None):
            raise ConfigError(f"{self.name}: exactly one target is needed, set tokens or retention")
        if self.tokens is not None and not is_count(self.tokens):
            raise ConfigError(f"{self.name}: tokens={self.tokens!r} is not a count of 1 or more")
        if self.retention is not None and not (is_number(self.retention, 0, 1) and self.retention > 0):
            raise ConfigError(f"{self.name}: retention={self.retention!r} is out of range: choose a ratio in (0, 1]")

    def budgets(self, shape: ModelShape, layout: Layout, first: int = 0) -> tuple[int, ...]:
        """What each segment keeps from decoder layer `first` on, whose layers before see all. Raises ConfigError where that
        cannot be met."""
        return tuple(
            self._budget(shape.layers, segment.candidates, first, shape.multiple if not first else 1) for segment in layout
        )

    def _budget(self, layers: int, candidates: int, first: int, multiple: int) -> int:
        if self.tokens is not None:
            if self.tokens > candidates:
                raise ConfigError(
                    f"{self.name}: tokens={self.tokens} exceeds the {candidates} of a segment: lower it, or set retention"
                )
            return self.tokens
        assert self.retention is not None
        # The mean over layers: the first ones see all of them.
        kept = round((self.retention * layers - first) / (layers - first) * candidates)
        if kept < 1:
            least = (first + (layers - first) / candidates) / layers
            raise ConfigError(
                f"{self.name}: retention={self.retention} leaves {kept} of {candidates} tokens, as the first {first} of "
                f"{layers} layers see all: choose more than {least:.4f}, or an earlier layer"
            )
        return min(candidates, -(-kept // multiple) * multiple)

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Any, ...]:
        """As `Method.stages`."""
        raise NotImplementedError

    def schedule(self, shape: ModelShape | None = None, layout: Layout | None = None) -> Schedule:
        """As `ViTCoPConfig.schedule`."""
        shape = shape or ModelShape()
        return resolve(self, shape, (shape.image,) if layout is None else layout)

    def to_json(self) -> str:
        """A versioned JSON text; `method_of` gives back an equal method."""
        return json.dumps({"method": self.name, "version": VERSION} | dataclasses.asdict(self), indent=2)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From the fields of `to_json`. Raises ConfigError for unknown ones and values out of range."""
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"{cls.name}: unknown settings {sorted(unknown)}: remove them or upgrade vitcop-compile")
        settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**settings)


def method_of(text: str) -> Method:
    """The method that a JSON text of `to_json` describes. Raises ConfigError."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not a JSON text: {error}") from None
    if not isinstance(values, dict):
        return ViTCoPConfig.from_json(text)
    values.pop("evidence", None)  # of what `tune` writes
    if "method" not in values:
        return ViTCoPConfig.from_json(json.dumps(values))
    name, version = values.pop("method"), values.pop("version", None)
    if name not in READERS:
        raise ConfigError(f"method {name!r} is unknown: use one of vitcop, {', '.join(READERS)}")
    if version != VERSION:
        raise ConfigError(f"{name}: version {version!r} cannot be read: this package reads {VERSION}")
    return READERS[name](values)


def load_method(path: str | Path) -> Method:
    """Reads a file that holds what `to_json` says. Raises ConfigError."""
    return method_of(Path(path).read_text())


def scaled(layers: tuple[int, ...], depth: int, names: str) -> tuple[int, ...]:
    """Decoder layers stated for a model of 32, in proportion to one of `depth`, each behind the one before. Raises ConfigError
    for a model that is too shallow for all."""
    found: list[int] = []
    for layer in layers:
        own = layer if depth == REFERENCE_LAYERS else round(layer * depth / REFERENCE_LAYERS)
        found.append(max(own, found[-1] + 1 if found else 1))
    if found and found[-1] >= depth:
        raise ConfigError(f"{names}: layers {tuple(found)} do not fit a decoder of {depth}: choose fewer")
    return tuple(found)


def at_layer(layer: int, depth: int, name: str, least: int = 1) -> int:
    """A decoder layer before which tokens go, by what the layer before says if `least` is 1. Raises ConfigError if the model
    has none such."""
    if not is_count(layer, least) or layer >= depth:
        raise ConfigError(f"{name}: layer={layer!r} is out of range for {depth} decoder layers: choose {least} to {depth - 1}")
    return layer


def is_count(value: Any, least: int = 1) -> bool:
    """Whether a value is a whole number, `least` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any, low: float, high: float = math.inf) -> bool:
    """Whether a value is a number of low to high."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def check_count(name: str, field: str, value: Any, least: int = 1) -> None:
    """Raises ConfigError for anything but a whole number, `least` or more."""
    if not is_count(value, least):
        raise ConfigError(f"{name}: {field}={value!r} is no whole number of {least} or more: choose one")


def scoring_layer(shape: ModelShape) -> int:
    """The encoder layer that methods score patches by: the last but one, or the last before it in which patches attend to
    their whole image."""
    layer = min(shape.vision_layers - 2, shape.feature_layer)
    scored = shape.scored_layers
    return max((i for i in scored if i <= layer), default=scored[0]) if scored else max(layer, 0)


def in_encoder(shape: ModelShape) -> str:
    """Where a stage before the projector stands."""
    return "merge" if shape.packed else "encoder"


def placing(shape: ModelShape) -> str:
    """Positions of what a stage before the decoder keeps: anew where a position is one number, as published code does."""
    return "kept" if shape.position_dims > 1 else "index"
