"""The contract: tokens, KV rows and FLOPs of every layer, resolved from shapes alone before any tensor exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ConfigError

if TYPE_CHECKING:
    from .config import ViTCoPConfig


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a schedule depends on. Widths are in elements, layers and tokens are counts.

    window: tokens that a decoder layer attends to, itself included, None for all. Programs attend to all, and a prompt with
    its new tokens must fit into the window, within which that is the same.
    """

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    vocab: int = 32064
    grid: tuple[int, int] = (24, 24)
    prefix_tokens: int = 1
    vision_layers: int = 24
    feature_layer: int = 22
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    patch_features: int = 3 * 14 * 14
    element_bytes: int = 2
    max_positions: int = 4096
    window: int | None = None

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest prompt and its new tokens together."""
        return self.max_positions if self.window is None else min(self.max_positions, self.window)

    @property
    def patches(self) -> int:
        """Visual tokens of one unpruned image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class VisionStage:
    """Pruning inside the encoder: after `layer`, keep `tokens` patches and cluster them around `centers`."""

    layer: int
    tokens: int
    centers: int
    density_width: float
    reach: float


@dataclass(frozen=True)
class Stage:
    """Pruning at the entry of decoder layer `layer`: `policy` reduces the visual tokens to `tokens`.

    positions: "kept" if surviving tokens keep their positions, "index" if they take their index in the stage's input.
    """

    layer: int
    policy: str
    tokens: int
    positions: str = "kept"


@dataclass(frozen=True)
class Schedule:
    """What every program must meet exactly. Counts are per image and prompt; FLOPs count a multiply-add as two.

    text_tokens: text tokens of the prompt the per-prompt figures are stated for.
    vision: the encoder's stage, None for a dense schedule; stages: the decoder's stages, by ascending layer.
    """

    shape: ModelShape
    text_tokens: int
    vision: VisionStage | None
    stages: tuple[Stage, ...]

    @property
    def image_tokens(self) -> int:
        """Visual tokens per image that enter the language model (n)."""
        return self.vision.tokens if self.vision else self.shape.patches

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in decoder layer 0 (L0)."""
        return self.text_tokens + self.image_tokens

    def visual_tokens(self) -> tuple[int, ...]:
        """Visual tokens in each decoder layer."""
        return tuple(self.image_tokens - delta for delta in self.removed_rows())

    def removed_rows(self) -> tuple[int, ...]:
        """Tokens removed from the prompt before each decoder layer: its KV cache holds L0 - delta rows."""
        return tuple(
            next((self.image_tokens - s.tokens for s in reversed(self.stages) if s.layer <= layer), 0)
            for layer in range(self.shape.layers)
        )

    def kv_rows(self, new_tokens: int = 0) -> tuple[int, ...]:
        """Rows of each layer's KV cache after the prompt and `new_tokens` generated tokens."""
        return tuple(self.prompt_tokens - delta + new_tokens for delta in self.removed_rows())

    def cache_shapes(self, batch: int, rows: int) -> list[tuple[int, ...]]:
        """Shape [batch, kv_heads, rows_l, head_dim] of each layer's key, and value, cache for `rows` rows in layer 0."""
        return [(batch, self.shape.kv_heads, rows - delta, self.shape.head_dim) for delta in self.removed_rows()]

    def mean_visual_tokens(self) -> float:
        """Visual tokens, mean over the decoder layers: the field's measure of a budget."""
        return sum(self.visual_tokens()) / self.shape.layers

    def kv_bytes(self, new_tokens: int = 0) -> int:
        """Bytes of the KV cache of one prompt."""
        return self._row_bytes() * sum(self.kv_rows(new_tokens))

    def dense_kv_bytes(self, new_tokens: int = 0) -> int:
        """Bytes of the unpruned KV cache of one prompt."""
        return self._row_bytes() * self.shape.layers * (self.text_tokens + self.shape.patches + new_tokens)

    def weight_bytes(self) -> int:
        """Bytes of the decoder's matrices and the head: what every decode step reads whatever was pruned."""
        shape = self.shape
        return shape.element_bytes * (shape.layers * _projection_weights(shape) + shape.hidden * shape.vocab)

    def decode_ratio(self, new_tokens: int = 0, batch: int = 1) -> float:
        """Dense over pruned bytes that a decode step must read, weights and KV caches: its ideal speed-up."""
        weights = self.weight_bytes()
        dense, pruned = self.dense_kv_bytes(new_tokens), self.kv_bytes(new_tokens)
        return (weights + batch * dense) / (weights + batch * pruned)

    def prefill_flops(self) -> tuple[int, ...]:
        """FLOPs of each decoder layer in prefill."""
        return tuple(_decoder_flops(self.shape, rows) for rows in self.kv_rows())

    def dense_prefill_flops(self) -> tuple[int, ...]:
        """FLOPs of each decoder layer in an unpruned prefill."""
        return (_decoder_flops(self.shape, self.text_tokens + self.shape.patches),) * self.shape.layers

    def head_flops(self) -> int:
        """FLOPs of the language-model head, which sees one token in either prefill."""
        return 2 * self.shape.hidden * self.shape.vocab

    def flop_ratio(self) -> float:
        """Dense over pruned prefill FLOPs of the language model, head included: the ideal speed-up of prefill."""
        head = self.head_flops()
        return (sum(self.dense_prefill_flops()) + head) / (sum(self.prefill_flops()) + head)

    def vision_flops(self) -> int:
        """FLOPs of the vision encoder up to its feature layer, and the projector."""
        shape = self.shape
        full, kept = shape.patches + shape.prefix_tokens, self.image_tokens + shape.prefix_tokens
        last_full = self.vision.layer if self.vision else shape.feature_layer
        tokens = [full if layer <= last_full else kept for layer in range(shape.feature_layer + 1)]
        embed = 2 * shape.patches * shape.patch_features * shape.vision_hidden
        projector = 2 * self.image_tokens * (shape.vision_hidden * shape.hidden + shape.hidden * shape.hidden)
        return embed + projector + sum(_encoder_flops(shape, count) for count in tokens)

    def dense_vision_flops(self) -> int:
        """FLOPs of the unpruned vision encoder and projector."""
        return Schedule(self.shape, self.text_tokens, None, ()).vision_flops()

    def _row_bytes(self) -> int:
        return 2 * self.shape.kv_heads * self.shape.head_dim * self.shape.element_bytes


def resolve(config: ViTCoPConfig, shape: ModelShape, text_tokens: int = 64) -> Schedule:
    """The schedule of `config` on a model of `shape`. Raises ConfigError if it cannot be met.

    Budgets follow ViTCoP's published settings: n = trunc(v * patches), centers = max(1, trunc(p * n)),
    R = round((N r / v - s) / (d - s + (N - d) / divisor) * n), RD = round(R / divisor), half to even, in float64.
    """
    if isinstance(text_tokens, bool) or not isinstance(text_tokens, int) or text_tokens < 0:
        raise ConfigError(f"text_tokens={text_tokens!r} is not a count of tokens: give an integer >= 0")
    if not config.prune:
        return Schedule(shape, text_tokens, None, ())
    shallow, deep = config.layers(shape.layers)
    tokens, centers, merged, kept = _budgets(config, shape, shallow, deep)
    vision = VisionStage(_vision_layer(config, shape), tokens, centers, config.density_width, config.reach)
    stages = (
        Stage(shallow, "merge_by_cluster", merged),
        Stage(deep, "keep_lowest", kept, "index" if config.positions == "published" else "kept"),
    )
    return Schedule(shape, text_tokens, vision, stages)


def published_budgets(
    retention: float, vision_ratio: float, shallow: int, deep: int, layers: int, tokens: int, divisor: float = 5
) -> tuple[int, int]:
    """(R, RD): what the shallow and the deep stage keep of `tokens`. Python's round, half to even, in float64.

    The published formula with 32 replaced by `layers` and 1/5 by 1/`divisor`. It knows no bounds; `resolve` checks them.
    """
    weight = deep - shallow + (layers - deep) / divisor
    merged = round((layers * retention / vision_ratio - shallow) / weight * tokens)
    return merged, round(merged / divisor)


def _budgets(config: ViTCoPConfig, shape: ModelShape, shallow: int, deep: int) -> tuple[int, int, int, int]:
    if config.budgets is not None:
        explicit = config.budgets
        if explicit.vision > shape.patches:
            raise ConfigError(f"budgets.vision={explicit.vision} exceeds the {shape.patches} patches of an image")
        centers = explicit.centers or max(1, int(config.center_ratio * explicit.vision))
        return explicit.vision, centers, explicit.shallow, explicit.deep
    tokens = int(config.vision_ratio * shape.patches)
    if tokens < 1:
        raise ConfigError(
            f"vision_ratio={config.vision_ratio} keeps none of the {shape.patches} patches: choose at least "
            f"{1 / shape.patches:.4g}"
        )
    retention = config.mean_tokens / shape.patches if config.mean_tokens is not None else config.retention
    assert retention is not None
    if retention > 1:
        raise ConfigError(f"mean_tokens={config.mean_tokens} exceeds the {shape.patches} patches of an image")
    name, value = ("mean_tokens", config.mean_tokens) if config.mean_tokens is not None else ("retention", retention)
    merged, kept = published_budgets(retention, config.vision_ratio, shallow, deep, shape.layers, tokens, config.deep_divisor)
    if kept < 1:
        raise ConfigError(
            f"{name}={value} leaves {merged} tokens after layer {shallow} and {kept} after layer {deep}, below 1: raise "
            f"{name}, or lower vision_ratio={config.vision_ratio} so that the first {shallow} layers cost less"
        )
    if merged > tokens:
        raise ConfigError(
            f"{name}={value} asks for {merged} tokens after layer {shallow}, but the vision stage keeps {tokens}: lower "
            f"{name} or raise vision_ratio={config.vision_ratio}"
        )
    return tokens, max(1, int(config.center_ratio * tokens)), merged, kept


def _vision_layer(config: ViTCoPConfig, shape: ModelShape) -> int:
    layer = config.vision_layer if config.vision_layer >= 0 else shape.vision_layers + config.vision_layer
    if not 0 <= layer <= shape.feature_layer:
        raise ConfigError(
            f"vision_layer={config.vision_layer} is layer {layer} of {shape.vision_layers}, but the model reads its "
            f"features after layer {shape.feature_layer}: choose {-shape.vision_layers} to "
            f"{shape.feature_layer - shape.vision_layers}, or 0 to {shape.feature_layer}"
        )
    return layer


def _projection_weights(shape: ModelShape) -> int:
    attention_width = shape.heads * shape.head_dim
    kv_width = shape.kv_heads * shape.head_dim
    return shape.hidden * (2 * attention_width + 2 * kv_width) + 3 * shape.hidden * shape.intermediate


def _decoder_flops(shape: ModelShape, tokens: int) -> int:
    causal_pairs = tokens * (tokens + 1) // 2
    return 2 * tokens * _projection_weights(shape) + 4 * causal_pairs * shape.heads * shape.head_dim


def _encoder_flops(shape: ModelShape, tokens: int) -> int:
    width = shape.vision_hidden
    return 2 * tokens * (4 * width * width + 2 * width * shape.vision_intermediate) + 4 * tokens * tokens * width
