"""Runs ONNX programs in OpenVINO on torch CPU tensors, without a copy on the way in or out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, UnsupportedError
from .manifest import NAME, FolderError, Manifest, ProgramSpec, TensorSpec, file_digest
from .openvino_exact import keep_exact
from .ort import TORCH, check_inputs, resolve

PRECISIONS = ("f32", "f16", "bf16")
# What a device says it computes in.
_CAPABILITY = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}
_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_ELEMENT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "bool": "boolean"}
# numpy knows no bfloat16: OpenVINO is told the type.
_NUMPY = {
    torch.float32: "<f4", torch.float16: "<f2", torch.bfloat16: "<u2", torch.int64: "<i8", torch.bool: "|b1"
}  # fmt: skip
# What is up to so many bytes is copied into or out of a tensor that stays bound, which takes less time than to bind another.
_COPIED = 1 << 16


def package() -> Any:
    """The package openvino. Raises UnsupportedError, saying what to install, without it."""
    try:
        import openvino
    except ImportError as error:
        raise UnsupportedError(
            f"OpenVINO is not installed ({error}): pip install 'vitcop-compile[openvino]', or use onnxruntime"
        ) from None
    return openvino


def precision_of(dtype: torch.dtype, precision: str | None, device: str = "CPU") -> str:
    """What `device` is to compute in: `precision`, or what a model of `dtype` is in.

    Raises UnsupportedError for an unknown precision or device, for a precision that the device does not have, and for one half
    where the model is in the other.
    """
    own = _OF_DTYPE[dtype]
    chosen = own if precision is None else precision
    if chosen not in PRECISIONS:
        raise UnsupportedError(f"precision={precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
    if "f32" not in (chosen, own) and chosen != own:
        raise UnsupportedError(f"precision={precision!r}: the weights are {dtype}: use precision={own!r} or 'f32'")
    core = package().Core()
    found = core.available_devices
    if device.partition(".")[0] not in {name.partition(".")[0] for name in found}:
        raise UnsupportedError(
            f"device={device!r} is not one that OpenVINO finds here ({', '.join(found) or 'none'}): name one of these, or "
            "install its driver"
        )
    if _CAPABILITY[chosen] not in core.get_property(device, "OPTIMIZATION_CAPABILITIES"):
        asked = f"precision={precision!r}" if precision else f"a model in {str(dtype).removeprefix('torch.')}"
        raise UnsupportedError(f"{asked}: {device} does not compute in {_CAPABILITY[chosen]} here: use precision='f32'")
    return chosen


def opener(
    root: Path,
    manifest: Manifest,
    device: str | None,
    precision: str | None,
    threads: int | None,
    cache_dir: str | Path | None,
    exact: bool = False,
) -> Callable[[Path, ProgramSpec], OpenVinoProgram]:
    """What loads the programs of an ONNX folder. Raises as `precision_of` does, ConfigError for a cache inside the folder."""
    where = "CPU" if device is None else device
    chosen = precision_of(getattr(torch, manifest.dtype), precision, where)
    cache = None
    if cache_dir is not None:
        if Path(cache_dir).resolve().is_relative_to(root.resolve()):
            raise ConfigError(
                f"cache_dir={str(cache_dir)!r} is inside the folder, which stays as it was exported: name another"
            )
        # OpenVINO knows a model by its path and changes of its file, which say nothing of another file with the weights.
        cache = Path(cache_dir) / file_digest(root / NAME)[:32]
    return partial(OpenVinoProgram, precision=chosen, device=where, threads=threads, cache=cache, exact=exact)


class OpenVinoProgram:
    """One program as a callable: torch tensors in, a list of new torch tensors out, bound by address.

    precision: one of PRECISIONS, that the device computes in; threads: torch's number by default; cache: a folder for what was
    compiled, None for none; exact: products by int8 weights in floats, where OpenVINO would round the other factor as well.
    Every thread that calls has a request of its own. Raises FolderError for a file that does not load or is not what `spec`
    says.
    """

    def __init__(
        self,
        path: Path,
        spec: ProgramSpec,
        precision: str,
        device: str = "CPU",
        threads: int | None = None,
        cache: Path | None = None,
        exact: bool = False,
    ):
        self._ov = package()
        options: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            # Unless told otherwise a CPU that has bfloat16 computes float32 models in it.
            "INFERENCE_PRECISION_HINT": precision,
        }
        if device == "CPU":
            # Threads of processes beside each other would be bound to the same cores.
            options |= {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
        if exact:
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        if cache is not None:
            options["CACHE_DIR"] = str(cache)
        try:
            core = self._ov.Core()
            model = str(path) if precision == "f32" else keep_exact(self._ov, core, core.read_model(path))
            self._compiled = core.compile_model(model, device, options)
        except Exception as error:
            raise FolderError(f"{path.name} cannot be loaded by openvino {self._ov.__version__}: {error}") from None
        self._spec = spec
        for values, stated in ((self._compiled.inputs, spec.inputs), (self._compiled.outputs, spec.outputs)):
            _check_signature(path.name, values, stated)
        self._of_thread = threading.local()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        rows = check_inputs(self._spec, inputs)
        bound = getattr(self._of_thread, "bound", None)
        if bound is None:
            bound = self._of_thread.bound = _Bound(self._ov, self._compiled.create_infer_request(), self._spec)
        return bound(inputs, rows)


class _Bound:
    """A request of one thread, and what is bound to it.

    OpenVINO keeps what a request returns in memory that the next call writes over: all results are given as tensors of their
    own. Large ones, as caches, are bound by address, which keeps none of them alive; small ones are copied.
    """

    def __init__(self, ov: Any, request: Any, spec: ProgramSpec):
        self._ov, self._request, self._spec = ov, request, spec
        self._places: list[Any] = [None] * len(spec.inputs)
        self._given, self._found = _buffers(spec.inputs), _buffers(spec.outputs)
        for i, tensor in self._given.items():
            request.set_input_tensor(i, self._shared(tensor))
        for i, tensor in self._found.items():
            request.set_output_tensor(i, self._shared(tensor))

    def __call__(self, inputs: tuple[Tensor, ...], rows: int | None) -> list[Tensor]:
        held = []
        for i, tensor in enumerate(inputs):
            if i in self._given:
                self._given[i].copy_(tensor)
                continue
            tensor = tensor.contiguous()
            held.append(tensor)
            place = (tensor.data_ptr(), tensor.shape)
            if self._places[i] != place:
                self._request.set_input_tensor(i, self._shared(tensor))
                self._places[i] = place
        new: dict[int, Tensor] = {}
        for i, spec in enumerate(self._spec.outputs):
            if i not in self._found:
                new[i] = torch.empty(resolve(spec.shape, rows), dtype=TORCH[spec.dtype])
                self._request.set_output_tensor(i, self._shared(new[i]))
        # infer() would make an array of every result as well, at a third of a millisecond for a decoding step of 32 layers.
        self._request.start_async()
        self._request.wait()
        return [self._found[i].clone() if i in self._found else new[i] for i in range(len(self._spec.outputs))]

    def _shared(self, tensor: Tensor) -> Any:
        """`tensor`, contiguous, as OpenVINO's own over the same memory, which it does not keep alive."""
        array = np.asarray(_Memory(tensor))
        if tensor.dtype == torch.bfloat16:
            return self._ov.Tensor(array, self._ov.Shape(list(tensor.shape)), self._ov.Type.bf16)
        return self._ov.Tensor(array, shared_memory=True)


class _Memory:
    """Where the values of a tensor are, as numpy asks for it."""

    def __init__(self, tensor: Tensor):
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape), "typestr": _NUMPY[tensor.dtype], "version": 3
        }  # fmt: skip


def _buffers(specs: tuple[TensorSpec, ...]) -> dict[int, Tensor]:
    """A tensor for each input or output of static shape that is small."""
    found = {}
    for i, spec in enumerate(specs):
        shape = [dim for dim in spec.shape if isinstance(dim, int)]
        if len(shape) == len(spec.shape) and torch.Size(shape).numel() * TORCH[spec.dtype].itemsize <= _COPIED:
            found[i] = torch.zeros(shape, dtype=TORCH[spec.dtype])
    return found


def _check_signature(file: str, values: list[Any], stated: tuple[TensorSpec, ...]) -> None:
    """Raises FolderError where a program's inputs or outputs are not those stated; a dynamic dimension is one of "rows"."""
    if len(values) != len(stated):
        raise FolderError(f"{file} has {len(values)} inputs or outputs, vitcop.json says {len(stated)}")
    for value, spec in zip(values, stated, strict=True):
        shape = tuple(dim.get_length() if dim.is_static else "rows" for dim in value.partial_shape)
        found = (value.element_type.get_type_name(), shape)
        wanted = (_ELEMENT[spec.dtype], tuple(dim if isinstance(dim, int) else "rows" for dim in spec.shape))
        if spec.name not in value.names or found != wanted:
            raise FolderError(
                f"{file} has {sorted(value.names)} {found}, vitcop.json says {spec.name} {wanted}: the file belongs to "
                "another folder"
            )
