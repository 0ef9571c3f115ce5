"""A conversation by the book with a Gemma 3 model: stock layers, masks from loops over positions, tokens pruned by hand, one
sample, eager; shares no code with the package."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import naive
import torch
from torch import Tensor
from transformers import DynamicCache


class Budget(NamedTuple):
    """What stays of an image: vision tokens in clusters, after the layers before shallow, and before deep."""

    vision: int
    centers: int
    shallow: int
    deep: int
    layers: tuple[int, int]


class Conversation:
    """Keeps keys, values and their positions from turn to turn. `kept` and `stages` are those of the last turn."""

    def __init__(self, model: Any, budget: Budget | None, vision_layer: int = 1):
        self.model, self.budget, self.vision_layer = model, budget, vision_layer
        self.words = model.model.language_model
        self.cache = DynamicCache()
        self.places: list[list[int]] = [[] for _ in self.words.layers]
        self.start = 0
        self.kept: list[list[int]] = []
        self.stages: list[list[int]] = []

    @torch.no_grad()
    def turn(self, ids: list[int], pixels: Tensor | None, said: list[int]) -> Tensor:
        """Logits [steps, vocab] of a turn that is made to say `said`, whose last is not fed."""
        hidden, blocks, labels = self._embed(ids, pixels)
        positions = [self.start + i for i in range(len(blocks))]
        self.start += len(blocks)
        self.stages, logits = [], []
        hidden, last = self._through(hidden, positions, blocks, labels), None
        for step, token in enumerate(said):
            last = self.model.lm_head(self.words.norm(hidden[:, -1]))[0]
            logits.append(last)
            if step + 1 < len(said):
                hidden = self.model.get_input_embeddings()(torch.tensor([[token]]))
                hidden = self._through(hidden, [self.start], [-1], [])
                self.start += 1
        return torch.stack(logits)

    def _through(self, hidden: Tensor, positions: list[int], blocks: list[int], labels: list[int]) -> Tensor:
        budget, counted = self.budget, [list(kept) for kept in self.kept]
        for index, layer in enumerate(self.words.layers):
            if budget and labels and index in budget.layers:
                norms = [sum(p * p for p in row) ** 0.5 for row in self._mean_keys(index - 1, self.before)]
                stay, rows = [i for i, block in enumerate(blocks) if block < 0], {i: hidden[0, i] for i in range(len(blocks))}
                chosen = []
                for block in sorted(set(blocks) - {-1}):
                    own = [i for i, found in enumerate(blocks) if found == block]
                    saliency = [norms[i] for i in own]
                    if index == budget.layers[0]:
                        merged, at = naive.merge_by_cluster(
                            hidden[0, own].numpy(), saliency, [labels[i] for i in own], budget.shallow
                        )
                        rows |= {own[i]: torch.tensor(row, dtype=hidden.dtype) for i, row in zip(at, merged, strict=True)}
                    else:
                        at = naive.keep_lowest(saliency, budget.deep)
                    stay += [own[i] for i in at]
                    counted[block] = [counted[block][i] for i in at]
                    chosen += [block * self.model.config.mm_tokens_per_image + i for i in counted[block]]
                stay.sort()
                self.stages.append(list(chosen))
                hidden = torch.stack([rows[i] for i in stay])[None]
                positions, blocks, labels = ([values[i] for i in stay] for values in (positions, blocks, labels))
            kind = self.words.config.layer_types[index]
            window = self.words.config.sliding_window if kind == "sliding_attention" else math.inf
            held = self.places[index]
            mask = torch.full((1, 1, len(positions), len(held) + len(positions)), torch.finfo(hidden.dtype).min)
            for i, (here, block) in enumerate(zip(positions, blocks)):
                for j, (there, other) in enumerate(zip([*held, *positions], [-1] * len(held) + blocks)):
                    if (there <= here or block == other >= 0) and here - there < window:
                        mask[0, 0, i, j] = 0
            held += positions
            rotary = self.words.rotary_emb(hidden, torch.tensor([positions]), kind)
            name = "cache" if "cache" in inspect.signature(type(layer.self_attn).forward).parameters else "past_key_values"
            self.before = hidden
            hidden = layer(hidden, position_embeddings=rotary, attention_mask=mask, **{name: self.cache})
        return hidden

    def _mean_keys(self, index: int, hidden: Tensor) -> list[list[float]]:
        """Of every row, what the projection of a layer leaves, mean over heads."""
        layer = self.words.layers[index]
        keys = layer.self_attn.k_proj(layer.input_layernorm(hidden))[0]
        return keys.unflatten(1, (-1, layer.self_attn.head_dim)).mean(1).double().tolist()

    def _embed(self, ids: list[int], pixels: Tensor | None) -> tuple[Tensor, list[int], list[int]]:
        """Hidden states of text and images, the image that each is of, -1 for text, and its cluster."""
        token, tokens = self.model.config.image_token_id, self.model.config.mm_tokens_per_image
        parts, blocks, labels, self.kept = [], [], [], []
        at = 0
        while at < len(ids):
            if ids[at] != token:
                parts.append(self.model.get_input_embeddings()(torch.tensor([[ids[at]]]))[0])
                blocks, labels, at = [*blocks, -1], [*labels, -1], at + 1
                continue
            image = pixels[len(self.kept)][None]
            features = self.model.model.get_image_features(image).pooler_output[0]
            kept, clusters = self._see(image) if self.budget else (list(range(tokens)), [0] * tokens)
            parts.append(features[kept])
            blocks += [len(self.kept)] * len(kept)
            labels += clusters
            self.kept.append(kept)
            at += tokens
        return torch.cat(parts)[None], blocks, labels

    def _see(self, image: Tensor) -> tuple[list[int], list[int]]:
        """(tokens that stay, their clusters): scores and keys of a token are the means of its patches'."""
        tower, count = self.model.model.vision_tower, self.model.config.mm_tokens_per_image
        hidden = tower.embeddings(image)
        for layer in tower.encoder.layers[: self.vision_layer]:
            hidden = layer(hidden, None)
        layer = tower.encoder.layers[self.vision_layer]
        normed, heads = layer.layer_norm1(hidden), layer.self_attn.num_heads
        query, key = (p(normed)[0] for p in (layer.self_attn.q_proj, layer.self_attn.k_proj))
        q, k = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (query, key))
        received = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1))
        pool = self.model.model.multi_modal_projector.avg_pool
        side = math.isqrt(len(key))
        scores, keys = (
            pool(x.T.reshape(1, -1, side, side)).flatten(2)[0].T for x in (received[:, None], key)
        )  # [tokens, 1], [tokens, C]
        kept = sorted(scores[:, 0].argsort(descending=True)[: self.budget.vision].tolist())
        wide = math.isqrt(count)
        places = torch.tensor([(i // wide / wide, i % wide / wide) for i in kept])
        found = naive.density_peaks(keys[kept].numpy(), places.numpy(), self.budget.centers, 8.0, 0.6)
        return kept, found.labels
