"""vitcop_compile: visual-token pruning compiled into the graphs of large vision-language models."""

from . import methods
from .config import Budgets, ViTCoPConfig
from .errors import ConfigError, InputError, RewriteError, UnsupportedError, VitcopError
from .optimized import OptimizedModel
from .pipeline import optimize
from .schedule import ModelShape, Schedule

__version__ = "0.1.0"
__all__ = [
    "Budgets",
    "ConfigError",
    "InputError",
    "ModelShape",
    "OptimizedModel",
    "RewriteError",
    "Schedule",
    "UnsupportedError",
    "ViTCoPConfig",
    "VitcopError",
    "methods",
    "optimize",
]
