"""Runs TensorRT engines on torch CUDA tensors: bound by address, on a stream of their own, a decode step as a CUDA graph."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedError, VitcopWarning
from .manifest import FolderError, Manifest, ProgramSpec
from .ort import check_inputs, resolve
from .tensorrt import INSTALL, check_profiles, check_tensors, product_of
from .tensorrt_build import describe

Step = Callable[..., Sequence[Tensor]]


def loader(manifest: Manifest) -> tuple[torch.device, Callable[[Path, ProgramSpec], TensorRtProgram]]:
    """Where a folder of engines runs, and what loads its programs.

    Raises UnsupportedError without the product that built the folder or without a CUDA device, FolderError if the product's
    version is another than the engines'.
    """
    try:
        product, trt = product_of(manifest.product)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"the folder holds engines of {manifest.product}, no other product loads them: {error}"
        ) from None
    built, here = manifest.versions.get(product), str(trt.__version__)
    if built != here:
        raise FolderError(
            f"the engines were built by {product} {built}, {here} is installed, and plans are bound to a version: export "
            f"again, or {INSTALL[product]} at {built}"
        )
    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"engines of {product} run on an NVIDIA GPU, and torch sees none: install torch with CUDA on a machine that has "
            "one, or export(format='onnx') for the CPU"
        )
    device = torch.device("cuda", torch.cuda.current_device())

    def load(path: Path, spec: ProgramSpec) -> TensorRtProgram:
        return TensorRtProgram(path, spec, trt, device)

    return device, load


class TensorRtProgram:
    """One engine as a callable: torch CUDA tensors in, a list of torch CUDA tensors out.

    The outputs of decode are the same tensors in every call; those of the other programs are new.
    """

    def __init__(self, path: Path, spec: ProgramSpec, trt: Any, device: torch.device):
        """Loads the plan at `path` with the module `trt` of its product.

        Raises FolderError for a plan that does not load or is not what `spec` says.
        """
        self._spec, self._device = spec, device
        # The logger has to outlive the engine.
        self._logger, said = _logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise FolderError(
                f"{spec.file} cannot be loaded by {trt.__name__} {trt.__version__} on {torch.cuda.get_device_name(device)}: "
                f"{' | '.join(said) or 'no reason given'}; build it on the kind of GPU that runs it"
            )
        found = describe(trt, self._engine)
        check_tensors(spec.file, spec, found)
        check_profiles(spec.file, spec, found["profiles"])
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise FolderError(f"{spec.file}: no execution context, is the GPU's memory full? {' | '.join(said)}")
        self._said = said
        self._stream = torch.cuda.Stream(device)
        self._profile = 0
        self._fixed: list[Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Runs the engine; later work on the current stream waits for it. Raises InputError for tensors it cannot take."""
        rows = check_inputs(self._spec, inputs)
        if elsewhere := [str(tensor.device) for tensor in inputs if tensor.device != self._device]:
            raise InputError(f"{self._spec.kind}: an input is on {elsewhere[0]}, the engine runs on {self._device}")
        # Copied, where needed, on the current stream, which the engine's own waits for.
        inputs = tuple(tensor.contiguous() for tensor in inputs)
        outputs = self._outputs(rows)
        current = torch.cuda.current_stream(self._device)
        if torch.cuda.is_current_stream_capturing():
            self._enqueue(inputs, outputs, rows, current)
            return outputs
        # A stream of its own: on the default stream TensorRT waits for the device at every call.
        self._stream.wait_stream(current)
        self._enqueue(inputs, outputs, rows, self._stream)
        current.wait_stream(self._stream)
        return outputs

    def graphed(self, step: Step) -> Step:
        """A decode step around this program, as one CUDA graph per set of buffers."""
        return GraphedStep(step, self._capturable)

    def _enqueue(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], rows: int | None, stream: torch.cuda.Stream
    ) -> None:
        context = self._context
        self._select(rows, stream)
        for spec, tensor in zip(self._spec.inputs, inputs, strict=True):
            if not context.set_input_shape(spec.name, tuple(tensor.shape)):
                raise InputError(
                    f"{self._spec.kind}: the engine refuses {spec.name} {tuple(tensor.shape)}: {' | '.join(self._said)}"
                )
            context.set_tensor_address(spec.name, tensor.data_ptr())
        for spec, tensor in zip(self._spec.outputs, outputs, strict=True):
            context.set_tensor_address(spec.name, tensor.data_ptr())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"{self._spec.file} failed to run: {' | '.join(self._said) or 'no reason given'}")

    def _select(self, rows: int | None, stream: torch.cuda.Stream) -> None:
        if len(self._spec.profiles) < 2 or rows is None:
            return
        fitting = [i for i, (least, _, most) in enumerate(self._spec.profiles) if least <= rows <= most]
        if not fitting:
            profiles = list(self._spec.profiles)
            raise InputError(f"{self._spec.kind}: a turn of {rows} rows is in none of the profiles {profiles}")
        if fitting[0] != self._profile:
            self._context.set_optimization_profile_async(fitting[0], stream.cuda_stream)
            self._profile = fitting[0]

    def _outputs(self, rows: int | None) -> list[Tensor]:
        if self._fixed is not None:
            return self._fixed
        outputs = [
            torch.empty(resolve(spec.shape, rows), dtype=getattr(torch, spec.dtype), device=self._device)
            for spec in self._spec.outputs
        ]
        if self._spec.kind == "decode":
            self._fixed = outputs
        return outputs

    def _capturable(self, stream: torch.cuda.Stream) -> bool:
        """Whether the engine can be captured; where the product cannot tell, it is tried."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(stream.cuda_stream))


class GraphedStep:
    """A decode step, the writes into the caches included, replayed as one CUDA graph.

    A graph holds addresses. It is captured when a set of buffers is first seen and replayed while they stay; only the latest
    is kept, and it keeps no buffer alive. Running a step twice on the same inputs writes the same rows twice, which is why
    the run before a capture is harmless.
    """

    def __init__(self, step: Step, capturable: Callable[[torch.cuda.Stream], bool]):
        self._step, self._capturable = step, capturable
        self._key: tuple[int, ...] | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Sequence[Tensor] = ()
        self._plain = False

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """(logits,), in memory of its own."""
        if self._plain:
            return tuple(tensor.clone() for tensor in self._step(*inputs))
        key = tuple(tensor.data_ptr() for tensor in inputs)
        if key != self._key:
            first = tuple(tensor.clone() for tensor in self._step(*inputs))
            self._capture(inputs, key)
            return first
        assert self._graph is not None
        self._graph.replay()
        return tuple(tensor.clone() for tensor in self._result)

    def _capture(self, inputs: Sequence[Tensor], key: tuple[int, ...]) -> None:
        self._key, self._graph = None, None
        stream = torch.cuda.Stream(inputs[0].device)
        graph = torch.cuda.CUDAGraph()
        try:
            if not self._capturable(stream):
                raise RuntimeError("the engine says that it cannot be captured")
            torch.cuda.synchronize(inputs[0].device)
            with torch.cuda.graph(graph, stream=stream):
                self._result = self._step(*inputs)
        except RuntimeError as error:
            self._plain = True
            warnings.warn(f"decode runs without a CUDA graph: {error}", VitcopWarning, stacklevel=2)
            return
        self._key, self._graph = key, graph


def _logger(trt: Any) -> tuple[Any, deque[str]]:
    """A logger that keeps the last warnings and errors, and prints nothing."""
    said: deque[str] = deque(maxlen=8)

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR, trt.ILogger.Severity.WARNING):
                said.append(text)

    return Logger(), said
