"""Where compiled programs are kept between processes: one folder of entries by key, bounded in bytes.

`VITCOP_CACHE` names the folder, by default `vitcop_compile` in `$XDG_CACHE_HOME` or `~/.cache`; "off" keeps nothing.
`VITCOP_CACHE_BYTES` bounds it. An entry is a folder of files and a list of their hashes. It is written aside and moved into
place, so processes may share the folder; it is checked when it is read, and discarded if it is not what was written. What
compilers keep are libraries and pickles, as in torch's own caches: whoever can write there decides what runs here. A folder
of another user, or one that others may write to, is therefore not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tarfile
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, InputError

log = logging.getLogger("vitcop_compile")
FOLDER, BYTES = "VITCOP_CACHE", "VITCOP_CACHE_BYTES"
LIMIT = 4 * 2**30
_OFF = ("off", "0", "")
_ENTRY, _PROGRAMS, _ASIDE = "entry.json", "programs", "aside"
# Anything aside that is older was left by a process that died.
_STALE_SECONDS = 6 * 3600
_suspended = 0


def current() -> Store | None:
    """The store that the environment names; None where it is off, or a folder that cannot be trusted, which the log says."""
    named = os.environ.get(FOLDER)
    if _suspended or (named is not None and named.strip().lower() in _OFF):
        return None
    try:
        root = Path(named).expanduser() if named else _default()
    except RuntimeError as error:
        log.warning("%s; nothing is kept: name a folder in %s", error, FOLDER)
        return None
    try:
        limit = int(os.environ.get(BYTES, LIMIT))
    except ValueError:
        limit = -1
    if limit < 0:
        raise ConfigError(f"{BYTES}={os.environ[BYTES]!r} is not a number of bytes: give one of 0 or more, or {FOLDER}=off")
    if (why := _distrusted(root)) is not None:
        log.warning("%s: %s; nothing is kept there", root, why)
        return None
    return Store(root.absolute(), limit)


def folder(name: str) -> Path | None:
    """A folder of the store for a compiler that has a cache of its own, made if need be; None where the store is off or cannot
    be written. Its files count towards the bound, and the ones used longest ago go first."""
    store = current()
    if store is None:
        return None
    path = store.root / name
    try:
        store.make()
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        log.info("%s cannot be made (%s): %s keeps nothing", path, error.strerror, name)
        return None
    return path if os.access(path, os.W_OK) else None


@contextlib.contextmanager
def off() -> Iterator[None]:
    """Within the context nothing is looked up or kept, in any thread: for what measures or counts compilation."""
    global _suspended
    _suspended += 1
    try:
        yield
    finally:
        _suspended -= 1


class Store:
    """Entries below `root`, at most `limit` bytes of them, by (group, key), two names for a folder within a folder."""

    def __init__(self, root: Path, limit: int):
        self.root, self.limit = root, limit

    def make(self) -> None:
        """Makes the folder, for its user alone whatever others the user lets in elsewhere."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def knows(self, group: str) -> bool:
        """Whether there is any entry of `group`."""
        try:
            return any((self.root / _PROGRAMS / group).iterdir())
        except OSError:
            return False

    def has(self, group: str, key: str) -> bool:
        """Whether there is an entry; `get` may still find it broken."""
        return (self._path(group, key) / _ENTRY).is_file()

    def get(self, group: str, key: str) -> Path | None:
        """The folder of an entry whose files are what was written; None without one. A broken one is discarded."""
        path = self._path(group, key)
        try:
            stated = json.loads((path / _ENTRY).read_text())["files"]
            whole = stated == _hashes(path)
        except FileNotFoundError:
            if path.exists():
                self.discard(group, key, "it is not whole")
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.discard(group, key, str(error))
            return None
        if not whole:
            self.discard(group, key, "its files are not those that were written")
            return None
        with contextlib.suppress(OSError):  # read-only
            os.utime(path / _ENTRY)
        return path

    def put(self, group: str, key: str, source: Path, about: dict[str, Any]) -> None:
        """Keeps the files in the folder `source`, which goes; the log says if that fails. about: what a reader may like to
        know of them."""
        path = self._path(group, key)
        try:
            text = json.dumps({"files": _hashes(source), "about": about}, indent=1)
            (source / _ENTRY).write_text(text)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.rename(source, path)
        except OSError as error:
            if not path.is_dir():
                log.warning("%s cannot be written (%s): the program is not kept", path, error.strerror)
            shutil.rmtree(source, ignore_errors=True)
            return
        self.shrink(newest=path)

    def aside(self) -> Path:
        """A new folder on the file system of the store, which `put` takes; elsewhere where the store cannot be written."""
        aside = self.root / _ASIDE
        try:
            self.make()
            aside.mkdir(mode=0o700, exist_ok=True)
            path = aside / uuid.uuid4().hex
            path.mkdir(mode=0o700)
        except OSError:
            return Path(tempfile.mkdtemp(prefix="vitcop-"))
        return path

    def discard(self, group: str, key: str, why: str) -> None:
        """Lets an entry go; the log says why."""
        path = self._path(group, key)
        log.warning("%s is discarded and made anew: %s", path, why)
        self._remove(path)

    def shrink(self, newest: Path | None = None) -> None:
        """Lets go of what was used longest ago until the rest fits, and of what dead processes left aside."""
        with contextlib.suppress(OSError):
            for left in (self.root / _ASIDE).iterdir():
                if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
        units = sorted(self._units(), key=lambda unit: unit[0])
        total = sum(size for _, size, _ in units)
        for _, size, path in units:
            if total <= self.limit:
                break
            if path != newest:
                log.info("%s: let go, the store holds more than %d bytes", path, self.limit)
                self._remove(path)
                total -= size

    def size(self) -> int:
        """Bytes of all that is kept."""
        return sum(size for _, size, _ in self._units())

    def pack(self, output: Path) -> None:
        """Writes all that is kept to a tar file; `tar -x` in a folder makes it one for VITCOP_CACHE."""
        with _written(output) as aside, tarfile.open(aside, "w") as tar:
            for path in sorted(self.root.rglob("*")):
                within = path.relative_to(self.root)
                if path.is_file() and not path.is_symlink() and within.parts[0] != _ASIDE:
                    tar.add(path, arcname=str(within), recursive=False)

    def _path(self, group: str, key: str) -> Path:
        return self.root / _PROGRAMS / group / key

    def _units(self) -> Iterator[tuple[float, int, Path]]:
        """When each was last used, its bytes, and where it is: an entry, or a file of another compiler."""
        for top in _children(self.root):
            if top.name == _PROGRAMS:
                for path in (entry for group in _children(top) for entry in _children(group)):
                    with contextlib.suppress(OSError):
                        yield (path / _ENTRY).stat().st_mtime, sum(_sizes(path)), path
            elif top.name != _ASIDE:
                for path in top.rglob("*"):
                    with contextlib.suppress(OSError):
                        if path.is_file():
                            about = path.stat()
                            yield max(about.st_mtime, about.st_atime), about.st_size, path

    def _remove(self, path: Path) -> None:
        """Out of sight first, so that no other process meets half of it."""
        gone = self.root / _ASIDE / uuid.uuid4().hex
        with contextlib.suppress(OSError):
            if not path.is_dir():
                path.unlink()
                return
            gone.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)


def _default() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitcop_compile"


def _distrusted(root: Path) -> str | None:
    """Why what lies in `root` must not be run; None for a folder of this user's or root's that no other can write to, or for
    none yet."""
    try:
        about = root.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not root.is_dir():
        return "is not a folder"
    if hasattr(os, "getuid"):
        if about.st_uid not in (os.getuid(), 0):
            return f"belongs to user {about.st_uid}, and programs that are loaded run as this one"
        if about.st_mode & 0o022:
            return f"can be written by others (mode {about.st_mode & 0o777:o}): chmod go-w it"
    return None


def _hashes(path: Path) -> dict[str, str]:
    """Of every file of an entry but the list of them, by its name in it."""
    found = {}
    for file in sorted(path.rglob("*")):
        if file.is_symlink():
            raise ValueError(f"{file.name} is a link")
        if file.is_file() and file != path / _ENTRY:
            with file.open("rb") as stream:
                found[file.relative_to(path).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _children(path: Path) -> list[Path]:
    try:
        return sorted(child for child in path.iterdir() if child.is_dir())
    except OSError:
        return []


def _sizes(path: Path) -> list[int]:
    return [file.stat().st_size for file in path.rglob("*") if file.is_file()]


@contextlib.contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A file beside `path`, which takes its place in the end."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): name a file in an existing folder") from None
    finally:
        aside.unlink(missing_ok=True)
