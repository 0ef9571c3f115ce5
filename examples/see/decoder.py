"""Teaching a decoder to answer, from the features of an encoder that stays as it is.

A sequence holds a picture once and fourteen questions about it, none of which sees another: each has the positions it would
have alone. So the picture's tokens, most of the work, are paid for once."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from . import models
from .learner import Learner, digest
from .questions import KINDS, question
from .scenes import GRID, Scene, scene
from .start import begin
from .tower import Heads, features_of, pixels_of, tower_of

BATCH = 16
# Questions of each kind about a picture.
ASKED = dict.fromkeys(KINDS, 2)
# And at last, when the others have been learned.
ASKED_LAST = {"what": 1, "where": 3, "colour": 1, "count": 5, "any": 1, "compare": 1, "read": 2}
# Counting is learned last of all, and goes on for long.
ASKED_COUNT = {"what": 1, "where": 2, "colour": 1, "count": 6, "any": 1, "compare": 1, "read": 2}
ASKED_FRESH = {"what": 1, "where": 2, "colour": 1, "count": 5, "any": 1, "compare": 1, "read": 3}
LONGEST = 17  # tokens of a question with what follows it


@dataclass(frozen=True)
class Plan:
    """Where everything stands. before: ids in front of the picture, after: behind a question; positions [3 or 1, T]; mask:
    bool [T, T], what each token sees."""

    before: list[int]
    between: list[int]
    after: list[int]
    end: int
    positions: Tensor
    mask: Tensor
    image: int  # tokens of the picture


def plan_of(kind: str, model: Any, tokenizer: Any, pool: int) -> Plan:
    """pool 2: the picture's patches averaged by twos, at the position of the first of each four."""
    image_id = model.config.image_token_id
    ids = tokenizer(models.prompt(kind, "yes"))["input_ids"]
    at, asked = ids.index(image_id), ids.index(tokenizer.convert_tokens_to_ids("yes"))
    before, between, after = ids[:at], ids[at + 1 : asked], ids[asked + 1 :]
    if kind == "llava":
        side = GRID // pool
        rows = torch.arange(side) * pool
        image = (rows[:, None] * GRID + rows).flatten()
        prefix = torch.cat([torch.arange(at), at + image])[None]
        start = at + GRID * GRID
    else:
        side = GRID // 2
        filled = torch.tensor([[*before, *[image_id] * side * side, *between]])
        types = (filled == image_id).int()
        prefix, _ = model.model.get_rope_index(filled, types, image_grid_thw=torch.tensor([[1, GRID, GRID]]))
        prefix = prefix[:, 0]
        start = int(prefix.max()) + 1
        prefix, between = prefix[:, : at + side * side], between
        start -= len(between)
    count = sum(ASKED.values())
    texts = (start + torch.arange(LONGEST)).repeat(count).expand(prefix.shape[0], -1)
    positions = torch.cat([prefix, texts], 1)
    block = torch.cat([torch.full((prefix.shape[1],), -1), torch.arange(count).repeat_interleave(LONGEST)])
    mask = (block[None] == block[:, None]) | (block[None] == -1)
    mask &= torch.ones_like(mask).tril()
    end = model.config.get_text_config().eos_token_id
    return Plan(before, between, after, end, positions, mask, side * side)


@lru_cache(maxsize=65536)
def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.convert_tokens_to_ids(text.split()))


def questions_of(scene: Scene, rng: random.Random, wanted: Mapping[str, int] = ASKED) -> list[tuple[str, str, str]]:
    """(kind, question, answer), as many as `wanted` says; another kind where the picture allows none of one."""
    found = []
    for kind, number in wanted.items():
        for _ in range(number):
            asked, real = question(kind, scene, rng), kind
            while asked is None:
                real = rng.choice(KINDS)
                asked = question(real, scene, rng)
            found.append((real, *asked))
    return found


class Pictures:
    """Features of pictures, float16 [N, 576, width], and what is on them; made once and kept in a file. tower: the digest of
    what made them."""

    def __init__(self, kind: str, model: Any, tower: str, number: int, seed: int, file: Path, console: Console):
        known = torch.load(file, weights_only=False) if file.exists() else None
        of = f"{number} pictures of seed {seed}, tower {tower}"
        if known is not None and known.get("of") != of:
            raise SystemExit(f"{file} is of {known.get('of')}, not of {of}: name another folder, or remove it")
        if known is None:
            parts, scenes = [], []
            with torch.no_grad():
                for at in track(range(0, number, 32), "features", console=console):
                    batch = [scene(random.Random(f"{seed} picture {one}")) for one in range(at, min(at + 32, number))]
                    parts.append(features_of(kind, model, pixels_of(kind, batch))[0].half())
                    scenes += [Scene(None, one.things, one.word, {}) for one in batch]  # type: ignore[arg-type]
            known = {"features": torch.cat(parts), "scenes": scenes, "of": of}
            aside = file.with_suffix(".partial")
            torch.save(known, aside)
            aside.replace(file)
        self.features, self.scenes = known["features"], known["scenes"]


def _image_rows(kind: str, model: Any, features: Tensor, pool: int) -> Tensor:
    """Projected features [B, tokens, width]; features: float32 [B, 576, width], row by row."""
    batch, _, width = features.shape
    half = GRID // 2
    squares = features.reshape(batch, half, 2, half, 2, width).transpose(2, 3)
    if kind != "llava":
        return model.model.visual.merger(squares.reshape(-1, width)).reshape(batch, half * half, -1)
    return model.model.multi_modal_projector(squares.mean((3, 4)).flatten(1, 2) if pool == 2 else features)


def loss_of(
    kind: str, model: Any, tokenizer: Any, plan: Plan, pool: int, features: Tensor, asked: list[list[tuple[str, str, str]]]
) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of answers and their ends; and the share of whole answers that are right, by kind."""
    batch, count = len(asked), sum(ASKED.values())
    ids = torch.zeros(batch, count, LONGEST, dtype=torch.long)
    wanted = torch.full((batch, count, LONGEST), -100)
    for row, questions in enumerate(asked):
        for at, (_, text, answer) in enumerate(questions):
            given = [*plan.between, *_ids(tokenizer, text), *plan.after]
            said = [*_ids(tokenizer, answer), plan.end]
            whole = torch.tensor(given + said)
            ids[row, at, : len(whole)] = whole
            wanted[row, at, len(given) - 1 : len(whole) - 1] = whole[len(given) :]
    embed = model.get_input_embeddings()
    front = embed(torch.tensor(plan.before)).expand(batch, -1, -1)
    rows = torch.cat([front, _image_rows(kind, model, features, pool), embed(ids.flatten(1))], 1)
    positions = plan.positions[:, None].expand(-1, batch, -1)
    hidden = model.model.language_model(
        inputs_embeds=rows,
        attention_mask=plan.mask[None, None].expand(batch, 1, -1, -1),
        position_ids=positions if kind != "llava" else positions[0],
        use_cache=False,
    ).last_hidden_state[:, len(plan.before) + plan.image :]
    wanted = wanted.flatten(1)
    taken = wanted >= 0
    logits = model.lm_head(hidden[taken])
    loss = F.cross_entropy(logits, wanted[taken])
    right = torch.ones_like(taken)
    right[taken] = logits.argmax(-1) == wanted[taken]
    whole = right.reshape(batch, count, LONGEST).all(-1)
    by_kind: dict[str, list[bool]] = {}
    for row, questions in zip(whole.tolist(), asked):
        for one, (name, _, _) in zip(row, questions):
            by_kind.setdefault(name, []).append(one)
    return loss, {"loss": loss.item()} | {name: sum(own) / len(own) for name, own in by_kind.items()}


def train(
    kind: str, model: Any, heads: Heads, steps: int, number: int, rate: float, seed: int, folder: Path, console: Console
) -> None:
    """Five parts, the rate rises anew in each. LLaVA's decoder learns from 144 averages a picture, twice, and then, with half
    the pictures a step, from all 576 patches; Qwen's has 144 tokens a picture. The last part has pictures of its own: by then
    the others are known by heart."""
    tokenizer = models.processor_of(kind).tokenizer
    tower = digest(tower_of(kind, model))
    known = Pictures(kind, model, tower, number, seed, folder / "features.pt", console)
    projector = model.model.multi_modal_projector if kind == "llava" else model.model.visual.merger
    parts = nn.ModuleDict({"projector": projector, "decoder": model.model.language_model, "lm_head": model.lm_head})
    with torch.no_grad():
        begin(kind, model, tokenizer, heads, known.features[:200].float(), seed)
    half, more = steps // 2, 4 * steps // 3
    phases = [("decoder", steps, 1, BATCH, ASKED), ("decoder-again", half, 1, BATCH, ASKED)]
    phases += [("decoder-last", half, 1, BATCH, ASKED_LAST), ("decoder-count", more, 1, BATCH, ASKED_COUNT)]
    if kind == "llava":
        phases = [("decoder-pooled", steps, 2, BATCH, ASKED), ("decoder-pooled-again", steps, 2, BATCH, ASKED)]
        phases += [("decoder-last", half, 1, BATCH // 2, ASKED_LAST), ("decoder-count", more, 1, BATCH // 2, ASKED_COUNT)]
    phases += [("decoder-fresh", steps, 1, phases[-1][3], ASKED_FRESH)]
    for name, length, pool, size, wanted in phases:
        if name == "decoder-fresh":
            known = Pictures(kind, model, tower, number, seed + 1, folder / "features-fresh.pt", console)
        plan = plan_of(kind, model, tokenizer, pool)
        sample = partial(_batch, kind, model, tokenizer, plan, pool, known, size, wanted)
        learner = Learner(name, parts, length, rate if size == BATCH else rate / 2, seed, of=f"tower {tower}")
        learner.run(sample, folder / f"{name}.pt", console)


def _batch(
    kind: str,
    model: Any,
    tokenizer: Any,
    plan: Plan,
    pool: int,
    known: Pictures,
    size: int,
    wanted: Mapping[str, int],
    rng: random.Random,
) -> tuple[Tensor, dict[str, float]]:
    chosen = [rng.randrange(len(known.scenes)) for _ in range(size)]
    asked = [questions_of(known.scenes[at], rng, wanted) for at in chosen]
    return loss_of(kind, model, tokenizer, plan, pool, known.features[chosen].float(), asked)
