"""Runs ONNX programs in onnxruntime on torch CPU tensors, without a copy on the way in or out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError
from .manifest import FolderError, ProgramSpec, TensorSpec

TORCH = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "bool": torch.bool,
}
_ORT = {
    "float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)", "int64": "tensor(int64)",
    "bool": "tensor(bool)",
}  # fmt: skip
# onnx.TensorProto's element types.
_ELEMENT = {"float32": 1, "float16": 10, "bfloat16": 16, "int8": 3, "int64": 7, "bool": 9}


class OrtProgram:
    """One program as a callable: torch tensors in, a list of new torch tensors out, bound by address.

    threads: torch's number by default; prepack: copy the weights into the kernels' layout, once in every program; exact: of
    int8 weights, make floats when the program loads, in place of kernels that round what they multiply to int8, too; weights:
    CPU tensors by name, in place of those that the program has in another file.
    """

    def __init__(
        self,
        path: Path,
        spec: ProgramSpec,
        threads: int | None = None,
        prepack: bool = False,
        exact: bool = False,
        weights: dict[str, Tensor] | None = None,
    ):
        try:
            import onnxruntime
        except ImportError as error:
            raise UnsupportedError(
                f"running an ONNX folder needs onnxruntime ({error}): pip install 'vitcop-compile[onnx]'"
            ) from None
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or torch.get_num_threads()
        # Every program has a pool of threads; one that still spins when the next program runs takes a core from it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Packed, every program holds all weights again; unpacked they stay in the one mapped file.
        options.add_session_config_entry("session.disable_prepacking", "0" if prepack else "1")
        # One block for each output channel, not the 32 rows by default: half the time of a product.
        options.add_session_config_entry("session.qdq_matmulnbits_block_size", "-1")
        options.add_session_config_entry("session.disable_quant_qdq", "1" if exact else "0")
        # onnxruntime reads them where they are, for as long as the session lives.
        self._weights = {name: weight.detach().contiguous() for name, weight in (weights or {}).items()}
        if self._weights:
            values = [_value(weight) for weight in self._weights.values()]
            options.add_external_initializers(list(self._weights), values)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FolderError(f"{path.name} cannot be loaded by onnxruntime {onnxruntime.__version__}: {error}") from None
        self._spec = spec
        for values, stated in ((self._session.get_inputs(), spec.inputs), (self._session.get_outputs(), spec.outputs)):
            _check_signature(path.name, values, stated)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        rows = check_inputs(self._spec, inputs)
        binding = self._session.io_binding()
        held = []
        for spec, tensor in zip(self._spec.inputs, inputs, strict=True):
            tensor = tensor.contiguous()
            held.append(tensor)
            binding.bind_input(spec.name, "cpu", 0, _ELEMENT[spec.dtype], tuple(tensor.shape), tensor.data_ptr())
        outputs = []
        for spec in self._spec.outputs:
            output = torch.empty(resolve(spec.shape, rows), dtype=TORCH[spec.dtype])
            outputs.append(output)
            binding.bind_output(spec.name, "cpu", 0, _ELEMENT[spec.dtype], tuple(output.shape), output.data_ptr())
        self._session.run_with_iobinding(binding)
        return outputs


def _value(tensor: Tensor) -> Any:
    """onnxruntime's view of a CPU tensor."""
    import onnxruntime

    name = str(tensor.dtype).removeprefix("torch.")
    array = tensor.view(torch.int16).numpy() if name == "bfloat16" else tensor.numpy()
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ELEMENT[name])


def _check_signature(file: str, values: list[Any], stated: tuple[TensorSpec, ...]) -> None:
    """Raises FolderError where a program's inputs or outputs are not those stated. A dynamic dimension has any name."""
    found = [
        (value.name, value.type, tuple(dim if isinstance(dim, int) else "rows" for dim in value.shape)) for value in values
    ]
    wanted = [
        (spec.name, _ORT[spec.dtype], tuple(dim if isinstance(dim, int) else "rows" for dim in spec.shape)) for spec in stated
    ]
    if len(found) != len(wanted):
        raise FolderError(f"{file} has {len(found)} inputs or outputs, vitcop.json says {len(wanted)}")
    if wrong := [pair for pair in zip(found, wanted) if pair[0] != pair[1]]:
        raise FolderError(f"{file} has {wrong[0][0]}, vitcop.json says {wrong[0][1]}: the file belongs to another folder")


def check_inputs(spec: ProgramSpec, inputs: tuple[Tensor, ...]) -> int | None:
    """Checks count, types and shapes against a program's spec; returns the rows of the turn. Raises InputError."""
    if len(inputs) != len(spec.inputs):
        raise InputError(f"{spec.kind} takes {len(spec.inputs)} inputs, got {len(inputs)}")
    rows: int | None = spec.rows[1] if spec.rows else None
    for expected, tensor in zip(spec.inputs, inputs, strict=True):
        if tensor.dtype != TORCH[expected.dtype]:
            raise InputError(f"{spec.kind}: input {expected.name} is {tensor.dtype}, the engine takes {expected.dtype}")
        if expected.name == "ids" and tensor.dim() == 2 and spec.rows is not None:
            rows = tensor.shape[1]
            if not spec.rows[0] <= rows <= spec.rows[1]:
                raise InputError(f"{spec.kind}: {rows} rows of a turn, the engine takes {spec.rows[0]} to {spec.rows[1]}")
        if tuple(tensor.shape) != resolve(expected.shape, rows):
            raise InputError(
                f"{spec.kind}: input {expected.name} has shape {tuple(tensor.shape)}, the engine takes "
                f"{resolve(expected.shape, rows)}"
            )
    return rows


def resolve(shape: tuple[int | str, ...], rows: Any) -> tuple[int, ...]:
    """The shape of a spec for a turn of `rows` rows: "rows" and "rows-110" become counts."""
    return tuple(dim if isinstance(dim, int) else _count(dim, rows) for dim in shape)


def _count(expression: str, rows: int) -> int:
    name, minus, offset = expression.partition("-")
    if name != "rows" or (minus and not offset.isdigit()):
        raise FolderError(f"vitcop.json: dimension {expression!r} is neither a count nor 'rows' less a count")
    return rows - int(offset or 0)
