"""Tiny stock models of the families whose image tokens are put together behind their encoder, and requests for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from models import VOCAB, randomize
from reference_families import Book
from torch import Tensor
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.vision_utils import get_vision_window_index

LAYERS = 4
START, END, VIDEO, IMAGE = VOCAB - 4, VOCAB - 3, VOCAB - 2, VOCAB - 1
# Shapes in tokens; of none is the longer side a multiple of 5: a reach of 0.6 would be the distance of some tokens exactly.
SHAPES = ((3, 4), (2, 6), (4, 4), (1, 3))
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
_THREE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


@dataclass(frozen=True)
class Kind:
    """A family: make() -> its tiny model; images(shapes, seed) and videos -> (what a processor gives, placeholders of each);
    book: for the reference; layer: what the encoder is scored in; video: whether it has videos."""

    make: Callable[[], Any]
    images: Callable[[Sequence[tuple[int, int]], int], dict[str, Tensor]]
    book: Book
    layer: int
    videos: Callable[[Sequence[tuple[int, int, int]], int], dict[str, Tensor]] | None = None
    tokens: int = 0  # of every image, 0 where shapes differ


def _qwen2_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2, "patch_size": 14}
    text = TEXT | {"rope_parameters": _THREE}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **IDS))


def qwen2_5_vl(window_size: int = 56) -> Any:
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64,
        "fullatt_block_indexes": [1], "window_size": window_size, "tokens_per_second": 2,
    }  # fmt: skip
    text = TEXT | {"rope_parameters": _THREE}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS))


def _internvl() -> Any:
    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=[112, 112],
        patch_size=[14, 14], use_qk_norm=True,
    )  # fmt: skip
    return InternVLForConditionalGeneration(
        InternVLConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5)
    )


def _patches(shapes: Sequence[tuple[int, ...]], seed: int, pixels: str, grids: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counted = [(*time, 2 * high, 2 * wide) if time else (1, 2 * high, 2 * wide) for *time, high, wide in shapes]
    rows = sum(t * h * w for t, h, w in counted)
    return {pixels: torch.randn(rows, 2 * 3 * 14 * 14, generator=generator), grids: torch.tensor(counted)}


def patched_images(shapes: Sequence[tuple[int, int]], seed: int) -> dict[str, Tensor]:
    return _patches(shapes, seed, "pixel_values", "image_grid_thw")


def patched_videos(shapes: Sequence[tuple[int, int, int]], seed: int) -> dict[str, Tensor]:
    return _patches(shapes, seed, "pixel_values_videos", "video_grid_thw")


def _timed_videos(shapes: Sequence[tuple[int, int, int]], seed: int) -> dict[str, Tensor]:
    seconds = torch.tensor([0.5 + i for i in range(len(shapes))])
    return patched_videos(shapes, seed) | {"second_per_grid_ts": seconds}


def _tiles(shapes: Sequence[tuple[int, int]], seed: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(len(shapes), 3, 112, 112, generator=torch.Generator().manual_seed(seed))}


def frames(given: dict[str, Any]) -> list[tuple[int, int]]:
    grids = given["image_grid_thw" if "image_grid_thw" in given else "video_grid_thw"].tolist()
    return [(high, wide) for time, high, wide in grids for _ in range(time)]


def patched_features(model: Any, given: dict[str, Any]) -> list[Tensor]:
    if "pixel_values" in given:
        whole = model.model.get_image_features(given["pixel_values"], given["image_grid_thw"]).pooler_output
    else:
        whole = model.model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"]).pooler_output
    return list(torch.cat(list(whole)).split([high * wide // 4 for high, wide in frames(given)]))


def packed_keys(module: Any, rows: Tensor) -> Tensor:
    return module.qkv(rows)[None].chunk(3, -1)[1]


def four_in_a_row(model: Any, grid: tuple[int, int]) -> list[list[int]]:
    return [list(range(4 * i, 4 * i + 4)) for i in range(grid[0] * grid[1] // 4)]


def _four_in_windows(model: Any, grid: tuple[int, int]) -> list[list[int]]:
    vision = model.config.vision_config
    order, _ = get_vision_window_index(torch.tensor([[1, *grid]]), 2, vision.window_size, vision.patch_size)
    return [list(range(4 * i, 4 * i + 4)) for i in order.argsort().tolist()]


def _shuffled(model: Any, grid: tuple[int, int]) -> list[list[int]]:
    numbers = torch.arange(grid[0] * grid[1]).reshape(1, *grid, 1).float()
    return model.model.pixel_shuffle(numbers, 0.5).flatten(1, 2)[0].int().tolist()


def _internvl_features(model: Any, given: dict[str, Any]) -> list[Tensor]:
    config = model.config
    layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
    found = model.model.get_image_features(
        pixel_values=given["pixel_values"], vision_feature_layer=layer, vision_feature_select_strategy=strategy
    )
    return list(found.pooler_output)


_QWEN = {"features": patched_features, "layers": lambda model: [block.attn for block in model.model.visual.blocks]}
KINDS: dict[str, Kind] = {
    "qwen2_vl": Kind(
        _qwen2_vl, patched_images,
        Book(**_QWEN, keys=packed_keys, tokens=four_in_a_row, grids=lambda _, given: frames(given), norms="centered",
             three=True),
        layer=0, videos=patched_videos,
    ),
    "qwen2_5_vl": Kind(
        qwen2_5_vl, patched_images,
        Book(**_QWEN, keys=packed_keys, tokens=_four_in_windows, grids=lambda _, given: frames(given), norms="centered",
             three=True),
        layer=1, videos=_timed_videos,
    ),
    "internvl": Kind(
        _internvl, _tiles,
        Book(
            _internvl_features, lambda model: [layer.attention for layer in model.model.vision_tower.encoder.layer],
            keys=lambda module, x: module.k_norm(module.k_proj(x)), tokens=_shuffled,
            grids=lambda _, given: [(8, 8)] * len(given["pixel_values"]), cls=1, norms="centered",
        ),
        layer=1, tokens=16,
    ),
}  # fmt: skip


@cache
def model(name: str) -> Any:
    """A float32 model in evaluation mode with weights that make it say many things."""
    made = KINDS[name].make().eval()
    randomize(made, 0)
    with torch.no_grad():
        for key, weight in made.named_parameters():
            if "lambda" in key:  # scales of whole layers
                weight.mul_(0.2)
        made.lm_head.weight.mul_(0.25)  # logits of about one
    return made


def prompt(name: str, parts: Sequence[Any], seed: int = 0) -> tuple[list[int], dict[str, Any]]:
    """(ids, what a processor gives beside them) of parts: a number of words, an image (rows, columns) or a video (time, rows,
    columns) in tokens."""
    kind, generator = KINDS[name], torch.Generator().manual_seed(100 + seed)
    ids: list[int] = []
    images = [part for part in parts if isinstance(part, tuple) and len(part) == 2]
    videos = [part for part in parts if isinstance(part, tuple) and len(part) == 3]
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(3, START, (part,), generator=generator).tolist()
        elif len(part) == 2:
            ids += [START, *[IMAGE] * (kind.tokens or part[0] * part[1]), END]
        else:
            ids += [START, *[VIDEO] * (part[0] * part[1] * part[2]), END]
    given: dict[str, Any] = kind.images(images, seed) if images else {}
    if videos:
        assert kind.videos is not None
        given |= kind.videos(videos, seed + 1)
    return ids, given


def types(ids: Tensor) -> dict[str, Tensor]:
    """What processors of models with positions of three coordinates say of each token."""
    return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
