"""Calibrated methods on a small model, and conversations with it that stock layers weighed by hand have too."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import torch
from models import PATCHES
from reference_calibrated import NOWHERE, LlavaWeighing, see_tome, see_visionzip, see_vitcop
from reference_llava import Settings

from vitcop_compile import ViTCoPConfig
from vitcop_compile.methods import ToMe, VisionZip

LAYERS, NEAR = 4, 1e-5
COUNTS: dict[str, Any] = {"shallow_layer": 1, "deep_layer": 3, "scale_layers": False}
VITCOP = ViTCoPConfig(budgets=(30, 12, 7, 5), **COUNTS)
BY_HAND = Settings(30, 5, 12, 7, 2, 1, 3, "original")
PLAIN = Settings(PATCHES, 1, 1, 1, 2, NOWHERE, NOWHERE, "original")
SEEING = {
    "visionzip": (VisionZip(tokens=20, contextual=0.25), PLAIN, see_visionzip(15, 5)),
    "vitcop": (VITCOP, BY_HAND, see_vitcop(BY_HAND)),
    "tome": (ToMe(tokens=22), PLAIN, see_tome((50, 36, 22))),
}
TOLD: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
TURNS = (1, 0, 2)  # images of each


@cache
def optimized(method: Any, backend: str = "eager", layers: int = LAYERS) -> Any:
    return models.optimize(models.shared(layers), method, backend=backend)


def check(cache: Any, told: Any, sample: int = 0, near: float = NEAR) -> None:
    """Keys and values of every layer, and how many tokens each row of theirs stands for."""
    for layer, stock in enumerate(told.cache.layers):
        rows = stock.keys.shape[2]
        for ours, theirs in zip(cache.buffers[2 * layer : 2 * layer + 2], (stock.keys, stock.values), strict=True):
            torch.testing.assert_close(ours[sample, :, :rows], theirs[0], atol=near, rtol=near)


def check_sizes(fast: Any, cache: Any, told: Any, sample: int = 0) -> None:
    plan = fast.schedule
    held = dict(zip(plan.told, cache.held_buffers.numbers, strict=True))
    for layer, group in enumerate(plan.groups):
        sizes = told.sizes[layer]
        if group in held:
            assert held[group][sample, : len(sizes)].tolist() == sizes
        else:
            assert set(sizes) == {1}


def talk(fast: Any, name: str, batch: int = 1, near: float = NEAR, turns: tuple[int, ...] = TURNS) -> None:
    """Turns with so many images, each of three tokens said."""
    _, settings, see = SEEING[name]
    told = [LlavaWeighing(fast.model, settings, see) for _ in range(batch)]
    whole, mask = torch.empty(batch, 0, dtype=torch.int64), torch.empty(batch, 0, dtype=torch.int64)
    cache, unfed = None, [[] for _ in range(batch)]
    for turn, images in enumerate(turns):
        prompts = [models.turn_ids(images, 7 * turn + sample) for sample in range(batch)]
        ids, real = models.pad([torch.tensor([prompt]) for prompt in prompts], "left")
        new = [models.pixels(images, 10 * turn + sample) if images else None for sample in range(batch)]
        whole, mask = torch.cat((whole, ids), 1), torch.cat((mask, real), 1)
        sent: dict[str, Any] = {"pixel_values": torch.cat([part for part in new if part is not None])} if images else {}
        out = fast.generate(
            whole, attention_mask=mask, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True,
            past_key_values=cache, **sent,
        )  # fmt: skip
        cache, said = out["past_key_values"], out.sequences[:, whole.shape[1] :]
        for sample in range(batch):
            logits = told[sample].turn([*unfed[sample], *prompts[sample]], new[sample], said[sample].tolist())
            torch.testing.assert_close(torch.stack(out.logits)[:, sample], logits, atol=near, rtol=near)
            check(cache, told[sample], sample, near)
            check_sizes(fast, cache, told[sample], sample)
            unfed[sample] = said[sample, -1:].tolist()
        if images:
            kept = [PATCHES * i + patch for i, of in enumerate(told[0].kept) for patch in of]
            assert cache.selection.kept[0].tolist() == kept
        whole, mask = out.sequences, torch.cat((mask, torch.ones_like(said)), 1)
    assert max(map(max, told[0].sizes)) > 2, "something has merged"
