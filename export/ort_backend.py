"""The backend "onnxruntime" of `optimize`: a program through ONNX, in a folder that is temporary or kept."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..bindings import Bindings
from ..quantised import parts_of
from .manifest import ProgramSpec, TensorSpec
from .onnx import BFLOAT16_OPSET, FOLD_ELEMENTS, INLINE_BYTES, WEIGHTS, WeightStore, external_weights, write_onnx
from .ort import OrtProgram

_OPSET = 18
_MODEL, _SPEC, _MADE = "model.onnx", "program.json", "made.safetensors"
_Loaded = TypeVar("_Loaded")


def load(program: ExportedProgram) -> OrtProgram:
    """`program` as a callable over torch CPU tensors."""
    return written(program, lambda path, spec: OrtProgram(path, spec, prepack=True, exact=True))


def written(program: ExportedProgram, load: Callable[[Path, ProgramSpec], _Loaded]) -> _Loaded:
    """What `load` makes of `program` as an ONNX file. The file lives as long as that."""
    folder = tempfile.TemporaryDirectory(prefix="vitcop-")
    root = Path(folder.name)
    loaded = load(root / _MODEL, _write(program, root))
    weakref.finalize(loaded, folder.cleanup)
    return loaded


def compile_kept(program: ExportedProgram, folder: Path, bindings: Bindings) -> OrtProgram:
    """As `load`; in `folder` what `load_kept` needs: the graph without its weights. Raises NotKept for weights that are none
    of the model's."""
    held = {**program.state_dict, **program.constants}
    bindings.write(folder, {name: value for name, value in held.items() if _large(value)})
    spec = _write(program, folder)
    stored = external_weights(folder / _MODEL)
    weights = {name: held[name] for name in stored if name in held}
    bindings.write(folder, weights)
    # What the exporter made of the graph's own numbers, and of weights that `small_values` tells apart.
    made = {name: value.clone() for name, value in stored.items() if name not in held}
    save_file(made, folder / _MADE)
    weights |= made
    (folder / WEIGHTS).unlink(missing_ok=True)
    sides = {"inputs": spec.inputs, "outputs": spec.outputs}
    (folder / _SPEC).write_text(json.dumps({side: [dataclasses.astuple(value) for value in sides[side]] for side in sides}))
    return OrtProgram(folder / _MODEL, spec, prepack=True, exact=True, weights=weights)


def load_kept(folder: Path, bindings: Bindings, device: torch.device) -> OrtProgram:
    """The program that `compile_kept` left in `folder`, on the weights of the model in `bindings`."""
    held = json.loads((folder / _SPEC).read_text())
    taken, given = (
        tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in held[side]) for side in ("inputs", "outputs")
    )
    weights = bindings.read(folder, device) | load_file(folder / _MADE)
    spec = ProgramSpec("program", _MODEL, None, taken, given)
    return OrtProgram(folder / _MODEL, spec, prepack=True, exact=True, weights=weights)


def small_values(model: nn.Module) -> str:
    """A hash of the weights that the exporter may have put, or folded, into the graph."""
    digest = hashlib.sha256()
    for name, whole in itertools.chain(model.named_parameters(), model.named_buffers()):
        for value in (part for part in parts_of(whole).values() if not _large(part)):
            digest.update(name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _large(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() > FOLD_ELEMENTS and value.nbytes >= INLINE_BYTES


def _write(program: ExportedProgram, folder: Path) -> ProgramSpec:
    inputs = [f"in_{i}" for i in range(len(program.graph_signature.user_inputs))]
    outputs = [f"out_{i}" for i in range(len(program.graph_signature.user_outputs))]
    wide = any(tensor.dtype == torch.bfloat16 for tensor in program.state_dict.values())
    opset = BFLOAT16_OPSET if wide else _OPSET
    taken, given = write_onnx(program, folder / _MODEL, WeightStore(folder / WEIGHTS), inputs, outputs, opset)
    return ProgramSpec("program", _MODEL, None, taken, given)
