"""A small folder of engines, and servers of it: what is measured of a server itself, where a model would hide it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from serving_arms import BUCKETS, NEW, processor_of
from vitcop_compile.export import export

from vitcop_compile import ViTCoPConfig, optimize
from vitcop_compile.bench import Shape
from vitcop_compile.errors import UnsupportedError

SHAPE = Shape(hidden=64, layers=4, vision_hidden=64, vision_layers=3, vocab=300, image_size=112, name="tiny")
# As the script `vitcop-compile`, wherever that is.
_CLI = "from vitcop_compile.cli import app; app(prog_name='vitcop-compile')"
# Seconds: of a start, which loads every program, and of an end.
_START, _END = 180.0, 60.0


def written(folder: Path, slots: int) -> Path:
    """A folder of a toy model at 1/9 and its processor."""
    fast = optimize(SHAPE.model(), ViTCoPConfig.preset("1/9"))
    export(fast, folder, batch_size=(1, slots), max_text_len=BUCKETS[-1], max_new_tokens=NEW)
    processor_of(SHAPE).save_pretrained(folder)
    return folder


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """The address of `vitcop-compile serve` of a folder, and its process. It is ended as an operator would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _CLI, "serve", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + _START
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() > end:
                raise UnsupportedError(f"{' '.join(command)} does not serve: what it said is above")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=10, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False
