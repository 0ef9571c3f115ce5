"""Teaching an encoder what each patch shows: a linear head a label on its features, and what the whole picture holds on a CLS
token where there is one, as a contrastive training gives towers features and saliency. The heads are thrown away."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .scenes import GRID, LABELS, LETTERS, MOST, NAMES, PATCH, Scene, scene


def pixels_of(kind: str, scenes: list[Scene]) -> dict[str, Tensor]:
    """What the stock processor gives for these pictures, without its overhead."""
    stacked = torch.from_numpy(np.stack([np.asarray(one.image) for one in scenes])).float() / 255
    pixels = ((stacked - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)).permute(0, 3, 1, 2)
    if kind == "llava":
        return {"pixel_values": pixels}
    half = GRID // 2
    blocks = pixels.reshape(-1, 3, half, 2, PATCH, half, 2, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = blocks.reshape(-1, 3, 1, PATCH, PATCH).expand(-1, -1, 2, -1, -1).flatten(1)  # a picture is two equal frames
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, GRID, GRID]] * len(scenes))}


def tower_of(kind: str, model: Any) -> nn.Module:
    """The model's encoder; of Qwen2.5-VL with its merger."""
    return model.model.vision_tower if kind == "llava" else model.model.visual


def features_of(kind: str, model: Any, pixels: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(patches [B, 576, width] row by row, CLS [B, width] or None): what the projector or merger is given."""
    if kind == "llava":
        states = model.model.vision_tower(pixels["pixel_values"], output_hidden_states=True).hidden_states
        features = states[model.config.vision_feature_layer]
        return features[:, 1:], features[:, 0]
    tower = model.model.visual
    order = _window_order(tower, pixels["image_grid_thw"])
    seen = tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"]).last_hidden_state
    width, half = seen.shape[-1], GRID // 2
    groups = seen.reshape(-1, 4 * width)[torch.argsort(order)]
    return groups.reshape(-1, half, half, 2, 2, width).transpose(2, 3).reshape(-1, GRID * GRID, width), None


def _window_order(tower: Any, grids: Tensor) -> Tensor:
    from transformers.vision_utils import get_vision_window_index

    order, _ = get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return order


class Heads(nn.Module):
    """Linear readings of features."""

    def __init__(self, width: int, whole: bool):
        super().__init__()
        self.patch = nn.ModuleDict({f"head_{name}": nn.Linear(width, number) for name, number in LABELS.items()})
        self.head_whole = nn.Linear(width, len(NAMES) * (MOST + 1) + len(LETTERS)) if whole else None

    def loss(self, features: Tensor, cls: Tensor | None, scenes: list[Scene]) -> tuple[Tensor, dict[str, float]]:
        """Cross entropy of every label, ground weighed a tenth; and the share of patches with something that is right."""
        total, seen = features.new_zeros(()), {}
        for name, number in LABELS.items():
            wanted = torch.from_numpy(np.stack([one.labels[name].reshape(-1) for one in scenes]))
            found = self.patch[f"head_{name}"](features)
            weight = torch.full((number,), 1.0)
            if name != "places":
                weight[0] = 0.1
            total = total + F.cross_entropy(found.flatten(0, 1), wanted.flatten(), weight)
            marked = wanted > 0
            seen[name] = (found.argmax(-1) == wanted)[marked].float().mean().item()
        if self.head_whole is not None and cls is not None:
            counts, letters = self.head_whole(cls).split([len(NAMES) * (MOST + 1), len(LETTERS)], -1)
            held = torch.tensor([[sum(thing.name == name for thing in one.things) for name in NAMES] for one in scenes])
            words = torch.tensor([[float(letter in one.word) for letter in LETTERS] for one in scenes])
            counts = counts.reshape(-1, MOST + 1)
            total = total + F.cross_entropy(counts, held.flatten()) + F.binary_cross_entropy_with_logits(letters, words)
            seen["counts"] = (counts.argmax(-1) == held.flatten())[held.flatten() > 0].float().mean().item()
        return total, seen


def scenes_of(rng: random.Random, number: int, signs: bool = False) -> list[Scene]:
    """Pictures to learn from. signs: two of three with two to six signs."""
    return [scene(rng, signs=rng.randint(2, 6) if signs and rng.random() < 0.67 else None) for _ in range(number)]
