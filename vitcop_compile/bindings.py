"""Weights by name: what a kept program reads belongs to the model that it is loaded for."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError
from .fingerprint import NotKept
from .quantised import parts_of

_NAMES, _VALUES = "weights.json", "values.safetensors"
_SHAPES = "inputs.json"


class Bindings:
    """Parameters and buffers of `model`, by name and by tensor."""

    def __init__(self, model: nn.Module):
        named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        # Of a quantised weight programs read the plain tensors that it consists of.
        self._tensors = {f"{name} {part}".rstrip(): held for name, tensor in named for part, held in parts_of(tensor).items()}
        self._names: dict[Any, str] = {}
        for name, tensor in self._tensors.items():
            self._names.setdefault(id(tensor), name)
            self._names.setdefault(_place(tensor), name)

    def write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Says in `folder` which of the model's each of `tensors` is. Integers that are none of it are kept themselves.

        Raises NotKept for others: numbers that may have been computed from weights would not follow them.
        """
        names, values = {}, {}
        for name, tensor in tensors.items():
            known = self._names.get(id(tensor)) or self._names.get(_place(tensor))
            if known is None:
                if tensor.is_floating_point():
                    raise NotKept(f"{name} is a tensor of numbers that is none of the model's")
                values[name] = tensor.detach().clone().contiguous()
            names[name] = known
        (folder / _NAMES).write_text(json.dumps(names))
        save_file(values, folder / _VALUES)

    def read(self, folder: Path, device: torch.device) -> dict[str, Tensor]:
        """What `write` was given, of this model, in that order."""
        names = json.loads((folder / _NAMES).read_text())
        values = load_file(folder / _VALUES)
        return {
            name: values[name].to(device) if known is None else self._tensors[known].detach() for name, known in names.items()
        }


class Signature:
    """Shapes, types and device of a program's inputs."""

    def __init__(self, inputs: Iterable[tuple[torch.Size, torch.dtype, torch.device]]):
        self._inputs = list(inputs)

    @classmethod
    def of(cls, examples: Iterable[Tensor]) -> Signature:
        """That of one tensor per input."""
        return cls((tensor.shape, tensor.dtype, tensor.device) for tensor in examples)

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> Signature:
        """What `write` wrote; all are on `device`."""
        rows = json.loads((folder / _SHAPES).read_text())
        return cls((torch.Size(shape), getattr(torch, dtype), device) for shape, dtype in rows)

    def write(self, folder: Path) -> None:
        """Keeps it in a file of `folder`."""
        rows = [(list(shape), str(dtype).removeprefix("torch.")) for shape, dtype, _ in self._inputs]
        (folder / _SHAPES).write_text(json.dumps(rows))

    def check(self, inputs: tuple[Tensor, ...]) -> None:
        """Raises InputError for inputs that are others: compiled programs read and write memory by address."""
        if len(inputs) != len(self._inputs):
            raise InputError(f"the program takes {len(self._inputs)} inputs, got {len(inputs)}")
        for i, (tensor, (shape, dtype, device)) in enumerate(zip(inputs, self._inputs, strict=True)):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
                layout = "" if tensor.is_contiguous() else ", not contiguous"
                raise InputError(
                    f"input {i} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{layout}; the program takes {dtype} "
                    f"{tuple(shape)} on {device}, contiguous"
                )


def _place(tensor: Tensor) -> Any:
    """What two tensors over the same values share; nothing where there are none."""
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        address = 0
    return (address, tensor.dtype, tuple(tensor.shape), tensor.stride()) if address else object()
