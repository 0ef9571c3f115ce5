"""Every method in half precision, under autocast, and in batches of which some samples have no image."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import torch
from models import exhaustive, slow

from vitcop_compile import methods
from vitcop_compile.methods import Calibrated, method_named

LAYERS, KEPT = 4, 9
# On decoders of four layers; ToMe takes a half of what there is in each of three blocks at most.
MORE: dict[str, dict[str, Any]] = {
    "tome": {"tokens": 30}, "fastv": {"layer": 1}, "dart": {"layer": 1}, "vscan": {"window": 3},
}  # fmt: skip
NAMES = [name for name in methods.METHODS if name != "custom"]
# In CI one that merges and weighs, and one at the decoder's entry, with the prompt's text in view.
FEW = ("calibrated+visionzip", "cdpruner")
EVERY = pytest.mark.parametrize("name", [*map(slow, FEW), *(exhaustive(name) for name in NAMES if name not in FEW)])


def method(name: str) -> Any:
    kind = name.removeprefix("calibrated+")
    made = method_named(kind, {"tokens": KEPT} | MORE.get(kind, {}))
    return made if kind == name else Calibrated(made)


@cache
def half(dtype: torch.dtype) -> Any:
    return models.llava(LAYERS).to(dtype)


def batch() -> dict[str, torch.Tensor]:
    """An image, and text alone."""
    ids, mask = models.pad([models.prompt(3, 5), torch.tensor([models.text(6)])], "left")
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": models.pixels()}


@EVERY
def test_samples_without_images_are_what_they_are_alone(name: str) -> None:
    """And autocast changes nothing."""
    fast, asked = models.optimize(models.shared(LAYERS), method(name)), batch()
    out = fast(**asked)
    single = fast(models.prompt(3, 5), asked["pixel_values"])
    text = fast(torch.tensor([models.text(6)]))
    torch.testing.assert_close(out.logits, torch.cat((single.logits, text.logits)), atol=1e-5, rtol=1e-5)
    ours, alone = (found["past_key_values"].selection for found in (out, single))
    for mine, theirs in zip((ours.kept, *ours.stages), (alone.kept, *alone.stages), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.equal(mine[:1], theirs) and (mine[1] == -1).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast(**asked).logits, out.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY
def test_half_precision_keeps_what_the_schedule_says(name: str, dtype: torch.dtype) -> None:
    fast = models.optimize(half(dtype), method(name))
    out = fast(**batch())
    held = out["past_key_values"].selection
    assert out.logits.dtype == dtype and out.logits.isfinite().all()
    tokens = [] if held.kept is None else [held.kept[0]]
    stages, counts = [*tokens, *held.stages], [fast.schedule.image_tokens, *fast.schedule.group_tokens()[1:]]
    for kept, count in zip(stages, counts[-len(stages) :], strict=True):
        kept = kept if kept.dim() == 1 else kept[0]
        assert len(kept) == count and kept.tolist() == sorted(set(kept.tolist()))
