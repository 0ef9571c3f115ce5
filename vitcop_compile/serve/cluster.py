"""What a cluster serves, as the command line and the files of Ray Serve say it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..config import DEFAULT_PRESET
from ..methods.named import settings_from
from .door import Limits
from .opening import Opening
from .pictures import Pictures


class Cluster(BaseModel):
    """Models by name, each a folder that every node reaches at that path or a name on the hub, and how they are served.

    replicas: engine processes, each of which holds all models; fronts: processes that speak HTTP, decode pictures and
    tokenize; cpus, gpus: of one engine replica, as Ray counts them, and as many threads; stalled_seconds: without a step,
    after which a replica is replaced; health_seconds: between two looks at that. Everything else is as the options of
    `vitcop-compile serve` have it. Raises pydantic's ValidationError for unknown names and wrong types.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    models: dict[str, str] = Field(min_length=1)
    replicas: int = Field(1, ge=1)
    fronts: int = Field(1, ge=1)
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)
    processor: str | None = None
    slots: int | None = None
    queue: int = 64
    max_text_len: int | None = None
    max_new_tokens: int | None = None
    image_hosts: list[str] = []
    max_body_mib: float = 20
    max_megapixels: float = 40
    drain_seconds: float = Field(60, ge=0)
    stalled_seconds: float = 60
    health_seconds: float = Field(5, gt=0)
    retention: str = DEFAULT_PRESET
    method: str | None = None
    backend: str = "inductor"
    image_sizes: list[tuple[int, int]] = []  # (height, width)
    images: list[int] = [1]
    dtype: str = "float32"
    runtime: str | None = None
    verify: bool = True

    def opening(self) -> Opening:
        """How its models are opened. Raises ConfigError."""
        names = ("slots", "queue", "max_text_len", "max_new_tokens", "runtime", "verify", "backend", "dtype", "image_sizes")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Opening(**given, images=self.images, settings=settings_from(self.retention, self.method, what="retention="))

    def limits(self) -> Limits:
        """What requests may be. Raises ConfigError."""
        pictures = Pictures(hosts=tuple(self.image_hosts), pixels=int(self.max_megapixels * 1e6))
        return Limits(body=int(self.max_body_mib * 2**20), stalled=self.stalled_seconds, pictures=pictures)

    def processor_of(self, name: str) -> str:
        """Where the processor of a model is."""
        return self.processor or self.models[name]
