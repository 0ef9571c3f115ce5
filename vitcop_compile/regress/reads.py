"""Counts what a run reads back to the host: on a GPU each read waits for everything before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Reads that copy a CPU tensor without an operator: only the Python call shows them there.
_CALLS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu)
_DATA_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Reads(TorchDispatchMode):
    """`count`: reads so far, by operators."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += _is_read(func, args, out)
        return out


class _Calls(TorchFunctionMode):
    """Counts the calls that are reads, each as one, whatever operators it runs."""

    def __init__(self, found: Reads):
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._found.count
        out = func(*args, **(kwargs or {}))
        if func in _CALLS:
            self._found.count = before + 1
        return out


@contextmanager
def reads() -> Iterator[Reads]:
    """Within the context every read of a tensor's values by the host is counted, on a CPU as it would occur on a GPU.

    Counted are operators whose output or shape depends on data (item, equal, nonzero, masked_select, an index by a mask, ...),
    copies from a device to the host, and `tolist`, `numpy` and `cpu`. Compiled code must not run inside.
    """
    with Reads() as found, _Calls(found):
        yield found


def _is_read(func: Any, args: Any, out: Any) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
        return source.device.type != "cpu" and out.device.type == "cpu"
    return not _DATA_DEPENDENT.isdisjoint(func.tags)
