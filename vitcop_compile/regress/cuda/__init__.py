"""Facts of the CUDA path, counted without a GPU: inductor's code for a fake device, built for real architectures."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UnsupportedError
from .replaced import DEVICES, VERSIONS, missing, version

__all__ = ["ALWAYS", "ALWAYS_DECODE", "ARCHITECTURES", "VERSIONS", "measure", "missing", "triton"]

ARCHITECTURES = tuple(DEVICES)
# What a program on CUDA must be, whatever a baseline says: without C++, in one piece, fit for CUDA graphs, with all that it
# writes to at addresses that hold, and nothing of it elsewhere or read by the host. A step must not copy its caches; prefill
# may lay out the keys of a layer that is scored before it writes them, as inductor makes one kernel of both.
ALWAYS = {"written_moving": 0, "cpp_kernels": 0, "refused": 0, "partitions": 1, "elsewhere": 0, "reads": 0, "moving": 0}
ALWAYS_DECODE = {"cache_copies": 0}
SECONDS = 3600


def triton() -> str:
    """The version that is installed, "none" without."""
    return version("triton")


def measure(settings: Any, say: Callable[[str], None] = lambda what: None) -> dict[str, dict[str, Any]]:
    """{preset: {architecture: {program: facts}}} of `settings` (`Settings`), a process for each of its architectures, side by
    side. Raises UnsupportedError where a process fails, as it does where `missing` says why."""
    say(f"generating CUDA code for {', '.join(settings.cuda)}")
    found: dict[str, dict[str, Any]] = {preset: {} for preset in settings.presets}
    with tempfile.TemporaryDirectory() as folder:
        running = {name: _start(settings, name, Path(folder)) for name in settings.cuda}
        try:
            for name, process in running.items():
                said = process.communicate(timeout=SECONDS)[1]
                if process.returncode:
                    raise UnsupportedError(f"the CUDA dry run for {name} failed: {said.strip()[-2000:]}")
                for preset, facts in json.loads(_result(Path(folder), name).read_text()).items():
                    found[preset][name] = facts
        except subprocess.TimeoutExpired:
            raise UnsupportedError(f"the CUDA dry run took more than {SECONDS} s: ask for fewer presets or layers") from None
        finally:
            for process in running.values():
                process.kill()
                process.wait()
    return found


def _start(settings: Any, architecture: str, folder: Path) -> subprocess.Popen:
    request = {name: getattr(settings, name) for name in ("model", "sizes", "presets", "batch", "text_tokens", "new_tokens")}
    asked = folder / f"{architecture}.asked"
    asked.write_text(json.dumps(request | {"architecture": architecture}))
    command = [sys.executable, "-m", __name__, str(_result(folder, architecture))]
    with asked.open() as given:
        return subprocess.Popen(command, stdin=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _result(folder: Path, architecture: str) -> Path:
    return folder / f"{architecture}.json"
