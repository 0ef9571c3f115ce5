"""Arms in processes of their own, which answer one command at a time over pipes; both ends. The standard library alone: a
worker may run in an environment that has neither torch nor this package.

A command is a line of JSON {"do": name, ...}, an answer {"ok": ...} or {"error": "..."}. A worker ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import string
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class WorkerError(RuntimeError):
    """A worker that failed, died or was too slow; its message starts with its name. `alive`: whether it can go on."""

    def __init__(self, message: str, alive: bool = False):
        super().__init__(message)
        self.alive = alive


class Worker:
    """A process of the command line `command`, from which `ask` gets answers.

    What it writes to standard error, and prints, is kept for the message of its end. threads: how many the libraries of the
    process may use that read OMP_NUM_THREADS.
    """

    def __init__(self, name: str, command: Sequence[str], threads: int = 1):
        self.name = name
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (as long as the process)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        try:
            self._process = subprocess.Popen(command, text=True, env=environment, **pipes)
        except OSError as reason:
            self._log.close()
            raise WorkerError(f"{name}: {command[0]} cannot be started: {reason.strerror}") from None
        self._answers: queue.Queue[str | None] = queue.Queue()
        # A pipe cannot be waited for with a limit on every system; a thread that reads it can.
        threading.Thread(target=self._read, daemon=True).start()

    def ask(self, do: str, seconds: float, **given: Any) -> Any:
        """What the worker answers to the command. Raises WorkerError: if it reports an error, it is still there; if it has
        ended, or has not answered within `seconds`, it is no more."""
        try:
            self._process.stdin.write(json.dumps({"do": do} | given) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.stop(0.0)
            raise WorkerError(f"{self.name}: no answer to {do!r} within {seconds:.0f} s{self._last_words()}") from None
        except (OSError, ValueError):
            answer = None
        try:
            found = None if answer is None else json.loads(answer)
        except ValueError:
            self.stop(0.0)
            raise WorkerError(f"{self.name}: answered {do!r} with {answer!r}, which is no JSON") from None
        if found is None:
            self.stop()
            raise WorkerError(f"{self.name}: ended with {self._process.returncode} at {do!r}{self._last_words()}")
        if "error" in found:
            raise WorkerError(f"{self.name}: {found['error']}", alive=True)
        return found["ok"]

    def cpu_seconds(self) -> float:
        """What all its threads have used so far; 0 where that cannot be read, which takes Linux."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, seconds: float = 5.0) -> None:
        """Ends it: its input first, itself after `seconds`."""
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.close()
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read()[-4000:].splitlines() if line.strip()]
        return f": {lines[-1][:300]}" if lines else ""


def serve(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answers commands from standard input until it ends, by functions of their fields, whose results JSON can hold.

    What they print goes to standard error: standard output is the channel.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        given = json.loads(line)
        try:
            answer = {"ok": commands[given.pop("do")](**given)}
        except Exception as error:
            words = " ".join(str(error).split())
            answer = {"error": f"{type(error).__name__}: {words[:500]}"}
        print(json.dumps(answer), file=channel, flush=True)


def question(seed: int, count: int) -> str:
    """A prompt of `count` tokens, a letter each."""
    return "".join(random.Random(seed).choices(string.ascii_lowercase, k=count))


def peak_around(call: Callable[[], Any]) -> tuple[Any, int | None]:
    """What `call` returns, and the most resident memory of this process meanwhile, in bytes; None without Linux."""
    if not _CLEAR.exists():
        return call(), None
    _CLEAR.write_text("5")  # proc(5): the peak is set to what is resident now
    found = call()
    (line,) = [line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
    return found, int(line.split()[1]) * 1024
