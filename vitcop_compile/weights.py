"""Whether a model is still the one that its programs were made of."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import Tensor, nn

from .errors import UnsupportedError
from .quantised import parts_of


class Weights:
    """The parameters, buffers and modules of `model` as they are now; `check` tells whether they still are.

    copied: whether programs hold copies of the weights. Where they read the model's own, values may change in place (an
    optimizer's step, `load_state_dict`) and programs follow; copies do not, and `check` refuses that too.
    """

    def __init__(self, model: nn.Module, copied: bool = False):
        self._model = model
        self._copied = copied
        self._contents = [
            (contents, dict(contents), path)
            for path, module in model.named_modules()
            for contents in (module._parameters, module._buffers, module._modules)
        ]
        held = [value for contents, _, _ in self._contents for value in contents.values()]
        whole = [value for value in held if isinstance(value, Tensor)]
        # A quantised weight consists of plain tensors, which are what programs read.
        parts = [parts_of(tensor) for tensor in whole]
        self._tensors = [part for found in parts for part in found.values()]
        self._owners = [tensor for tensor, found in zip(whole, parts) for _ in found]
        self._parts = [(tensor, name, part) for tensor, found in zip(whole, parts) for name, part in found.items() if name]
        self._dicts, self._held = [contents for contents, _, _ in self._contents], held
        self._addresses, self._dtypes = self._places()
        self._versions = self.version

    def check(self) -> None:
        """Raises UnsupportedError, naming what differs, for a model that programs no longer follow. Reads no value.

        Noticed are parameters, buffers and modules that were added, removed or replaced (`load_state_dict(assign=True)`, an
        adapter), and those that were moved or converted. It runs before every prompt, so its loops are Python's own.
        """
        now = itertools.chain.from_iterable(map(dict.values, self._dicts))
        if sum(map(len, self._dicts)) != len(self._held) or not all(map(operator.is_, now, self._held)):
            if self._places()[1] != self._dtypes:  # a conversion replaces buffers too
                self._refuse_places()
            self._refuse_contents()
        elif self._places() != (self._addresses, self._dtypes):
            self._refuse_places()
        for tensor, name, part in self._parts:
            if getattr(tensor, name, None) is not part:
                self._refuse(f"{name} of {self._path(tensor)}, a quantised weight, was replaced, moved or converted")
        if self._copied and self.version != self._versions:
            self._refuse("weights were changed in place, and the programs of this backend hold copies")

    def _places(self) -> tuple[list[int], list[torch.dtype]]:
        """Of every tensor, where its values are and what type they have."""
        try:
            addresses = list(map(Tensor.data_ptr, self._tensors))
        except RuntimeError:  # some have no values, as fake tensors
            addresses = list(map(_address, self._tensors))
        return addresses, list(map(operator.attrgetter("dtype"), self._tensors))

    def _refuse_contents(self) -> None:
        for contents, before, path in self._contents:
            if contents.keys() != before.keys():
                self._refuse(f"{path or 'the model itself'} has gained or lost parameters, buffers or modules")
            for name, value in before.items():
                if contents[name] is not value:
                    what = "module " if isinstance(value, nn.Module) else ""
                    self._refuse(f"{what}{path}.{name} was replaced".replace(" .", " ").lstrip("."))

    def _refuse_places(self) -> None:
        addresses, dtypes = self._places()
        for tensor, *pairs in zip(self._owners, zip(addresses, self._addresses), zip(dtypes, self._dtypes)):
            if any(now != before for now, before in pairs):
                self._refuse(f"{self._path(tensor)} was moved or converted")

    def _path(self, tensor: Tensor) -> str:
        for _, before, path in self._contents:
            for name in before:
                if before[name] is tensor:
                    return f"{path}.{name}".lstrip(".")
        return "a tensor"

    @property
    def version(self) -> int:
        """A number that grows with every change of values in place; those of inference mode are not counted."""
        return sum(tensor._version for tensor in self._tensors if not tensor.is_inference())

    def _refuse(self, what: str) -> None:
        raise UnsupportedError(
            f"the model has changed since optimize(): {what}; compiled programs do not follow that: optimize again"
        )


def _address(tensor: Tensor) -> int:
    """Where the values are; 0 where there are none, as on meta and in fake tensors."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0
