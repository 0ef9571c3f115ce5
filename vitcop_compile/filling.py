"""What a process does that `fillers` starts: it builds a model without values, and compiles what nobody has claimed."""

from __future__ import annotations

import os
import pickle
import sys
import threading

import torch

from .fillers import Share, empty, work
from .pipeline import optimize


def _help(share: Share) -> None:
    """What a process does."""
    torch.set_num_threads(share.threads)
    fast = optimize(
        empty(share.kind, share.config, share.dtype),  # type: ignore[arg-type]
        share.method,
        backend=share.backend,
        attn_implementation=share.attn_implementation,
    )
    kept = fast.on_demand.kept
    if kept is None or kept.group != share.group:
        raise SystemExit("the model is not what its class makes of its configuration")
    work(fast.on_demand, share)


def main() -> None:
    """Reads a `Share` from standard input, whose end is that of the parent."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    share = pickle.loads(sys.stdin.buffer.read(size))

    def follow() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _help(share)
