"""Requests for models whose videos are runs of placeholders, a frame each, and what every such family must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from models import randomize, text
from torch import Tensor

from vitcop_compile import Budgets, ModelShape, ViTCoPConfig
from vitcop_compile.layout import Layout
from vitcop_compile.schedule import Stage

VOCAB, PATCH, LAYERS = 96, 14, 5
# Numbers of every tiny language model, and of every tiny encoder.
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": PATCH,
    "out_hidden_size": 64,
}


@dataclass(frozen=True)
class Tokens:
    """Ids of placeholders, and those around a run of them, and around all runs of a video."""

    image: int = 95
    video: int = 94
    run: tuple[int, int] = (93, 92)
    clip: tuple[int, ...] = ()


def made(model: Any) -> Any:
    """`model` in evaluation mode, with seeded random weights."""
    model = model.eval()
    randomize(model, 0)
    return model


def request(tokens: Tokens, *parts: Any, seed: int = 0) -> dict[str, Tensor]:
    """What a processor would give. parts: numbers of words, and of images ("image", rows, columns) in patches, and videos
    ("video", frames, rows, columns), each frame behind a word in place of its time."""
    generator = torch.Generator().manual_seed(seed)
    words = iter(text(300, seed))
    ids: list[int] = [1]
    types = [0]
    pixels: dict[str, list[Tensor]] = {"image": [], "video": []}
    grids: dict[str, list[tuple[int, int, int]]] = {"image": [], "video": []}

    def say(token: int, count: int = 1, kind: int = 0) -> None:
        ids.extend([token] * count)
        types.extend([kind] * count)

    for part in parts:
        if isinstance(part, int):
            for _ in range(part):
                say(next(words) % 90)
            continue
        kind, *grid = part
        time, rows, columns = grid if kind == "video" else (1, *grid)
        number, token = (2, tokens.video) if kind == "video" else (1, tokens.image)
        for edge in tokens.clip[:1] * (number == 2):
            say(edge)
        for _ in range(time):
            if number == 2:
                say(next(words) % 90)
            say(tokens.run[0])
            say(token, rows * columns // 4, number)
            say(tokens.run[1])
        for edge in tokens.clip[1:] * (number == 2):
            say(edge)
        grids[kind].append((time, rows, columns))
        pixels[kind].append(torch.randn(time * rows * columns, 3 * 2 * PATCH * PATCH, generator=generator))
    given = {"input_ids": torch.tensor([ids])}
    given |= {"attention_mask": torch.ones_like(given["input_ids"])}
    for kind, values, beside in (("image", "pixel_values", "image"), ("video", "pixel_values_videos", "video")):
        if grids[kind]:
            given |= {values: torch.cat(pixels[kind]), f"{beside}_grid_thw": torch.tensor(grids[kind])}
    return given | ({"mm_token_type_ids": torch.tensor([types])} if any(grids.values()) else {})


def batch(*requests: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same together, padded on the left."""
    longest = max(given["input_ids"].shape[1] for given in requests)
    rows: dict[str, list[Tensor]] = {}
    for given in requests:
        ids = given["input_ids"]
        given = given | {"mm_token_type_ids": given.get("mm_token_type_ids", torch.zeros_like(ids))}
        for name, value in given.items():
            along = name in ("input_ids", "attention_mask", "mm_token_type_ids")
            rows.setdefault(name, []).append(torch.nn.functional.pad(value, (longest - ids.shape[1], 0)) if along else value)
    return {name: torch.cat(values) for name, values in rows.items()}


def then(said: Tensor, before: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole conversation: `said` int64 [1, T] of the turn `before` and its answer, and then `new`, which comes without its
    first token."""
    ids = torch.cat((said, new["input_ids"][:, 1:]), 1)
    types = torch.zeros_like(ids)
    for given, at in ((before, 0), (new, said.shape[1] - 1)):
        found = given.get("mm_token_type_ids")
        if found is not None:
            keep = found[:, 1:] if at else found
            types[:, at + bool(at) : at + bool(at) + keep.shape[1]] = keep
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        values = [given[name] for given in (before, new) if name in given]
        whole |= {name: torch.cat(values)} if values else {}
    return whole if any("grid" in name for name in whole) else {k: v for k, v in whole.items() if "types" not in k}


def generate(model: Any, given: dict[str, Tensor], count: int = 16, **more: Any) -> Any:
    """Greedy tokens, none of them a placeholder, and logits."""
    return model.generate(
        **given, **more, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=[*range(90, VOCAB)],
    )  # fmt: skip


def assert_same(found: Any, wanted: Any, bound: float = 1e-4, count: int = 16) -> None:
    """The same tokens, of which there are several, and logits within `bound`."""
    assert found.sequences[:, -count:].tolist() == wanted.sequences[:, -count:].tolist()
    assert len(set(found.sequences[0, -count:].tolist())) > 3
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert (one - other).abs().max() < bound


class Everything(ViTCoPConfig):
    """Selects, and prunes at a layer where features are still to be added, and keeps every token."""

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        vision, *_ = super().stages(shape, layout)
        return (vision, *(Stage("decoder", layer, "keep_lowest", vision.tokens, keys=shape.keys) for layer in (1, 4)))


def everything(tokens: int) -> ViTCoPConfig:
    """The same for images of so many tokens each."""
    return Everything(budgets=Budgets(tokens, tokens, tokens), shallow_layer=3, deep_layer=4)
