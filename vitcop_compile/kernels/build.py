"""Builds the kernels with the compiler that inductor uses, once a machine and version of torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from .. import store
from ..errors import UnsupportedError

SOURCE = Path(__file__).with_name("cpu.cpp")
# No -ffast-math: linked into a library, it would switch denormal numbers off in the whole process.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
# Seconds in which whoever builds it must have ended.
_PATIENCE = 120.0
# Of torch's stable interface, which later versions keep.
_INTERFACE = "-DTORCH_TARGET_VERSION=0x020b000000000000"


@functools.cache
def load() -> None:
    """Registers the operators of `vitcop_cpu`, building their library where none is kept yet.

    Raises UnsupportedError where no compiler builds it, with what that says.
    """
    torch.ops.load_library(str(_library()))
    _describe()


@functools.cache
def begin() -> None:
    """Starts what compilers are asked once a machine, the library and which instructions inductor may use, in a thread: they
    take seconds, in which a graph is traced. `load` waits for it, and says what went wrong."""
    threading.Thread(target=_prepare, name="vitcop-kernels").start()


def _prepare() -> None:
    with contextlib.suppress(Exception):  # whoever needs it says so
        _library()
        instructions()


def instructions() -> None:
    """Lets inductor find out which instructions it may use here: by its own check, a second or two of a compiler, of the best
    that the processor says it has; of all of them, as inductor would, only where that fails."""
    from torch._inductor import config, cpu_vec_isa

    known = cpu_vec_isa.valid_vec_isa_list
    if config.cpp.vec_isa_ok is None and hasattr(known, "cache_info") and not known.cache_info().currsize:
        with config.patch({"cpp.vec_isa_ok": True}):
            best = cpu_vec_isa.pick_vec_isa()
        if best:
            return
        known.cache_clear()
    cpu_vec_isa.pick_vec_isa()


def _library() -> Path:
    """Where it is, built. Raises UnsupportedError as `load` does."""
    flags = (*_FLAGS, _native(), _INTERFACE)
    target = folder() / f"cpu-{_key(flags)}.so"
    if not target.exists():
        try:
            _build_once([_compiler(), *flags], target)
        except OSError as error:
            raise UnsupportedError(
                f"{target.parent} cannot be written ({error.strerror}): kernels for the CPU are built there; name a folder of "
                f"your own in {store.FOLDER} or TORCHINDUCTOR_CACHE_DIR"
            ) from None
    return target


def folder() -> Path:
    """Where the library is kept, and what was measured of it: with the programs that call it, or where none are kept, with
    inductor's cache."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return store.folder("kernels") or Path(cache_dir()) / "vitcop"


def text() -> str:
    """All of the source."""
    return "".join(path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))


def machine() -> str:
    """The CPU as far as compiled code and the speed of kernels depend on it."""
    wanted = ("model name", "flags", "Features", "CPU part")
    found: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in wanted:
                found.setdefault(name.strip(), value.strip())
    return repr((platform.machine(), platform.processor(), sorted(found.items())))


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise UnsupportedError(f"kernels for the CPU are C++ ({error}): {_REMEDY}") from None


_REMEDY = "install g++ or clang++, name it in the environment variable CXX, or use backend='eager' or 'onnxruntime'"


def _native() -> str:
    return "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"


def _key(flags: tuple[str, ...]) -> str:
    """Whatever the compiler: a library that is kept is loaded where none is installed."""
    parts = (text(), repr(flags), torch.__version__, machine())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _build_once(command: list[str], target: Path) -> None:
    """Processes that start together build it once; two may where a file system has no locks."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(target.with_suffix(".lock"), timeout=_PATIENCE):
            if not target.exists():
                _build(command, target)
    except (Timeout, NotImplementedError):
        _build(command, target)


def _build(command: list[str], target: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        made = Path(aside) / target.name
        links = ("-L", str(torch_folder / "lib"), "-ltorch_cpu", "-lc10")
        run = [*command, "-I", str(torch_folder / "include"), str(SOURCE), "-o", str(made), *links]
        done = subprocess.run(run, capture_output=True, text=True)
        if done.returncode:
            said = "\n".join(done.stderr.strip().splitlines()[:5])
            raise UnsupportedError(f"kernels for the CPU are C++, which {command[0]} does not build ({said}): {_REMEDY}")
        os.replace(made, target)


def _describe() -> None:
    """Their shapes, for tracing."""

    @torch.library.register_fake("vitcop_cpu::linear_few")
    def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]))

    @torch.library.register_fake("vitcop_cpu::linear_int8")
    def _(input: Tensor, weight: Tensor) -> Tensor:
        return input.new_empty((*input.shape[:-1], weight.shape[0]), dtype=torch.int32)

    @torch.library.register_fake("vitcop_cpu::decode_attention")
    def _(query: Tensor, key: Tensor, value: Tensor, scale: float, at: Tensor) -> Tensor:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
