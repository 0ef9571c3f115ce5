"""ViTCoP as its published code computes it, as the arm "by_the_book": eager, one prompt at a time.

Written from the description of the method; shares no operation with the package. An arm and no oracle: golden data of the
published code check it, and `tests/reference_llava.py`, as it does every other arm. Stock transformers modules are called
layer by layer. What makes the published form slow is kept: the scoring layer's attention matrices, an [n, n, d] tensor of
differences, clusters merged in Python loops that read scalars back from the device, causal masks, and a cache that grows by
concatenation. What is no part of the method is left out: the encoder ends at the layer whose features are used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vitcop_compile import ViTCoPConfig
from vitcop_compile.bench.arms import Arm, Request, inputs, register
from vitcop_compile.bench.kernels import recorded
from vitcop_compile.bench.stock import check_stock
from vitcop_compile.bench.timing import Call
from vitcop_compile.cache import CACHE_NAME
from vitcop_compile.errors import ConfigError
from vitcop_compile.families import family_of
from vitcop_compile.schedule import Schedule


class ByTheBook:
    """A pruned model for one prompt at a time. noted: what selects, to be called again, while it is a list.

    Raises UnsupportedError for a model of no known family; ConfigError for a model in training mode or not on "sdpa", for a
    dense config, and for an encoder pruned elsewhere than at its feature layer.
    """

    def __init__(self, model: PreTrainedModel, config: ViTCoPConfig):
        shape = family_of(model).shape
        if not config.prune:
            raise ConfigError("the published method always prunes: pass a preset, or choose a dense arm")
        check_stock(model)
        self.model: Any = model
        self.schedule: Schedule = config.schedule(shape)
        assert self.schedule.vision is not None
        self.vision = self.schedule.vision
        if self.vision.layer != shape.feature_layer:
            raise ConfigError(
                f"vision_layer={config.vision_layer} is layer {self.vision.layer}, the published code prunes after layer "
                f"{shape.feature_layer} only, which the features are read from: choose that"
            )
        self.noted: list[Call] | None = None

    def _selecting(self, function: Callable[..., Any], *given: Any) -> Any:
        if self.noted is not None:
            self.noted.append(functools.partial(function, *given))
        return function(*given)

    @torch.no_grad()
    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(features [1, n, D], labels int64 [n]) of the patches that stay, from pixels [1, channels, height, width]."""
        tower = self.model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for layer in tower.encoder.layers[: self.vision.layer]:
            hidden = layer(hidden, None)
        hidden, weights, keys = attend(tower.encoder.layers[self.vision.layer], hidden)
        kept, labels = self._selecting(self.choose, weights, keys)
        return self.model.model.multi_modal_projector(hidden[:, 1:][:, kept]), labels

    def choose(self, weights: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """(kept int64 [n] in raster order, labels int64 [n]), from the scoring layer's attention [1, heads, t, t] and raw keys
        [1, t, C]."""
        stage, side = self.vision, self.schedule.shape.grid[0]
        score = weights[0, :, 0, 1:].sum(0)
        kept = score.topk(stage.total).indices.sort().values
        places = torch.stack((kept // side, kept % side), 1) / side
        centers, width, reach = (stage.option(name) for name in ("centers", "density_width", "reach"))
        return kept, cluster(keys[0, 1:][kept], places, centers[0], width, reach)

    @torch.no_grad()
    def prefill(self, ids: Tensor, features: Tensor, labels: Tensor) -> tuple[Tensor, DynamicCache]:
        """The first logits [1, 1, vocab] and the cache, of its own length in every layer, from ids int64 [1, T] with the
        image's expanded placeholder, and what was seen of it."""
        language = self.model.model.language_model
        image = (ids[0] == self.model.config.image_token_id).int()
        start = image.argmax().item()
        patches = image.sum().item()
        before, after = language.embed_tokens(ids[:, :start]), language.embed_tokens(ids[:, start + patches :])
        hidden = torch.cat((before, features, after), 1)
        cache: Any = DynamicCache()
        positions, first = torch.arange(hidden.shape[1], device=ids.device), 0
        for stage in self.schedule.decoder_stages:
            hidden = self._layers(hidden, positions, cache, first, stage.layer)
            first = stage.layer
            rows = slice(start, start + len(labels))
            keys = cache.layers[first - 1].keys[:, :, rows]
            visual, index = self._selecting(self.reduce, stage.policy, hidden[0, rows], keys, labels, stage.total)
            if stage.positions == "index":
                positions = torch.arange(len(positions), device=ids.device)
            hidden = torch.cat((hidden[:, :start], visual.unsqueeze(0), hidden[:, rows.stop :]), 1)
            positions = torch.cat((positions[:start], positions[rows][index], positions[rows.stop :]))
            labels = labels[index]
        hidden = self._layers(hidden, positions, cache, first, len(language.layers))
        return self.model.lm_head(language.norm(hidden[:, -1:])), cache

    def reduce(self, policy: str, hidden: Tensor, keys: Tensor, labels: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """(hidden [budget, D], index int64 [budget]): the visual rows that go on, and where they were.

        hidden [n, D]; keys [1, kv_heads, n, hd] of the layer before, whose norms are small where a token matters; labels [n].
        """
        importance = keys[0].mean(0).norm(dim=-1)
        if policy == "merge_by_cluster":
            return merge(hidden, importance, labels, budget)
        index = importance.topk(budget, largest=False).indices.sort().values
        return hidden[index], index

    @torch.no_grad()
    def decode(self, token: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [1, 1, vocab] of one token, int64 [1, 1], which the cache takes in."""
        language = self.model.model.language_model
        # Its first layer holds whatever the vision stage has left.
        position = torch.tensor([cache.layers[0].keys.shape[2]], device=token.device)
        hidden = self._layers(language.embed_tokens(token), position, cache, 0, len(language.layers))
        return self.model.lm_head(language.norm(hidden))

    def _layers(self, hidden: Tensor, positions: Tensor, cache: DynamicCache, first: int, end: int) -> Tensor:
        """Decoder layers `first` to `end`: hidden [1, t, D] at positions int64 [t]."""
        language, tokens = self.model.model.language_model, hidden.shape[1]
        mask = None
        if tokens > 1:
            mask = torch.full((tokens, tokens), -torch.inf, dtype=hidden.dtype, device=hidden.device).triu(1)[None, None]
        tables = language.rotary_emb(hidden, position_ids=positions[None])
        for layer in language.layers[first:end]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions[None],
                use_cache=True,
                position_embeddings=tables,
                **{CACHE_NAME: cache},
            )
        return hidden


def attend(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One encoder layer with its attention as matrices: (hidden [1, t, C], weights [1, heads, t, t], raw keys [1, t, C])."""
    attention = layer.self_attn
    shape = (*hidden.shape[:2], attention.num_heads, -1)
    normed = layer.layer_norm1(hidden)
    keys = attention.k_proj(normed)
    query, key, value = (
        part.view(shape).transpose(1, 2) for part in (attention.q_proj(normed), keys, attention.v_proj(normed))
    )
    logits = query @ key.transpose(2, 3) * attention.scale
    weights = logits.softmax(-1, dtype=torch.float32).to(hidden.dtype)
    hidden = hidden + attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden)), weights, keys


def cluster(features: Tensor, places: Tensor, centers: int, density_width: float, reach: float) -> Tensor:
    """Labels int64 [n] by density peaks among spatial neighbours, -1 where a chain of neighbours reaches no center.

    features [n, d]; places [n, 2] in units of the image side.
    """
    distance = ((features.unsqueeze(1) - features.unsqueeze(0)).square().sum(-1) + 1e-8).sqrt()
    distance.fill_diagonal_(0)
    density = (-((distance / density_width) ** 2)).exp().sum(1)
    apart = (places.unsqueeze(1) - places.unsqueeze(0)).square().sum(-1).sqrt()
    candidate = (density.unsqueeze(0) >= density.unsqueeze(1)) & (apart <= reach)
    candidate.fill_diagonal_(False)
    delta, nearest = distance.masked_fill(~candidate, torch.inf).min(1)
    nearest = torch.where(delta.isinf(), 0, nearest)
    peaks = (delta * density).topk(centers).indices
    labels = torch.full_like(nearest, -1)
    labels[peaks] = torch.arange(centers, device=labels.device)
    settled = labels >= 0
    while True:
        taken = torch.where(settled, labels, labels[nearest])
        if (taken == labels).all().item():
            return labels
        labels = taken


def merge(hidden: Tensor, importance: Tensor, labels: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """(hidden [budget, D], index int64 [budget], ascending): rows [n, D] merged cluster by cluster; importance [n]."""
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique().tolist()]
    total = torch.stack([importance[tokens].sum() for tokens in members])
    ascending = total.argsort().tolist()
    alone: list[Tensor] = []
    groups: list[Tensor] = []
    if len(members) > budget:
        groups = [members[c] for c in ascending[: budget - 1]]
        groups.append(torch.cat([members[c] for c in ascending[budget - 1 :]]).sort().values)
    else:
        for tokens, quota in zip(members, _quotas(members, ascending, len(labels), budget), strict=True):
            ranked = tokens[importance[tokens].argsort()]
            alone.append(ranked[:quota])
            groups.append(ranked[quota:].sort().values)
    middles = [group[len(group) // 2].item() for group in groups]
    merged = torch.stack([hidden[middle] + hidden[group].mean(0) for middle, group in zip(middles, groups, strict=True)])
    index = torch.cat((*alone, torch.tensor(middles, device=hidden.device)))
    rows = torch.cat((hidden[index[: len(index) - len(groups)]], merged))
    order = index.argsort()
    return rows[order], index[order]


def _quotas(members: list[Tensor], ascending: list[int], tokens: int, budget: int) -> list[int]:
    """How many tokens of each cluster stay as they are."""
    clusters = len(members)
    spare = torch.tensor([len(group) - 1 for group in members], device=members[0].device)
    # Divided by a tensor: CUDA multiplies by the reciprocal of a number, which rounds differently.
    share = spare.float() / torch.full_like(spare, max(tokens - clusters, 1)) * (budget - clusters)
    quota = torch.minimum(share.round().long(), spare)
    missing = budget - clusters - quota.sum().item()
    step = 1 if missing > 0 else -1
    for c in ascending if missing > 0 else ascending[::-1]:
        if missing == 0:
            break
        if 0 <= quota[c].item() + step <= spare[c].item():
            quota[c] += step
            missing -= step
    return [quota[c].item() for c in range(clusters)]


@register("by_the_book")
def by_the_book(model: PreTrainedModel, config: ViTCoPConfig, request: Request) -> Arm:
    """The published form, for one prompt.

    Selection alone is scoring from the attention matrices, clustering, merging and top-k, on what the prompt gave rise to.
    Raises ConfigError for a batch above 1, and as `ByTheBook` does.
    """
    if request.batch != 1:
        raise ConfigError(f"batch={request.batch}: the published code takes one prompt at a time; use batch=1")
    book = ByTheBook(model, config)
    ids, pixels = inputs(model, request).values()
    book.noted = selecting = []
    seen = book.see(pixels)
    _, cache = book.prefill(ids, *seen)
    book.noted = None

    def decode() -> tuple[Tensor, ...]:
        logits = book.decode(ids[:, :1], cache)
        cache.crop(-1)  # a view per layer; the step's own concatenation has copied the cache
        return (logits,)

    stages: dict[str, Call] = {
        "vision": lambda: book.see(pixels),
        "prefill": lambda: book.prefill(ids, *seen),
        "decode": decode,
        "ttft": lambda: book.prefill(ids, *book.see(pixels)),
    }
    attention = {name: recorded(call) for name, call in stages.items()}
    for name in ("vision", "ttft"):
        attention[name] += "; matrices in the scoring layer"
    return Arm(stages, attention, torch.no_grad()(lambda: [call() for call in selecting]))
