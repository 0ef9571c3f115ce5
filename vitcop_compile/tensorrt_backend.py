"""`optimize(model, config, backend="tensorrt")`: every program one TensorRT engine, through torch-tensorrt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from .errors import UnsupportedError

# The whole graph or nothing. Names and defaults differ between versions of torch-tensorrt, so each is stated; the global
# partitioner is the one that leaves the nodes it cannot take in the outer graph, where they can be listed. Types are the
# graph's own: later versions know no other way and ignore the option.
_OPTIONS: dict[str, Any] = {
    "min_block_size": 1,
    "use_fast_partitioner": False,
    "truncate_double": False,
    "use_explicit_typing": True,
}
_LISTED = 20


def check() -> None:
    """Raises UnsupportedError where torch-tensorrt is not installed or no CUDA device is there."""
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "backend='tensorrt' builds and runs on a CUDA device, and torch sees none: use backend='inductor', or "
            "export(format='tensorrt', product='tensorrt_rtx'), which builds without a GPU"
        )
    _torch_tensorrt()


def compile_whole(program: ExportedProgram) -> Callable[..., Any]:
    """`program`, exported at static shapes and without mutation, as a single engine: CUDA tensors in, CUDA tensors out.

    Nothing falls back to PyTorch. Raises UnsupportedError, listing the nodes torch-tensorrt has no converter for, before
    anything is built; the same error carries a failure of the build.
    """
    compiler = _torch_tensorrt().dynamo.compile
    inputs = _inputs(program)
    refuse_parts(compiler(program, arg_inputs=inputs, dryrun=True, **_OPTIONS))
    try:
        return compiler(program, arg_inputs=inputs, require_full_compilation=True, **_OPTIONS)
    except Exception as error:
        raise UnsupportedError(
            f"torch-tensorrt cannot build the program: {type(error).__name__}: {error}; use backend='inductor', or "
            "export(format='tensorrt')"
        ) from error


def refuse_parts(plan: fx.GraphModule) -> None:
    """Raises UnsupportedError if a partitioned graph is not one engine and nothing else, naming what is left in PyTorch."""
    engines = [node for node in plan.graph.nodes if node.op == "call_module" and "_run_on_acc" in node.name]
    # An engine with several outputs is followed by the picking of each, which computes nothing.
    picks = {node for engine in engines for node in engine.users if getattr(node.target, "__name__", "") == "getitem"}
    left = [node for node in plan.graph.nodes if node.op.startswith("call_") and node not in picks and node not in engines]
    if len(engines) == 1 and not left:
        return
    named = ", ".join(f"{node.name} ({node.target})" for node in left[:_LISTED])
    more = f" and {len(left) - _LISTED} more" if len(left) > _LISTED else ""
    raise UnsupportedError(
        f"torch-tensorrt would split the program into {len(engines)} engines and leave {len(left)} nodes in PyTorch: "
        f"{named or 'none'}{more}; there is no such fallback here: use backend='inductor', or export(format='tensorrt')"
    )


def _inputs(program: ExportedProgram) -> list[torch.Tensor]:
    """Example inputs of the program's shapes and types on its device."""
    args, _ = program.example_inputs or ((), {})
    return list(args)


def _torch_tensorrt() -> Any:
    try:
        import torch_tensorrt
    except Exception as error:  # a missing native library ends in whatever its loader raises
        raise UnsupportedError(
            f"backend='tensorrt' needs torch-tensorrt ({error}): pip install 'vitcop-compile[tensorrt]', or use "
            "backend='inductor'"
        ) from None
    return torch_tensorrt
