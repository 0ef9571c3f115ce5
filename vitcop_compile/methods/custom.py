"""The user's own score, a function or a trained module, traced into the graph."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from ..errors import ConfigError, RewriteError
from ..layout import Layout
from ..ops.indexing import lowest
from ..policies import OWNED, Choice, Policy, Site
from ..schedule import ModelShape, Stage
from .base import VERSION, Budgeted, at_layer, in_encoder, placing, register, scoring_layer

_SIDES = ("encoder", "entry", "decoder")
_LAYER = frozenset(("query", "key", "value", "scale", "before"))
_PROMPT = frozenset(("whole", "entry", "text", "last"))
_TAPPED = frozenset(("score", "features"))
_NEEDS = _LAYER | _PROMPT | _TAPPED | {"hidden"}


@register("custom")
@dataclass(frozen=True, kw_only=True)
class CustomMethod(Budgeted):
    """The tokens of greatest score(site) stay.

    score: site -> fp [b, n] for the n candidates of b segments, larger is more important: a function of tensors, or a module,
    whose weights are then part of the program; see `policies.Site`. needs: the fields of `Site` that it looks at. side:
    "encoder", by hidden states, queries and keys of encoder layer `layer`, or of what a tower says of it; "entry", behind the
    projector; "decoder", before decoder layer `layer`. None is the encoder's last layer but one, and decoder layer 2. On the
    first two sides needs of "score" and "features" are the family's own saliency and keys.

    Two of these are equal if they are one: functions cannot be compared. Raises ConfigError for values out of range and needs
    that the side cannot meet, RewriteError while it is traced for a score of another shape.
    """

    score: Callable[[Site], Tensor] | None = None
    needs: tuple[str, ...] = ("hidden",)
    side: str = "decoder"
    layer: int | None = None
    policy: str = dataclasses.field(default="", init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.side not in _SIDES:
            raise ConfigError(f"custom: side={self.side!r} is unknown: use one of {', '.join(_SIDES)}")
        if unknown := set(self.needs) - _NEEDS:
            raise ConfigError(
                f"custom: needs={sorted(unknown)} are no fields of a site: use some of {', '.join(sorted(_NEEDS))}"
            )
        if self.score is not None and not callable(self.score):
            raise ConfigError(f"custom: score={self.score!r} cannot be called: pass a function or a module")
        self._enter(f"custom_{uuid.uuid4().hex[:12]}")

    def _enter(self, name: str) -> None:
        """Its policy is known by `name` as long as this, or an equal one that was read from a file, is there."""
        object.__setattr__(self, "policy", name)
        entry = OWNED.setdefault(name, Policy(partial(_choose, self.score), frozenset(self.needs)))
        object.__setattr__(self, "_entry", entry)

    def check(self) -> None:
        """Raises ConfigError without a score."""
        if self.score is None:
            raise ConfigError("custom: a method that was read from a file, or has none, has no score: pass one")

    def __hash__(self) -> int:
        return hash((self.policy, self.tokens, self.retention, self.side, self.layer, self.needs))

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """One, on its side. Raises ConfigError for a layer out of range, and for needs that are not met there."""
        self._check_needs(shape)
        if self.side == "decoder":
            least = 1 if _LAYER & set(self.needs) else 0  # before layer 0 there is none to look at
            layer = at_layer(2 if self.layer is None else self.layer, shape.layers, self.name, least)
            return (Stage("decoder", layer, self.policy, self.budgets(shape, layout, layer)),)
        layer = scoring_layer(shape) if self.layer is None else self.layer
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= shape.feature_layer:
            raise ConfigError(
                f"custom: layer={layer!r} is out of range: choose an encoder layer of 0 to {shape.feature_layer}"
            )
        side = "entry" if self.side == "entry" else in_encoder(shape)
        tap = shape.saliency if {"score", "features"} & set(self.needs) else None
        return (Stage(side, layer, self.policy, self.budgets(shape, layout), (), placing(shape), tap=tap),)

    def _check_needs(self, shape: ModelShape) -> None:
        if self.side == "decoder":
            missing, remedy = _TAPPED, "they are of an encoder: choose side 'encoder' or 'entry'"
        elif self.side == "entry":
            missing, remedy = _LAYER | _PROMPT, "use hidden, score and features, or side 'decoder'"
        elif shape.packed:
            missing = _LAYER | _PROMPT | {"hidden"}
            remedy = "its tokens are put together behind it: use score and features, or side 'entry'"
        else:
            missing, remedy = _PROMPT, "an encoder knows of no prompt: choose side 'decoder'"
        if unmet := missing & set(self.needs):
            raise ConfigError(f"custom: needs={sorted(unmet)} cannot be met on side {self.side!r} of this model: {remedy}")

    def to_json(self) -> str:
        """As `Budgeted.to_json`, without the score: what a folder of programs needs to know."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "score"]
        return json.dumps({"method": self.name, "version": VERSION} | {name: getattr(self, name) for name in fields}, indent=2)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """As `Budgeted.of`; without a score it tells budgets, and cannot be traced. Its stages have the name that they had."""
        method = super().of({name: value for name, value in values.items() if name != "policy"})
        if name := values.get("policy"):
            if not str(name).startswith("custom_"):
                raise ConfigError(f"custom: policy={name!r} is none of its own: leave it out")
            method._enter(name)
        return method


def _choose(score_of: Callable[[Site], Tensor] | None, site: Site, budget: int) -> Choice:
    assert score_of is not None
    score = score_of(site)
    if not isinstance(score, Tensor) or score.shape != site.at.shape:
        found = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
        raise RewriteError(
            f"custom: score(site) is {found}: return a tensor {tuple(site.at.shape)}, one number for each candidate"
        )
    score = score.float() if site.real is None else torch.where(site.real, score.float(), -torch.inf)
    return Choice(lowest(-score, budget))
