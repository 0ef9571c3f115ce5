"""The passes, in the order they run. Each is one file: `(graph module, settings) -> graph module`, in place.

    encoder   clean -> truncate_encoder -> prune, or tap -> drop_prefix -> lower_attention
    tower     clean -> truncate_encoder -> tap -> drop_prefix -> lower_attention
    prefill   clean -> prune -> attach_cache -> lower_attention
    extend    clean -> attach_cache -> lower_attention [-> lower_decode]

A decoder that adds more features to the tokens of images is made one of text before `extend`: drop_features.

The lists below are data: `encoder_passes` and its kin name them, `rewrite` runs them. Backends add to these on every exported
program: all but eager and inductor begin with unroll_loops, inductor and aotinductor end with lower_linear and lower_int8.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, fx

from ..policies import counted_in
from ..schedule import Schedule
from .attach_cache import attach_cache
from .clean import clean
from .drop_features import drop_features
from .drop_prefix import drop_prefix
from .dump import dump_graph
from .lower_attention import lower_attention
from .lower_decode import lower_decode
from .lower_int8 import lower_int8
from .lower_linear import lower_linear
from .prune import prune
from .tap import tap
from .truncate_encoder import truncate_encoder

__all__ = [
    "Passes",
    "attach_cache",
    "clean",
    "drop_features",
    "drop_prefix",
    "encoder_passes",
    "extend_passes",
    "lower_attention",
    "lower_decode",
    "lower_int8",
    "lower_linear",
    "prefill_passes",
    "prune",
    "rewrite",
    "tap",
    "text_passes",
    "tower_passes",
    "truncate_encoder",
]

Pass = Callable[[fx.GraphModule], fx.GraphModule]
Passes = tuple[tuple[str, Pass], ...]


def encoder_passes(schedule: Schedule, attn_implementation: str = "sdpa", exact: bool = True) -> Passes:
    """hidden [I, prefix + patches, C] -> (patches [I, lead + n, C], kept int64 [I, n], state [I, n]...), an image a row."""
    shape, stage = schedule.shape, schedule.vision
    prefix, (segment, *_) = shape.prefix_tokens, schedule.layout
    site = {"prefix": prefix, "grid": segment.grid[1:], "exact": exact}
    inside = tuple(stage.of_segment(0) for stage in schedule.vision_stages if stage.side == "encoder")
    behind = stage.of_segment(0) if stage is not None and stage.side != "encoder" else None
    pruned = ("prune", partial(prune, stages=inside, incoming=(segment.candidates,), prefix=prefix, site=site))
    return (
        ("clean", clean),
        ("truncate_encoder", partial(truncate_encoder, feature_layer=shape.feature_layer)),
        pruned if behind is None else ("tap", partial(tap, stage=behind, prefix=prefix)),
        ("drop_prefix", partial(drop_prefix, prefix=prefix - segment.lead)),
        ("lower_attention", partial(lower_attention, name=attn_implementation)),
    )


def tower_passes(schedule: Schedule, attn_implementation: str = "sdpa") -> Passes:
    """hidden [T, prefix + patches, C] -> (patches [T, p, C], and with a stage score [T, p], features [T, p, K]), a tile a
    row."""
    shape = schedule.shape
    return (
        ("clean", clean),
        ("truncate_encoder", partial(truncate_encoder, feature_layer=shape.feature_layer)),
        ("tap", partial(tap, stage=schedule.vision, prefix=shape.prefix_tokens)),
        ("drop_prefix", partial(drop_prefix, prefix=shape.prefix_tokens)),
        ("lower_attention", partial(lower_attention, name=attn_implementation)),
    )


def prefill_passes(
    schedule: Schedule,
    attn_implementation: str = "sdpa",
    *,
    states: int = 0,
    filled: bool = False,
    in_place: bool = True,
    exact: bool = True,
) -> Passes:
    """(embeddings [B, t, D], positions, [marks,] features [B, t, D]..., visual, state..., [last,] [text,] [length, removed,]
    key_0, value_0, ...) -> (hidden [B, t', D], index of each stage...). Not `in_place`, the new rows k0, v0, k1, ... follow,
    and caches that are not `filled` are no input; `exact` as `policies.Site` has it."""
    stages, site = schedule.decoder_stages, None if exact else {"exact": False}
    pruned = partial(prune, stages=stages, incoming=schedule.segment_tokens, states=states, site=site)
    attached = partial(attach_cache, groups=schedule.groups, filled=filled, in_place=in_place)
    return (
        ("clean", clean),
        ("prune", partial(pruned, counted=counted_in(schedule.vision_stages))),
        ("attach_cache", partial(attached, sized=schedule.sized)),
        *_lowered(attn_implementation, filled, in_place),
    )


def text_passes(schedule: Schedule) -> Passes:
    """(embeddings [B, t, D], positions, features [B, t, D]...) -> hidden [B, t, D] without the features, if there are any."""
    more = schedule.shape.deepstack
    return (("drop_features", partial(drop_features, number=more)),) if more else ()


def extend_passes(
    schedule: Schedule, attn_implementation: str = "sdpa", in_place: bool = True, kernels: bool = False
) -> Passes:
    """(embeddings [B, s, D], positions, [marks,] length [B], removed [groups, B], key_0, value_0, ...) -> (hidden [B, s, D],).

    Not `in_place`, the new rows k0, v0, k1, v1, ... [B, kv_heads, s, hd] follow the hidden state, and attention stays spelled
    out. kernels: attention of one query takes ours, see `lower_decode`.
    """
    attached = partial(attach_cache, groups=schedule.groups, filled=True, in_place=in_place, blocks=False)
    return (
        ("clean", clean),
        ("attach_cache", partial(attached, sized=schedule.sized)),
        *_lowered(attn_implementation, True, in_place),
        *((("lower_decode", lower_decode),) if kernels else ()),
    )


def rewrite(
    captured: fx.GraphModule, passes: Passes, dump: Path | None = None, inputs: Sequence[Tensor] = ()
) -> fx.GraphModule:
    """A copy of `captured` after all `passes`. dump: a folder that gets the graph as it is after each, for people to read,
    with the shapes that `inputs` of the finished graph lead to."""
    module = _copy(captured)
    if dump is not None:
        dump_graph(module, dump, 0, "captured", inputs)
    for number, (name, run) in enumerate(passes, start=1):
        module = run(module)
        if dump is not None:
            dump_graph(module, dump, number, name, inputs)
    return module


def _lowered(attn_implementation: str, filled: bool, in_place: bool) -> Passes:
    if filled and not in_place:
        return ()
    return (("lower_attention", partial(lower_attention, name=attn_implementation)),)


def _copy(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph over the same parameters, free to be rewritten."""
    memo: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    result = graph.graph_copy(module.graph, memo)
    graph.output(result)
    for old, new in memo.items():
        new.meta = copy.copy(old.meta)
    return fx.GraphModule(module, graph)
