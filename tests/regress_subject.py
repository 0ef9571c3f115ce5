"""The model that the gate's tests measure, and its facts, measured once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import naive
import torch
from models import PATCHES, optimize, shared

from vitcop_compile import OptimizedModel, ViTCoPConfig, programs
from vitcop_compile.bench import Request, bind
from vitcop_compile.regress import facts

# A language model of 3 layers, 64 wide, 4 query heads on 2 key heads; an encoder 32 wide, read after the third of its layers.
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, WIDE = 3, 64, 4, 2, 16, 96
VISION, VISION_WIDE, VISION_LAYERS = 32, 48, 3
PRESET, RETENTION, VISION_RATIO = "1/3", 0.3333, 0.5
BATCH, TEXT, NEW = 2, 20, 5
TEXT_ROWS, ROOM = 32, 64  # the buckets of TEXT and NEW
SHALLOW, DEEP = 1, 2  # 2 and 22 of 32 layers, at this depth
KEPT = int(VISION_RATIO * PATCHES)
MERGED, LEFT = naive.budgets(RETENTION, VISION_RATIO, SHALLOW, DEEP, LAYERS, KEPT)
VISUAL = [KEPT, MERGED, LEFT]
ROWS = [TEXT_ROWS + count for count in VISUAL]
REQUEST = Request(BATCH, TEXT, NEW)


def build(config: ViTCoPConfig | None = None, backend: str = "eager") -> OptimizedModel:
    """A fresh model; its programs are exported once for all models of one schedule and one set of passes."""
    optimized = optimize(shared(LAYERS, KV_HEADS), config or ViTCoPConfig.preset(PRESET), backend=backend)
    for made in vars(optimized.on_demand).values():
        if isinstance(made, programs.Programs):
            for name in ("export_vision", "export_prefill", "export_extend"):
                object.__setattr__(made, name, _kept(name, made))
    return optimized


@functools.cache
def measured() -> tuple[OptimizedModel, dict[str, Any]]:
    """(model, facts); whoever changes the facts copies them."""
    optimized = build()
    return optimized, facts.measure(optimized, REQUEST)[0]


@functools.cache
def exported() -> dict[str, torch.export.ExportedProgram]:
    """The programs of `measured`."""
    return bind.exported(measured()[0], REQUEST)


_exports: dict[tuple, torch.export.ExportedProgram] = {}


def _kept(name: str, made: programs.Programs) -> Callable[..., torch.export.ExportedProgram]:
    original = getattr(made, name)

    def export(*given: Any, **named: Any) -> torch.export.ExportedProgram:
        key = (name, made.schedule, given, tuple(named.items()), programs.prefill_passes)
        if key not in _exports:
            _exports[key] = original(*given, **named)
        return _exports[key]

    return export
