"""What to prune: the user's side of a schedule. Pure numbers, no tensors."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError
from .layout import Layout, Segment
from .schedule import ModelShape, Schedule, Stage, resolve

FORMAT_VERSION = 2
REFERENCE_LAYERS = 32
_REFERENCE_PAIR = (2, 22)
_PUBLISHED_VISION_LAYER = -2
_LARGEST = 2**53

# ViTCoP, table of settings: name -> (vision_ratio, center_ratio, retention).
PRESETS: dict[str, tuple[float, float, float]] = {
    "1/3": (0.5, 0.18, 0.3333),
    "2/9": (0.4, 0.15, 0.2222),
    "1/9": (0.3, 0.12, 0.1111),
}
# The same, but the vision stage keeps 1.6 times as many and the decoder's stages so many fewer that the mean is as published:
# at one ninth it kept more on both models that were measured (docs/fidelity.md). "1/9-wide" takes five layers or more.
WIDE_PRESETS = {f"{name}-wide": (round(1.6 * v, 4), p, r) for name, (v, p, r) in PRESETS.items()}
NAMED_PRESETS = PRESETS | WIDE_PRESETS
# What the vision stage may keep of a clip whose frames share a budget: all pairs are compared, which takes 64 MiB at 1,024,
# 180 MiB at 2,048 and 630 MiB at 4,096, and seconds of a core.
CLIP_TOKENS = 4096
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
        stated for 32 layers and are scaled to the model's depth, and moved behind the layers in which a model adds features
        of its encoder; any other pair is taken as it is.
    scale_layers: True / False forces or forbids that scaling; None decides as described.
    deep_divisor: deep budget = round(shallow budget / deep_divisor).
    positions: "published": after the deep stage a token's position is its index in the sequence that enters that stage, as
        in the published code; "original": every token keeps the position it entered the language model with. None is
        "published" where a position is one number, and "original" elsewhere.
    keys: whose norms score tokens in the decoder: "rotated", as attention meets them (the published code), "raw", before
        rotation and norms of heads, "centered", raw without the mean of their segment. None is what suits the family.
    density_width, reach: kernel width and spatial reach (in units of the image side) of the density-peaks clustering.
    merge: "published": tokens that merge become one of them plus the mean of all, about twice as long as others, as in the
        published code; "mean": their mean.
    mean_tokens: overall target as mean visual tokens per layer, in place of `retention`.
    budgets: explicit token counts per stage, in place of any target; a tuple is read as Budgets(*tuple). They are those of a
        segment of the layout: of an image, or of an image's overview and its tiles each.
    prune: False keeps every token (the dense baseline through the same compiler).
    scope: whose budgets the decoder's are: "per_image", every image of a prompt has its own; "pooled", the images of a prompt
        share one for all their tokens, as in the published code. With one image it is the same.
    clips: whose budgets the frames of a video have: "per_frame", its own each; "pooled", those of the clip, which is then one
        segment: one selection among all frames, clusters near each other in time as in space, counts of `budgets` and
        `mean_tokens` those of the clip. All pairs of what the vision stage keeps are compared, so it keeps no more than
        `CLIP_TOKENS` of a clip.

    Raises ConfigError for values out of range.
    """

    vision_ratio: float = 0.5
    center_ratio: float = 0.18
    retention: float | None = None
    vision_layer: int = _PUBLISHED_VISION_LAYER
    shallow_layer: int = 2
    deep_layer: int = 22
    deep_divisor: float = 5
    positions: Literal["published", "original"] | None = None
    keys: Literal["rotated", "raw", "centered"] | None = None
    density_width: float = 8.0
    reach: float = 0.6
    mean_tokens: float | None = None
    budgets: Budgets | None = None
    scale_layers: bool | None = None
    prune: bool = True
    scope: Literal["per_image", "pooled"] = "per_image"
    clips: Literal["per_frame", "pooled"] = "per_frame"
    merge: Literal["published", "mean"] = "published"

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
        if self.keys not in (None, "rotated", "raw", "centered"):
            raise ConfigError(f"keys={self.keys!r} is unknown: use 'rotated', 'raw' or 'centered'")
        if self.positions not in (None, "published", "original"):
            raise ConfigError(f"positions={self.positions!r} is unknown: use 'published' or 'original'")
        if self.scope not in ("per_image", "pooled"):
            raise ConfigError(f"scope={self.scope!r} is unknown: use 'per_image' or 'pooled'")
        if self.clips not in ("per_frame", "pooled"):
            raise ConfigError(f"clips={self.clips!r} is unknown: use 'per_frame' or 'pooled'")
        if self.merge not in ("published", "mean"):
            raise ConfigError(f"merge={self.merge!r} is unknown: use 'published' or 'mean'")
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
        """The setting `name`, with `overrides` applied: "1/3", "2/9" or "1/9" of the visual tokens, as published, or as many
        with a vision stage that keeps more, and a decoder that keeps fewer: "1/3-wide", "2/9-wide" or "1/9-wide"."""
        if name not in NAMED_PRESETS:
            raise ConfigError(f"preset {name!r} is unknown: use one of {', '.join(NAMED_PRESETS)}")
        vision, center, retention = NAMED_PRESETS[name]
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

    def layers(self, decoder_layers: int, first: int = 1) -> tuple[int, int]:
        """(shallow, deep) for a decoder of `decoder_layers` layers that can merge tokens before layer `first` at the earliest.
        Raises ConfigError if they do not fit."""
        shallow, deep = self.shallow_layer, self.deep_layer
        scale = self.scale_layers
        if scale is None:
            scale = (shallow, deep) == _REFERENCE_PAIR
        if scale and (decoder_layers != REFERENCE_LAYERS or shallow < first):
            if decoder_layers < first + 2:
                raise ConfigError(f"a decoder of {decoder_layers} layers has no room for two stages: {first + 2} are needed")
            shallow = min(max(first, round(shallow * decoder_layers / REFERENCE_LAYERS)), decoder_layers - 2)
            deep = min(max(shallow + 1, round(deep * decoder_layers / REFERENCE_LAYERS)), decoder_layers - 1)
        if deep >= decoder_layers:
            raise ConfigError(
                f"deep_layer={deep} is out of range for {decoder_layers} decoder layers: choose at most "
                f"{decoder_layers - 1}, or leave both layers at their defaults to have them scaled"
            )
        if shallow < first:
            raise ConfigError(
                f"shallow_layer={shallow} merges tokens to which this model still adds features of its encoder, behind its "
                f"first {first} layers: choose at least {first}, or leave both layers at their defaults"
            )
        return shallow, deep

    def schedule(self, shape: ModelShape | None = None, layout: Layout | None = None) -> Schedule:
        """Tokens, KV rows and FLOPs on a model of `shape` (None: LLaVA-1.5-7B) for a prompt of `layout` (None: one image).

        Raises ConfigError if it cannot be met.
        """
        shape = shape or ModelShape()
        return resolve(self, shape, (shape.image,) if layout is None else layout)

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """The three stages for a prompt of `layout`; none without `prune`. Raises ConfigError for budgets that do not fit.

        Budgets follow ViTCoP's published settings: n = trunc(v * patches), centers = max(1, trunc(p * n)),
        R = round((N r / v - s) / (d - s + (N - d) / divisor) * n), RD = round(R / divisor), half to even, in float64; with
        `scope` "pooled", R and RD are those of the n of all images together.
        """
        if not self.prune:
            return ()
        shallow, deep = self.layers(shape.layers, max(1, shape.deepstack))
        tokens = tuple(self._vision_tokens(segment, shape.multiple) for segment in layout)
        for segment, count in zip(layout, tokens, strict=True):
            if segment.grid[0] > 1 and count > CLIP_TOKENS:
                raise ConfigError(
                    f"the vision stage keeps {count} tokens of a clip of {segment.grid[0]} frames, all pairs of which are "
                    f"compared, and the most is {CLIP_TOKENS}: lower vision_ratio={self.vision_ratio} or budgets.vision, take "
                    "fewer frames, or set clips='per_frame'"
                )
        centers = tuple(self._centers(count) for count in tokens)
        if self.scope == "pooled" and layout:
            kept = [self._decoder_tokens(shape, layout, sum(tokens), shallow, deep)]
        else:
            pairs = zip(layout, tokens, strict=True)
            kept = [self._decoder_tokens(shape, (segment,), count, shallow, deep) for segment, count in pairs]
        clustering = (("centers", centers), ("density_width", self.density_width), ("reach", self.reach))
        # Where a mask is made of positions, those of a token in two layers must be the same.
        flat = shape.position_dims == 1 and not shape.marks
        if self.positions == "published" and not flat:
            why = "masks are made of positions" if shape.marks else f"positions have {shape.position_dims} coordinates"
            raise ConfigError(f"positions='published' counts tokens anew, and this model's {why}: use 'original'")
        positions = "index" if self.positions == "published" or (self.positions is None and flat) else "kept"
        keys = self.keys or shape.keys
        merging = "merge_by_cluster" if self.merge == "published" else "merge_to_means"
        return (
            Stage(
                "merge" if shape.packed else "encoder",
                self._vision_layer(shape),
                shape.saliency,
                tokens,
                clustering,
                positions="kept" if shape.position_dims > 1 else "index",
            ),
            Stage("decoder", shallow, merging, tuple(merged for merged, _ in kept), keys=keys),
            Stage("decoder", deep, "keep_lowest", tuple(last for _, last in kept), positions=positions, keys=keys),
        )

    def _vision_tokens(self, segment: Segment, multiple: int) -> int:
        patches = segment.candidates
        if self.budgets is not None:
            if self.budgets.vision > patches:
                raise ConfigError(f"budgets.vision={self.budgets.vision} exceeds the {patches} patches of an image")
            return self.budgets.vision
        tokens = int(self.vision_ratio * patches)
        if tokens < 1:
            raise ConfigError(
                f"vision_ratio={self.vision_ratio} keeps none of the {patches} patches: choose at least {1 / patches:.4g}"
            )
        return min(patches, -(-tokens // multiple) * multiple)

    def _centers(self, tokens: int) -> int:
        explicit = self.budgets.centers if self.budgets is not None else None
        return explicit or max(1, int(self.center_ratio * tokens))

    def _decoder_tokens(self, shape: ModelShape, segments: Layout, tokens: int, shallow: int, deep: int) -> tuple[int, int]:
        """(R, RD) of `segments`, which share a budget and have `tokens` left."""
        if self.budgets is not None:
            return self.budgets.shallow * len(segments), self.budgets.deep * len(segments)
        if self.mean_tokens is not None:
            # The mean of the images, to which each contributes as many tokens as it has.
            wholes = [(segment.whole or segment.candidates, segment.candidates) for segment in segments]
            patches = sum(own for _, own in wholes)
            images = sum(own / whole for whole, own in wholes)
            name, value, retention = "mean_tokens", self.mean_tokens, self.mean_tokens * images / patches
            if retention > 1:
                raise ConfigError(f"mean_tokens={value} exceeds the {patches / images:g} patches of an image")
        else:
            assert self.retention is not None
            name, value, retention = "retention", self.retention, self.retention
        merged, kept = published_budgets(retention, self.vision_ratio, shallow, deep, shape.layers, tokens, self.deep_divisor)
        if shape.packed:  # strips of an image can be as narrow as a token
            merged, kept = min(max(1, merged), tokens), max(1, kept)
        if kept < 1:
            raise ConfigError(
                f"{name}={value} leaves {merged} tokens after layer {shallow} and {kept} after layer {deep}, below 1: raise "
                f"{name}, or lower vision_ratio={self.vision_ratio} so that the first {shallow} layers cost less"
            )
        if merged > tokens:
            raise ConfigError(
                f"{name}={value} asks for {merged} tokens after layer {shallow}, but the vision stage keeps {tokens}: lower "
                f"{name} or raise vision_ratio={self.vision_ratio}"
            )
        return merged, kept

    def _vision_layer(self, shape: ModelShape) -> int:
        layer = self.vision_layer if self.vision_layer >= 0 else shape.vision_layers + self.vision_layer
        scored = shape.scored_layers
        if scored and layer not in scored:
            if self.vision_layer != _PUBLISHED_VISION_LAYER:
                raise ConfigError(
                    f"vision_layer={self.vision_layer} is layer {layer}, where patches attend within windows and cannot be "
                    f"compared: choose one of {', '.join(map(str, scored))}, or leave it at its default"
                )
            layer = max((i for i in scored if i <= layer), default=scored[0])
        if not 0 <= layer <= shape.feature_layer:
            raise ConfigError(
                f"vision_layer={self.vision_layer} is layer {layer} of {shape.vision_layers}, but the model reads its "
                f"features after layer {shape.feature_layer}: choose {-shape.vision_layers} to "
                f"{shape.feature_layer - shape.vision_layers}, or 0 to {shape.feature_layer}"
            )
        return layer

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


def published_budgets(
    retention: float, vision_ratio: float, shallow: int, deep: int, layers: int, tokens: int, divisor: float = 5
) -> tuple[int, int]:
    """(R, RD): what the shallow and the deep stage keep of `tokens`. Python's round, half to even, in float64.

    The published formula with 32 replaced by `layers` and 1/5 by 1/`divisor`. It knows no bounds; `ViTCoPConfig.stages` checks
    them.
    """
    weight = deep - shallow + (layers - deep) / divisor
    merged = round((layers * retention / vision_ratio - shallow) / weight * tokens)
    return merged, round(merged / divisor)


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
