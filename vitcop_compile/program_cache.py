"""Programs by key: made once, logged, and let go when they are too many."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from .isolation import tracing
from .schedule import Stage

log = logging.getLogger("vitcop_compile")
Program = Callable[..., Any]
# What the numbers of a key are, by its kind.
FIELDS = {
    "vision": ("images",),
    "tower": ("tiles", "slots"),
    "frames": ("frames",),
    "select": ("tiles", "slots", "segments", "candidates", "taps", "stage", "axes"),
    "prefill": ("batch", "text rows", "visual tokens", "cache rows", "filled"),
    "extend": ("batch", "tokens", "cache rows"),
}


class ProgramCache:
    """`programs` by key, at most `limit` bytes of them by `bytes_of`; the one that was used longest ago goes first.

    Every program that is made is a line of the log "vitcop_compile" at level INFO: its key, why there was none, and the
    seconds of its export and first call.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.programs: dict[tuple, Program] = {}
        self._bytes: dict[tuple, int] = {}
        self._used: dict[tuple, int] = {}
        self._clock = itertools.count()

    def get(self, key: tuple, make: Callable[[], tuple]) -> Program:
        """The program of `key`. make() -> (program, bytes), and in a word how, by default "exported"; one thread makes at a
        time, the others wait."""
        program = self.programs.get(key)
        if program is None:
            with tracing():
                program = self.programs.get(key)  # another thread may have made it while this one waited
                if program is None:
                    program = self._made(key, make)
        self._used[key] = next(self._clock)
        return program

    def release(self) -> None:
        """Lets all programs go; those that run end undisturbed."""
        self.programs.clear()
        self._bytes.clear()

    def _made(self, key: tuple, make: Callable[[], tuple]) -> Program:
        why, start = reason(key, list(self.programs)), time.perf_counter()
        made, size, *how = make()
        taken, verb = time.perf_counter() - start, how[0] if how else "exported"

        def first(*inputs: Any) -> Any:
            """Compiles, in most backends; from then on the program itself is called."""
            with tracing():
                begun = time.perf_counter()
                outputs = made(*inputs)
                if self.programs.get(key) is first:
                    self.programs[key] = made
                    seconds = time.perf_counter() - begun
                    log.info("%s: %s; %s in %.1f s, first call %.1f s", name(key), why, verb, taken, seconds)
            return outputs

        self.programs[key], self._bytes[key] = first, size
        self._used[key] = next(self._clock)
        self._shrink(key)
        return first

    def _shrink(self, newest: tuple) -> None:
        while sum(self._bytes.values()) > self.limit and len(self.programs) > 1:
            oldest = min((key for key in self.programs if key != newest), key=lambda key: self._used.get(key, -1))
            log.info("%s: let go, programs hold more than %d bytes", name(oldest), self.limit)
            del self.programs[oldest]
            self._bytes.pop(oldest, None)


def name(key: tuple) -> str:
    """A key in words."""
    kind, *values = key
    words = (
        f"{what} {f'to {value.total}' if isinstance(value, Stage) else value}" for what, value in zip(FIELDS[kind], values)
    )
    return f"{kind} ({', '.join(words)})"


def reason(key: tuple, known: list[tuple]) -> str:
    """Why there was no program of `key`: how it differs from the known one that is most like it."""
    kind, *values = key
    alike = [other[1:] for other in known if other[0] == kind]
    if not alike:
        return "the first of its kind"
    nearest = min(alike, key=lambda other: sum(a != b for a, b in zip(values, other, strict=True)))
    new = [what for what, a, b in zip(FIELDS[kind], values, nearest, strict=True) if a != b]
    return f"other {', '.join(new)}"


def bytes_of(program: ExportedProgram, copied: bool) -> int:
    """What a program holds, estimated before it is compiled: its results, which a CUDA graph keeps, twice its largest
    intermediate value, and where they are `copied` the weights."""
    sizes = [value.nbytes for node in program.graph.nodes if isinstance(value := node.meta.get("val"), Tensor)]
    weights = sum(value.nbytes for value in program.state_dict.values()) if copied else 0
    outputs = [node.meta["val"] for node in program.graph.output_node().all_input_nodes if "val" in node.meta]
    return weights + 2 * max(sizes, default=0) + sum(value.nbytes for value in outputs if isinstance(value, Tensor))
