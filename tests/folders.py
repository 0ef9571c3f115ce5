"""Folders of tiny models, exported once for all tests, and generation that compares them."""

from __future__ import annotations

import fcntl
import functools
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import models
import reference_llava as reference
import torch
from torch import Tensor
from vitcop_compile.export import EngineModel, export

from vitcop_compile import ViTCoPConfig

LAYERS, STEPS, TEXT = 3, 32, 24
NEW = STEPS + 4  # rows for new tokens
BUDGET = 30  # visual tokens that leave the encoder
CONFIG = ViTCoPConfig(budgets=(BUDGET, 18, 7, 5), shallow_layer=1, deep_layer=2, vision_layer=2, scale_layers=False)
SETTINGS = reference.Settings(BUDGET, 5, 18, 7, 2, 1, 2)
SHIFTS = (0, 12, 23)  # rows missing from the caches of the layers
# name -> (batch size, opset, text buckets). The command-line tests export opset 18 with a dynamic axis.
FOLDERS: dict[str, tuple[int, int, tuple[int, ...] | None]] = {
    "dynamic": (1, 23, None),
    "pair": (2, 18, (10, TEXT)),
}


@functools.cache
def optimized() -> Any:
    """The model that the folders are made from, on torch's eager backend."""
    return models.optimize(models.shared(LAYERS), CONFIG)


@functools.cache
def folder(name: str) -> Path:
    """A folder of FOLDERS, exported when the first of all workers asks for it. Nobody writes into it."""
    root = Path(os.environ["VITCOP_TEST_FOLDERS"])
    batch, opset, buckets = FOLDERS[name]
    numbers = {"batch_size": batch, "max_text_len": TEXT, "max_new_tokens": NEW}
    with (root / f"{name}.lock").open("w") as lock, without_collection():
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            export(optimized(), root / name, opset=opset, prompt_buckets=buckets, **numbers)
    return root / name


@contextmanager
def without_collection() -> Iterator[None]:
    """The collector walks torch's whole graphs again and again: a sixth of the time of an export."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def generate(model: Any, ids: Tensor, images: Tensor | None = None, steps: int = STEPS, **settings: Any) -> tuple[Any, Any]:
    """(new tokens [B, steps], logits [B, steps, V]), greedy by default. An engine's batch is filled with copies."""
    if isinstance(model, EngineModel) and ids.shape[0] == 1 < max(model.manifest.batch_sizes):
        ids, images = ids.repeat(2, 1), None if images is None else images.repeat(2, 1, 1, 1)
    settings = {"do_sample": False, "max_new_tokens": steps} | settings | ({} if images is None else {"pixel_values": images})
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)
