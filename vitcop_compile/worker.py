"""One thread that calls programs on behalf of all others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .isolation import plain


class Worker:
    """Calls programs in a thread of its own, one at a time, on the caller's CUDA stream."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vitcop")
        self._inside = threading.local()

    def calling(self, program: Callable[..., Any]) -> Callable[..., Any]:
        """`program`, called by this worker; the caller waits for it to return, not for the device."""

        def call(*inputs: Any) -> Any:
            if getattr(self._inside, "yes", False):
                return program(*inputs)
            stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
            return self._thread.submit(self._run, program, inputs, stream).result()

        return call

    def _run(self, program: Callable[..., Any], inputs: tuple[Any, ...], stream: Any) -> Any:
        self._inside.yes = True
        # Modes and streams belong to threads: what surrounds the caller does not surround this one.
        with plain(), torch.cuda.stream(stream):
            return program(*inputs)
