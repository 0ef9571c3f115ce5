"""One semantic capture of each side of a model: fx graphs over ATen whose batch and token axes are symbols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from transformers import PreTrainedModel

from .attention import anchored
from .families import Family
from .isolation import tracing

# Any size from 2 on traces to a symbol; these differ from each other and from common widths.
_BATCH, _TOKENS = 2, 11


@dataclass(frozen=True)
class Capture:
    """encoder: ([B, t, C]) -> [B, t, C] and decoder: ([B, t, D], positions [dims, B, t] [, marks [B, 2, 1, t]], and of each of
    `shape.deepstack` more features [B, t, D]) -> [B, t, D], with B and t symbolic.
    An encoder of images of any size is none: `capture_encoder` traces it at the sizes of a program. frames: as encoder, that
    of the frames of videos where they have their own.

    Parameters are the model's own. Graphs are copied before they are rewritten; a capture is never changed.
    """

    encoder: fx.GraphModule | None
    decoder: fx.GraphModule
    frames: fx.GraphModule | None = None


class LaterCapture:
    """A capture that is traced when it is first asked for: programs that were kept need none."""

    def __init__(self, trace: Callable[[], Capture]):
        self._trace = trace
        self._made: Capture | None = None

    @property
    def made(self) -> Capture:
        """The capture itself."""
        with tracing():  # as whoever asks from within an export holds already
            self._made = self._made or self._trace()
            return self._made

    @property
    def encoder(self) -> fx.GraphModule | None:
        """As of `Capture`."""
        return self.made.encoder

    @property
    def decoder(self) -> fx.GraphModule:
        """As of `Capture`."""
        return self.made.decoder

    @property
    def frames(self) -> fx.GraphModule | None:
        """As of `Capture`."""
        return self.made.frames


def capture(family: Family, model: PreTrainedModel) -> Capture:
    """Traces the encoder and the decoder of `family`, which are parts of `model`, once."""
    parameter = next(model.parameters())
    like: dict[str, Any] = {"dtype": parameter.dtype, "device": parameter.device}
    pixels = torch.zeros(_BATCH, _TOKENS, family.shape.vision_hidden, **like)
    embeddings = torch.zeros(_BATCH, _TOKENS, family.shape.hidden, **like)
    shape = family.shape
    positions = torch.arange(_TOKENS, device=parameter.device).repeat(shape.position_dims, _BATCH, 1)
    marks = [positions.new_zeros(_BATCH, 2, 1, _TOKENS)] if shape.marks else []
    seeing = [family.encoder] if family.frames is None else [family.encoder, family.frames.encoder]
    stated = anchored(*seeing, family.decoder, window=shape.window, marks=shape.marks)
    with tracing(*seeing, family.decoder), stated:
        encoder = None if family.host.tables else _trace(family.encoder, pixels)
        more = [torch.zeros_like(embeddings) for _ in range(shape.deepstack)]
        frames = None if family.frames is None else _trace(family.frames.encoder, pixels)
        return Capture(encoder, _trace(family.decoder, embeddings, positions, *marks, *more), frames)


def capture_encoder(family: Family, patches: torch.Tensor, *tables: torch.Tensor) -> fx.GraphModule:
    """The encoder at the sizes of patches [T, p, C], real bool [T, p] and what else its host's `tables` say of them."""
    with tracing(family.encoder), anchored(family.encoder):
        program = torch.export.export(family.encoder, (patches, *tables), strict=False)
    return program.module(check_guards=False)


def _trace(module: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    """The batch and token axes are the first two of every input; coordinates of positions, integers, come before them, and
    marks between."""
    batch, tokens = Dim("batch", min=1), Dim("tokens", min=1)
    where = [(0, 1) if value.is_floating_point() else (1, 2) if value.dim() == 3 else (0, 3) for value in inputs]
    axes = tuple({first: batch, second: tokens} for first, second in where)
    program = torch.export.export(module, inputs, dynamic_shapes=(axes,), strict=False)
    return program.module(check_guards=False)
