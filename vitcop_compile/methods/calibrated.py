"""Calibration: attention counts a merged token as often as tokens are in it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

from ..errors import ConfigError
from ..layout import Layout
from ..policies import POLICIES
from ..schedule import Method, ModelShape, Schedule, Stage, check_ready, resolve
from .base import READERS, VERSION, method_of


@dataclass(frozen=True)
class Calibrated:
    """`method` with the logarithm of how many tokens a merged one stands for added to the logits of attention to it
    (proportional attention, ToMe, arXiv 2210.09461, Eq. 1), in every layer behind the merge, in the encoder as in the decoder,
    and in every later step: tokens that are alike and merged into one give what they gave before. All tokens keep their
    positions.

    What merges becomes its plain mean, for a token of about twice the length is none of those that it stands for: where the
    method has `merge`, "mean" is in place of "published". What a method drops counts for nothing. Policies that score tokens
    by attention look at it without sizes, as published.

    Raises ConfigError for what is no method, or calibrated already.
    """

    method: Method

    def __post_init__(self) -> None:
        if isinstance(self.method, Calibrated):
            raise ConfigError("calibrated: the method is calibrated already: pass the one inside")
        if isinstance(self.method, type) or not hasattr(self.method, "stages"):
            raise ConfigError(
                f"calibrated: {self.method!r} is no method: pass a ViTCoPConfig, or another of vitcop_compile.methods"
            )

    @property
    def clips(self) -> str:
        """As `ViTCoPConfig.clips`, of the method."""
        return getattr(self.method, "clips", "per_frame")

    def check(self) -> None:
        """Raises ConfigError as the method does."""
        check_ready(self.method)

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """Those of the method. Raises ConfigError as it does, for a model whose masks are made of positions, and for a policy
        that merges and does not say how many."""
        if shape.marks:
            raise ConfigError(
                "calibrated: tokens of an image attend to each other both ways in this model, by masks of their own, beside "
                "which there are no sizes: use the method as it is"
            )
        method: Any = self.method
        if getattr(method, "merge", None) == "published":
            method = dataclasses.replace(method, merge="mean")
        return tuple(_weighing(stage) for stage in method.stages(shape, layout))

    def schedule(self, shape: ModelShape | None = None, layout: Layout | None = None) -> Schedule:
        """As `ViTCoPConfig.schedule`."""
        shape = shape or ModelShape()
        return resolve(self, shape, (shape.image,) if layout is None else layout)

    def to_json(self) -> str:
        """A versioned JSON text; `method_of` gives back an equal method."""
        return json.dumps({"method": "calibrated", "version": VERSION, "of": json.loads(self.method.to_json())}, indent=2)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Self:
        """From the fields of `to_json`. Raises ConfigError for unknown ones, and as `method_of` does."""
        if values.keys() != {"of"}:
            raise ConfigError(f"calibrated: settings {sorted(values)} are not those of one method, in 'of'")
        return cls(method_of(json.dumps(values["of"])))


def _weighing(stage: Stage) -> Stage:
    policy = POLICIES[stage.policy]
    if policy.merges and not policy.adds:
        raise ConfigError(
            f"calibrated: policy {stage.policy!r} merges tokens and does not say how many each stands for: have it add that "
            "to the state, last"
        )
    return dataclasses.replace(stage, positions="kept", weighs=policy.merges)


READERS["calibrated"] = Calibrated.of
