"""Unrolls choices made one by one, for backends that do not take them as one operator."""

from __future__ import annotations

from torch.export import ExportedProgram

from ..errors import UnsupportedError
from ..ops.greedy import LOOPS

# Steps of one program: each is some ten operators, which such backends compile one by one.
MOST_STEPS = 256


def unroll_loops(program: ExportedProgram) -> ExportedProgram:
    """The program with every operator of `ops.greedy` spelled out. Raises UnsupportedError beyond `MOST_STEPS` steps."""
    loops = [node for node in program.graph.nodes if node.target in LOOPS]
    if not loops:
        return program
    steps = sum(argument for node in loops for argument in node.args if isinstance(argument, int))
    if steps > MOST_STEPS:
        raise UnsupportedError(
            f"the method chooses {steps} tokens one by one, each by all before, for which this backend has no operator; "
            f"{MOST_STEPS} is the most that is unrolled: lower its budget, or use backend 'inductor' or 'eager'"
        )
    return program.run_decompositions(dict(LOOPS))
