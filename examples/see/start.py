"""Weights that a projector and a decoder start from.

Random ones have to find out first that a word and the patches which show what it names belong together, and a few minutes of
training are too short for that. So the projector starts as the linear readings that the tower was taught with, words as what
is read where they are shown, and attention as likeness (mimetic initialization, Trockman and Kolter, 2023, arXiv
2305.09828)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .scenes import COLUMNS, LABELS, LETTERS, NAMES, ROWS, SHADES
from .tower import Heads

_LENGTH = 0.5  # root mean square of what enters the decoder
_SHARP = 1.8  # of queries and keys
_LEAST = 1.0  # deviations above the mean from which a reading counts


def begin(kind: str, model: Any, tokenizer: Any, heads: Heads, features: Tensor, seed: int) -> None:
    """Sets projector, words and attention. features: fp32 [N, 576, width] of some pictures, for means and deviations."""
    generator = torch.Generator().manual_seed(seed)
    width = features.shape[-1]
    readings = torch.cat([heads.patch[f"head_{name}"].weight for name in LABELS])
    number = len(readings)
    rotation = _rotation(width, generator)
    basis, text = rotation[:number], rotation[number:]
    merger = None if kind == "llava" else model.model.visual.merger
    given = features if merger is None else merger.ln_q(features)
    told = given.flatten(0, 1) @ readings.T
    scaled = readings / told.std(0)[:, None]
    shift = -_LEAST - told.mean(0) / told.std(0)
    spread = (torch.nn.functional.gelu(told / told.std(0) + shift) @ basis).square().mean().sqrt()
    if merger is None:
        _readings(model.model.multi_modal_projector, scaled, shift, _LENGTH / spread * basis, ("linear_1", "linear_2"))
    else:
        four = torch.block_diag(*[scaled] * 4)
        _readings(merger.mlp, four, shift.repeat(4), _LENGTH / spread / 2 * basis.repeat(4, 1), ("0", "2"))
    shown = _shown(basis)
    _words(model, tokenizer, shown, text)
    units = torch.stack([reading / reading.norm() for reading in shown.values()])
    _alike(model, units.T @ text[: len(units)], generator)


def _rotation(width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]


def _readings(module: Any, first: Tensor, shift: Tensor, second: Tensor, names: tuple[str, str]) -> None:
    """module(x) is gelu(first x + shift) second, as far as its rows go; the others stay small and random."""
    one, two = (module.get_submodule(name) for name in names)
    count = len(first)
    one.weight.data[:count], one.bias.data[:count] = first, shift
    two.weight.data[:, :count] = second.T


def _shown(basis: Tensor) -> dict[str, Tensor]:
    """[width] of each word for something to be seen: what an image token has where it is shown."""
    at = dict(zip(LABELS, torch.tensor([0, *LABELS.values()]).cumsum(0).tolist()))
    found: dict[str, Tensor] = {}
    for kind, words in (("names", NAMES), ("colours", SHADES), ("letters", tuple(LETTERS))):
        found |= {word: basis[at[kind] + number + 1] for number, word in enumerate(words)}
    places = basis[at["places"] :].reshape(3, 3, -1)
    found |= {word: places[number].mean(0) for number, word in enumerate(ROWS)}
    return found | {word: places[:, number].mean(0) for number, word in enumerate(COLUMNS)}


def _words(model: Any, tokenizer: Any, shown: dict[str, Tensor], text: Tensor) -> None:
    """Each of these words is a direction of its own, one for a name and its plural, and is said where it is shown; other words
    are random. All have one length."""
    embed, say = model.get_input_embeddings().weight.data, model.lm_head.weight.data
    embed.mul_(_LENGTH / embed.square().mean().sqrt())
    root = text.shape[1] ** 0.5
    for (word, reading), unit in zip(shown.items(), text):
        for form in (word, f"{word}s") if word in NAMES else (word,):
            number = tokenizer.convert_tokens_to_ids(form)
            embed[number] = 0.9 * _LENGTH * root * unit + 0.4 * embed[number]
        say[tokenizer.convert_tokens_to_ids(word)] = 0.03 * root * reading / reading.norm()


def _alike(model: Any, shown_by: Tensor, generator: torch.Generator) -> None:
    """In every layer a word asks for what shows it, and what is attended to is copied. shown_by: [width, width], from a word's
    direction to that of its reading."""
    for layer in model.model.language_model.layers:
        own = layer.self_attn
        keys, values = (_SHARP * _rotation(len(shown_by), generator), _rotation(len(shown_by), generator))
        own.q_proj.weight.data.add_(keys @ shown_by)
        own.k_proj.weight.data.copy_(keys)
        own.v_proj.weight.data.copy_(values)
        own.o_proj.weight.data.copy_(0.3 * values.T)
