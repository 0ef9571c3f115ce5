"""What is measured, as data: a toy model's size, a backend, settings, a request, and the arms to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import LlavaForConditionalGeneration

from ..backends import BACKENDS, backend_of
from ..config import PRESETS, ViTCoPConfig
from ..errors import ConfigError, UnsupportedError
from ..families.registry import shape_of
from ..schedule import ModelShape
from ..toy import small_llava
from .arms import ARMS, Request

STAGES = ("vision", "prefill", "decode", "ttft")
DENSE = "dense"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")
# Arms that never prune. Any other that is no backend prunes by itself, and is built with every setting.
STOCK_ARMS = ("stock_eager", "stock_compile")
_HEAD = 64


@dataclass(frozen=True)
class Shape:
    """The size of a toy LLaVA: widths in elements, `image_size` in pixels (patches are 14 x 14), layers as counts.

    Heads are 64 wide, the decoder's MLP 8/3 of `hidden`, the encoder's 4 times `vision_hidden`. dtype: a name in DTYPES;
    device: "cpu" or "cuda"; name: for tables, "<hidden>x<layers>" by default.
    """

    hidden: int = 1024
    layers: int = 12
    vision_hidden: int = 1024
    vision_layers: int = 8
    vocab: int = 2048
    image_size: int = 336
    dtype: str = "float32"
    device: str = "cpu"
    name: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", f"{self.hidden}x{self.layers}")

    @property
    def intermediate(self) -> int:
        """LLaMA's MLP width: 8/3 of the hidden size, in steps of 64."""
        return -(-self.hidden * 8 // 3 // 64) * 64

    def check(self) -> None:
        """Raises ConfigError or UnsupportedError for a size, dtype or device that no model can be built with."""
        for what in ("hidden", "layers", "vision_hidden", "vision_layers", "image_size"):
            _positive(what, getattr(self, what))
        for what in ("hidden", "vision_hidden"):
            width = getattr(self, what)
            if width % (2 * _heads(width)):
                raise ConfigError(f"{what}={width} does not split into heads of {_HEAD}: choose a multiple of {_HEAD}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is unknown: use one of {', '.join(DTYPES)}")
        if self.device not in DEVICES:
            raise ConfigError(f"device {self.device!r} is unknown: use one of {', '.join(DEVICES)}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("device 'cuda' needs a CUDA GPU, and there is none: use 'cpu'")

    def model(self, seed: int = 0) -> LlavaForConditionalGeneration:
        """The model with random weights drawn from `seed`, on its device."""
        return self._llava(seed).to(self.device)  # type: ignore[arg-type]

    def model_shape(self) -> ModelShape:
        """What a schedule depends on, without weights."""
        with torch.device("meta"):
            return shape_of(self._llava(0).config)

    def _llava(self, seed: int) -> LlavaForConditionalGeneration:
        return small_llava(
            vision_hidden=self.vision_hidden,
            vision_layers=self.vision_layers,
            vision_heads=_heads(self.vision_hidden),
            hidden=self.hidden,
            layers=self.layers,
            heads=_heads(self.hidden),
            intermediate=self.intermediate,
            vocab=self.vocab,
            image_size=self.image_size,
            seed=seed,
            dtype=DTYPES[self.dtype],
        )


class Entrant(NamedTuple):
    """One arm of a case: a name in ARMS, the label of its settings ("dense", a preset, or the case's own), and those."""

    arm: str
    label: str
    config: ViTCoPConfig

    @property
    def key(self) -> str:
        """Its name within the case."""
        return f"{self.arm} {self.label}"


@dataclass(frozen=True)
class Case:
    """One interleaved run: the arms `against`, the backend with nothing pruned, and the backend with every setting.

    backend: an arm named as a backend; presets: published settings; configs: further settings by label; against: arms to
    compare with, those that prune by themselves with every setting, all others dense; stages: what is timed, of STAGES,
    the selection along with prefill.
    batch, text_tokens, new_tokens: the request, as in `Request`.
    """

    shape: Shape
    backend: str = "inductor"
    presets: tuple[str, ...] = tuple(PRESETS)
    batch: int = 1
    text_tokens: int = 64
    new_tokens: int = 64
    against: tuple[str, ...] = ("stock_compile",)
    configs: Mapping[str, ViTCoPConfig] = field(default_factory=dict)
    stages: tuple[str, ...] = STAGES

    @property
    def request(self) -> Request:
        """What every arm serves."""
        return Request(self.batch, self.text_tokens, self.new_tokens)

    def settings(self) -> dict[str, ViTCoPConfig]:
        """The pruned configurations by label."""
        return {name: ViTCoPConfig.preset(name) for name in self.presets} | dict(self.configs)

    def entrants(self) -> list[Entrant]:
        """The arms of the run, in the order they are built."""
        dense, settings = ViTCoPConfig.dense(), self.settings()
        found = []
        for arm in self.against:
            labels = {DENSE: dense} if is_dense_arm(arm) else settings
            found += [Entrant(arm, label, config) for label, config in labels.items()]
        return found + [Entrant(self.backend, label, config) for label, config in ({DENSE: dense} | settings).items()]

    def check(self) -> None:
        """Raises ConfigError or UnsupportedError for anything unknown, not positive or not possible, before work starts."""
        self.shape.check()
        backend_of(self.backend)
        for arm in (self.backend, *self.against):
            if arm not in ARMS:
                raise ConfigError(f"arm {arm!r} is unknown: use one of {', '.join(ARMS)}")
        if self.backend in self.against or len(set(self.against)) < len(self.against):
            raise ConfigError(
                f"against={', '.join(self.against)} with backend {self.backend!r} names an arm twice: name each once"
            )
        for what in ("batch", "text_tokens", "new_tokens"):
            _positive(what, getattr(self, what))
        for stage in self.stages:
            if stage not in STAGES:
                raise ConfigError(f"stage {stage!r} is unknown: use one of {', '.join(STAGES)}")
        for label in self.configs:
            if label == DENSE or label in PRESETS:
                raise ConfigError(f"configs: {label!r} already names a setting: choose another label")
        shape = self.shape.model_shape()
        for config in self.settings().values():
            config.schedule(shape)


def is_dense_arm(name: str) -> bool:
    """Whether the arm, as something to compare with, serves the unpruned model."""
    return name in BACKENDS or name in STOCK_ARMS


def check_cases(cases: Iterable[Case], rounds: int) -> None:
    """Raises as `Case.check`, for a count of rounds below 1, and for two shapes of one name."""
    _positive("rounds", rounds)
    shapes: dict[str, Shape] = {}
    for case in cases:
        case.check()
        if shapes.setdefault(case.shape.name, case.shape) != case.shape:
            raise ConfigError(f"two shapes are named {case.shape.name!r}: give one another name")


def _heads(width: int) -> int:
    return max(1, width // _HEAD)


def _positive(what: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{what}={value} is below 1")
