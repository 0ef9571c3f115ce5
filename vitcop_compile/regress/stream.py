"""A mixed stream of requests: what compiles beyond its batch sizes and buckets is a defect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..bench import Request, inputs
from ..optimized import OptimizedModel
from ..provider import Ask
from .counters import Counts, counts, traced_only

_NEW_TOKENS = 3


@dataclass(frozen=True)
class Item:
    """One request: `generate` of three tokens, or `forward` alone; greedy or sampled; with an image or without."""

    batch: int
    text_tokens: int
    image: bool = True
    generate: bool = True
    sample: bool = False


def items(optimized: OptimizedModel, text_tokens: int) -> list[Item]:
    """Batches of 1 and 2, prompts of `text_tokens`, one shorter and one in the next bucket, with and without an image."""
    plan = optimized.on_demand.plan
    rows = plan(Ask(1, text_tokens, 0, _NEW_TOKENS)).text
    within = next((text for text in (text_tokens - 1, text_tokens + 1) if 0 < text <= rows), text_tokens)
    return [
        Item(1, text_tokens, generate=False),
        Item(1, within),
        Item(1, text_tokens, sample=True),
        Item(1, rows + 1),
        Item(2, text_tokens),
        Item(2, within, sample=True),
        Item(1, within, image=False),
    ]


def stream(optimized: OptimizedModel, text_tokens: int, since: Counts) -> dict[str, int]:
    """Runs the requests twice and counts programs, graphs, graph breaks and recompilations since `since`.

    since: `counts()` from before the first program of `optimized` was made. graphs: what torch.compile handed to a compiler, 0
    for backends that do not go through it; recompiles: programs that no batch size and bucket asks for, graphs beyond one a
    program, and everything that the second pass added.
    """
    expected = set(optimized.compiled)
    with traced_only(), torch.random.fork_rng():
        torch.manual_seed(0)
        for item in items(optimized, text_tokens):
            expected |= _programs(optimized, item)
            _serve(optimized, item)
        programs, first = optimized.compiled, counts().since(since)
        for item in items(optimized, text_tokens):
            _serve(optimized, item)
    second = counts().since(since)
    added = len(optimized.compiled) - len(programs) + second.graphs - first.graphs
    return {
        "programs": len(programs),
        "graphs": first.graphs,
        "graph_breaks": second.breaks,
        "recompiles": len(set(programs) - expected) + max(0, first.graphs - len(programs)) + added,
    }


def _programs(optimized: OptimizedModel, item: Item) -> set[tuple]:
    """Keys of the programs that a request needs, by the buckets alone."""
    provider = optimized.on_demand
    plan = provider.plan(Ask(item.batch, item.text_tokens, int(item.image), _NEW_TOKENS if item.generate else None))
    keys: set[tuple] = {("extend", item.batch, plan.text, plan.rows)}
    if item.image:
        keys = {("vision", item.batch), ("prefill", item.batch, plan.text, provider.schedule.key, plan.rows, False)}
    if item.generate:
        keys.add(("extend", item.batch, 1, plan.rows))
    return keys


def _serve(optimized: OptimizedModel, item: Item) -> None:
    prompt: dict[str, Any] = inputs(optimized.model, Request(item.batch, item.text_tokens))
    if not item.image:
        ids = prompt.pop("input_ids")
        del prompt["pixel_values"]
        prompt["input_ids"] = ids[ids != optimized.host.token_id].reshape(item.batch, -1)
    if not item.generate:
        optimized.forward(**prompt)
        return
    # Of a model with an end token too, every request decodes.
    settings: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": item.sample}
    optimized.generate(**prompt, attention_mask=torch.ones_like(prompt["input_ids"]), **settings)
