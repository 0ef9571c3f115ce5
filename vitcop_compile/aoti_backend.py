"""The backend "aotinductor" of `optimize`: a program compiled ahead of time into a package, which runs without Python."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .bindings import Bindings, Signature
from .errors import UnsupportedError
from .inductor_backend import load_kernels, note_kernels
from .passes.lower_int8 import lower_int8
from .passes.lower_linear import lower_linear

_PACKAGE = "program.pt2"
# Weights stay out of the package, down to the smallest: all programs of a model read the model's own.
_OPTIONS: dict[str, Any] = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
}


def check() -> None:
    """Raises UnsupportedError where no C++ compiler is found."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError) as error:
        raise UnsupportedError(
            f"backend='aotinductor' compiles C++ ({error}): install g++, name a compiler in the environment variable CXX, or "
            "use backend='onnxruntime'"
        ) from None


def compile_ahead(program: ExportedProgram, options: dict[str, Any]) -> AheadProgram:
    """`program`, exported at static shapes, through AOTInductor; options: more of inductor's, by name.

    Raises UnsupportedError if the package asks for a constant that the program does not have.
    """
    inputs: tuple[Tensor, ...] = (program.example_inputs or ((), {}))[0]
    with tempfile.TemporaryDirectory(prefix="vitcop-") as folder:
        module = _package(program, Path(folder) / _PACKAGE, options)
        loaded = _load(Path(folder) / _PACKAGE, inputs[0].device)
    return AheadProgram(loaded, _constants(module, loaded.get_constant_fqns()), Signature.of(inputs))


def compile_kept(program: ExportedProgram, folder: Path, bindings: Bindings) -> AheadProgram:
    """As `compile_ahead` on a CPU; in `folder` what `load_kept` needs. Raises NotKept for constants that are none of the
    model's."""
    inputs: tuple[Tensor, ...] = (program.example_inputs or ((), {}))[0]
    held = _named(program.module(check_guards=False))
    bindings.write(folder, {name: _attribute(held, name) for name in sorted(_targets(held))})  # says so before minutes of work
    module = _package(program, folder / _PACKAGE, {})
    note_kernels(module, folder)
    loaded = _load(folder / _PACKAGE, inputs[0].device)
    constants = _constants(module, loaded.get_constant_fqns())
    bindings.write(folder, constants)
    signature = Signature.of(inputs)
    signature.write(folder)
    return AheadProgram(loaded, constants, signature)


def load_kept(folder: Path, bindings: Bindings, device: torch.device) -> AheadProgram:
    """The program that `compile_kept` left in `folder`, on the weights of the model in `bindings`."""
    load_kernels(folder)
    loaded = _load(folder / _PACKAGE, device)
    return AheadProgram(loaded, bindings.read(folder, device), Signature.read(folder, device))


def _package(program: ExportedProgram, path: Path, options: dict[str, Any]) -> fx.GraphModule:
    """Compiles into a package at `path`; the module that was compiled holds its constants."""
    from torch._inductor import aot_compile
    from torch._inductor.package import package_aoti

    inputs: tuple[Tensor, ...] = (program.example_inputs or ((), {}))[0]
    module = _named(lower_int8(lower_linear(program.module(check_guards=False), ahead=True)))
    with torch.no_grad():
        files = aot_compile(module, tuple(inputs), options=_OPTIONS | options)
        package_aoti(str(path), files)  # type: ignore[arg-type]
    return module


def _load(path: Path, device: torch.device) -> Any:
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path), device_index=device.index if device.index is not None else -1)


class AheadProgram:
    """One program as a callable: torch tensors in, a tuple of tensors out.

    constants: the tensors it reads, by name, which are neither copied nor let go; signature: what its inputs are.
    """

    def __init__(self, loaded: Any, constants: dict[str, Tensor], signature: Signature):
        self._constants, self._signature = constants, signature
        if constants:
            loaded.load_constants(constants, check_full_update=True, user_managed=True)
        self._loader = loaded.loader

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self._signature.check(inputs)
        return tuple(self._loader.boxed_run(list(inputs)))


def _named(module: fx.GraphModule) -> fx.GraphModule:
    """Makes constants that are neither parameters nor buffers into buffers: AOTInductor forgets the names of others."""
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for name in sorted(_targets(module) - known):
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        value = getattr(owner, last)
        delattr(owner, last)
        owner.register_buffer(last, value, persistent=False)
    return module


def _targets(module: fx.GraphModule) -> set[str]:
    return {node.target for node in module.graph.find_nodes(op="get_attr")}


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _constants(module: fx.GraphModule, names: list[str]) -> dict[str, Tensor]:
    """The tensors of `module` that the package calls `names`."""
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    if unknown := [name for name in names if name not in held]:
        raise UnsupportedError(
            f"AOTInductor made constants of its own ({', '.join(unknown)}), which the program cannot supply: use "
            "backend='inductor'"
        )
    return {name: held[name].detach() for name in names}
