"""What a user could run, side by side: arms interleaved in one process, stage by stage, beside the ideal."""

from . import ours, stock  # noqa: F401  (they register their arms)
from .arms import ARMS, Arm, Request
from .cases import STAGES, Case, Entrant, Shape, check_cases
from .environment import environment
from .models import IMAGE_SIZES, MODELS
from .report import check_target, markdown, read, table, write
from .rows import rows
from .runner import run

__all__ = [
    "ARMS", "IMAGE_SIZES", "MODELS", "STAGES", "Arm", "Case", "Entrant", "Request", "Shape", "check_cases", "check_target",
    "environment", "markdown", "read", "rows", "run", "table", "write",
]  # fmt: skip
