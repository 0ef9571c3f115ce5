"""The three programs of a model, exported at concrete shapes: vision, prefill, decode.

Each is a rewritten graph between the model's own embedding, projector and head. Exporting it at static shapes removes
every symbol, and what remains is an ordinary ExportedProgram: the one input of every backend.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from .attention import evaluating
from .capture import Capture
from .errors import RewriteError
from .families import Family
from .isolation import tracing
from .ops.indexing import put_rows, take_rows
from .passes import rewrite_decode, rewrite_encoder, rewrite_prefill
from .passes.decode_cache import offset_groups
from .schedule import Schedule


class Vision(nn.Module):
    """pixels [B, channels, height, width] -> (features [B, n, D], kept int64 [B, n], labels int64 [B, n])."""

    def __init__(self, family: Family, encoder: fx.GraphModule):
        super().__init__()
        self.patches, self.encoder, self.projector = family.patches, encoder, family.projector

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        hidden, *selection = self.encoder(self.patches(pixels))
        return self.projector(hidden), *selection


class Prefill(nn.Module):
    """A prompt with images spliced in -> (logits [B, 1, vocab], index per stage..., k0, v0, k1, v1, ...).

    ids: int64 [B, t], right-padded, anything at visual rows; last: int64 [B], the row of each prompt's last token;
    features: [B, n, D]; visual: int64 [B, n], the rows the features take; labels: int64 [B, n].
    Rows behind `last` are padding: attention is causal, so nothing before them can see them.
    """

    def __init__(self, family: Family, decoder: fx.GraphModule, removed: int, stages: int, all_logits: bool = False):
        super().__init__()
        self.embedding, self.decoder, self.head = family.embedding, decoder, family.head
        self.removed, self.stages, self.all_logits = removed, stages, all_logits

    def forward(self, ids: Tensor, last: Tensor, *image: Tensor) -> tuple[Tensor, ...]:
        embeddings = self.embedding(ids)
        if image:
            embeddings = put_rows(embeddings, image[1], image[0])
        return self.prefill(embeddings, last, *image[1:])

    def prefill(self, embeddings: Tensor, last: Tensor, *selectors: Tensor) -> tuple[Tensor, ...]:
        """The same from embeddings [B, t, D]."""
        batch, tokens, _ = embeddings.shape
        positions = torch.arange(tokens, device=embeddings.device).expand(batch, tokens)
        hidden, *rest = self.decoder(embeddings, positions, *(selectors if self.stages else ()))
        if not self.all_logits:
            hidden = take_rows(hidden, (last - self.removed).unsqueeze(1))
        return self.head(hidden), *rest


class Decode(nn.Module):
    """(token int64 [B, 1], length int64 [B], offsets int64 [groups], key_0, value_0, ...) -> (logits [B, 1, vocab],).

    Caches are updated in place; a decoder rewritten otherwise returns its new rows behind the logits.
    """

    def __init__(self, family: Family, decoder: fx.GraphModule):
        super().__init__()
        self.embedding, self.decoder, self.head = family.embedding, decoder, family.head

    def forward(self, token: Tensor, length: Tensor, offsets: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        hidden, *rows = self.decoder(self.embedding(token), length.unsqueeze(1), length, offsets, *caches)
        return self.head(hidden), *rows


@dataclass(frozen=True)
class Programs:
    """Rewrites once, exports on demand. `schedule` is the contract; `export_*` raise RewriteError where a graph breaks it."""

    family: Family
    captured: Capture
    schedule: Schedule
    attn_implementation: str = "sdpa"

    @property
    def removed(self) -> int:
        """Rows that the decoder stages take out of a prompt."""
        return self.schedule.removed_rows()[-1]

    def export_vision(self, batch: int, exact: bool = True) -> ExportedProgram:
        """The vision program for `batch` images; `exact` as in `ops.density_peaks`."""
        encoder = rewrite_encoder(self.captured.encoder, self.schedule, self.attn_implementation, exact)
        pixels = self._zeros(batch, *self.family.pixel_shape)
        program = _export(Vision(self.family, encoder), (pixels,))
        _expect("vision features", _shapes(program)[0][:2], (batch, self.schedule.image_tokens))
        return program

    def export_prefill(self, batch: int, tokens: int, image: bool = True, least_tokens: int | None = None) -> ExportedProgram:
        """The prefill program for `batch` prompts of `tokens` rows, images counted after the vision stage.

        Without `image` the prompt is text alone, which only a dense schedule can take. With `least_tokens` the rows are a
        dynamic axis from there to `tokens`; the visual budgets stay static.
        """
        inputs = self.prefill_inputs(batch, tokens, image)
        if least_tokens is not None:
            axes: list[dict[int, Dim] | None] = [None] * len(inputs)
            axes[0] = {1: Dim("rows", min=least_tokens, max=tokens)}
            return _export(self.prefill_module(), inputs, _by_name(axes))
        program = _export(self.prefill_module(), inputs)
        caches = _shapes(program)[1 + len(self.schedule.stages) :]
        _expect("the list of keys and values", (len(caches),), (2 * self.schedule.shape.layers,))
        for layer, expected in enumerate(self.schedule.cache_shapes(batch, tokens)):
            _expect(f"key cache of layer {layer}", caches[2 * layer], expected)
            _expect(f"value cache of layer {layer}", caches[2 * layer + 1], expected)
        return program

    def export_decode(self, batch: int, rows: int, in_place: bool = True) -> ExportedProgram:
        """The decode program for `batch` sequences with `rows` cache rows in layer 0 (prompt and new tokens)."""
        decoder = rewrite_decode(self.captured.decoder, self.schedule, self.attn_implementation, in_place)
        return _export(Decode(self.family, decoder), self.decode_inputs(batch, rows))

    def decode_inputs(self, batch: int, rows: int) -> tuple[Tensor, ...]:
        """Example inputs of the decode program, at its last row."""
        token = torch.zeros(batch, 1, dtype=torch.int64, device=self._device())
        length = torch.full((batch,), rows - 1, dtype=torch.int64, device=self._device())
        caches = [self._zeros(*shape) for shape in self.schedule.cache_shapes(batch, rows) for _ in "kv"]
        return token, length, self.offsets(), *caches

    def offsets(self, image: bool = True) -> Tensor:
        """The `offsets` input of decode: rows missing from each group of layers; zeros for prompts without an image."""
        groups = offset_groups(self.schedule.removed_rows())
        return torch.tensor(groups if image else [0] * len(groups), dtype=torch.int64, device=self._device())

    def prefill_module(self, all_logits: bool = False) -> Prefill:
        """The prefill program before export."""
        decoder = rewrite_prefill(self.captured.decoder, self.schedule, self.attn_implementation)
        return Prefill(self.family, decoder, self.removed, len(self.schedule.stages), all_logits)

    def prefill_inputs(self, batch: int, tokens: int, image: bool = True) -> tuple[Tensor, ...]:
        """Example inputs of the prefill program."""
        ids = torch.zeros(batch, tokens, dtype=torch.int64, device=self._device())
        last = torch.full((batch,), tokens - 1, dtype=torch.int64, device=self._device())
        if not image:
            return ids, last
        n = self.schedule.image_tokens
        visual = torch.arange(n, device=self._device()).repeat(batch, 1)
        features = self._zeros(batch, n, self.schedule.shape.hidden)
        return (ids, last, features, visual, *([torch.zeros_like(visual)] if self.schedule.stages else []))

    def _parameter(self) -> Tensor:
        return next(self.family.head.parameters())

    def _device(self) -> torch.device:
        return self._parameter().device

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self._parameter().dtype, device=self._device())


def _export(module: nn.Module, inputs: tuple[Tensor, ...], axes: tuple | None = None) -> ExportedProgram:
    with tracing(module), evaluating(module):
        return torch.export.export(module, inputs, dynamic_shapes=axes, strict=False)


def _by_name(axes: list) -> tuple:
    """Axes of `Prefill.forward`'s inputs: ids, last, and the rest, which is variadic."""
    return (axes[0], axes[1], *([tuple(axes[2:])] if len(axes) > 2 else []))


def _shapes(program: ExportedProgram) -> list[tuple[int, ...]]:
    output = next(iter(reversed(program.graph.nodes)))
    return [tuple(value.meta["val"].shape) for value in output.args[0]]


def _expect(what: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise RewriteError(f"{what} has shape {tuple(found)}, the schedule says {tuple(expected)}")
