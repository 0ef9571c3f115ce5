"""The backend "aotinductor" of `optimize`: a program compiled ahead of time into a package, which runs without Python."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from .errors import InputError, UnsupportedError
from .passes.lower_int8 import lower_int8
from .passes.lower_linear import lower_linear

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
    from torch._inductor import aot_compile, aoti_load_package
    from torch._inductor.package import package_aoti

    inputs: tuple[Tensor, ...] = (program.example_inputs or ((), {}))[0]
    module = _named(lower_int8(lower_linear(program.module(check_guards=False), ahead=True)))
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="vitcop-") as folder:
        files = aot_compile(module, tuple(inputs), options=_OPTIONS | options)
        path = package_aoti(str(Path(folder) / "program.pt2"), files)  # type: ignore[arg-type]
        device = inputs[0].device
        loaded = aoti_load_package(path, device_index=device.index if device.index is not None else -1)
    return AheadProgram(loaded, _constants(module, loaded.get_constant_fqns()), inputs)


class AheadProgram:
    """One program as a callable: torch tensors in, a tuple of tensors out.

    constants: the tensors it reads, by name, which are neither copied nor let go; examples: one tensor per input, of the
    shape, type and device that it takes.
    """

    def __init__(self, loaded: Any, constants: dict[str, Tensor], examples: tuple[Tensor, ...]):
        self._constants = constants
        self._signature = [(tensor.shape, tensor.dtype, tensor.device) for tensor in examples]
        if constants:
            loaded.load_constants(constants, check_full_update=True, user_managed=True)
        self._loader = loaded.loader

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        # A compiled program reads and writes memory by address: what does not fit must not reach it.
        if len(inputs) != len(self._signature):
            raise InputError(f"the program takes {len(self._signature)} inputs, got {len(inputs)}")
        for i, (tensor, (shape, dtype, device)) in enumerate(zip(inputs, self._signature, strict=True)):
            if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
                layout = "" if tensor.is_contiguous() else ", not contiguous"
                raise InputError(
                    f"input {i} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}{layout}; the program takes {dtype} "
                    f"{tuple(shape)} on {device}, contiguous"
                )
        return tuple(self._loader.boxed_run(list(inputs)))


def _named(module: fx.GraphModule) -> fx.GraphModule:
    """Makes constants that are neither parameters nor buffers into buffers: AOTInductor forgets the names of others."""
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for name in sorted({node.target for node in module.graph.find_nodes(op="get_attr")} - known):
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        value = getattr(owner, last)
        delattr(owner, last)
        owner.register_buffer(last, value, persistent=False)
    return module


def _constants(module: fx.GraphModule, names: list[str]) -> dict[str, Tensor]:
    """The tensors of `module` that the package calls `names`."""
    held = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    if unknown := [name for name in names if name not in held]:
        raise UnsupportedError(
            f"AOTInductor made constants of its own ({', '.join(unknown)}), which the program cannot supply: use "
            "backend='inductor'"
        )
    return {name: held[name].detach() for name in names}
