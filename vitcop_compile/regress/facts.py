"""The deterministic facts of a compiled model: what it computes, holds, compiles to and reads back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram

from ..backends import Program
from ..bench import Request
from ..bench.bind import PROGRAMS, Served, bind, exported, with_programs
from ..bench.timing import Call
from ..errors import ConfigError
from ..optimized import OptimizedModel
from ..provider import Ask
from .flops import count
from .reads import reads
from .stream import counts, generating, stream

Facts = dict[str, Any]
Say = Callable[[str], None]


def measure(optimized: OptimizedModel, request: Request, say: Say = lambda what: None) -> tuple[Facts, dict[str, Call]]:
    """All facts of `optimized` for `request`, and its programs bound to it (`bench.bind`), compiled by then.

    Raises ConfigError if programs of `optimized` exist already: their compilation could not be counted.
    """
    if optimized.compiled:
        raise ConfigError(
            f"{len(optimized.compiled)} programs of the model are compiled already, and kernels are counted while they "
            "compile: hand in a fresh model"
        )
    since = counts()
    say("exporting")
    programs = exported(optimized, request)
    facts = graph_facts(optimized, request, programs)
    say("counting reads")
    facts["reads"] = count_reads(optimized, request, programs)
    calls, kernels = bind(optimized, request), {}
    with generating():
        for name in PROGRAMS:
            say(f"compiling {name}")
            before = counts()
            calls[name]()
            made = counts().since(before)
            kernels[name] = {"generated": made.generated, "extern": made.extern}
    if optimized.backend == "inductor":
        facts["kernels"] = kernels
    say("serving a mixed stream of requests")
    facts["stream"] = stream(optimized, request.text_tokens, since)
    return facts, calls


def graph_facts(optimized: OptimizedModel, request: Request, programs: dict[str, ExportedProgram]) -> Facts:
    """What the graphs alone tell. FLOPs, tokens and bytes are of the whole batch at the bucket's length; rows and tokens per
    layer and prompt. Keys and values are those that prefill writes; `schedule_flops` is what the schedule says."""
    schedule = optimized.schedule
    text = optimized.on_demand.plan(Ask(request.batch, request.text_tokens, 1, request.new_tokens)).text
    caches = _written(programs["prefill"], 2 * schedule.shape.layers)
    rows = [cache.shape[2] for cache in caches[::2]]
    return {
        "flops": {name: count(program) for name, program in programs.items()},
        "schedule_flops": {
            "vision": request.batch * schedule.vision_flops(),
            "prefill": request.batch * (sum(schedule.prefill_flops(text)) + schedule.head_flops()),
        },
        "visual_tokens": [held - text for held in rows],
        "kv_rows": rows,
        "kv_bytes": sum(cache.numel() * cache.element_size() for cache in caches),
        "nodes": {name: _nodes(program) for name, program in programs.items()},
    }


def _nodes(program: ExportedProgram) -> dict[str, int]:
    """Nodes per operator, by its name."""
    targets: list[Any] = [node.target for node in program.graph.nodes if node.op == "call_function"]
    named = (str(t) if isinstance(t, torch._ops.OperatorBase) else f"{t.__module__}.{t.__name__}" for t in targets)
    return dict(sorted(Counter(named).items()))


def _written(program: ExportedProgram, count: int) -> list[torch.Tensor]:
    """The keys and values that prefill writes, `count` of them: what it pads to the rows of its caches, or, where it updates
    none, returns."""
    graph, pads = program.graph, (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default)
    values = [node.args[0] for node in graph.nodes if node.op == "call_function" and node.target in pads]
    if len(values) != count:
        values = list(graph.output_node().args[0])[-count:]
    return [value.meta["val"] for value in values]


@torch.no_grad()
def count_reads(optimized: OptimizedModel, request: Request, programs: dict[str, ExportedProgram]) -> dict[str, int]:
    """program: reads inside the vision and prefill programs; entry: what `forward` adds to them. Counted operator by
    operator, on the graphs that the backend is given."""
    inside = 0
    modules = {name: programs[name].module(check_guards=False) for name in ("vision", "prefill")}

    def counted(name: str, make: Callable[[], Program]) -> Program:
        def run(*given: Any) -> Any:
            nonlocal inside
            before = found.count
            out = modules[name](*given)
            inside += found.count - before
            return out

        return run

    model, served = with_programs(optimized, counted), Served(optimized, request)
    with reads() as found:
        served.forward(model)
    return {"program": inside, "entry": found.count - inside}
