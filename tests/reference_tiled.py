"""A conversation by the book about images in tiles: LLaVA-NeXT's and LLaVA-OneVision's stock layers, and their stock packing
of features, of scores and of keys, and LLaVA-NeXT-Video's pooled frames; shares no code with the package."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import reference_llava as book
import torch
from reference_turns import Conversation
from torch import Tensor


class TiledConversation(Conversation):
    """settings_of(candidates) -> Settings of a segment with so many; `kept` counts the candidates of each segment."""

    def __init__(self, model: Any, settings_of: Callable[[int], book.Settings], pooled: bool = False):
        super().__init__(model, settings_of(1000), pooled)
        self.settings_of = settings_of
        self.candidates: list[int] = []  # of each segment of the turn

    def _embed(self, ids: list[int], pixels: Any) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        """pixels: what the processor gave, a dict."""
        config, embed = self.model.config, self.model.get_input_embeddings()
        parts, spans, labels = [], [], []
        self.kept, self.own, self.candidates = [], [], []
        pixels = pixels or {}
        seen = {config.image_token_id: iter(self._see(pixels) if "pixel_values" in pixels else ())}
        if "pixel_values_videos" in pixels:
            seen[config.video_token_id] = iter(self._see_videos(pixels))
        at = rows = 0
        while at < len(ids):
            if ids[at] not in seen:
                parts.append(embed(torch.tensor([[ids[at]]])))
                at, rows = at + 1, rows + 1
                continue
            for features, keys, scores, columns in next(seen[ids[at]]):
                # What is no candidate is a line break.
                candidates = [i for i, score in enumerate(scores) if not math.isnan(score)]
                settings = self.settings_of(len(candidates))
                ranked = sorted(range(len(candidates)), key=lambda i: -scores[candidates[i]])
                kept = sorted(ranked[: settings.n])
                longer = max(columns, len(candidates) // columns)
                places = [(i // columns / longer, i % columns / longer) for i in kept]
                chosen = [candidates[i] for i in kept]
                labels.append(book.cluster(keys[chosen], places, settings.centers, settings.density_width, settings.reach))
                self.kept.append(kept)
                self.own.append(settings)
                self.candidates.append(len(candidates))
                stays = [i for i in range(len(scores)) if i in chosen or i not in candidates]
                parts.append(features[stays][None])
                spans.append([rows + stays.index(i) for i in chosen])
                at, rows = at + len(scores), rows + len(stays)
        assert all(next(left, None) is None for left in seen.values())
        return torch.cat(parts, 1), spans, labels

    def _see(self, given: dict[str, Tensor]) -> list[list[tuple[Tensor, Tensor, list[float], int]]]:
        """By image and segment: features [tokens, D], keys [tokens, C], scores, NaN at line breaks, and columns."""
        inner, config = self.model.model, self.model.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        own = {name: value for name, value in given.items() if name != "pixel_values_videos"}
        whole = list(inner.get_image_features(**own).pooler_output)
        found = []
        for image, features in enumerate(whole):
            size = given["image_sizes"][image : image + 1]
            tiles = self._tiles(given, image, len(features), side * side)
            scores, keys = self._score(tiles)
            number, wide = scores.shape[0], keys.shape[-1]
            packed = self._pack(torch.cat((scores.reshape(number, -1, 1), keys), -1), size, wide + 1)
            assert len(packed) == len(features)
            cuts = [(0, len(features))] if number == 1 else [(0, side * side), (side * side, len(features))]
            segments = []
            for start, stop in cuts:
                part = packed[start:stop]
                breaks = part[:, 0].isnan().nonzero()[:, 0].tolist()
                columns = side if start == 0 else breaks[0]
                segments.append((features[start:stop], part[:, 1:], part[:, 0].tolist(), columns))
            found.append(segments)
        return found

    def _see_videos(self, given: dict[str, Tensor]) -> list[list[tuple[Tensor, Tensor, list[float], int]]]:
        """The same by video and frame, pooled as the model pools features: of scores and keys, the means."""
        inner, found = self.model.model, []
        for video in given["pixel_values_videos"]:
            scores, keys = self._score(video)
            pooled = inner.vision_resampler(torch.cat((scores[..., None], keys), -1))
            features = inner.get_video_features(video[None]).pooler_output[0].reshape(*pooled.shape[:2], -1)
            columns = math.isqrt(pooled.shape[1])
            found.append(
                [(own, part[:, 1:], part[:, 0].tolist(), columns) for own, part in zip(features, pooled, strict=True)]
            )
        return found

    def _tiles(self, given: dict[str, Tensor], image: int, tokens: int, patches: int) -> Tensor:
        """The tiles of an image, without padding: one, if its tokens are one tile's and a line break."""
        if tokens == patches + 1:
            return given["pixel_values"][image, :1]
        tiles = given["pixel_values"][image]
        return tiles[tiles.flatten(1).any(1)]

    def _pack(self, values: Tensor, size: Tensor, width: int) -> Tensor:
        line_break = torch.full((width,), math.nan)
        if self.model.config.model_type.startswith("llava_next"):
            return self.model.model.pack_image_features([values], size, "default", line_break)[0][0]
        ratio = self.model.config.vision_aspect_ratio
        return self.model.model.pack_image_features([values], size, line_break, ratio)[0][0]

    def _score(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """(scores [T, patches], keys [T, patches, C]) of the scoring layer, one tile after another."""
        tower = self.model.model.vision_tower
        cls = self.model.config.model_type.startswith("llava_next")
        scores, keys = [], []
        for tile in tiles:
            hidden = tower.embeddings(tile[None])
            hidden = tower.pre_layrnorm(hidden) if cls else hidden
            for index, layer in enumerate(tower.encoder.layers):
                if index == self.settings.vision:
                    normed = layer.layer_norm1(hidden)
                    query, key = layer.self_attn.q_proj(normed)[0], layer.self_attn.k_proj(normed)[0]
                    heads = layer.self_attn.num_heads
                    scores.append(book._cls_attention(query[0], key, heads) if cls else _received(query, key, heads))
                    keys.append(key[1:] if cls else key)
                    break
                hidden = layer(hidden, None)
        return torch.stack(scores), torch.stack(keys)


def _received(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Softmax attention that every row of [t, C] receives, mean over heads and queries."""
    width, total = key.shape[1] // heads, torch.zeros(key.shape[0])
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for row in query[:, part]:
            total += torch.softmax(key[:, part] @ row / math.sqrt(width), 0)
    return total / (heads * query.shape[0])
