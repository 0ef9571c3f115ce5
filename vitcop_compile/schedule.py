"""The contract: tokens, KV rows and FLOPs of every layer, resolved from shapes alone before any tensor exists."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .errors import ConfigError
from .layout import Layout, Segment

# The sides of a stage -> which comes first.
_ORDER = {"encoder": 0, "merge": 1, "entry": 1, "decoder": 2}


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a model that a schedule depends on. Widths are in elements, layers and tokens are counts.

    grid and prefix_tokens: of one input of the encoder, patches and what stands before them; lead: how many of the latter the
    language model gets as well; saliency: the policy that scores patches in this encoder; packed: whether the tokens of an
    image are put together behind the encoder, from several inputs of it or from several patches each, so that they are
    selected there; group: patches that the projector makes one token of, side by side; projector_hidden: width between its
    two layers, None if that of the decoder; key_features: elements of a patch's
    keys, None if as many as of the patch; multiple: what the tokens of a segment are rounded up to when they leave the vision
    stage, so that images of many sizes share programs. deepstack: how many more features of an image's tokens there are, which
    the decoder adds to them behind its first layers, one each: the encoder's rows and the projector's are so many times wider,
    and tokens cannot be merged before they have them all. position_dims: coordinates of a token's position in the decoder;
    keys: which of its keys norms are taken of by default, see `Stage`; scored_layers: encoder layers in which every patch
    attends to its whole image, () for all. window: tokens that a decoder layer attends to, itself included, None for all.
    Programs attend to all, and a prompt with its new tokens must fit into the window, within which that is the same. marks:
    whether tokens of an image attend to each other both ways: the decoder then takes marks of its tokens in place of a mask,
    see `attention.visible`, and its windows are served as they are. An image is a run of visual tokens without text between.
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
    vision_heads: int = 16
    patch_features: int = 3 * 14 * 14
    element_bytes: int = 2
    max_positions: int = 4096
    window: int | None = None
    lead: int = 0
    deepstack: int = 0
    position_dims: int = 1
    marks: bool = False
    keys: str = "rotated"
    scored_layers: tuple[int, ...] = ()
    saliency: str = "cls_attention"
    packed: bool = False
    group: int = 1
    projector_hidden: int | None = None
    key_features: int | None = None
    multiple: int = 1

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest prompt and its new tokens together."""
        return self.max_positions if self.window is None else min(self.max_positions, self.window)

    @property
    def patches(self) -> int:
        """Patches of one input of the encoder."""
        return self.grid[0] * self.grid[1]

    @property
    def vision_width(self) -> int:
        """Width of what the encoder returns."""
        return self.vision_hidden * (1 + self.deepstack)

    @property
    def feature_width(self) -> int:
        """Width of what the projector returns."""
        return self.hidden * (1 + self.deepstack)

    def segment(self, kind: str, grid: tuple[int, int, int], lead: int) -> Segment:
        """One of so many candidates behind `lead` of what stands before the patches."""
        return Segment(kind, grid, math.prod(grid) + lead, tuple(range(lead)), taps=self.group, lead=lead)

    @property
    def image(self) -> Segment:
        """An image that is one input of the encoder."""
        rows, columns = (side // math.isqrt(self.group) for side in self.grid)
        return self.segment("image", (1, rows, columns), self.lead)


@dataclass(frozen=True)
class Stage:
    """Pruning of visual tokens, on either side of a model.

    side: "encoder", after its layer `layer`; "merge", behind the encoder, by what that layer says; "entry", behind the
    projector, likewise; or "decoder", at the entry of that layer, 0 for that of the language model, with the prompt's text in
    view; policy: a name in `policies.POLICIES`, with `options` as (name, value) pairs; tokens: what each segment of the layout
    keeps, or one number for all of them together; positions: "kept" if tokens that stay keep their positions, "index" if they
    take their index in the stage's input, which is all that the decoder knows of stages before it where a position is one
    number, unless one of them says "kept"; keys: "rotated", as attention meets them, "raw", as their projection leaves them,
    or "centered", raw without the mean of their segment; tap: the policy whose tap scores candidates of an encoder for this
    one, None for its own; also: more layers of the encoder that it scores them by, in front of `layer`; weighs: whether a
    token that it merges counts in attention for as many as it took in, from there on (`attention.weighed`).
    """

    side: str
    layer: int
    policy: str
    tokens: tuple[int, ...]
    options: tuple[tuple[str, Any], ...] = ()
    positions: str = "kept"
    keys: str = "rotated"
    tap: str | None = None
    also: tuple[int, ...] = ()
    weighs: bool = False

    @property
    def total(self) -> int:
        """Tokens that leave the stage, of all segments together."""
        return sum(self.tokens)

    def option(self, name: str) -> Any:
        """The policy's option `name`. Raises KeyError."""
        return dict(self.options)[name]

    def of_segment(self, number: int) -> Stage:
        """The stage for one segment alone."""
        options = tuple((name, value[number] if isinstance(value, tuple) else value) for name, value in self.options)
        return replace(self, tokens=(self.tokens[number],), options=options)


class Method(Hashable, Protocol):
    """Decides what is pruned where: `ViTCoPConfig` is one. Equal methods make equal schedules. One that can be without what
    its programs are traced from has also `check()`, which then raises ConfigError."""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """The stages for a prompt of `layout`, the encoder's first, then the decoder's by ascending layer. Their number,
        layers and policies do not depend on the layout, as long as there is an image. Raises ConfigError if it cannot be
        met."""
        ...

    def to_json(self) -> str:
        """A text from which `methods.method_of` makes an equal one."""
        ...


@dataclass(frozen=True)
class Schedule:
    """What every program must meet exactly. Counts are those of one prompt; FLOPs count a multiply-add as two.

    layout: the prompt's images; stages: what `Method.stages` says. `text` is the number of the prompt's text tokens, among
    them the protected tokens of its images, which no stage touches either, and `new` that of generated ones, wherever they are
    asked for.
    """

    shape: ModelShape
    layout: Layout
    stages: tuple[Stage, ...]

    @property
    def vision_stages(self) -> tuple[Stage, ...]:
        """The stages before the decoder, in order: several inside an encoder, else one at most."""
        return tuple(stage for stage in self.stages if stage.side != "decoder")

    @property
    def vision(self) -> Stage | None:
        """The last stage before the decoder, None where nothing is pruned there."""
        return self.vision_stages[-1] if self.vision_stages else None

    @property
    def placed(self) -> bool:
        """Whether a prompt's positions depend on which of its tokens stay before the decoder."""
        return self.shape.position_dims > 1 or (self.vision is not None and self.vision.positions == "kept")

    @property
    def sized(self) -> tuple[int, ...]:
        """Groups of layers in which a token may count for several."""
        weighing = [group for group, stage in enumerate(self.decoder_stages, start=1) if stage.weighs]
        first = 0 if any(stage.weighs for stage in self.vision_stages) else min(weighing, default=len(self.stages) + 1)
        return tuple(group for group in sorted(set(self.groups)) if group >= first)

    @property
    def told(self) -> tuple[int, ...]:
        """Groups of layers whose caches hold a number of every row beside keys and values: its position, where masks are made
        of those, or how many tokens it stands for."""
        return tuple(sorted(set(self.groups))) if self.shape.marks else self.sized

    @property
    def follows(self) -> bool:
        """Whether a prefill program takes the state of the vision stages, to prune or to weigh by."""
        return bool(self.decoder_stages) or any(stage.weighs for stage in self.vision_stages)

    @property
    def decoder_stages(self) -> tuple[Stage, ...]:
        """The decoder's stages, by ascending layer."""
        return tuple(stage for stage in self.stages if stage.side == "decoder")

    @property
    def patches(self) -> int:
        """Visual tokens of the unpruned prompt that may be pruned."""
        return sum(segment.candidates for segment in self.layout)

    @property
    def protected(self) -> int:
        """Visual tokens that may not."""
        return sum(len(segment.protected) for segment in self.layout)

    @property
    def key(self) -> tuple[tuple[int, ...], ...]:
        """What decides about a prefill program: visual tokens by segment that enter it, and leave each of its stages, and
        where segments differ in what leads them, how many of these they have."""
        leads = tuple(segment.lead for segment in self.layout)
        uneven = () if set(leads) <= {self.shape.lead} else (leads,)
        return (self.segment_tokens, *(stage.tokens for stage in self.decoder_stages), *uneven)

    @property
    def lead(self) -> int:
        """Rows of what leads the segments, of all together."""
        return sum(segment.lead for segment in self.layout)

    @property
    def segment_tokens(self) -> tuple[int, ...]:
        """Visual tokens of every segment that enter the language model."""
        return self.vision.tokens if self.vision else tuple(segment.candidates for segment in self.layout)

    @property
    def image_tokens(self) -> int:
        """Visual tokens that enter the language model, of all segments together."""
        return sum(self.segment_tokens)

    def prompt_tokens(self, text: int) -> int:
        """Length of the prompt in decoder layer 0 (L0)."""
        return text + self.image_tokens

    @property
    def groups(self) -> tuple[int, ...]:
        """The group of every decoder layer: layers between two stages share a group, and lack the same rows."""
        starts = [stage.layer for stage in self.decoder_stages]
        return tuple(sum(start <= layer for start in starts) for layer in range(self.shape.layers))

    def group_tokens(self) -> tuple[int, ...]:
        """Visual tokens in the layers of each group."""
        return (self.image_tokens, *(stage.total for stage in self.decoder_stages))

    def visual_tokens(self) -> tuple[int, ...]:
        """Visual tokens in each decoder layer."""
        tokens = self.group_tokens()
        return tuple(tokens[group] for group in self.groups)

    def removed_rows(self) -> tuple[int, ...]:
        """Tokens removed from the prompt before each decoder layer: its KV cache holds so many rows fewer than that of layer
        0."""
        return tuple(self.image_tokens - tokens for tokens in self.visual_tokens())

    def kv_rows(self, text: int, new: int = 0) -> tuple[int, ...]:
        """Rows of each layer's KV cache after the prompt and `new` generated tokens."""
        return tuple(text + tokens + new for tokens in self.visual_tokens())

    def cache_shapes(self, batch: int, rows: Sequence[int]) -> list[tuple[int, ...]]:
        """Shape [batch, kv_heads, rows_l, head_dim] of each layer's key, and value, cache; rows: those of each group."""
        return [(batch, self.shape.kv_heads, rows[group], self.shape.head_dim) for group in self.groups]

    def mean_visual_tokens(self) -> float:
        """Visual tokens, mean over the decoder layers: the field's measure of a budget."""
        return sum(self.visual_tokens()) / self.shape.layers

    def kv_bytes(self, text: int, new: int = 0) -> int:
        """Bytes of the KV cache of one prompt."""
        return self._row_bytes() * sum(self.kv_rows(text, new))

    def dense_kv_bytes(self, text: int, new: int = 0) -> int:
        """Bytes of the unpruned KV cache of one prompt."""
        return self._row_bytes() * self.shape.layers * (text + self.patches + new)

    def weight_bytes(self) -> int:
        """Bytes of the decoder's matrices and the head: what every decode step reads whatever was pruned."""
        shape = self.shape
        return shape.element_bytes * (shape.layers * _projection_weights(shape) + shape.hidden * shape.vocab)

    def decode_ratio(self, text: int, new: int = 0, batch: int = 1) -> float:
        """Dense over pruned bytes that a decode step must read, weights and KV caches: its ideal speed-up."""
        weights = self.weight_bytes()
        dense, pruned = self.dense_kv_bytes(text, new), self.kv_bytes(text, new)
        return (weights + batch * dense) / (weights + batch * pruned)

    def prefill_flops(self, text: int) -> tuple[int, ...]:
        """FLOPs of each decoder layer in prefill."""
        return tuple(_decoder_flops(self.shape, rows) for rows in self.kv_rows(text))

    def dense_prefill_flops(self, text: int) -> tuple[int, ...]:
        """FLOPs of each decoder layer in an unpruned prefill."""
        return (_decoder_flops(self.shape, text + self.patches),) * self.shape.layers

    def head_flops(self) -> int:
        """FLOPs of the language-model head, which sees one token in either prefill."""
        return 2 * self.shape.hidden * self.shape.vocab

    def flop_ratio(self, text: int) -> float:
        """Dense over pruned prefill FLOPs of the language model, head included: the ideal speed-up of prefill."""
        head = self.head_flops()
        return (sum(self.dense_prefill_flops(text)) + head) / (sum(self.prefill_flops(text)) + head)

    def vision_flops(self) -> int:
        """FLOPs of the vision encoder up to its feature layer, and the projector."""
        shape, stage = self.shape, self.vision
        inside = [own for own in self.vision_stages if own.side == "encoder"]
        projected = self.segment_tokens if stage is None or stage.side != "entry" else [s.candidates for s in self.layout]
        flops = 0
        for number, (segment, kept) in enumerate(zip(self.layout, projected, strict=True)):
            grouped = shape.group > 1 and segment.taps == shape.group
            # Tiles are seen whole, however much of them the candidates are; else the candidates tell what is seen, in a clip
            # frame by frame.
            clip = segment.tiles if segment.grid[0] > 1 else 1
            patches = shape.patches if shape.packed and not grouped else segment.candidates * segment.taps // clip
            left = [
                [patches, *(own.tokens[number] for own in inside if own.layer < i)] for i in range(shape.feature_layer + 1)
            ]
            layers = (_encoder_flops(shape, tokens[-1] + shape.prefix_tokens) for tokens in left)
            flops += segment.tiles * (2 * patches * shape.patch_features * shape.vision_hidden + sum(layers))
            # A group goes through a projector as one token, taps that are blended go through it each.
            wide, rows = (segment.taps, kept) if grouped else (1, kept * segment.taps)
            between = shape.projector_hidden or shape.hidden
            projector = wide * shape.vision_hidden * between + between * shape.hidden
            flops += 2 * (rows + segment.lead) * (1 + shape.deepstack) * projector
        return flops

    def dense_vision_flops(self) -> int:
        """FLOPs of the unpruned vision encoder and projector."""
        return Schedule(self.shape, self.layout, ()).vision_flops()

    def _row_bytes(self) -> int:
        return 2 * self.shape.kv_heads * self.shape.head_dim * self.shape.element_bytes


def resolve(method: Method, shape: ModelShape, layout: Layout) -> Schedule:
    """The schedule of `method` on a model of `shape`, for a prompt of `layout`. Raises ConfigError if it cannot be met, and
    for stages that no program of this model has a place for."""
    stages = method.stages(shape, layout)
    _check_sides(stages, shape)
    return Schedule(shape, layout, stages)


def check_ready(method: Method) -> None:
    """Raises ConfigError for a method that tells schedules and cannot be traced."""
    check = getattr(method, "check", None)
    if check is not None:
        check()


def _check_sides(stages: tuple[Stage, ...], shape: ModelShape) -> None:
    for stage in stages:
        if stage.side not in _ORDER:
            raise ConfigError(f"a stage of side {stage.side!r} is none: use one of {', '.join(_ORDER)}")
        if stage.side == "encoder" and shape.packed:
            raise ConfigError(
                f"policy {stage.policy!r} has a stage in the encoder, and this model's tokens are put together behind it: use "
                "side 'merge' or 'entry'"
            )
        if stage.side == "merge" and not shape.packed:
            raise ConfigError(
                f"policy {stage.policy!r} has a stage of side 'merge', and this model puts no tokens together behind its "
                "encoder: use side 'encoder' or 'entry'"
            )
    sides = [stage.side for stage in stages]
    if sides != sorted(sides, key=_ORDER.__getitem__):
        raise ConfigError(f"stages of sides {', '.join(sides)} are out of order: the encoder's come first, the decoder's last")
    behind = sides.count("merge") + sides.count("entry")
    if behind > 1:
        raise ConfigError(f"{behind} stages stand between encoder and decoder: there is place for 1, use one of them")
    if behind and "encoder" in sides:
        raise ConfigError(
            "stages inside the encoder and behind it: what is chosen there is told of whole images; use either, or go on in "
            "the decoder"
        )


def _projection_weights(shape: ModelShape) -> int:
    attention_width = shape.heads * shape.head_dim
    kv_width = shape.kv_heads * shape.head_dim
    return shape.hidden * (2 * attention_width + 2 * kv_width) + 3 * shape.hidden * shape.intermediate


def _decoder_flops(shape: ModelShape, tokens: int) -> int:
    # Those of causal attention: windows, and images that attend to themselves both ways, are not told apart.
    causal_pairs = tokens * (tokens + 1) // 2
    return 2 * tokens * _projection_weights(shape) + 4 * causal_pairs * shape.heads * shape.head_dim


def _encoder_flops(shape: ModelShape, tokens: int) -> int:
    width = shape.vision_hidden
    return 2 * tokens * (4 * width * width + 2 * width * shape.vision_intermediate) + 4 * tokens * tokens * width
