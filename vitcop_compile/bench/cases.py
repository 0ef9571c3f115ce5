"""What is measured, as data: a random model's size, a backend, settings, a request, and the arms to compare with."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..backends import BACKENDS, backend_of
from ..config import NAMED_PRESETS, PRESETS, ViTCoPConfig
from ..errors import ConfigError, UnsupportedError
from ..families.registry import host_of
from ..host import Host
from ..layout import Layout
from ..schedule import Method, ModelShape, resolve
from .arms import ARMS, Request, layouts
from .models import DTYPES, MODELS, WEIGHTS, heads

STAGES = ("vision", "tower", "select", "prefill", "decode", "ttft")
DENSE = "dense"
DEVICES = ("cpu", "cuda")
# Arms that never prune. Any other that is no backend prunes by itself, and is built with every setting.
STOCK_ARMS = ("stock_eager", "stock_compile")


@dataclass(frozen=True)
class Shape:
    """The size of a random model: widths in elements, layers as counts; `image_size`: pixels of a side of its images, or of
    those that it is given if it takes any (patches are 14 x 14).

    Heads of the encoder are 64 wide, those of the decoder `head`. MLPs: in the encoder 4 times `vision_hidden`, in the decoder
    `mlp`, by default 8/3 of `hidden` in steps of 64, as in LLaMA. dtype, device, family, weights: names in DTYPES, DEVICES,
    MODELS and WEIGHTS; name: for tables, "<hidden>x<layers>" by default.
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
    family: str = "llava"
    head: int = 64
    mlp: int | None = None
    weights: str = "float"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or f"{self.hidden}x{self.layers}")

    @property
    def intermediate(self) -> int:
        """The width of the decoder's MLP."""
        return self.mlp or -(-self.hidden * 8 // 3 // 64) * 64

    def check(self) -> None:
        """Raises ConfigError or UnsupportedError for a size, family, dtype or device that no model can be built with."""
        for what in ("hidden", "layers", "vision_hidden", "vision_layers", "image_size", "head"):
            _positive(what, getattr(self, what))
        for what, head in (("hidden", self.head), ("vision_hidden", 64)):
            width = getattr(self, what)
            if width % (2 * heads(width, head)):
                raise ConfigError(f"{what}={width} does not split into heads of {head}: choose a multiple of {head}")
        named: dict[str, Iterable[str]] = {"family": MODELS, "dtype": DTYPES, "device": DEVICES, "weights": WEIGHTS}
        for what, known in named.items():
            _known(what, getattr(self, what), known)
        if self.weights != "float" and not importlib.util.find_spec("torchao"):
            raise UnsupportedError(f"weights={self.weights!r} takes torchao: pip install 'vitcop-compile[quant]'")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("device 'cuda' needs a CUDA GPU, and there is none: use 'cpu'")

    def model(self, seed: int = 0) -> PreTrainedModel:
        """The stock model with random weights drawn from `seed`, on its device; `weights` as it is said."""
        with torch.device(self.device):
            return WEIGHTS[self.weights](MODELS[self.family](self, seed))

    def host(self) -> Host:
        """What the runtime knows of its images, without weights."""
        with torch.device("meta"):
            return host_of(MODELS[self.family](self, 0).config)

    def model_shape(self) -> ModelShape:
        """What a schedule depends on beside the images."""
        return self.host().shape


class Entrant(NamedTuple):
    """One arm of a case: a name in ARMS, the label of its settings ("dense", a preset, or the case's own), and those."""

    arm: str
    label: str
    config: Method

    @property
    def key(self) -> str:
        """Its name within the case."""
        return f"{self.arm} {self.label}"


@dataclass(frozen=True)
class Case:
    """One interleaved run: the arms `against`, the backend with nothing pruned, and the backend with every setting.

    backend: an arm named as a backend; presets: published settings; configs: further settings by label; against: arms to
    compare with, those that prune by themselves with every setting, all others dense; stages: what is timed, of STAGES,
    the selection along with prefill. batch, text_tokens, new_tokens, images, frames: the request, as in `Request`.
    """

    shape: Shape
    backend: str = "inductor"
    presets: tuple[str, ...] = tuple(PRESETS)
    batch: int = 1
    text_tokens: int = 64
    new_tokens: int = 64
    against: tuple[str, ...] = ("stock_compile",)
    configs: Mapping[str, Method] = field(default_factory=dict)
    stages: tuple[str, ...] = STAGES
    images: int = 1
    frames: int = 0

    def __str__(self) -> str:
        return f"{self.shape.name} {self.backend} batch {self.batch}, {self.text_tokens} text tokens"

    @property
    def request(self) -> Request:
        """What every arm serves."""
        return Request(self.batch, self.text_tokens, self.new_tokens, self.images, self.frames, self.shape.image_size)

    def layout(self) -> Layout:
        """The images of each prompt."""
        return tuple(segment for image in layouts(self.shape.host(), self.request) for segment in image)

    def settings(self) -> dict[str, Method]:
        """What is pruned, by label."""
        presets: dict[str, Method] = {name: ViTCoPConfig.preset(name) for name in self.presets}
        return presets | dict(self.configs)

    def entrants(self) -> list[Entrant]:
        """The arms of the run, in the order they are built."""
        dense: dict[str, Method] = {DENSE: ViTCoPConfig.dense()}
        settings = self.settings()
        arms = {arm: dense if arm in BACKENDS or arm in STOCK_ARMS else settings for arm in self.against}
        arms[self.backend] = dense | settings
        return [Entrant(arm, label, config) for arm, labels in arms.items() for label, config in labels.items()]

    def check(self) -> None:
        """Raises ConfigError or UnsupportedError for anything unknown, not positive or not possible, before work starts."""
        self.shape.check()
        backend_of(self.backend)
        for arm in (self.backend, *self.against):
            _known("arm", arm, ARMS)
        if self.backend in self.against or len(set(self.against)) < len(self.against):
            raise ConfigError(
                f"against={', '.join(self.against)} with backend {self.backend!r} names an arm twice: name each once"
            )
        for what in ("batch", "text_tokens", "new_tokens", "images"):
            _positive(what, getattr(self, what))
        if self.frames < 0:
            raise ConfigError(f"frames={self.frames} is below 0: give a count, or 0 for images")
        if self.images > self.text_tokens:
            raise ConfigError(
                f"images={self.images} with text_tokens={self.text_tokens}: every image stands behind a token of text, "
                "ask for more of these"
            )
        for stage in self.stages:
            _known("stage", stage, STAGES)
        for label in self.configs:
            if label == DENSE or label in NAMED_PRESETS:
                raise ConfigError(f"configs: {label!r} already names a setting: choose another label")
        shape, layout = self.shape.model_shape(), self.layout()
        for config in self.settings().values():
            resolve(config, shape, layout)


def check_cases(cases: Iterable[Case], rounds: int) -> None:
    """Raises as `Case.check`, for a count of rounds below 1, and for two shapes of one name."""
    _positive("rounds", rounds)
    shapes: dict[str, Shape] = {}
    for case in cases:
        case.check()
        if shapes.setdefault(case.shape.name, case.shape) != case.shape:
            raise ConfigError(f"two shapes are named {case.shape.name!r}: give one another name")


def _positive(what: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{what}={value} is below 1")


def _known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(f"{what} {name!r} is unknown: use one of {', '.join(known)}")
