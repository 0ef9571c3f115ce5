"""Programs that are kept between processes: found by what they depend on, before anything is captured or exported."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import ExportedProgram

from . import store
from .bindings import Bindings
from .fingerprint import NotKept, of_key, of_method, of_model, of_schedule, of_surroundings, of_text
from .schedule import Method, Schedule

log = logging.getLogger("vitcop_compile")
Program = Callable[..., Any]


class Keeper(NamedTuple):
    """How a backend keeps programs. compile(program, folder, bindings) -> program: compiles, and leaves in the folder what
    `load(folder, bindings, device) -> program` needs; raises NotKept before it compiles what it cannot keep. values(model)
    -> text: what of the weights' values is in the folder."""

    compile: Callable[[ExportedProgram, Path, Bindings], Program]
    load: Callable[[Path, Bindings, torch.device], Program]
    values: Callable[[nn.Module], str] = lambda model: ""


class Kept:
    """The programs of one model, method and backend in a store."""

    def __init__(self, held: store.Store, keeper: Keeper, model: nn.Module, group: str, device: torch.device):
        self._store, self._keeper, self.group, self._device = held, keeper, group, device
        self._bindings = Bindings(model)

    @property
    def known(self) -> bool:
        """Whether any program is kept: the model has been captured by this method before."""
        return self._store.knows(self.group)

    def has(self, key: tuple, schedule: Schedule) -> bool:
        """Whether the program of `key` is kept; it is not read."""
        name = self._name(key, schedule)
        return name is not None and self._store.has(self.group, name)

    def load(self, key: tuple, schedule: Schedule) -> tuple[Program, int, str] | None:
        """The program of `key`, the bytes that it holds, and a word for the log; None where there is none that loads."""
        name = self._name(key, schedule)
        if name is None or (path := self._store.get(self.group, name)) is None:
            return None
        try:
            size = int((path / "bytes").read_text())
            program = self._keeper.load(path, self._bindings, self._device)
        except Exception as error:  # whatever a compiler's own loader says of a file that is none of its own
            self._store.discard(self.group, name, f"{type(error).__name__}: {error}")
            return None
        log.debug("%s: found in %s", key[0], path)
        return program, size, "found and loaded"

    def compile(self, key: tuple, schedule: Schedule, program: ExportedProgram, size: int) -> Program | None:
        """`program` compiled, and kept; None where it cannot be, which the log says."""
        name = self._name(key, schedule)
        if name is None:
            return None
        folder = self._store.aside()
        try:
            compiled = self._keeper.compile(program, folder, self._bindings)
            (folder / "bytes").write_text(str(size))
        except NotKept as error:
            log.info("%s is not kept: %s", key[0], error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._store.put(self.group, name, folder, {"kind": key[0], "torch": torch.__version__})
        return compiled

    def _name(self, key: tuple, schedule: Schedule) -> str | None:
        try:
            return of_text(of_key(key), of_schedule(schedule))
        except NotKept as error:
            log.info("%s is not kept: %s", key[0], error)
            return None


def kept(model: nn.Module, method: Method, backend: str, keeper: Keeper | None, *settings: Any) -> Kept | None:
    """Where the programs of `model` by `method` are kept; None where there is no store, or they cannot be, which the log says.

    settings: what else programs depend on, for JSON. Programs for CUDA are not kept.
    """
    held = store.current()
    device = next(model.parameters()).device
    if held is None or keeper is None or device.type != "cpu":
        return None
    try:
        parts = [of_model(model), of_method(method), of_surroundings(device), keeper.values(model)]
    except NotKept as error:
        log.info("programs of this model are not kept: %s", error)
        return None
    return Kept(held, keeper, model, of_text(*parts, backend, *settings), device)
