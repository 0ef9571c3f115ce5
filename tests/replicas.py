"""Engine replicas that decode slowly, and whose step thread can be made to hang: the workers of Ray in tests import it."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from vitcop_compile.serve.ray_app import Engine

STEP = 0.02  # seconds


class Slow(Engine):
    """An `Engine` that takes STEP for a decode step at least."""

    def __init__(self, cluster: Any):
        super().__init__(cluster)
        self._hung = threading.Event()
        for scheduler in self._replica._schedulers.values():
            slots = scheduler._slots  # type: ignore[attr-defined]
            for name in ("prefill", "decode"):
                setattr(slots, name, self._slowly(getattr(slots, name)))

    def _slowly(self, step: Any) -> Any:
        def slow(*given: Any) -> Any:
            time.sleep(STEP)
            while self._hung.is_set():
                time.sleep(0.1)
            return step(*given)

        return slow

    async def hang(self) -> int:
        """No step ends any more; the process that this is of."""
        self._hung.set()
        return os.getpid()

    async def pid(self) -> int:
        """Of the process."""
        return os.getpid()
