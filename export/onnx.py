"""ExportedProgram -> ONNX. All programs of a folder share one file of weights, in which every weight is stored once."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from ..errors import UnsupportedError
from ..isolation import tracing
from ..passes.unroll_loops import unroll_loops
from .manifest import OPSETS, QuantisedTensor, TensorSpec

WEIGHTS = "weights.bin"
# The first that has a convolution in bfloat16.
BFLOAT16_OPSET = 22
# Smaller constants stay in the graph file: in the file of weights each would take up to a page (see _ALIGNMENT).
INLINE_BYTES = 1024
# Tensors start at multiples of a page, so that they can be mapped into memory.
_ALIGNMENT = 4096
_DTYPES = {
    "FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "INT64": "int64", "INT8": "int8", "BOOL": "bool",
}  # fmt: skip
# Operations on constants are computed at export only up to this many elements, so that the graph file stays small.
FOLD_ELEMENTS = 1024
# Control flow, sequences, and results whose size depends on data: static budgets need none, and not every engine accepts them.
FORBIDDEN = ("NonZero", "Loop", "If", "Scan", "Unique", "Compress", "SequenceConstruct")


@dataclass
class WeightStore:
    """A file of tensors. Tensors with equal bytes are stored once.

    int8: whether weights of linear layers are rounded to int8; quantised: those that are int8 so far, by name.
    """

    path: Path
    int8: bool = False
    size: int = 0
    quantised: dict[str, QuantisedTensor] = field(default_factory=dict)
    _known: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    def add(self, data: bytes | memoryview) -> tuple[int, int]:
        """Appends `data` unless the file already holds the same bytes. Returns (offset, length in bytes) in the file."""
        key = hashlib.sha256(data).digest()
        if key not in self._known:
            start = -(-self.size // _ALIGNMENT) * _ALIGNMENT
            with self.path.open("ab") as stream:
                stream.write(b"\0" * (start - self.size))
                stream.write(data)
            self.size = start + len(data)
            self._known[key] = (start, len(data))
        return self._known[key]


def write_onnx(
    program: ExportedProgram, path: Path, store: WeightStore, inputs: list[str], outputs: list[str], opset: int
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Writes `program` to `path` and its weights to `store`, which must be in the same folder.

    inputs, outputs: names for the graph's inputs and outputs, in order. Returns their specs. Raises UnsupportedError for an
    opset out of range, a missing package, or an operator that `check_nodes` refuses.
    """
    onnx_ir = _require("onnx_ir")
    if opset not in OPSETS:
        raise UnsupportedError(f"opset={opset} is out of range: choose {OPSETS.start} to {OPSETS.stop - 1}")
    with tracing(), _quiet():
        converted = torch.onnx.export(
            unroll_loops(program),
            dynamo=True,
            opset_version=opset,
            verbose=False,
            input_names=inputs,
            output_names=outputs,
            optimize=False,
        )
        assert converted is not None
        model = converted.model
        store.quantised |= _simplify(model, store.int8)
    check_nodes(model, path.name)
    for node in model.graph.all_nodes():
        # The exporter attaches stack traces: they make up half of the file and reveal paths of this machine.
        node.metadata_props.clear()
        node.doc_string = None
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < INLINE_BYTES:
            continue
        offset, length = store.add(_bytes(tensor))
        value.const_value = onnx_ir.ExternalTensor(
            location=store.path.name,
            offset=offset,
            length=length,
            dtype=tensor.dtype,
            shape=tensor.shape,
            name=value.name,
            base_dir=str(path.parent),
        )
    onnx_ir.save(model, path)
    symbol = _row_symbol(model)
    return _specs(model.graph.inputs, symbol), _specs(model.graph.outputs, symbol)


def _simplify(model: Any, int8: bool) -> dict[str, QuantisedTensor]:
    """Folds constants and removes what is unused, in place; `int8` rounds weights. Returns those that are int8.

    These are the steps of onnxscript's optimizer that help here. Its other rewrites match almost nothing and take half the
    time of an export. Large results are not folded: the graph file would hold masks for every bucket.
    """
    from .quantise import keep_int8, names_of_linears, quantise  # needs onnx_ir

    optimizer, fusions = _require("onnxscript.optimizer"), _require("onnxscript.rewriter.onnx_fusions")
    common = _require("onnx_ir.passes.common")
    optimizer.inline(model)
    names, quantised = names_of_linears(model), keep_int8(model)
    optimizer.fold_constants(model, input_size_limit=FOLD_ELEMENTS, output_size_limit=FOLD_ELEMENTS)
    fusions.fuse(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        step(model)
    return quantised | quantise(model, names) if int8 else quantised


def _bytes(tensor: Any) -> memoryview:
    """The bytes of a tensor; copied only if it is not contiguous."""
    return memoryview(np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def check_nodes(model: Any, name: str) -> None:
    """Raises UnsupportedError, naming the node, for an operator that is not standard ONNX or whose result is not static."""
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedError(f"{name}: node {node.name} is {node.domain}::{node.op_type}, not a standard operator")
        reduction = node.attributes.get("reduction")
        scatters = node.op_type in ("ScatterElements", "ScatterND") and reduction is not None and reduction.value != "none"
        if node.op_type in FORBIDDEN or scatters:
            raise UnsupportedError(
                f"{name}: node {node.name} is {node.op_type}{' with a reduction' if scatters else ''}, whose size or order "
                "depends on data: write the operation with static shapes"
            )


def require_packages() -> None:
    """Raises UnsupportedError, saying what to install, if a package that ONNX export needs is missing."""
    for name in ("onnx", "onnx_ir", "onnxscript"):
        _require(name)


def op_counts(path: Path) -> Counter[str]:
    """How often each operator occurs in an ONNX file."""
    onnx_ir = _require("onnx_ir")
    return Counter(node.op_type for node in onnx_ir.load(path).graph.all_nodes())


def external_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights that an ONNX file has in another, by name, read-only."""
    onnx_ir = _require("onnx_ir")
    held = onnx_ir.load(path).graph.initializers.values()
    return {value.name: _tensor(value.const_value) for value in held if isinstance(value.const_value, onnx_ir.ExternalTensor)}


def _tensor(tensor: Any) -> torch.Tensor:
    dtype = getattr(torch, _DTYPES[tensor.dtype.name])
    return torch.frombuffer(bytearray(tensor.tobytes()), dtype=dtype).reshape(tuple(tensor.shape))


def _specs(values: Any, symbol: str | None) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(value.name, _DTYPES[value.dtype.name], tuple(_dim(dim, symbol) for dim in value.shape)) for value in values
    )


def _dim(dim: Any, symbol: str | None) -> int | str:
    """A static size as it is; a dynamic one as an expression in "rows", which replaces the exporter's `symbol`."""
    if isinstance(dim, int):
        return dim
    return str(dim.value).replace(str(symbol), "rows").replace(" ", "")


def _row_symbol(model: Any) -> str | None:
    """The exporter's name for the dynamic axis; None if every size is static."""
    names = (dim.value for value in model.graph.inputs for dim in value.shape if not isinstance(dim, int))
    return next(names, None)


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(f"ONNX export needs {name} ({error}): pip install 'vitcop-compile[onnx]'") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporter's progress messages and deprecation warnings: they say nothing about the model."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
