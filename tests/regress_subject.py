"""The model that the gate's tests measure, and its facts, measured once."""

from __future__ import annotations

import functools
from typing import Any

import naive
import torch
from models import PATCHES, optimize, shared

from vitcop_compile import OptimizedModel, ViTCoPConfig
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
    """A fresh model, of programs that are exported once."""
    return optimize(shared(LAYERS, KV_HEADS), config or ViTCoPConfig.preset(PRESET), backend=backend)


@functools.cache
def measured() -> tuple[OptimizedModel, dict[str, Any]]:
    """(model, facts); whoever changes the facts copies them."""
    optimized = build()
    return optimized, facts.measure(optimized, REQUEST)[0]


@functools.cache
def exported() -> dict[str, torch.export.ExportedProgram]:
    """The programs of `measured`."""
    return bind.exported(measured()[0], REQUEST)
