"""The modules that programs are exported from: rewritten graphs between the model's own embedding, projector and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .families import Family
from .layout import Segment
from .ops.indexing import put_rows, take_rows
from .policies import POLICIES, Choice, Site, patch_positions, tap_of
from .schedule import Schedule, Stage


class Vision(nn.Module):
    """pixels [I, channels, height, width] -> (features [I, lead + n, D], kept int64 [I, n], state [I, n]...).

    stages: those before the decoder, of one image; the encoder returns which patches each inside it keeps of those before,
    and its state; for one behind the projector, what that asks of a layer.
    """

    def __init__(
        self,
        patches: nn.Module,
        encoder: fx.GraphModule,
        projector: nn.Module,
        stages: Sequence[Stage],
        segment: Segment,
        exact: bool,
    ):
        super().__init__()
        self.patches, self.encoder, self.projector = patches, encoder, projector
        self.stages, self.segment, self.exact = tuple(stages), segment, exact

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        hidden, *told = self.encoder(self.patches(pixels))
        features = self.projector(hidden)
        if self.stages and self.stages[-1].side == "entry":
            return self._enter(features, told)
        if len(self.stages) < 2:
            return features, *told
        kept, *indices = told[: len(self.stages)]
        for index in indices:
            kept = kept.gather(1, index)
        return features, kept, *told[len(self.stages) :]

    def _enter(self, features: Tensor, told: list[Tensor]) -> tuple[Tensor, ...]:
        """Of features [I, lead + p, D], and score [I, p] and keys [I, p, K] of a layer if the stage asks for them, what it
        keeps."""
        (stage,), lead = self.stages, self.segment.lead
        candidates = features[:, lead:]
        grid = self.segment.grid[1:]
        index = torch.arange(candidates.shape[1], device=features.device).expand(candidates.shape[:2])
        site = Site(at=index, hidden=candidates, grid=grid, places=patch_positions(index, grid), exact=self.exact)
        if told:
            site = replace(site, score=told[0], features=told[1])
        choice = POLICIES[stage.policy].choose(site, stage.total, **dict(stage.options))
        rows = take_rows(candidates, choice.index) if choice.rows is None else choice.rows
        return torch.cat((features[:, :lead], rows), 1), choice.index, *choice.state


class Tower(nn.Module):
    """pixels [T, channels, height, width], or [T, p, features] with real bool [T, p] and tables [T, p, ...] -> (patches [T, p,
    C],), and with a vision stage score [T, p], features [T, p, K]. Contiguous, as compiled programs take what they read by
    address: keys are often a part of what one product makes of queries, keys and values."""

    def __init__(self, family: Family, encoder: fx.GraphModule):
        super().__init__()
        self.patches, self.encoder = family.patches, encoder

    def forward(self, pixels: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.contiguous() for part in self.encoder(self.patches(pixels, *tables), *tables))


class Select(nn.Module):
    """What a tower says, and where the candidates of S segments come from -> (features [S, n, D], kept int64 [S, n], state
    [S, n]...); without a stage, all features alone.

    index: int64 [S, N, taps], patches of all tiles, -1 in rows of padding; weight: fp32 [S, N, taps], if taps are blended;
    places: fp32 [S, N, 2 or 3], if there is a stage. Only what is kept goes through the projector: before it is blended, as in
    the stock models, or as groups [.., taps, C] that the projector makes one token of each. A stage behind the projector
    chooses among the features of all. A group's score and keys are the means of its patches'.
    """

    def __init__(self, family: Family, stage: Stage | None, taps: int, exact: bool):
        super().__init__()
        self.projector, self.stage, self.exact = family.projector, stage, exact
        self.blended = taps > 1 and family.shape.group == 1

    def forward(self, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        if self.stage is None:
            return (self._project(hidden, rest[0], rest[1] if self.blended else None),)
        looked = 0 if tap_of(self.stage) is None else 2
        told, (index, *given) = rest[:looked], rest[looked:]
        weight, places = (given[0] if self.blended else None), given[-1]
        if self.stage.side == "entry":
            features = self._project(hidden, index.clamp_min(0), weight)
            choice = choose(self.stage, told, index, weight, places, self.exact, features)
            return take_rows(features, choice.index) if choice.rows is None else choice.rows, choice.index, *choice.state
        choice = choose(self.stage, told, index, weight, places, self.exact)
        kept = choice.index
        weight = None if weight is None else take_rows(weight, kept)
        return self._project(hidden, take_rows(index.clamp_min(0), kept), weight), kept, *choice.state

    def _project(self, hidden: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
        rows = hidden.flatten(0, 1).index_select(0, index.flatten()).reshape(*index.shape, hidden.shape[-1])
        if weight is None:
            # Engines refuse to leave out an axis that is longer than 1, where torch leaves it.
            return self.projector(rows.squeeze(2) if index.shape[2] == 1 else rows)
        parts = self.projector(rows.flatten(1, 2)).reshape(*index.shape, -1)
        return (parts * weight.unsqueeze(-1).to(parts.dtype)).sum(2)


def choose(
    stage: Stage,
    told: Sequence[Tensor],
    index: Tensor,
    weight: Tensor | None,
    places: Tensor,
    exact: bool,
    hidden: Tensor | None = None,
) -> Choice:
    """What `stage` keeps of the candidates of S segments; as in `Select`. told: score [T, p] and keys [T, p, K] of all
    patches, if the stage looks at a layer; hidden: [S, N, D], if it chooses behind the projector."""
    real = index[..., 0] >= 0
    index = index.clamp_min(0)
    at = torch.arange(index.shape[1], device=index.device).expand(index.shape[:2])
    site = Site(at=at, hidden=hidden, places=places, real=real, exact=exact)
    if told:
        scores = _blend(told[0].flatten(0, 1), index, weight)
        padding = real if scores.dim() == real.dim() else real.unsqueeze(-1)
        features = _blend(told[1].flatten(0, 1), index, weight)
        site = replace(site, score=torch.where(padding, scores, -torch.inf), features=features)
    return POLICIES[stage.policy].choose(site, stage.total, **dict(stage.options))


def _blend(values: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    """values [R, ...] at index [S, N, taps], blended by weight or their mean: [S, N, ...], in fp32 where there are several. A
    tap at a time, so that nothing has the taps as an axis."""
    taps = [values.index_select(0, index[..., tap].flatten()).unflatten(0, index.shape[:2]) for tap in range(index.shape[2])]
    if len(taps) == 1:
        return taps[0]
    if weight is None:
        return sum((part.float() for part in taps[1:]), taps[0].float()) / len(taps)
    shares = [weight[..., tap].reshape(*index.shape[:2], *(1,) * (values.dim() - 1)) for tap in range(index.shape[2])]
    return sum((part.float() * share for part, share in zip(taps, shares, strict=True)), torch.zeros((), device=values.device))


class Prefill(nn.Module):
    """A prompt with images spliced in -> (logits [B, 1, vocab], index per stage..., and new keys and values if not in place).

    ids: int64 [B, t], right-padded, anything at visual rows; last: int64 [B], the row of each prompt's last token; positions:
    int64 [dims, B, t]; features: [B, n, D], of each segment its leading rows first, and where the decoder adds more of them to
    its hidden state, those in further columns; visual: int64 [B, n], the rows the features take; then the state of the vision
    stages, [B, n] each without leading rows, and what `attach_cache` asks for. Rows behind `last` are padding: attention is
    causal but within images, so nothing before them can see them.
    """

    def __init__(self, family: Family, decoder: fx.GraphModule, schedule: Schedule, states: int, all_logits: bool = False):
        super().__init__()
        self.embedding, self.decoder, self.head = family.embedding, decoder, family.head
        self.removed, self.pruned = schedule.removed_rows()[-1], schedule.follows
        self.states, self.all_logits, self.marks = states, all_logits, schedule.shape.marks
        needs = frozenset[str]().union(*(POLICIES[stage.policy].needs for stage in schedule.decoder_stages))
        self.told = tuple(name for name in ("last", "text") if name in needs)
        self.deepstack = schedule.shape.deepstack
        # Rows of the features that may be pruned; None is all.
        leads = [segment.lead for segment in schedule.layout]
        self.columns: list[int] | None = _behind(schedule.segment_tokens, leads) if any(leads) else None

    def forward(
        self, ids: Tensor, last: Tensor, positions: Tensor, features: Tensor, visual: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        embeddings = self.embedding(ids)
        features, *more = features.chunk(1 + self.deepstack, -1) if self.deepstack else (features,)
        added = tuple(put_rows(torch.zeros_like(embeddings), visual, part) for part in more)
        return self.prefill(put_rows(embeddings, visual, features), last, positions, visual, *rest, added=added)

    def prefill(
        self,
        embeddings: Tensor,
        last: Tensor,
        positions: Tensor,
        visual: Tensor,
        *rest: Tensor,
        added: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """The same from embeddings [B, t, D], and what the decoder adds to them later, likewise."""
        marks = [image_marks(positions, visual)] if self.marks else []
        told = {"last": last, "text": _text(visual, last, embeddings.shape[1])} if self.told else {}
        if self.columns is not None:
            visual = visual.index_select(1, torch.tensor(self.columns, device=visual.device))
        selectors = (visual, *rest[: self.states], *(told[name] for name in self.told)) if self.pruned else ()
        hidden, *results = self.decoder(embeddings, positions, *marks, *added, *selectors, *rest[self.states :])
        if not self.all_logits:
            hidden = take_rows(hidden, (last - self.removed).unsqueeze(1))
        return self.head(hidden), *results


def _text(visual: Tensor, last: Tensor, rows: int) -> Tensor:
    """bool [B, rows]: the text that has seen all images, which are at rows `visual` int64 [B, n], ascending; `last`, int64
    [B], is the last row that is no padding. Where there is none, all text, and without any, all rows: never nothing."""
    order = torch.arange(rows, device=last.device)
    real = order <= last.unsqueeze(1)
    text = real.scatter(1, visual, torch.zeros_like(visual, dtype=torch.bool))
    behind = text & (order > visual[:, -1:])
    for wider in (text, real):
        behind = behind | (wider & ~behind.any(1, keepdim=True))  # onnxruntime chooses among numbers alone
    return behind


def image_marks(positions: Tensor, visual: Tensor | None) -> Tensor:
    """int64 [B, 2, 1, t]: of every token the image that it is of, -1 for text, and its position, of positions [1, B, t].

    visual: int64 [B, n], the rows of images, ascending, None without; each run of them is an image.
    """
    place = positions[0]
    block = torch.full_like(place, -1)
    if visual is not None:
        begins = F.pad(visual[:, 1:] != visual[:, :-1] + 1, (1, 0))
        block = block.scatter(1, visual, begins.long().cumsum(1))
    return torch.stack((block, place), 1).unsqueeze(2)


class Extend(nn.Module):
    """More tokens on filled caches -> (logits [B, 1, vocab],): a decoding step, a text prompt, a later turn of text.

    ids: int64 [B, s], right-padded; last: int64 [B], which of the s is each sequence's last; length: int64 [B], tokens before
    them as layer 0 counts them; position: int64 [B] of the first of them; removed: int64 [groups, B], rows that each group of
    layers lacks; then the caches, updated in place. A decoder rewritten otherwise returns its new rows behind the logits.
    """

    def __init__(self, family: Family, decoder: fx.GraphModule):
        super().__init__()
        self.embedding, self.decoder, self.head = family.embedding, decoder, family.head
        self.dims, self.marks = family.shape.position_dims, family.shape.marks

    def forward(
        self, ids: Tensor, last: Tensor, length: Tensor, position: Tensor, removed: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        batch, count = ids.shape
        positions = position.unsqueeze(1) + torch.arange(count, device=ids.device)
        positions = positions.expand(self.dims, batch, count)
        marks = [image_marks(positions, None)] if self.marks else []
        hidden, *rows = self.decoder(self.embedding(ids), positions, *marks, length, removed, *caches)
        return self.head(take_rows(hidden, last.unsqueeze(1))), *rows


def _behind(counts: Sequence[int], leads: Sequence[int]) -> list[int]:
    """Where the counted rows stand if so many others stand before those of each count."""
    columns: list[int] = []
    start = 0
    for count, lead in zip(counts, leads, strict=True):
        columns += range(start + lead, start + lead + count)
        start += lead + count
    return columns
