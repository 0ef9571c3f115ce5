"""What to prune: the user's side of a schedule. Pure numbers, no tensors."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError
from .schedule import ModelShape, Schedule, resolve

FORMAT_VERSION = 2
REFERENCE_LAYERS = 32
_REFERENCE_PAIR = (2, 22)
_LARGEST = 2**53

# ViTCoP, table of settings: name -> (vision_ratio, center_ratio, retention).
PRESETS: dict[str, tuple[float, float, float]] = {
    "1/3": (0.5, 0.18, 0.3333),
    "2/9": (0.4, 0.15, 0.2222),
    "1/9": (0.3, 0.12, 0.1111),
}
# Of `optimize` without a config, and of every command.
DEFAULT_PRESET = "1/9"


@dataclass(frozen=True)
class Budgets:
    """Explicit token counts per image: what each stage keeps.

    vision: tokens leaving the vision encoder; shallow, deep: tokens leaving the two decoder stages;
    centers: clusters of the vision stage (None: from `center_ratio`).
    """

    vision: int
    shallow: int
    deep: int
    centers: int | None = None


@dataclass(frozen=True)
class ViTCoPConfig:
    """Settings of ViTCoP (arXiv 2601.17818).

    vision_ratio: share of the patches kept by the vision stage, (0, 1].
    center_ratio: share of the kept tokens that become cluster centers, (0, 1].
    retention: overall target: mean visual tokens over all decoder layers / patches, (0, 1].
    vision_layer: encoder layer whose CLS attention scores the patches; negative counts from the end.
    shallow_layer, deep_layer: decoder layers before which tokens are merged and dropped (0-based). The defaults are
        stated for 32 layers and are scaled to the model's depth; any other pair is taken as it is.
    scale_layers: True / False forces or forbids that scaling; None decides as described.
    deep_divisor: deep budget = round(shallow budget / deep_divisor).
    positions: "published": after the deep stage a token's position is its index in the sequence that enters that stage, as
        in the published code; "original": every token keeps the position it entered the language model with.
    density_width, reach: kernel width and spatial reach (in units of the image side) of the density-peaks clustering.
    mean_tokens: overall target as mean visual tokens per layer, in place of `retention`.
    budgets: explicit token counts per stage, in place of any target; a tuple is read as Budgets(*tuple).
    prune: False keeps every token (the dense baseline through the same compiler).

    Raises ConfigError for values out of range.
    """

    vision_ratio: float = 0.5
    center_ratio: float = 0.18
    retention: float | None = None
    vision_layer: int = -2
    shallow_layer: int = 2
    deep_layer: int = 22
    deep_divisor: float = 5
    positions: Literal["published", "original"] = "published"
    density_width: float = 8.0
    reach: float = 0.6
    mean_tokens: float | None = None
    budgets: Budgets | None = None
    scale_layers: bool | None = None
    prune: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.budgets, tuple | list):
            if not 3 <= len(self.budgets) <= 4:
                raise ConfigError(f"budgets={self.budgets} is not (vision, shallow, deep) or (vision, shallow, deep, centers)")
            object.__setattr__(self, "budgets", Budgets(*self.budgets))
        if not isinstance(self.budgets, Budgets | None):
            raise ConfigError(f"budgets={self.budgets!r} is not a Budgets: pass (vision, shallow, deep)")
        if not isinstance(self.prune, bool) or not isinstance(self.scale_layers, bool | None):
            raise ConfigError(f"prune={self.prune!r} and scale_layers={self.scale_layers!r} are True or False (or None)")
        targets = [name for name in ("retention", "mean_tokens", "budgets") if getattr(self, name) is not None]
        if self.prune and len(targets) != 1:
            raise ConfigError(
                f"exactly one target is needed, got {targets or 'none'}: set one of retention, mean_tokens, budgets"
            )
        _ratio("vision_ratio", self.vision_ratio)
        _ratio("center_ratio", self.center_ratio)
        if self.retention is not None:
            _ratio("retention", self.retention)
        if self.mean_tokens is not None:
            _positive("mean_tokens", self.mean_tokens)
        for name in ("deep_divisor", "density_width", "reach"):
            _positive(name, getattr(self, name))
        for name in ("vision_layer", "shallow_layer", "deep_layer"):
            _integer(name, getattr(self, name))
        if self.deep_divisor < 1:
            raise ConfigError(f"deep_divisor={self.deep_divisor} is below 1: the deep stage cannot keep more tokens")
        if self.positions not in ("published", "original"):
            raise ConfigError(f"positions={self.positions!r} is unknown: use 'published' or 'original'")
        if self.shallow_layer < 1:
            raise ConfigError(f"shallow_layer={self.shallow_layer} is below 1: layer 0 has no keys before it to score")
        if self.shallow_layer >= self.deep_layer:
            raise ConfigError(
                f"shallow_layer={self.shallow_layer} is not before deep_layer={self.deep_layer}: choose shallow < deep"
            )
        if self.budgets is not None:
            _check_budgets(self.budgets)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ViTCoPConfig:
        """The published setting `name` ("1/3", "2/9" or "1/9" of the visual tokens), with `overrides` applied."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown: use one of {', '.join(PRESETS)}")
        vision, center, retention = PRESETS[name]
        values: dict[str, Any] = {"vision_ratio": vision, "center_ratio": center}
        if not {"mean_tokens", "budgets"} & overrides.keys():
            values["retention"] = retention
        return cls(**(values | overrides))

    @classmethod
    def for_mean_tokens(cls, mean_tokens: float, **overrides: Any) -> ViTCoPConfig:
        """A target of `mean_tokens` visual tokens, mean over layers, with the ratios of the nearest preset.

        The published targets 192, 128 and 64 are those of 576 patches.
        """
        _positive("mean_tokens", mean_tokens)
        nearest = min(PRESETS.values(), key=lambda preset: abs(preset[2] * 576 - mean_tokens))
        return cls(**({"vision_ratio": nearest[0], "center_ratio": nearest[1], "mean_tokens": mean_tokens} | overrides))

    @classmethod
    def dense(cls) -> ViTCoPConfig:
        """No pruning: the baseline, through the same capture and the same lowering."""
        return cls(prune=False)

    def layers(self, decoder_layers: int) -> tuple[int, int]:
        """(shallow, deep) for a decoder of `decoder_layers` layers. Raises ConfigError if they do not fit."""
        shallow, deep = self.shallow_layer, self.deep_layer
        scale = self.scale_layers
        if scale is None:
            scale = (shallow, deep) == _REFERENCE_PAIR
        if scale and decoder_layers != REFERENCE_LAYERS:
            if decoder_layers < 3:
                raise ConfigError(f"a decoder of {decoder_layers} layers has no room for two stages: 3 are needed")
            shallow = min(max(1, round(shallow * decoder_layers / REFERENCE_LAYERS)), decoder_layers - 2)
            deep = min(max(shallow + 1, round(deep * decoder_layers / REFERENCE_LAYERS)), decoder_layers - 1)
        if deep >= decoder_layers:
            raise ConfigError(
                f"deep_layer={deep} is out of range for {decoder_layers} decoder layers: choose at most "
                f"{decoder_layers - 1}, or leave both layers at their defaults to have them scaled"
            )
        return shallow, deep

    def schedule(self, shape: ModelShape | None = None, *, text_tokens: int = 64) -> Schedule:
        """Tokens, KV rows and FLOPs on a model of `shape` (None: LLaVA-1.5-7B). Raises ConfigError if not possible."""
        return resolve(self, shape or ModelShape(), text_tokens)

    def to_json(self) -> str:
        """A versioned JSON text; `from_json` gives back an equal config."""
        return json.dumps({"version": FORMAT_VERSION} | dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> ViTCoPConfig:
        """Inverse of `to_json`. Raises ConfigError for another version, unknown fields or values out of range."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"not a JSON text: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"a config is a JSON object, got {type(values).__name__}")
        version = values.pop("version", None)
        if version != FORMAT_VERSION:
            raise ConfigError(f"config version {version!r} cannot be read: this package reads {FORMAT_VERSION}")
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"unknown config fields {sorted(unknown)}: remove them or upgrade vitcop-compile")
        if values.get("budgets") is not None:
            try:
                values["budgets"] = Budgets(**values["budgets"])
            except TypeError as error:
                raise ConfigError(f"budgets: {error}") from None
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes `to_json()` to `path`, aside first and then moved into place."""
        target = Path(path)
        aside = target.with_name(target.name + ".partial")
        aside.write_text(self.to_json() + "\n")
        aside.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> ViTCoPConfig:
        """Reads a file written by `save`."""
        return cls.from_json(Path(path).read_text())


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ConfigError(f"{name}={value!r} is not a finite number")
    return value


def _ratio(name: str, value: object) -> None:
    if not 0 < _number(name, value) <= 1:
        raise ConfigError(f"{name}={value} is out of range: choose a ratio in (0, 1]")


def _positive(name: str, value: object) -> None:
    if _number(name, value) <= 0:
        raise ConfigError(f"{name}={value} is not positive")


def _integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is not an integer")


def _check_budgets(budgets: Budgets) -> None:
    for name in ("vision", "shallow", "deep"):
        _integer(f"budgets.{name}", getattr(budgets, name))
        if getattr(budgets, name) < 1:
            raise ConfigError(f"budgets.{name}={getattr(budgets, name)} is below 1: every stage keeps a token")
    if budgets.centers is not None:
        _integer("budgets.centers", budgets.centers)
        if not 1 <= budgets.centers <= budgets.vision:
            raise ConfigError(f"budgets.centers={budgets.centers} is out of range: choose 1 to {budgets.vision}")
    if not budgets.vision >= budgets.shallow >= budgets.deep:
        raise ConfigError(
            f"budgets {budgets.vision}, {budgets.shallow}, {budgets.deep} grow: no stage can keep more tokens than it "
            "receives; choose vision >= shallow >= deep"
        )
