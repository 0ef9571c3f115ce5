"""What a user could run, side by side: arms interleaved in one process, stage by stage, beside the ideal."""

from . import ours, stock
from .arms import ARMS, Arm, Request, build, inputs, register
from .cases import Case, Entrant, Shape, check_cases
from .environment import environment
from .report import check_target, markdown, read, table, write
from .rows import rows
from .runner import measure, run
from .selection import SelectionOnly, selection_arm, selection_inputs
from .timing import interleave, median_ratio, spread

__all__ = [
    "ARMS",
    "Arm",
    "Case",
    "Entrant",
    "Request",
    "SelectionOnly",
    "Shape",
    "build",
    "check_cases",
    "check_target",
    "environment",
    "inputs",
    "interleave",
    "markdown",
    "measure",
    "median_ratio",
    "ours",
    "read",
    "register",
    "rows",
    "run",
    "selection_arm",
    "selection_inputs",
    "spread",
    "stock",
    "table",
    "write",
]
