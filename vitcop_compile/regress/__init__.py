"""The regression gate: what a compiled model computes, holds and costs, compared with a committed baseline."""

from .baseline import Baseline, Record, load, save
from .compare import Failure, Judged, Report, Timing
from .gate import ELSEWHERE, REPEATS, check, update
from .subject import Settings, settings_of

__all__ = [
    "ELSEWHERE",
    "REPEATS",
    "Baseline",
    "Failure",
    "Judged",
    "Record",
    "Report",
    "Settings",
    "Timing",
    "check",
    "load",
    "save",
    "settings_of",
    "update",
]
