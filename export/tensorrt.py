"""ONNX -> TensorRT engines: one code path for `tensorrt` and `tensorrt_rtx`, each build in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import Progress

from ..errors import ConfigError, UnsupportedError
from .manifest import FolderError, Manifest, ProgramSpec, TensorSpec
from .onnx import WEIGHTS
from .ort import resolve
from .tensorrt_check import check_graph

ENGINES = ("tensorrt", "tensorrt_rtx")
INSTALL = {
    "tensorrt": "pip install tensorrt (10.x or 11.x)",
    "tensorrt_rtx": "pip install 'vitcop-compile[tensorrt-rtx]'",
}
_DTYPES = (torch.float16, torch.bfloat16)
_LAST_LINES = 12


@dataclass(frozen=True)
class BuildOptions:
    """What `export(format="tensorrt")` takes beside the options of every format.

    product: "tensorrt" or "tensorrt_rtx", None for the first of them that is installed; workspace: bytes the builder may let
    layers use, None for its own limit; timing_cache: a file read and written by the builder, of "tensorrt" alone;
    optimization_level: 0 to 5, None for the product's own; timeout: seconds for each engine, None for no limit.

    Raises ConfigError for a value out of range.
    """

    product: str | None = None
    workspace: int | None = None
    timing_cache: str | Path | None = None
    optimization_level: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.product not in (None, *ENGINES):
            raise ConfigError(f"product={self.product!r} is unknown: use one of {', '.join(ENGINES)}, or None")
        _check_number("workspace", self.workspace, 1, None, int)
        _check_number("optimization_level", self.optimization_level, 0, 5, int)
        _check_number("timeout", self.timeout, 0, None, (int, float))
        if self.timing_cache is not None and Path(self.timing_cache).is_dir():
            raise ConfigError(f"timing_cache={str(self.timing_cache)!r} is a folder: name a file")


def finisher(dtype: torch.dtype, **build_options: Any) -> Callable[[Path, Manifest, Progress], Manifest]:
    """Checks everything that can be checked before any work; the result turns a folder of ONNX files into one of engines.

    build_options: of `BuildOptions`. Raises ConfigError for options, UnsupportedError for a dtype or a missing product.
    """
    known = [field.name for field in dataclasses.fields(BuildOptions)]
    if unknown := [name for name in build_options if name not in known]:
        raise ConfigError(f"{', '.join(unknown)} are no options of format='tensorrt': use {', '.join(known)}")
    options = BuildOptions(**build_options)
    if dtype not in _DTYPES:
        raise UnsupportedError(
            f"format='tensorrt' builds strongly typed float16 or bfloat16, the model is {str(dtype).removeprefix('torch.')}: "
            "load it with dtype=torch.float16 or torch.bfloat16, or use format='onnx'"
        )
    product, _ = product_of(options.product)
    if product == "tensorrt_rtx" and options.timing_cache is not None:
        raise ConfigError("timing_cache has no effect with product='tensorrt_rtx', which times nothing: leave it out")

    def finish(folder: Path, manifest: Manifest, progress: Progress) -> Manifest:
        return build_folder(folder, manifest, progress, product, options)

    return finish


def product_of(name: str | None) -> tuple[str, Any]:
    """(name, module) of an installed product. Raises UnsupportedError, saying what to install, where there is none."""
    reasons = []
    for candidate in ENGINES if name is None else (name,):
        try:
            return candidate, importlib.import_module(candidate)
        except Exception as error:  # a missing native library ends in whatever its loader raises
            reasons.append(f"{candidate} cannot be imported ({error}): {INSTALL[candidate]}")
    raise UnsupportedError("; or ".join(reasons))


def build_folder(folder: Path, manifest: Manifest, progress: Progress, product: str, options: BuildOptions) -> Manifest:
    """Replaces the ONNX files of `folder` by engines of `product` and returns the manifest that describes them.

    Every graph is checked before the first build. Raises UnsupportedError for a graph that cannot be built, a builder that
    fails, dies or runs out of time, and FolderError for an engine that is not as the manifest says.
    """
    operators = [check_graph(folder / spec.file, spec.kind) for spec in manifest.programs]
    engines = []
    version = ""
    for onnx, found in zip(manifest.programs, operators, strict=True):
        name = Path(onnx.file).stem
        spec = dataclasses.replace(onnx, file=f"{name}/engine.plan", profiles=_profiles(onnx, manifest))
        task = progress.add_task(f"building {name} with {product}", total=None)

        def report(text: str, task: Any = task, name: str = name) -> None:
            progress.update(task, description=f"building {name} with {product}: {text}")

        version = build_engine(folder / onnx.file, folder / spec.file, spec, found, product, options, report)
        progress.remove_task(task)
        engines.append(spec)
    for onnx in manifest.programs:
        (folder / onnx.file).unlink()
    (folder / WEIGHTS).unlink(missing_ok=True)
    versions = manifest.versions | {product: version}
    return dataclasses.replace(manifest, product=product, programs=tuple(engines), versions=versions)


def build_engine(
    onnx: Path,
    plan: Path,
    spec: ProgramSpec,
    operators: dict[str, list[str]],
    product: str,
    options: BuildOptions,
    report: Callable[[str], None],
) -> str:
    """Builds one engine in a process of its own and checks its inputs, outputs and profiles. Returns the product's version."""
    plan.parent.mkdir(parents=True, exist_ok=True)
    request = {
        "product": product,
        "onnx": str(onnx),
        "plan": str(plan),
        "operators": operators,
        "profiles": [_bounds(spec, profile) for profile in spec.profiles],
        "workspace": options.workspace,
        "timing_cache": None if options.timing_cache is None else str(options.timing_cache),
        "optimization_level": options.optimization_level,
        "load": torch.cuda.is_available(),
    }
    what = f"{spec.kind}, built with {product}"
    found = run_builder(what, request, options.timeout, report)
    check_tensors(what, spec, found["network"])
    if "engine" in found:
        check_tensors(what, spec, found["engine"])
        check_profiles(what, spec, found["engine"]["profiles"])
    if not plan.is_file() or plan.stat().st_size != found["done"]["bytes"]:
        raise FolderError(f"{what}: {plan.name} is not what the builder wrote; is the disk full?")
    return found["done"]["version"]


def run_builder(
    what: str, request: dict[str, Any], timeout: float | None, report: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Runs the builder's process to its end. Returns its last event of each kind.

    Raises UnsupportedError, with what the process said last, if it refuses, dies or takes longer than `timeout` seconds.
    """
    events: dict[str, dict[str, Any]] = {}
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as native:
        process = subprocess.Popen(
            _command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=native, text=True, encoding="utf-8"
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, stop)
        timer.daemon = True
        if timeout is not None:
            timer.start()
        try:
            for event in _events(process, request):
                events[event["event"]] = event
                if event["event"] == "log":
                    lines.append(event["text"])
                elif event["event"] == "progress":
                    report(f"{event['phase']} {event['step']}/{event['steps']}")
            status = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
            _pipes(process)[1].close()
        native.seek(0)
        last = [*native.read().splitlines()[-_LAST_LINES:], *lines]
    if late.is_set():
        raise UnsupportedError(
            f"{what}: not done after timeout={timeout} s; raise it, or lower optimization_level; last lines: {_tail(last)}"
        )
    if "error" in events:
        raise UnsupportedError(
            f"{what}: {events['error']['text']}{_nodes(events['error']['nodes'])}; last lines: {_tail(last)}"
        )
    if status != 0 or "done" not in events:
        raise UnsupportedError(
            f"{what}: the builder's process {_fate(status)}; nothing else was harmed. Try another opset, a lower "
            f"optimization_level or another version of the product; last lines: {_tail(last)}"
        )
    return events


def check_tensors(what: str, spec: ProgramSpec, found: dict[str, Any]) -> None:
    """Compares {"inputs": [{name, dtype, shape}, ...], "outputs": ...} with a program's spec: -1 stands for dynamic rows.

    Raises FolderError, naming the tensor. A static budget that became dynamic is an error too; beside a dynamic dimension
    TensorRT may fail to infer a static one, which is then checked when the engine runs.
    """
    for side, stated in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        tensors = {value["name"]: value for value in found[side]}
        if sorted(tensors) != sorted(tensor.name for tensor in stated):
            raise FolderError(f"{what}: {side} are {sorted(tensors)}, vitcop.json says {[tensor.name for tensor in stated]}")
        for tensor in stated:
            value = tensors[tensor.name]
            shape = [dim if isinstance(dim, int) else -1 for dim in tensor.shape]
            free = -1 in shape and len(shape) == len(value["shape"])
            fits = (
                all(a == b or (free and a == -1) for a, b in zip(value["shape"], shape)) if free else value["shape"] == shape
            )
            if value["dtype"] != tensor.dtype or not fits:
                raise FolderError(
                    f"{what}: {tensor.name} is {value['dtype']} {value['shape']}, vitcop.json says {tensor.dtype} {shape}"
                )


def check_profiles(what: str, spec: ProgramSpec, found: dict[str, Any]) -> None:
    """Compares {input: [[least, optimal, most] of each profile]} with a program's spec. Raises FolderError."""
    for tensor in _dynamic(spec):
        stated = [_bounds(spec, profile)[tensor.name] for profile in spec.profiles]
        if found.get(tensor.name) != stated:
            raise FolderError(f"{what}: profiles of {tensor.name} are {found.get(tensor.name)}, vitcop.json says {stated}")


def _profiles(spec: ProgramSpec, manifest: Manifest) -> tuple[tuple[int, int, int], ...]:
    """(least, optimal, most) rows: one for each bucket, or one for the whole range, at its best where it is longest."""
    if spec.rows is None or not _dynamic(spec):
        return ()
    least, most = spec.rows
    if manifest.prompt_buckets is None:
        return ((least, most, most),)
    image = most - manifest.max_text_len
    return tuple((size + image,) * 3 for size in manifest.prompt_buckets)


def _dynamic(spec: ProgramSpec) -> list[TensorSpec]:
    return [tensor for tensor in spec.inputs if any(not isinstance(dim, int) for dim in tensor.shape)]


def _bounds(spec: ProgramSpec, profile: tuple[int, int, int]) -> dict[str, list[list[int]]]:
    """Shapes of every dynamic input at the three counts of rows of a profile."""
    return {tensor.name: [list(resolve(tensor.shape, rows)) for rows in profile] for tensor in _dynamic(spec)}


def _command() -> list[str]:
    """The builder as a plain script: a module of this package would import torch. -P keeps its folder off the path, where
    our `onnx.py` would stand for the package of that name."""
    return [sys.executable, "-P", str(Path(__file__).with_name("tensorrt_build.py"))]


def _events(process: subprocess.Popen[str], request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the process says, up to its end. A line that is cut off by its death is left out."""
    stdin, stdout = _pipes(process)
    try:
        with stdin:
            stdin.write(json.dumps(request))
    except BrokenPipeError:
        pass  # died before it read: its exit status says the rest
    for line in stdout:
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None and process.stdout is not None
    return process.stdin, process.stdout


def _fate(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status} and no engine"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}, exit status {status}"


def _nodes(nodes: list[list[str]]) -> str:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, operator, reason in nodes:
        by_reason[reason].append(f"{name or '(unnamed)'} ({operator})")
    return "".join(f"; {', '.join(names[:8])}: {reason}" for reason, names in by_reason.items())


def _tail(lines: list[str]) -> str:
    return " | ".join(line.strip() for line in lines if line.strip()) or "none"


def _check_number(name: str, value: Any, least: float, most: float | None, kinds: Any) -> None:
    if value is None:
        return
    fits = isinstance(value, kinds) and not isinstance(value, bool) and value >= least and (most is None or value <= most)
    if not fits or (name == "timeout" and value <= 0):
        span = f"{least} to {most}" if most is not None else f"above {least}" if name == "timeout" else f"at least {least}"
        raise ConfigError(f"{name}={value!r} is out of range: {span}, or None")
