"""A conversation by the book: turns with any number of images on caches of stock decoder layers, one sample, eager.

On top of `reference_llava`, which does one prompt with one image; shares no code with the package.
"""

from __future__ import annotations

from typing import Any

import reference_llava as book
import torch
from torch import Tensor
from transformers import DynamicCache


class Conversation:
    """Keeps the caches from turn to turn. `stages` and `kept` are those of the last turn's images, one list each."""

    def __init__(self, model: Any, settings: book.Settings, pooled: bool = False):
        self.model, self.settings, self.pooled = model, settings, pooled
        self.cache, self.start = DynamicCache(), 0
        self.kept: list[list[int]] = []
        self.own: list[book.Settings] = []  # by image of the turn
        self.stages: list[list[list[int]]] = []

    @torch.no_grad()
    def turn(self, ids: list[int], pixels: Tensor | None, said: list[int]) -> Tensor:
        """Logits [steps, vocab] of the turn `ids`, in which image placeholders are expanded, made to say `said`.

        The last of `said` is not fed: it belongs to the next turn, as in transformers.
        """
        hidden, spans, labels = self._embed(ids, pixels)
        logits, (positions, after) = [], self._positions(ids, hidden.shape[1])
        hidden = self._prefill(hidden, spans, labels, positions)
        for step in range(len(said)):
            logits.append(self._head(hidden))
            if step + 1 < len(said):
                hidden = self.model.get_input_embeddings()(torch.tensor([[said[step]]]))
                for index in range(len(self.model.model.language_model.layers)):
                    hidden = self._layer(index, hidden, [after + step])
        self.start = after + len(said) - 1
        return torch.stack(logits)

    def _positions(self, ids: list[int], rows: int) -> tuple[list[Any], int]:
        """(of every row of the turn, of the token after it)."""
        return list(range(self.start, self.start + rows)), self.start + rows

    def _layer(self, index: int, hidden: Tensor, positions: list[Any]) -> Tensor:
        return book._layer(self.model, index, hidden, torch.tensor([positions]), self.cache)

    def _head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.language_model.norm(hidden[:, -1]))[0]

    def _embed(self, ids: list[int], pixels: Tensor | None) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        """Hidden states of text and pruned images, the rows of each image, and its clusters."""
        token, embed = self.model.config.image_token_id, self.model.get_input_embeddings()
        side = self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size
        parts, spans, labels, self.kept = [], [], [], []
        at = rows = image = 0
        while at < len(ids):
            if ids[at] != token:
                parts.append(embed(torch.tensor([[ids[at]]])))
                at, rows = at + 1, rows + 1
                continue
            assert all(entry == token for entry in ids[at : at + side * side])
            found = book.Result()
            assert pixels is not None
            parts.append(book._see(self.model, pixels[image : image + 1], self.settings, found))
            spans.append(list(range(rows, rows + len(found.kept))))
            labels.append(found.labels)
            self.kept.append(found.kept)
            at, rows, image = at + side * side, rows + len(found.kept), image + 1
        self.own = [self.settings] * len(spans)
        return torch.cat(parts, 1), spans, labels

    def _prefill(self, hidden: Tensor, spans: list[list[int]], labels: list[list[int]], positions: list[Any]) -> Tensor:
        settings = self.settings
        patches, self.stages = [list(kept) for kept in self.kept], []
        for index in range(len(self.model.model.language_model.layers)):
            if spans and index in (settings.shallow, settings.deep):
                if index == settings.deep and settings.positions == "published":
                    positions = [self.start + i for i in range(len(positions))]
                chosen, rows = self._choose(hidden, spans, labels, index)
                keep, merged, new_spans = [], {}, [[] for _ in spans]
                owner = {row: (image, offset) for image, span in enumerate(spans) for offset, row in enumerate(span)}
                for row in range(hidden.shape[1]):
                    image, offset = owner.get(row, (None, None))
                    if image is None:
                        keep.append(row)
                    elif offset in chosen[image]:
                        merged[len(keep)] = rows[image][chosen[image].index(offset)]
                        new_spans[image].append(len(keep))
                        keep.append(row)
                hidden = torch.stack([merged.get(i, hidden[0, row]) for i, row in enumerate(keep)])[None]
                positions = [positions[row] for row in keep]
                patches = [[of[i] for i in where] for of, where in zip(patches, chosen, strict=True)]
                labels = [[of[i] for i in where] for of, where in zip(labels, chosen, strict=True)]
                spans = new_spans
                self.stages.append(patches)
            hidden = self._layer(index, hidden, positions)
        return hidden

    def _norms(self, index: int, spans: list[list[int]], rows: int) -> list[list[float]]:
        """By image, the norms of its tokens' keys in the layer before `index`."""
        keys = self.cache.layers[index - 1].keys[0]
        new = keys[:, keys.shape[1] - rows :]
        return [new[:, span].mean(0).norm(dim=-1).tolist() for span in spans]

    def _choose(
        self, hidden: Tensor, spans: list[list[int]], labels: list[list[int]], index: int
    ) -> tuple[list[list[int]], list[list[Tensor]]]:
        """By image: which of its tokens stay, and their hidden states."""
        norms = self._norms(index, spans, hidden.shape[1])
        groups = [list(range(len(spans)))] if self.pooled else [[i] for i in range(len(spans))]
        chosen: list[list[int]] = [[] for _ in spans]
        rows: list[list[Tensor]] = [[] for _ in spans]
        for group in groups:
            at = [row for i in group for row in spans[i]]
            owner = [(i, offset) for i in group for offset in range(len(spans[i]))]
            values = [value for i in group for value in norms[i]]
            if index == self.settings.shallow:
                # Clusters of different images are different clusters.
                of = [100_000 * i + label for i in group for label in labels[i]]
                found, where = book.merge(hidden[0, at], values, of, sum(self.own[i].merged for i in group))
            else:
                number = sum(self.own[i].kept for i in group)
                where = sorted(sorted(range(len(values)), key=values.__getitem__)[:number])
                found = hidden[0, at][where]
            for place, row in zip(where, found, strict=True):
                image, offset = owner[place]
                chosen[image].append(offset)
                rows[image].append(row)
        return chosen, rows
