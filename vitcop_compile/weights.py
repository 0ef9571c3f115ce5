"""Whether a model is still the one that its programs were made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import UnsupportedError


class Weights:
    """The parameters, buffers and modules of `model` as they are now; `check` tells whether they still are.

    copied: whether programs hold copies of the weights. Where they read the model's own, values may change in place (an
    optimizer's step, `load_state_dict`) and programs follow; copies do not, and `check` refuses that too.
    """

    def __init__(self, model: nn.Module, copied: bool = False):
        self._model = model
        self._copied = copied
        self._contents = [
            (contents, len(contents), path)
            for path, module in model.named_modules()
            for contents in (module._parameters, module._buffers, module._modules)
        ]
        self._children = [
            (module._modules, name, child) for _, module in model.named_modules() for name, child in module._modules.items()
        ]
        self._tensors = [
            (contents, name, tensor, _address(tensor), _dtype(tensor))
            for module in model.modules()
            for contents in (module._parameters, module._buffers)
            for name, tensor in contents.items()
        ]
        self._versions = self._sum_of_versions()

    def check(self) -> None:
        """Raises UnsupportedError, naming what differs, for a model that programs no longer follow. Reads no value.

        Noticed are parameters, buffers and modules that were added, removed or replaced (`load_state_dict(assign=True)`, an
        adapter), and those that were moved or converted. Some tens of microseconds for a model of 7B.
        """
        for contents, size, path in self._contents:
            if len(contents) != size:
                self._refuse(f"{path or 'the model itself'} has gained or lost parameters, buffers or modules")
        for children, name, child in self._children:
            if children.get(name) is not child:
                self._refuse(f"module {self._path(children, name)} was replaced")
        for contents, name, tensor, address, dtype in self._tensors:
            if contents.get(name) is not tensor:
                self._refuse(f"{self._path(contents, name)} was replaced")
            if _address(tensor) != address or _dtype(tensor) != dtype:
                self._refuse(f"{self._path(contents, name)} was moved or converted")
        if self._copied and self._sum_of_versions() != self._versions:
            self._refuse("weights were changed in place, and the programs of this backend hold copies")

    def _sum_of_versions(self) -> int:
        tensors = (tensor for _, _, tensor, *_ in self._tensors if tensor is not None)
        return sum(tensor._version for tensor in tensors if not tensor.is_inference())

    def _path(self, contents: dict, name: str) -> str:
        for path, module in self._model.named_modules():
            if any(contents is held for held in (module._parameters, module._buffers, module._modules)):
                return f"{path}.{name}".lstrip(".")
        return name

    def _refuse(self, what: str) -> None:
        raise UnsupportedError(
            f"the model has changed since optimize(): {what}; compiled programs do not follow that: optimize again"
        )


def _dtype(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _address(tensor: Tensor | None) -> int:
    """Where the values are; 0 where there are none, as on meta and in fake tensors."""
    try:
        return 0 if tensor is None else tensor.data_ptr()
    except RuntimeError:
        return 0
