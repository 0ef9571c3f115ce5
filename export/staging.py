"""Folders that appear whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .manifest import FolderError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; moved to `target` at the end, removed if anything goes wrong.

    Missing parents are made. Raises FolderError, before any work, as `check_target` does.
    """
    target = check_target(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield aside
        aside.chmod(0o755)
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def check_target(target: Path) -> Path:
    """`target`, absolute. Raises FolderError if it exists and is not an empty folder, or lies below a file."""
    target = target.absolute()
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise FolderError(f"{target} exists: choose another output folder, or remove it first")
    if blocking := [str(parent) for parent in target.parents if parent.exists() and not parent.is_dir()]:
        raise FolderError(f"{target} cannot be made: {blocking[0]} is a file")
    return target
