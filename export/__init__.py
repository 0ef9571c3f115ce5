"""Lowering to files and engines: `export` writes a folder, `EngineModel` runs it."""

from .engine import EngineModel
from .manifest import FolderError, Manifest
from .writer import export

__all__ = ["EngineModel", "FolderError", "Manifest", "export"]
