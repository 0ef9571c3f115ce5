"""Builds one engine from one ONNX file, in a process of its own: a crash of the native builder ends here.

`python -m vitcop_compile.export.tensorrt_build` reads a specification (JSON) from standard input and writes events (JSON
lines) to standard output. It imports the standard library and TensorRT alone, so that it can also run as a plain script,
without the seconds and the memory that torch takes.

Specification: product ("tensorrt", "tensorrt_rtx"), onnx and plan (paths), operators (operator -> names of nodes), profiles
(a list of input -> [least, optimal, most] shapes), workspace (bytes), timing_cache (path), optimization_level (each may be
null), load (whether a GPU is there to load the plan on). Events: {"event": "log" | "progress" | "network" | "engine" |
"error" | "done", ...}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds between two reports of progress: the builder takes thousands of steps.
_INTERVAL = 0.1
DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}

Emit = Callable[..., None]


class Refusal(Exception):
    """The build cannot go on; the message is for the user. nodes: (name, operator, reason) of offending nodes."""

    def __init__(self, text: str, nodes: list[tuple[str, str, str]] | None = None):
        super().__init__(text)
        self.nodes = nodes or []


def main() -> int:
    """Builds what standard input asks for; 0 if the plan was written, 1 after an "error" event."""
    # What native code prints to standard output must not get between the events.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def emit(event: str, **values: Any) -> None:
        with lock:
            channel.write(json.dumps({"event": event, **values}) + "\n")
            channel.flush()

    try:
        emit("done", **build(json.load(sys.stdin), emit))
    except Refusal as refusal:
        emit("error", text=str(refusal), nodes=refusal.nodes)
        return 1
    except Exception as error:
        emit("error", text=f"{type(error).__name__}: {error}", nodes=[])
        return 1
    return 0


def build(spec: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Parses, builds and writes the plan. Returns its bytes, the seconds taken and the product's version."""
    start = time.monotonic()
    trt = importlib.import_module(spec["product"])
    logger = _logger(trt, emit)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # what the binding makes of a null pointer
        raise Refusal(
            f"{spec['product']} {trt.__version__} cannot start its builder: is a GPU with its driver there?"
        ) from None
    network = builder.create_network(_strongly_typed(trt))
    parse(trt, network, logger, spec)
    emit(
        "network",
        inputs=_tensors(network.num_inputs, network.get_input),
        outputs=_tensors(network.num_outputs, network.get_output),
    )
    config = builder.create_builder_config()
    cache = configure(trt, builder, config, spec)
    monitor = _monitor(trt, emit)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refusal("the builder gave no engine")
    Path(spec["plan"]).write_bytes(plan)
    if cache is not None:
        _save_cache(Path(spec["timing_cache"]), config.get_timing_cache())
    if spec["load"]:
        emit("engine", **loaded(trt, logger, Path(spec["plan"])))
    return {"bytes": plan.nbytes, "seconds": time.monotonic() - start, "version": trt.__version__}


def parse(trt: Any, network: Any, logger: Any, spec: dict[str, Any]) -> None:
    """Fills the network from the ONNX file. Raises Refusal, naming nodes, for what the parser does not take."""
    parser = trt.OnnxParser(network, logger)
    unknown = [name for name in spec["operators"] if not parser.supports_operator(name)]
    if unknown:
        nodes = [
            (node, name, "the parser does not know this operator") for name in unknown for node in spec["operators"][name]
        ]
        raise Refusal(f"the parser does not know {', '.join(unknown)}", nodes)
    if parser.parse_from_file(spec["onnx"]):
        return
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    raise Refusal("the parser refuses the graph", [(e.node_name(), e.node_operator(), e.desc()) for e in errors])


def configure(trt: Any, builder: Any, config: Any, spec: dict[str, Any]) -> Any:
    """Applies options and profiles. Returns the timing cache, if one is asked for."""
    if spec["workspace"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec["workspace"])
    if spec["optimization_level"] is not None:
        config.builder_optimization_level = spec["optimization_level"]
    for shapes in spec["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        if config.add_optimization_profile(profile) < 0:
            raise Refusal(f"the builder refuses the optimization profile {shapes}")
    if spec["timing_cache"] is None:
        return None
    path = Path(spec["timing_cache"])
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise Refusal(f"the timing cache {path} is not one of this version and GPU: remove it, or choose another path")
    return cache


def loaded(trt: Any, logger: Any, path: Path) -> dict[str, Any]:
    """Loads the plan back and lists its inputs, outputs and profiles: name -> [[least, optimal, most] of every profile]."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise Refusal("the engine was built, and cannot be loaded again")
    return describe(trt, engine)


def describe(trt: Any, engine: Any) -> dict[str, Any]:
    """inputs, outputs and profiles of an engine."""
    found: dict[str, Any] = {"inputs": [], "outputs": [], "profiles": {}}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        shape, dtype = list(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        found["inputs" if is_input else "outputs"].append(_tensor(name, dtype, shape))
        if is_input and -1 in shape:
            shapes = (engine.get_tensor_profile_shape(name, i) for i in range(engine.num_optimization_profiles))
            found["profiles"][name] = [[list(bound) for bound in profile] for profile in shapes]
    return found


def _strongly_typed(trt: Any) -> int:
    """Flags of a network that keeps the types of the graph; later versions know no other kind."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _tensors(count: int, get: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [_tensor(value.name, value.dtype, list(value.shape)) for value in map(get, range(count))]


def _tensor(name: str, dtype: Any, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "dtype": DTYPES.get(dtype.name, dtype.name), "shape": shape}


def _save_cache(path: Path, cache: Any) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(cache.serialize())
    aside.replace(path)


def _logger(trt: Any, emit: Emit) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, text: str) -> None:
            if severity != trt.ILogger.Severity.VERBOSE:
                with contextlib.suppress(OSError):
                    emit("log", severity=severity.name, text=text)

    return Logger()


def _monitor(trt: Any, emit: Emit) -> Any:
    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}
            self._last = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _report(self, phase: str, step: int) -> None:
            now = time.monotonic()
            if now - self._last >= _INTERVAL:
                self._last = now
                with contextlib.suppress(OSError):
                    emit("progress", phase=phase, step=step, steps=self._steps.get(phase, step))

    return Monitor()


if __name__ == "__main__":
    sys.exit(main())
