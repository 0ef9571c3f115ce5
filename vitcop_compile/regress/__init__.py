"""The regression gate: what a compiled model computes, holds and costs, compared with a committed baseline."""

from .baseline import Baseline, Record, Settings, load, save, settings_of
from .compare import Failure, Judged, Report, Timing
from .gate import ELSEWHERE, REPEATS, check, update

__all__ = [
    "ELSEWHERE", "REPEATS", "Baseline", "Failure", "Judged", "Record", "Report", "Settings", "Timing", "check", "load", "save",
    "settings_of", "update",
]  # fmt: skip
