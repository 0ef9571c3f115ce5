"""A CUDA device that is not there: tensors on cuda:0 with shapes and types, and no values."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ...errors import UnsupportedError

# What torch's own builds for a CPU lack: whoever asks which device is current. Nothing is launched, so nothing is guarded.
_GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace { C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>) }
"""
_COMPILERS = ("c++", "g++", "clang++")


def missing() -> str | None:
    """Why there can be no such device here, None where there can."""
    if torch.cuda._is_compiled():
        return f"torch {torch.__version__} is a build for CUDA, which has devices or an error of its own: use the one for CPUs"
    if _compiler() is None and not _guard().exists():
        return f"no C++ compiler was found ({', '.join(_COMPILERS)}): install one, or name it in CXX"
    return None


@functools.cache
def load_guard() -> None:
    """Loads the guard into this process, for good; it is built once for each version of torch. Raises UnsupportedError."""
    reason = missing()
    if reason is not None:
        raise UnsupportedError(f"there can be no fake CUDA device: {reason}")
    if not _guard().exists():
        _build(_guard())
    ctypes.CDLL(str(_guard()))


def _guard() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitcop_compile"
    key = hashlib.sha256(f"{torch.__version__} {torch.version.git_version} {_GUARD}".encode()).hexdigest()
    return root / f"cuda_guard_{key[:16]}.so"


def _compiler() -> str | None:
    return next((found for name in (os.environ.get("CXX", ""), *_COMPILERS) if name and (found := shutil.which(name))), None)


def _build(target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, made = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(_GUARD)
        flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{home / 'include'}", f"-L{home / 'lib'}"]
        command = [str(_compiler()), *flags, str(source), "-lc10", "-o", str(made)]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            raise UnsupportedError(f"{command[0]} cannot build the guard of a fake CUDA device: {built.stderr.strip()[-500:]}")
        made.replace(target)  # whole or not at all: other processes may look for it


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Within the context tensors are fake, and made on cuda:0 where no device is named. Raises UnsupportedError."""
    load_guard()
    with FakeTensorMode() as mode, torch.device("cuda"):
        yield mode


class HostReads(TorchFunctionMode):
    """Answers the reads that `OptimizedModel.forward` may make, of `ids` int64 [B, T], of a mask of ones and of whether pixels
    are finite, and lists them in `found`, by type and shape. Any other read of a fake tensor is an error."""

    def __init__(self, mode: FakeTensorMode, ids: np.ndarray):
        super().__init__()
        self._mode, self.ids = mode, ids
        self.found: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.from_numpy:
            return self._mode.from_tensor(func(*args))
        if func not in (Tensor.cpu, Tensor.__bool__) or args[0].device.type != "cuda":
            return func(*args, **(kwargs or {}))
        self.found.append((args[0].dtype, tuple(args[0].shape)))
        if func is Tensor.__bool__:
            return True
        if args[0].shape != self.ids.shape:
            raise UnsupportedError(f"a tensor {args[0].dtype} {tuple(args[0].shape)} is read, which is neither ids nor mask")
        values = self.ids if args[0].dtype == torch.int64 else np.ones_like(self.ids, dtype=bool)
        return types.SimpleNamespace(numpy=lambda: values)
