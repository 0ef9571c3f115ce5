"""What torch's compiler counts of itself, and a mixed stream of requests: what compiles beyond its buckets is a defect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch._functorch.config
import torch._inductor.compile_fx
import torch._inductor.metrics
from torch._dynamo.utils import counters
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import Scheduler

from ..bench import Request
from ..bench.arms import inputs
from ..optimized import OptimizedModel
from ..provider import Ask

_NEW_TOKENS = 3
_extern = 0


class Counts(NamedTuple):
    """Graphs handed to a compiler, graph breaks, kernels that inductor generated, and, while `generating`, calls of kernels
    that it did not, torch's or ours: which of them multiplies differs between machines, how often does not."""

    graphs: int
    breaks: int
    generated: int
    extern: int

    def since(self, before: Counts) -> Counts:
        """What was counted after `before`."""
        return Counts(*(now - then for now, then in zip(self, before)))


def counts() -> Counts:
    """The counts of this process so far."""
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return Counts(graphs, breaks, torch._inductor.metrics.generated_kernel_count, _extern)


@contextmanager
def generating() -> Iterator[None]:
    """Within the context inductor generates every kernel anew; what a cache hands out would depend on earlier runs."""
    generate = Scheduler.codegen_extern_call

    def counted(self: Scheduler, scheduled: Any) -> None:
        global _extern
        # To pick a result of such a call is none; torch's own counter takes it for one.
        _extern += not isinstance(scheduled.node, MultiOutput)
        generate(self, scheduled)

    local = torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
    shared = torch._functorch.config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False)
    with local, shared, mock.patch.object(Scheduler, "codegen_extern_call", counted):
        yield


@contextmanager
def traced_only() -> Iterator[None]:
    """Within the context `torch.compile` traces and guards as ever, and inductor returns the graph as it is.

    Whether a request compiles anew is decided before inductor's turn, and generating code takes most of the time.
    """
    module: Any = torch._inductor.compile_fx
    original, module.compile_fx = module.compile_fx, lambda graph, *_, **__: graph
    try:
        yield
    finally:
        module.compile_fx = original


class Item(NamedTuple):
    """One request: `generate` of three tokens, or `forward` alone; greedy or sampled; with an image or without."""

    batch: int
    text_tokens: int
    image: bool = True
    generate: bool = True
    sample: bool = False


def items(optimized: OptimizedModel, text_tokens: int) -> list[Item]:
    """Batches of 1 and 2, prompts of `text_tokens`, one shorter and one in the next bucket, with and without an image."""
    rows = optimized.on_demand.plan(Ask(1, text_tokens, 0, _NEW_TOKENS)).text
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
    asked = items(optimized, text_tokens)
    expected = set(optimized.compiled).union(*(_programs(optimized, item) for item in asked))
    with traced_only(), torch.random.fork_rng():
        torch.manual_seed(0)
        for item in asked:
            _serve(optimized, item)
        programs, first = optimized.compiled, counts().since(since)
        for item in asked:
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
        ids = prompt["input_ids"]
        prompt = {"input_ids": ids[ids != optimized.host.token_id].reshape(item.batch, -1)}
    if not item.generate:
        optimized.forward(**prompt)
        return
    # Of a model with an end token too, every request decodes.
    settings: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": item.sample}
    optimized.generate(**prompt, attention_mask=torch.ones_like(prompt["input_ids"]), **settings)
