"""The backend "onnxruntime" of `optimize`: a program through ONNX, without a folder to keep."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path

from torch.export import ExportedProgram

from .manifest import ProgramSpec
from .onnx import WEIGHTS, WeightStore, write_onnx
from .ort import OrtProgram

_OPSET = 18


def load(program: ExportedProgram) -> OrtProgram:
    """`program` as a callable over torch CPU tensors. The files live as long as the callable."""
    folder = tempfile.TemporaryDirectory(prefix="vitcop-")
    root = Path(folder.name)
    inputs = [f"in_{i}" for i in range(len(program.graph_signature.user_inputs))]
    outputs = [f"out_{i}" for i in range(len(program.graph_signature.user_outputs))]
    taken, given = write_onnx(program, root / "model.onnx", WeightStore(root / WEIGHTS), inputs, outputs, _OPSET)
    loaded = OrtProgram(
        root / "model.onnx", ProgramSpec("program", "model.onnx", None, taken, given), prepack=True, exact=True
    )
    weakref.finalize(loaded, folder.cleanup)
    return loaded
