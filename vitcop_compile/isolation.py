"""What keeps a trace, the user's model and the user's surroundings apart."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

_Module = TypeVar("_Module", bound=nn.Module)
# Tracing swaps parameters for fake ones and patches torch.nn.Module for the whole process: one thread at a time.
_TRACING = threading.RLock()
_CONTENTS = ("_parameters", "_buffers", "_modules")


def shell(model: _Module) -> _Module:
    """A copy of the modules of `model`, over the same parameters and buffers.

    Tracing changes modules while it lasts, and leaves them changed if it is cut short. What is traced is therefore this
    copy, and the user's own model stays usable meanwhile, in other threads too.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _traceable(tensor) for tensor in tensors})


def _traceable(tensor: Tensor) -> Tensor:
    """`tensor` itself; of one made in inference mode, which cannot ask for a gradient when traced, one that does not."""
    if not tensor.is_inference() or not tensor.requires_grad:
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=False)


@contextlib.contextmanager
def tracing(*modules: nn.Module) -> Iterator[None]:
    """Within the context no other thread traces or compiles, and neither autocast nor inference mode is on.

    Should it end in an error, `modules` and all in them have the parameters, buffers and children they had before.
    """
    with _TRACING, plain():
        held = [(child, name, dict(child.__dict__[name])) for child in _all(modules) for name in _CONTENTS]
        try:
            yield
        except BaseException:
            for child, name, values in held:
                contents = child.__dict__[name]
                contents.clear()
                contents.update(values)
            raise


def _all(modules: tuple[nn.Module, ...]) -> list[nn.Module]:
    return list(dict.fromkeys(child for module in modules for child in module.modules()))


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within the context neither autocast nor inference mode is on: programs are traced, and run, without either.

    Autocast would trace its casts into a program, for good; tensors made in inference mode make a program compile anew.
    """
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
