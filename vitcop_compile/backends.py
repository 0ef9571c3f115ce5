"""What an exported program becomes: a callable over tensors. A backend is one function in a registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram

from .errors import UnsupportedError
from .passes.lower_linear import lower_linear

Program = Callable[..., Any]
Backend = Callable[[ExportedProgram], Program]
BACKENDS: dict[str, Backend] = {}


def register(name: str) -> Callable[[Backend], Backend]:
    """Adds a backend under `name`."""

    def add(backend: Backend) -> Backend:
        BACKENDS[name] = backend
        return backend

    return add


def backend_of(name: str) -> Backend:
    """The backend `name`. Raises UnsupportedError, listing the known ones."""
    if name not in BACKENDS:
        raise UnsupportedError(f"backend={name!r} is unknown: use one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


@register("eager")
def eager(program: ExportedProgram) -> Program:
    """The rewritten graph as it is, operator by operator."""
    return program.module(check_guards=False)


@register("inductor")
def inductor(program: ExportedProgram) -> Program:
    """torch.compile of the whole graph at static shapes; with CUDA graphs on CUDA. Compiles at the first call."""
    module = lower_linear(program.module(check_guards=False))
    on_cuda = any(parameter.is_cuda for parameter in module.parameters())
    options: dict[str, Any] = {"triton.cudagraphs": True} | _exact_division() if on_cuda else {}
    return torch.compile(module, fullgraph=True, dynamic=False, options=options or None)


def _exact_division() -> dict[str, bool]:
    """Quotas are rounded in fp32: a division that is off by an ulp could move a token. The option's name has changed."""
    names = ("eager_numerics.division_rounding", "emulate_division_rounding")
    return {name: True for name in names if name in torch._inductor.list_options()}
