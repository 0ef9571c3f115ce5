"""Conversations by the book about videos: whose frames share their budgets, and whose frames have a tower of their own; shares
no code with the package."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import reference_llava as book
import torch
from reference_families import FamilyConversation
from reference_turns import Conversation
from torch import Tensor


class FrameConversation(Conversation):
    """Of Video-LLaVA: frames go through the tower of videos, one by one, and their CLS tokens stay in front of them. `turn`
    takes what the processor gave as its pixels."""

    def _embed(self, ids: list[int], pixels: Any) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        config, inner, embed = self.model.config, self.model.model, self.model.get_input_embeddings()
        patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        given = pixels or {}
        left = {
            config.image_token_id: (iter(given.get("pixel_values", ())), inner.image_tower, 0),
            config.video_token_id: (iter([f for video in given.get("pixel_values_videos", ()) for f in video]),
                                    inner.video_tower, 1),
        }  # fmt: skip
        parts, spans, labels, self.kept = [], [], [], []
        at = rows = 0
        while at < len(ids):
            if ids[at] not in left:
                parts.append(embed(torch.tensor([[ids[at]]])))
                at, rows = at + 1, rows + 1
                continue
            pictures, tower, lead = left[ids[at]]
            assert set(ids[at : at + patches + lead]) == {ids[at]}
            found, one = book.Result(), SimpleNamespace(vision_tower=tower, multi_modal_projector=inner.multi_modal_projector)
            picture = next(pictures)[None]
            features = book._see(SimpleNamespace(model=one, config=config), picture, self.settings, found)
            if lead:
                hidden = tower(picture, output_hidden_states=True).hidden_states[config.vision_feature_layer]
                parts.append(inner.multi_modal_projector(hidden[:, :1]))
            parts.append(features)
            spans.append(list(range(rows + lead, rows + lead + len(found.kept))))
            labels.append(found.labels)
            self.kept.append(found.kept)
            at, rows = at + patches + lead, rows + lead + len(found.kept)
        self.own = [self.settings] * len(spans)
        return torch.cat(parts, 1), spans, labels


class ClipConversation(FamilyConversation):
    """As `FamilyConversation`, but a video is one segment: its tokens are ranked together, clustered with time as a coordinate
    beside row and column, and keep a number of the clip. Text may stand between frames."""

    def _embed(self, ids: list[int], pixels: Any) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        config, embed = self.model.config, self.model.get_input_embeddings()
        self.kept, self.own, self.columns, self.candidates, self.given = [], [], [], [], pixels or {}
        seen = {token: iter(self._of_kind(pixels or {}, kind)) for token, kind in (
            (config.image_token_id, "image"), (config.video_token_id, "video"),
        )}  # fmt: skip
        videos = iter(self._frames_of_videos())
        visual = [at for at, entry in enumerate(ids) if entry in (config.image_token_id, config.video_token_id)]
        # By column of the prompt: what stands there, and of which segment it is.
        rows: dict[int, Tensor] = {at: embed(torch.tensor([entry])) for at, entry in enumerate(ids) if at not in visual}
        members: list[list[int]] = []
        labels = []
        while visual:
            token = ids[visual[0]]
            time = next(videos) if token == config.video_token_id else 1
            clip = [next(seen[token]) for _ in range(time)]
            high, wide = clip[0][3]
            longer, each = max(high, wide), high * wide
            at, visual = visual[: time * each], visual[time * each :]
            features, keys = (torch.cat([frame[part] for frame in clip]) for part in (0, 1))
            scores = [score for frame in clip for score in frame[2]]
            settings = self.settings_of(len(scores))
            kept = sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[: settings.n])
            places = [(i // each / longer, i % each // wide / longer, i % wide / longer) for i in kept]
            labels.append(book.cluster(keys[kept], places, settings.centers, settings.density_width, settings.reach))
            self.kept.append(kept)
            self.own.append(settings)
            self.candidates.append(len(scores))
            rows |= {at[i]: features[i][None] for i in kept}
            members.append([at[i] for i in kept])
        assert all(next(left, None) is None for left in seen.values())
        self.columns = sorted(rows)
        where = {column: row for row, column in enumerate(self.columns)}
        hidden = torch.cat([rows[column] for column in self.columns])[None]
        return hidden, [[where[column] for column in own] for own in members], labels

    def _of_kind(self, given: dict[str, Any], kind: str) -> list[Any]:
        """The images alone, or the frames of videos alone, by the stock encoder."""
        own = {name: value for name, value in given.items() if ("video" in name or "second" in name) == (kind == "video")}
        return self._see(own) if own else []

    def _frames_of_videos(self) -> list[int]:
        if "video_grid_thw" in self.given:
            return self.given["video_grid_thw"][:, 0].tolist()
        return [len(video) for video in self.given.get("pixel_values_videos", ())]
