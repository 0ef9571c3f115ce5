"""What programs compute on caches that hold something: tokens fed together or one by one, and prompts behind others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from models import IMAGE, PATCHES, Remembered, captured, shared, slow
from reference_llava import Settings
from reference_turns import Conversation
from torch import Tensor

from vitcop_compile import ViTCoPConfig
from vitcop_compile.backends import writing_rows
from vitcop_compile.families import family_of
from vitcop_compile.programs import Programs

LAYERS, NEAR = 4, 1e-4
N, MERGED, KEPT, TEXT = 30, 18, 7, 11
PRUNED = ViTCoPConfig(budgets=(N, MERGED, KEPT, 5), shallow_layer=1, deep_layer=3, scale_layers=False)
SETTINGS = Settings(N, 5, MERGED, KEPT, 2, 1, 3)
BOTH = pytest.mark.parametrize("in_place", [True, False])


@functools.cache
def programs(config: ViTCoPConfig) -> Programs:
    model = shared(LAYERS)
    return Remembered(family_of(model), captured(model), config)


@functools.cache
def exported(config: ViTCoPConfig, kind: str, *given: Any, **settings: Any) -> Any:
    """A program as a module, exported once for all steps."""
    return getattr(programs(config), f"export_{kind}")(*given, **settings).module(check_guards=False)


class Held:
    """Caches of a batch, and the programs that work on them."""

    def __init__(self, made: Programs, batch: int, rows: tuple[int, ...], in_place: bool):
        self.made, self.batch, self.rows, self.in_place = made, batch, rows, in_place
        shapes = made.schedule.cache_shapes(batch, rows)
        # A fresh prefill must not care what was there.
        self.caches = [torch.full(shape, torch.nan) for shape in shapes for _ in "kv"]
        self.length = torch.zeros(batch, dtype=torch.int64)
        self.removed = torch.zeros(len(rows), batch, dtype=torch.int64)

    def clear(self) -> None:
        for cache in self.caches:
            cache.zero_()

    @torch.no_grad()
    def extend(self, ids: Tensor, last: Tensor) -> Tensor:
        program = exported(self.made.method, "extend", self.batch, ids.shape[1], self.rows, in_place=self.in_place)
        given = (ids.contiguous(), last, self.length, self.length, self.removed, *self.caches)
        (logits,) = self._around(program, True)(*given)
        self.length = self.length + last + 1
        return logits

    @torch.no_grad()
    def prefill(self, prompts: list[list[int]], pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits, index of each stage) of prompts that hold as many images each, one placeholder for each of them."""
        images, filled = prompts[0].count(IMAGE), bool(self.length.any())
        schedule = self.made.schedule_of((self.made.family.shape.image,) * images)
        features, *selection = exported(self.made.method, "vision", pixels.shape[0])(pixels)
        each = schedule.segment_tokens[0]
        long = [[t for token in prompt for t in [token] * (each if token == IMAGE else 1)] for prompt in prompts]
        width = TEXT + schedule.image_tokens
        ids = torch.tensor([row + [0] * (width - len(row)) for row in long])
        visual = torch.tensor([[i for i, token in enumerate(row) if token == IMAGE] for row in long])
        last = torch.tensor([len(row) - 1 for row in long])
        positions = (self.length.unsqueeze(1) + torch.arange(width))[None]
        given = (self.batch, TEXT, images, self.rows)
        program = exported(self.made.method, "prefill", *given, filled=filled, in_place=self.in_place)
        state = [values.reshape(self.batch, -1) for values in selection[1:]]
        places = (self.length, self.removed) if filled else ()
        features = features.reshape(self.batch, visual.shape[1], -1)
        results = self._around(program, filled)(ids, last, positions, features, visual, *state, *places, *self.caches)
        logits, *stages = results
        self.length = self.length + last + 1
        tokens = schedule.group_tokens()
        self.removed = self.removed + torch.tensor([[tokens[0] - count] for count in tokens])
        return logits, stages

    def _around(self, program: Callable[..., Any], filled: bool) -> Callable[..., Any]:
        return program if self.in_place else writing_rows(program, self.made.schedule.groups, filled=filled)

    def rows_of(self, layer: int, sample: int) -> list[Tensor]:
        """Keys and values [kv_heads, rows, hd] of a sample in a layer, as many rows as it has."""
        count = int(self.length[sample] - self.removed[self.made.schedule.groups[layer], sample])
        return [cache[sample, :, :count] for cache in self.caches[2 * layer : 2 * layer + 2]]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=NEAR, rtol=0)


# Extend


@BOTH
def test_tokens_together_are_tokens_one_by_one(in_place) -> None:
    """Behind a prompt with an image, of samples whose texts are not equally long."""
    made, pixels = programs(PRUNED), models.pixels(2)
    prompts = [[*models.text(3, 1), IMAGE, *models.text(5, 2)], [*models.text(2, 3), IMAGE, *models.text(2, 4)]]
    rows = tuple(TEXT + tokens + 9 for tokens in made.schedule.group_tokens())
    together, apart = (Held(made, 2, rows, in_place) for _ in "ab")
    for held in (together, apart):
        held.prefill(prompts, pixels)
    more = torch.tensor([models.text(6, 5), models.text(6, 6)])
    logits = together.extend(more, torch.full((2,), 5))
    for step in range(6):
        one = apart.extend(more[:, step : step + 1], torch.zeros(2, dtype=torch.int64))
    close(logits, one)
    for layer in range(LAYERS):
        for sample in range(2):
            for found, expected in zip(together.rows_of(layer, sample), apart.rows_of(layer, sample), strict=True):
                close(found, expected)


@BOTH
def test_text_alone_is_the_stock_model(in_place) -> None:
    """On empty caches, whatever is pruned where there are images; pads behind a sample's last token change nothing."""
    made, model = programs(PRUNED), shared(LAYERS)
    held = Held(made, 2, (20, 20, 20), in_place)
    held.clear()
    first, second = [models.text(7, 1), models.text(4, 2)], [models.text(2, 3), models.text(5, 4)]
    for turn in (first, second):
        width = max(map(len, turn))
        ids = torch.tensor([words + [0] * (width - len(words)) for words in turn])
        logits = held.extend(ids, torch.tensor([len(words) - 1 for words in turn]))
    for sample in range(2):
        with torch.no_grad():
            stock = model(input_ids=torch.tensor([first[sample] + second[sample]]), use_cache=True)
        close(logits[sample, 0], stock.logits[0, -1])
        for layer, cache in enumerate(stock.past_key_values.layers):
            keys, values = held.rows_of(layer, sample)
            close(keys, cache.keys[0])
            close(values, cache.values[0])


# Prefill behind another


@BOTH
def test_a_dense_prompt_behind_another_is_the_stock_model(in_place) -> None:
    """Attention over the rows of both, of one sequence that holds both."""
    made, model, pixels = programs(ViTCoPConfig.dense()), shared(LAYERS), models.pixels(3)
    first, second = [*models.text(3, 1), IMAGE, *models.text(5, 2)], [IMAGE, *models.text(2, 3), IMAGE, *models.text(4, 4)]
    held = Held(made, 1, (2 * TEXT + 3 * PATCHES + 5,), in_place)
    held.prefill([first], pixels[:1])
    logits, _ = held.prefill([second], pixels[1:])
    ids = [t for token in first + second for t in [token] * (PATCHES if token == IMAGE else 1)]
    with torch.no_grad():
        stock = model(input_ids=torch.tensor([ids]), pixel_values=pixels, use_cache=True)
    close(logits[0, 0], stock.logits[0, -1])
    for layer, cache in enumerate(stock.past_key_values.layers):
        keys, values = held.rows_of(layer, 0)
        close(keys, cache.keys[0])
        close(values, cache.values[0])


@pytest.mark.parametrize(
    ("in_place", "scope", "positions"),
    [
        (True, "per_image", "published"),
        (False, "per_image", "published"),
        slow(True, "pooled", "published"),
        (True, "per_image", "original"),
    ],
)
def test_a_pruned_prompt_behind_others_is_stock_layers_by_hand(in_place, scope, positions) -> None:
    """One image, text, then two images, for two samples; logits, keys and values of every turn."""
    config = ViTCoPConfig(
        budgets=(N, MERGED, KEPT, 5), shallow_layer=1, deep_layer=3, scale_layers=False, scope=scope, positions=positions
    )
    made, model = programs(config), shared(LAYERS)
    told = [Conversation(model, dataclasses.replace(SETTINGS, positions=positions), scope == "pooled") for _ in range(2)]
    rows = tuple(3 * TEXT + 3 * tokens for tokens in made.schedule.group_tokens())
    held = Held(made, 2, rows, in_place)
    turns = [
        [[*models.text(3, 1), IMAGE, *models.text(5, 2)], [IMAGE, *models.text(4, 3)]],
        [models.text(4, 4), models.text(6, 5)],
        [[IMAGE, *models.text(2, 6), IMAGE, *models.text(4, 7)], [*models.text(3, 8), IMAGE, IMAGE, *models.text(2, 9)]],
    ]
    for number, prompts in enumerate(turns):
        images = prompts[0].count(IMAGE)
        pixels = models.pixels(2 * images, number) if images else None
        if pixels is None:
            ids = torch.tensor([words + [0] * (6 - len(words)) for words in prompts])
            logits, stages = held.extend(ids, torch.tensor([len(words) - 1 for words in prompts])), []
        else:
            logits, stages = held.prefill(prompts, pixels)
        for sample, prompt in enumerate(prompts):
            ids_ = [t for token in prompt for t in [token] * (PATCHES if token == IMAGE else 1)]
            own = None if pixels is None else pixels[images * sample : images * (sample + 1)]
            close(logits[sample], told[sample].turn(ids_, own, [0]))
            for layer, cache in enumerate(told[sample].cache.layers):
                keys, values = held.rows_of(layer, sample)
                close(keys, cache.keys[0])
                close(values, cache.values[0])
            if stages:
                assert patches(told[sample].kept, [index[sample].tolist() for index in stages]) == told[sample].stages


def patches(kept: list[list[int]], stages: list[list[int]]) -> list[list[list[int]]]:
    """By stage and image, the patches that stay."""
    current, found = [(image, patch) for image, of in enumerate(kept) for patch in of], []
    for index in stages:
        current = [current[i] for i in index]
        found.append([[patch for image, patch in current if image == wanted] for wanted in range(len(kept))])
    return found
