"""The gate's subjects on a fake CUDA device: programs, and what `forward` gives them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram
from transformers import AutoConfig, PreTrainedModel

from ...bench import Request, Shape
from ...bench.bind import PROGRAMS, Served, compiled_by
from ...bench.models import MODELS
from ...config import ViTCoPConfig
from ...families.registry import host_of
from ...optimized import OptimizedModel
from ...pipeline import optimize
from .fake import HostReads, fake_cuda

# Called with every program's name, itself, and what it is given when the request passes through.
See = Callable[[str, ExportedProgram, Sequence[Any]], None]


def config_of(model: str, sizes: dict[str, Any]) -> Any:
    """The configuration of the random model of `sizes`, or of a folder or model on the hub."""
    if any(size is None for size in sizes.values()):
        return AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        return MODELS["llava"](Shape(**sizes), 0).config


def prompt_of(config: Any, request: Request) -> np.ndarray:
    """int64 [B, T]: the ids of `request`, as `HostReads` answers them: an image behind the first token of each prompt."""
    host = host_of(config)
    tokens = sum(segment.tokens for segment in host.layout)
    text = next(word for word in range(3, 99) if word not in host.token_ids)
    row = [text, *[host.token_id] * tokens, *[text] * (request.text_tokens - 1)]
    return np.array([row] * request.batch, dtype=np.int64)


def pass_through(
    kind: type[PreTrainedModel],
    config: Any,
    methods: dict[str, Any],
    request: Request,
    see: Callable[[str], See],
    **options: Any,
) -> dict[str, list[tuple[torch.dtype, tuple[int, ...]]]]:
    """Sends `request` and one more token through `forward` of a `kind` made of `config` in bf16, on a fake CUDA device, for
    every one of `methods` by label; `see(label)` sees its programs. Returns the reads of the host by label."""
    found = {}
    with fake_cuda() as mode, torch.no_grad():
        model = kind._from_config(config, dtype=torch.bfloat16).eval()
        last: OptimizedModel | None = None
        for label, method in methods.items():
            last = optimize(model, method, like=last, **options)
            seeing, names = see(label), iter(PROGRAMS)

            def note(program: ExportedProgram, seeing: See = seeing, names: Any = names) -> Any:
                plain, name = program.module(check_guards=False), next(names)

                def run(*given: Any) -> Any:
                    seeing(name, program, given)
                    return plain(*given)

                return run

            with HostReads(mode, prompt_of(config, request)) as host:
                Served(last, request).decode(compiled_by(last, note))
            found[label] = host.found
    return found


def presets(names: Sequence[str]) -> dict[str, ViTCoPConfig]:
    """Published settings by name."""
    return {name: ViTCoPConfig.preset(name) for name in names}


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a process measures: the model as `Settings` names it, the request, and the architecture."""

    architecture: str
    model: str
    sizes: dict[str, Any]
    presets: tuple[str, ...]
    batch: int
    text_tokens: int
    new_tokens: int

    @property
    def request(self) -> Request:
        """The request that passes through."""
        return Request(self.batch, self.text_tokens, self.new_tokens)
