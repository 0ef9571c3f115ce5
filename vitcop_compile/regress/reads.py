"""Counts what a run reads back to the host: on a GPU each read waits for everything before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Reads that copy a CPU tensor without an operator: only the Python call shows them there.
_CALLS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu)
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Reads:
    """`count`: reads so far."""

    def __init__(self) -> None:
        self.count = 0
        self.inside = False


@contextmanager
def reads() -> Iterator[Reads]:
    """Within the context every read of a tensor's values by the host is counted, on a CPU as it would occur on a GPU.

    Counted are operators whose output or shape depends on data (item, equal, nonzero, masked_select, an index by a mask, ...),
    copies from a device to the host, and `tolist`, `numpy` and `cpu`. Compiled code must not run inside.
    """
    found = Reads()
    with ExitStack() as stack:
        stack.enter_context(_Calls(found))
        stack.enter_context(_Operators(found))
        yield found


class _Calls(TorchFunctionMode):
    def __init__(self, found: Reads):
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _CALLS:
            return func(*args, **(kwargs or {}))
        self._found.count += 1
        self._found.inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._found.inside = False


class _Operators(TorchDispatchMode):
    def __init__(self, found: Reads):
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self._found.inside and _is_read(func, args, out):
            self._found.count += 1
        return out


def _is_read(func: Any, args: Any, out: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if any(tag in func.tags for tag in _DATA_DEPENDENT):
        return True
    if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
        return source.device.type != "cpu" and out.device.type == "cpu"
    return False
