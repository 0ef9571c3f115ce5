"""What tests of `generate` share: the same pruning said to the package and to the reference, and requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import reference_llava as reference
import torch
from models import PATCHES, optimize, prompt, shared
from reference_llava import Settings
from torch import Tensor

from vitcop_compile import ViTCoPConfig
from vitcop_compile.cache import PrunedCache

STEPS = 6


@dataclass
class Case:
    """The same pruning, said to the package and to the reference."""

    config: ViTCoPConfig
    settings: Settings
    layers: int = 6
    kv_heads: int = 4
    prompts: list[Tensor] = field(default_factory=lambda: [prompt(), prompt(2, 14, seed=1)])


def explicit(budgets, shallow: int, deep: int, vision=2, positions="published", density_width=8.0, reach=0.6, **model) -> Case:
    """budgets: (vision, shallow, deep, centers)."""
    n, merged, kept, centers = budgets
    config = ViTCoPConfig(
        budgets=(n, merged, kept, centers),
        shallow_layer=shallow,
        deep_layer=deep,
        vision_layer=vision,
        positions=positions,
        density_width=density_width,
        reach=reach,
        scale_layers=False,
    )
    return Case(config, Settings(n, centers, merged, kept, vision, shallow, deep, positions, density_width, reach), **model)


def published(name: str, **model) -> Case:
    return Case(ViTCoPConfig.preset(name), reference.preset(name, PATCHES, 6, shallow=1, deep=4, vision=2), **model)


CASES = {
    "preset-third": published("1/3"),
    "preset-two-ninths": published("2/9", kv_heads=2),
    "preset-ninth": published("1/9"),
    "original": explicit((40, 24, 8, 9), 2, 4, positions="original"),
    "gqa-original-early-scores": explicit((36, 20, 5, 4), 3, 5, vision=0, positions="original", kv_heads=2),
    "gqa-middle-scores": explicit((44, 30, 12, 6), 1, 3, vision=1, kv_heads=2),
    "adjacent-stages": explicit((40, 24, 8, 9), 2, 3, vision=1),
    "more-clusters-than-budget": explicit((33, 6, 3, 14), 1, 2, layers=3),
    "unassigned-points": explicit((48, 25, 9, 2), 1, 2, density_width=5.0, reach=0.26, layers=3),
    "whole-image": explicit((64, 40, 39, 8), 1, 2, positions="original", layers=3),
    "least": explicit((8, 1, 1, 1), 1, 2, layers=3),
    "nothing-removed": explicit((20, 20, 20, 5), 1, 2, layers=3),
    "image-at-an-edge": explicit((30, 18, 7, 5), 1, 2, layers=3, prompts=[prompt(0, 9), prompt(7, 0), prompt(0, 0)]),
}


def generate(fast, ids: Tensor, images: Tensor | None = None, steps: int = STEPS, **settings):
    """Greedy by default: the output with logits, and the new tokens [B, steps]."""
    settings = {"do_sample": False, "max_new_tokens": steps} | settings
    settings |= {} if images is None else {"pixel_values": images}
    out = fast.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)
    return out, out.sequences[:, ids.shape[1] :]


def logits_of(out) -> Tensor:
    return torch.stack(out.logits, 1)


def expected(model, ids: Tensor, images: Tensor, settings: Settings, tokens: Tensor) -> Tensor:
    """The reference's logits [steps, V] when it is made to say `tokens`."""
    forced = reference.run(model, ids, images, settings, len(tokens), lambda logits, step: int(tokens[step]))
    return torch.stack(forced.logits)


def keys(fast) -> set[tuple]:
    """What programs there are: kind, batch and, but for vision, rows."""
    return {key[:3] for key in fast.compiled}


def rows_of(cache: PrunedCache) -> list[int]:
    """Rows of every layer's keys."""
    return [buffer.shape[2] for buffer in cache.buffers[::2]]


PLAIN = explicit((30, 18, 7, 5), 1, 2, layers=3)


@pytest.fixture(scope="module")
def plain():
    """(fast, model, settings): the 3-layer model that most tests use."""
    model = shared(3)
    return optimize(model, PLAIN.config), model, PLAIN.settings


@pytest.fixture(scope="module")
def dense():
    model = shared(3)
    return optimize(model, ViTCoPConfig.dense()), model
