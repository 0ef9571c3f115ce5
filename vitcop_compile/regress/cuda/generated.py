"""What inductor generates for a GPU that is not there, and the facts of it. For a process in which `replaced.install` ran."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from ...backends import inductor
from ...errors import RewriteError
from . import checks, replaced

_LAUNCH = re.compile(r"^ *(triton_\w+)\.run\(", re.MULTILINE)
# Calls of the wrapper that leave Triton, by the operator's name.
_EXTERN = re.compile(r"^[^#\n]*\b(?:extern_kernels|torch\.ops\.\w+)\.(\w+)(?:\.\w+)?\(", re.MULTILINE)
_BUFFER = re.compile(r"empty_strided_cuda\(\(([\d, ]*)\), \([\d, ]*\), torch\.(\w+)\)")


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and what was built of it: the architecture and the bytes of every configuration's cubin."""

    name: str
    cubins: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Generated:
    """source: the module that inductor wrote; inputs: what the graph takes, in order; static: places of those whose addresses
    hold, written: of those that it writes to; refused: why it cannot run as a CUDA graph, None if it can; partitions: the
    pieces that it runs in."""

    source: str
    inputs: tuple[Any, ...]
    static: frozenset[int]
    written: frozenset[int]
    refused: str | None
    partitions: int
    kernels: tuple[Kernel, ...] = ()


class _Done(BaseException):
    """Ends a call of a compiled graph; no Exception, for which compiled modules have handlers of their own."""


_compiled: list[Generated] = []
_built: list[Kernel] = []


def install(architecture: str, build: bool = True) -> None:
    """`replaced.install`, for `generate`. build: also build the kernels."""
    replaced.install(architecture, _note, _note_kernel if build else None)


def _note(graph: Any, inputs: Sequence[Any]) -> None:
    reasons = [graph.disabled_cudagraphs_reason] if graph.disabled_cudagraphs_reason else []
    reasons += graph.cudagraph_info.cudagraph_fail_reasons if graph.cudagraph_info else ["nobody asked for a CUDA graph"]
    made = Generated(
        graph.source_code,
        tuple(inputs),
        frozenset(graph.fx_kwargs["static_input_idxs"] or ()),
        frozenset(graph.mutated_input_idxs),
        "; ".join(reasons) or None,
        len(graph.partition_maps or [None]),
        tuple(_built),
    )
    _compiled.append(made)
    raise _Done


def _note_kernel(tuner: Any) -> None:
    kernels = [result.kernel for result in tuner.compile_results]
    cubins = tuple((f"sm_{kernel.metadata.target.arch}", len(kernel.asm["cubin"])) for kernel in kernels)
    _built.append(Kernel(tuner.fn.__name__, cubins))


def generate(program: ExportedProgram, given: Sequence[Any]) -> Generated:
    """What backend "inductor" makes of `program`, called with `given`. Raises RewriteError for more than one graph."""
    return generate_from(inductor(program), given)


def generate_from(compiled: Any, given: Sequence[Any]) -> Generated:
    """The same of what `torch.compile` returned."""
    _compiled.clear()
    _built.clear()
    try:
        with torch.no_grad():
            compiled(*given)
    except _Done:
        pass
    if len(_compiled) != 1:
        raise RewriteError(f"a program was compiled to {len(_compiled)} graphs: it has to be one")
    return _compiled.pop()


def facts_of(made: Generated) -> dict[str, Any]:
    """Integers by name. kernels: that were built; launches: of them, by one call; extern: calls that leave Triton, by
    operator; allocated_bytes: of buffers between, of which cache_copies have the shape of a cache that is written; div_rn:
    divisions that are rounded as elsewhere. What they have to be, whatever is measured, `regress.cuda.ALWAYS` says."""
    buffers = [(_numbers(shape), dtype) for shape, dtype in _BUFFER.findall(made.source)]
    caches = {tuple(made.inputs[place].shape) for place in made.written if made.inputs[place].is_floating_point()}
    names = set(re.findall(r"^(triton_\w+) = async_compile\.triton\(", made.source, re.MULTILINE))
    return {
        "kernels": len(names),
        "launches": len(_LAUNCH.findall(made.source)),
        "extern": dict(sorted(Counter(_EXTERN.findall(made.source)).items())),
        "allocated_bytes": sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in buffers),
        "div_rn": made.source.count("div_rn("),
        "inputs": len(made.inputs),
        "static": len(made.static),
        "written": len(made.written),
        "written_moving": len(made.written - made.static),
        "cache_copies": sum(shape in caches for shape, _ in buffers),
        "cpp_kernels": made.source.count("async_compile.cpp"),
        "refused": int(made.refused is not None),
        "partitions": made.partitions,
    }


def unbuilt(made: Generated, architecture: str) -> list[str]:
    """Kernels of `made` of which there is no cubin, or one of another architecture."""
    names = set(re.findall(r"^(triton_\w+) = async_compile\.triton\(", made.source, re.MULTILINE))
    good = {k.name for k in made.kernels if k.cubins and all(arch == architecture and size for arch, size in k.cubins)}
    return sorted(names - good)


def graph_facts(program: ExportedProgram, given: Sequence[Any]) -> dict[str, int]:
    """What the exported graph itself must not hold: see `checks`."""
    return {
        "elsewhere": len(checks.elsewhere(program)),
        "reads": len(checks.reads(program)),
        "moving": len(checks.moving(program, given)),
    }


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number.strip())
