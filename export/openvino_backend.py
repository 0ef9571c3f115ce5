"""The backend "openvino" of `optimize`: a program through ONNX, without a folder to keep."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from .openvino import OpenVinoProgram, precision_of
from .ort_backend import written


def load(program: ExportedProgram, precision: str | None = None) -> OpenVinoProgram:
    """`program` as a callable over torch CPU tensors, computed in `precision`, by default in what its weights are in; that of
    int8 weights is the type of what they multiply, which is not rounded."""
    dtypes = [tensor.dtype for tensor in program.state_dict.values() if tensor.is_floating_point()]
    chosen = precision_of(dtypes[0] if dtypes else torch.float32, precision)
    return written(program, lambda path, spec: OpenVinoProgram(path, spec, chosen, exact=True))
