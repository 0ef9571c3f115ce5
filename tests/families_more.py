"""Tiny stock models of more families, requests for them, and what the reference must know of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import families
import tiled
import torch
from families import END, IMAGE, START, VIDEO
from models import randomize
from reference_families import Book, FamilyConversation, renamed
from reference_llava import Settings
from reference_tiled import TiledConversation
from reference_turns import Conversation
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

# A patch's side in pixels, the sides of images of one size, 6 x 6 patches of which four are a token, or 3 x 3 tokens, and of
# those of any size.
PATCH, MERGED, PLAIN, CANVAS = 8, 48, 24, (64, 96)
WORDS = {**families.TEXT, "num_hidden_layers": 3}
TILES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": PATCH,
}  # fmt: skip
# A video is (frames, rows, columns), an image (rows, columns), both in tokens; a number is one of words.
Part = int | tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """make() -> a tiny model; ids(part) -> the tokens of an image or a video; images(shapes, seed) and videos -> what a
    processor gives; book(model, settings) -> a conversation; layer: what the encoder is scored in; layers: before which tokens
    are merged, and before which they are dropped; told: whether a processor says of each token what it is."""

    make: Callable[[], Any]
    ids: Callable[[tuple[int, ...]], list[int]]
    images: Callable[[Sequence[tuple[int, ...]], int], dict[str, Tensor]]
    book: Callable[[Any, Settings], Conversation]
    videos: Callable[[Sequence[tuple[int, ...]], int], dict[str, Tensor]] | None = None
    layer: int = 1
    layers: tuple[int, int] = (1, 2)
    positions: str = "published"
    told: bool = False


def prompt(name: str, parts: Sequence[Part], seed: int = 0) -> tuple[list[int], dict[str, Any]]:
    """(ids, what a processor gives beside them)."""
    kind, generator = KINDS[name], torch.Generator().manual_seed(100 + seed)
    ids: list[int] = []
    for part in parts:
        ids += torch.randint(3, START, (part,), generator=generator).tolist() if isinstance(part, int) else kind.ids(part)
    images, videos = ([part for part in parts if isinstance(part, tuple) and len(part) == size] for size in (2, 3))
    given = kind.images(images, seed) if images else {}
    if videos:
        assert kind.videos is not None
        given |= kind.videos(videos, seed + 1)
    return ids, given


def types(name: str, ids: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
    """What a processor says of each token."""
    if not KINDS[name].told:
        return {}
    kinds = families.types(ids)["mm_token_type_ids"]
    return {"mm_token_type_ids": kinds if "image_grid_thw" in given else 2 * kinds.sign()}


@cache
def model(name: str) -> Any:
    """A float32 model in evaluation mode with weights that make it say many things."""
    made = KINDS[name].make().eval()
    randomize(made, 0)
    with torch.no_grad():
        made.lm_head.weight.mul_(0.25)  # logits of about one
        for key, weight in made.named_parameters():
            # Layers that add as much as there is, or attend to single tokens, make ten of every rounding error.
            if key.endswith(
                ("down_proj.weight", "q_proj.weight", "post_self_attn_layernorm.weight", "post_mlp_layernorm.weight")
            ):
                weight.mul_(0.3)
            if key.endswith("qkv.weight"):
                weight.mul_(0.6)
    return made


def _qwen3_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    # The tapped layers are not in order: the decoder adds them as the encoder makes them.
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64,
        "num_position_embeddings": 36, "deepstack_visual_indexes": [1, 0],
    }  # fmt: skip
    text = WORDS | {"head_dim": 16, "rope_parameters": rope, "num_hidden_layers": 4}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **families.IDS))


def _glm4v(newer: bool = False) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14, "out_hidden_size": 64,
        "image_size": 84,
    }  # fmt: skip
    ids = {
        "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": START, "image_end_token_id": END,
        "video_start_token_id": 3, "video_end_token_id": 4,
    }  # fmt: skip
    text = WORDS | {"rope_parameters": rope}
    if not newer:
        return Glm4vForConditionalGeneration(Glm4vConfig(text_config=text, vision_config=vision, **ids))
    own = {"text_config": text | {"model_type": "glm4v_text"}, "vision_config": vision | {"model_type": "glm4v_vision"}}
    return Glm46VForConditionalGeneration(Glm46VConfig(**own, **ids))


def _shuffling(config: Any, kind: Any) -> Any:
    vision = TILES | {"image_size": MERGED}
    return kind(config(vision_config=vision, text_config=LlamaConfig(**WORDS), image_token_id=IMAGE, scale_factor=2))


def _mistral3() -> Any:
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            vision_config=PixtralVisionConfig(**TILES, image_size=max(CANVAS)), image_token_index=IMAGE,
            text_config=MistralConfig(**WORDS, head_dim=16, sliding_window=None), spatial_merge_size=2,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def _next_video() -> Any:
    """7 x 7 patches a tile: pooling leaves the last row and column out."""
    vision = CLIPVisionConfig(**TILES, image_size=tiled.TILE, projection_dim=16)
    return LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config=vision, text_config=LlamaConfig(**WORDS), image_token_index=IMAGE, video_token_index=VIDEO,
            image_grid_pinpoints=tiled.PINPOINTS["next"],
        )
    )  # fmt: skip


def _video_llava() -> Any:
    return VideoLlavaForConditionalGeneration(
        VideoLlavaConfig(
            vision_config=CLIPVisionConfig(**TILES, image_size=PLAIN, projection_dim=16), text_config=LlamaConfig(**WORDS),
            image_token_index=IMAGE, video_token_index=VIDEO, image_seq_length=9,
        )
    )  # fmt: skip


def _run(part: tuple[int, ...], video: int) -> list[int]:
    """An image, or a frame after another with a word before each."""
    *time, high, wide = part
    frame = [START, *[video if time else IMAGE] * (high * wide), END]
    return [token for step in range(time[0]) for token in (7 + step, *frame)] if time else frame


def _rows(part: tuple[int, ...]) -> list[int]:
    """A token of text behind every row."""
    return ([IMAGE] * part[1] + [START]) * (part[0] - 1) + [IMAGE] * part[1] + [END]


def _nine(part: tuple[int, ...]) -> list[int]:
    return [IMAGE] * 9


def _of_one_size(shapes: Sequence[tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    return {"pixel_values": _noise(len(shapes), 3, PLAIN, PLAIN, seed=seed)}


def _samples_of_tiles(shapes: Sequence[tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """A sample of three images, the last of them missing, or the last two."""
    pixels = torch.zeros(1, 3, 3, MERGED, MERGED)
    pixels[0, : len(shapes)] = _noise(len(shapes), 3, MERGED, MERGED, seed=seed)
    shown = (pixels != 0).any(2).long()
    return {"pixel_values": pixels, "pixel_attention_mask": shown}


def _in_corners(shapes: Sequence[tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    sizes = [(2 * PATCH * high, 2 * PATCH * wide) for high, wide in shapes]
    pixels = torch.zeros(len(shapes), 3, *CANVAS)
    for image, (high, wide) in enumerate(sizes):
        pixels[image, :, :high, :wide] = _noise(3, high, wide, seed=seed + 10 * image)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def _frames(shapes: Sequence[tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    return {"pixel_values_videos": _noise(len(shapes), shapes[0][0], 3, tiled.TILE, tiled.TILE, seed=seed)}


def _packed(shapes: Sequence[tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Tiles of each image, padded to the most that there are."""
    given = tiled.images("next", *shapes, seed=seed)
    pixels = torch.zeros(len(shapes), 5, 3, tiled.TILE, tiled.TILE)
    pixels[:, : given["pixel_values"].shape[1]] = given["pixel_values"]
    return given | {"pixel_values": pixels}


def _noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _packed_ids(part: tuple[int, ...]) -> list[int]:
    """Of an image of (height, width) pixels, or a video of so many frames."""
    if len(part) == 3:
        return [VIDEO] * (part[0] * (tiled.TILE // PATCH // 2) ** 2)
    with torch.no_grad():
        return [IMAGE] * len(tiled.features(model("next_video"), tiled.images("next", part))[0])


def _with_what_is_added(stock: Any, given: dict[str, Any]) -> list[Tensor]:
    """Features, and beside them what the decoder adds later."""
    pixels, grids = (given[name] for name in (
        ("pixel_values", "image_grid_thw") if "pixel_values" in given else ("pixel_values_videos", "video_grid_thw")
    ))  # fmt: skip
    out = stock.model.get_image_features(pixels, grids)
    whole = torch.cat([torch.cat(list(part)) for part in (out.pooler_output, *out.deepstack_features)], 1)
    return list(whole.split([high * wide // 4 for high, wide in families.frames(given)]))


def _one_after_another(stock: Any, given: dict[str, Any]) -> list[Tensor]:
    """Each image alone: together they would share a mask."""
    layer, found = stock.config.vision_feature_layer, []
    for image, size in zip(given["pixel_values"], given["image_sizes"].tolist(), strict=True):
        out = stock.model.get_image_features(image[None], torch.tensor([size]), vision_feature_layer=layer)
        found += out.pooler_output
    return found


def _shuffled_features(stock: Any, given: dict[str, Any]) -> list[Tensor]:
    whole = torch.cat(list(stock.model.get_image_features(**given).pooler_output))
    return list(whole.split((MERGED // PATCH // 2) ** 2))


def _shuffled(stock: Any, grid: tuple[int, int]) -> list[list[int]]:
    numbers = torch.arange(grid[0] * grid[1]).reshape(1, -1, 1).float()
    return stock.model.connector.pixel_shuffle(numbers, 2)[0].int().tolist()


def _in_squares(stock: Any, grid: tuple[int, int]) -> list[list[int]]:
    numbers = torch.arange(grid[0] * grid[1]).reshape(1, 1, *grid).float()
    return torch.nn.functional.unfold(numbers, 2, stride=2)[0].T.int().tolist()


def _sizes(stock: Any, given: dict[str, Any]) -> list[tuple[int, int]]:
    return [(high // PATCH, wide // PATCH) for high, wide in given["image_sizes"].tolist()]


def _tiles(stock: Any, given: dict[str, Any]) -> list[tuple[int, int]]:
    real = given["pixel_values"].flatten(0, 1).flatten(1).any(1)
    return [(MERGED // PATCH, MERGED // PATCH)] * int(real.sum())


def _of(about: Book) -> Callable[[Any, Settings], Conversation]:
    return lambda stock, settings: FamilyConversation(stock, about, lambda _: settings)


class _PixelsAlone(Conversation):
    """Takes what a processor gives."""

    def turn(self, ids: list[int], pixels: Any, said: list[int]) -> Tensor:
        """As `Conversation.turn`."""
        return super().turn(ids, pixels and pixels["pixel_values"], said)

    @property
    def candidates(self) -> list[int]:
        """Of each image of the turn."""
        return [(PLAIN // PATCH) ** 2] * len(self.kept)


def _book_of_video_llava(stock: Any, settings: Settings) -> Conversation:
    inner = stock.model
    parts = {"language_model": inner.language_model, "multi_modal_projector": inner.multi_modal_projector}
    return _PixelsAlone(renamed(stock, vision_tower=inner.image_tower, **parts), settings)


_PATCHED: dict[str, Any] = {
    "layers": lambda stock: [block.attn for block in stock.model.visual.blocks], "keys": families.packed_keys,
    "tokens": families.four_in_a_row, "grids": lambda _, given: families.frames(given), "three": True,
}  # fmt: skip
_RUNS: dict[str, Any] = {
    "images": families.patched_images, "videos": families.patched_videos, "positions": "kept", "told": True,
}  # fmt: skip
_GLM4V = _of(Book(families.patched_features, norms="centered", **_PATCHED))
_SHUFFLED = _of(
    Book(
        _shuffled_features, lambda stock: [layer.self_attn for layer in stock.model.vision_model.encoder.layers],
        keys=lambda module, x: module.k_proj(x), tokens=_shuffled, grids=_tiles, decoder="text_model",
    )
)  # fmt: skip
KINDS: dict[str, Kind] = {
    "qwen3_vl": Kind(
        _qwen3_vl, partial(_run, video=VIDEO), book=_of(Book(_with_what_is_added, norms="raw", added=2, **_PATCHED)),
        layers=(2, 3), **_RUNS,
    ),
    # Frames of its videos have the placeholders of images.
    "glm4v": Kind(_glm4v, partial(_run, video=IMAGE), book=_GLM4V, **_RUNS),
    "glm46v": Kind(partial(_glm4v, newer=True), partial(_run, video=IMAGE), book=_GLM4V, **_RUNS),
    "idefics3": Kind(
        partial(_shuffling, Idefics3Config, Idefics3ForConditionalGeneration), _nine, _samples_of_tiles, _SHUFFLED
    ),
    "smolvlm": Kind(
        partial(_shuffling, SmolVLMConfig, SmolVLMForConditionalGeneration), _nine, _samples_of_tiles, _SHUFFLED
    ),
    "mistral3": Kind(
        _mistral3, _rows, _in_corners,
        _of(
            Book(
                _one_after_another, lambda stock: [layer.attention for layer in stock.model.vision_tower.transformer.layers],
                keys=lambda module, x: module.k_proj(x), tokens=_in_squares, grids=_sizes,
            )
        ),
    ),
    "next_video": Kind(
        _next_video, _packed_ids, _packed, lambda stock, settings: TiledConversation(stock, lambda _: settings), _frames
    ),
    "video_llava": Kind(_video_llava, _nine, _of_one_size, _book_of_video_llava, layer=0),
}  # fmt: skip
