"""Dense against pruned, stage by stage: arms interleaved in one process, medians, beside the ideal."""

from .arms import ARMS, Arm, Request, build, inputs, register
from .runner import Case, cases, dtype_of, environment, measure, run, selection_inputs, table, write
from .timing import interleave, median_ratio, spread

__all__ = [
    "ARMS",
    "Arm",
    "Case",
    "Request",
    "build",
    "cases",
    "dtype_of",
    "environment",
    "inputs",
    "interleave",
    "measure",
    "median_ratio",
    "register",
    "run",
    "selection_inputs",
    "spread",
    "table",
    "write",
]
