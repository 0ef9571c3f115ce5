"""Methods: what is pruned where. Each is a small file: a policy that chooses, and a class that says where it stands.

`ViTCoPConfig` is one; these are the others, and `CustomMethod` is the user's own.
"""

from .base import METHODS, Budgeted, load_method, method_of
from .calibrated import Calibrated
from .cdpruner import CDPruner
from .custom import CustomMethod
from .dart import Dart
from .divprune import DivPrune
from .fastv import FastV
from .floors import Downsample, Random, Uniform
from .holov import HoloV
from .named import method_from, method_named, method_names
from .pyramiddrop import PyramidDrop
from .scope import Scope
from .sparsevlm import SparseVLM
from .tome import ToMe
from .v2drop import V2Drop
from .visionzip import VisionZip
from .vscan import VScan
from .zspaprune import ZSPAPrune

__all__ = [
    "METHODS",
    "Budgeted",
    "CDPruner",
    "Calibrated",
    "CustomMethod",
    "Dart",
    "DivPrune",
    "Downsample",
    "FastV",
    "HoloV",
    "PyramidDrop",
    "Random",
    "Scope",
    "SparseVLM",
    "ToMe",
    "Uniform",
    "V2Drop",
    "VScan",
    "VisionZip",
    "ZSPAPrune",
    "load_method",
    "method_from",
    "method_named",
    "method_names",
    "method_of",
]
