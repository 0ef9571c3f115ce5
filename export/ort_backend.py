"""The backend "onnxruntime" of `optimize`: a program through ONNX, without a folder to keep."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch.export import ExportedProgram

from .manifest import ProgramSpec
from .onnx import BFLOAT16_OPSET, WEIGHTS, WeightStore, write_onnx
from .ort import OrtProgram

_OPSET = 18
_Loaded = TypeVar("_Loaded")


def load(program: ExportedProgram) -> OrtProgram:
    """`program` as a callable over torch CPU tensors."""
    return written(program, lambda path, spec: OrtProgram(path, spec, prepack=True))


def written(program: ExportedProgram, load: Callable[[Path, ProgramSpec], _Loaded]) -> _Loaded:
    """What `load` makes of `program` as an ONNX file. The file lives as long as that."""
    folder = tempfile.TemporaryDirectory(prefix="vitcop-")
    root = Path(folder.name)
    inputs = [f"in_{i}" for i in range(len(program.graph_signature.user_inputs))]
    outputs = [f"out_{i}" for i in range(len(program.graph_signature.user_outputs))]
    wide = any(tensor.dtype == torch.bfloat16 for tensor in program.state_dict.values())
    opset = BFLOAT16_OPSET if wide else _OPSET
    taken, given = write_onnx(program, root / "model.onnx", WeightStore(root / WEIGHTS), inputs, outputs, opset)
    loaded = load(root / "model.onnx", ProgramSpec("program", "model.onnx", None, taken, given))
    weakref.finalize(loaded, folder.cleanup)
    return loaded
