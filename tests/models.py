"""Tiny stock LLaVA models with seeded random weights, and prompts for them."""

from __future__ import annotations

import dataclasses
import inspect
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vitcop_compile
from vitcop_compile import backends, programs
from vitcop_compile.capture import Capture, capture
from vitcop_compile.families import family_of

IMAGE, VOCAB, GRID, PATCHES, SIDE = 95, 96, 8, 64, 112


def llava(layers: int = 6, kv_heads: int = 4, seed: int = 0, positions: int = 1024, **config):
    """A float32 LlavaForConditionalGeneration in evaluation mode: CLIP of 4 layers on 8x8 patches, Llama of 4 heads."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=SIDE // GRID,
        projection_dim=16,
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=False, **config)
    ).eval()
    randomize(model, seed)
    return model


@cache
def shared(layers: int = 6, kv_heads: int = 4) -> LlavaForConditionalGeneration:
    """One `llava` for all tests, which leave it as it is."""
    return llava(layers, kv_heads)


# Where `_use_lazy_graph_module` is on, as inductor has it, torch prints the code of a graph when it is run, and not after each
# of its own passes.
_captures: dict[int, tuple[object, Capture]] = {}


def captured(model: LlavaForConditionalGeneration) -> Capture:
    """The capture of `model`, traced once."""
    if id(model) not in _captures:
        with _use_lazy_graph_module(True):
            _captures[id(model)] = model, capture(family_of(model), model)
    return _captures[id(model)][1]


_exports: dict[tuple, torch.export.ExportedProgram] = {}


def _once(name: str) -> Any:
    def export(self: programs.Programs, *given: Any, **named: Any) -> torch.export.ExportedProgram:
        original = getattr(programs.Programs, name)
        if self.dump is not None:
            return original(self, *given, **named)
        asked = inspect.signature(original).bind(self, *given, **named)
        asked.apply_defaults()
        _, *values = (tuple(value) if isinstance(value, list) else value for value in asked.arguments.values())
        # Some tests replace one of these.
        made = (original, programs._export, programs.encoder_passes, programs.prefill_passes, programs.extend_passes)
        key = (self.captured, self.method, self.attn_implementation, *values, *made)
        if key not in _exports:
            with _use_lazy_graph_module(True):
                _exports[key] = original(self, *given, **named)
        return _exports[key]

    return export


class Remembered(programs.Programs):
    """Programs that are exported once for all tests of a process: they depend on the key alone, and nobody changes them."""

    export_vision = _once("export_vision")
    export_tower = _once("export_tower")
    export_select = _once("export_select")
    export_prefill = _once("export_prefill")
    export_extend = _once("export_extend")


_modules: dict[int, tuple[torch.export.ExportedProgram, Any]] = {}


def _eager(program: torch.export.ExportedProgram) -> Any:
    """As the backend, but strict: programs that are kept take contiguous inputs alone, whatever torch could do with others."""
    if id(program) not in _modules:
        module = backends.eager(program)

        def run(*inputs: torch.Tensor) -> Any:
            views = [place for place, tensor in enumerate(inputs) if not tensor.is_contiguous()]
            assert not views, f"inputs {views} of a program are not contiguous"
            return module(*inputs)

        _modules[id(program)] = program, run
    return _modules[id(program)][1]


def optimize(model: LlavaForConditionalGeneration, config=None, backend: str = "eager", **settings):
    """`vitcop_compile.optimize`, but a model is traced once for all configurations, and a program exported once for all that
    ask for it. Backends other than eager compile it for each."""
    once = mock.patch("vitcop_compile.pipeline.capture", lambda family, model: captured(model))
    with once, mock.patch("vitcop_compile.pipeline.Programs", Remembered):
        fast = vitcop_compile.optimize(model, config, backend=backend, **settings)
    if backend == "eager":
        fast.on_demand.backend = dataclasses.replace(fast.on_demand.backend, compile=_eager)
    return fast


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that tokens differ: selections are decided by wide margins and greedy tokens vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name or "layrnorm" in name:
                weight.copy_(noise * 0.1 + (0 if name.endswith("bias") else 1))
            elif name.endswith("bias"):
                weight.copy_(noise * 0.1)
            elif "embed" in name and "patch" not in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * 1.6 / weight[0].numel() ** 0.5)


def slow(*values):
    """Parameters of a test that the default run leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def exhaustive(*values):
    """Parameters of a test that CI leaves out as well: what they combine is proven by others one by one."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def pixels(batch: int = 1, seed: int = 0) -> Tensor:
    """Random normalised images [batch, 3, 112, 112], a color of its own for every patch."""
    generator = torch.Generator().manual_seed(1000 + seed)
    base = torch.randn(batch, 3, GRID, GRID, generator=generator)
    noise = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    return base.repeat_interleave(SIDE // GRID, 2).repeat_interleave(SIDE // GRID, 3) + 0.3 * noise


def text(count: int, seed: int = 0) -> list[int]:
    """`count` text token ids, neither special nor the image's."""
    generator = torch.Generator().manual_seed(2000 + seed)
    return torch.randint(3, IMAGE, (count,), generator=generator).tolist()


def prompt(before: int = 5, after: int = 9, seed: int = 0, image_tokens: int = PATCHES) -> Tensor:
    """ids [1, before + image_tokens + after]: text around the image's expanded placeholder."""
    words = text(before + after, seed)
    return torch.tensor([words[:before] + [IMAGE] * image_tokens + words[before:]])


def pad(prompts: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """(ids, mask) [B, longest] of prompts [1, T], padded on the given side."""
    longest = max(ids.shape[1] for ids in prompts)
    rows = []
    for ids in prompts:
        fill = ids.new_zeros(1, longest - ids.shape[1])
        parts = [(fill, 0 * fill), (ids, torch.ones_like(ids))]
        rows.append([torch.cat(p, 1) for p in zip(*(parts if side == "left" else parts[::-1]))])
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


def turn_ids(images: int, seed: int) -> list[int]:
    """Text around, and between, so many images."""
    words = text(4 + 5 * images + seed % 3, seed)
    ids = words[:3]
    for i in range(images):
        ids = [*ids, *[IMAGE] * PATCHES, *words[3 + 5 * i : 3 + 5 * i + (seed + i) % 5]]
    return [*ids, *words[-2:]]
