"""What torch's compiler counts of itself, as differences; and a way to count without generating code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch._functorch.config
import torch._inductor.compile_fx
import torch._inductor.metrics
from torch._dynamo.utils import counters


class Counts(NamedTuple):
    """Graphs handed to a compiler, graph breaks, kernels that inductor generated, calls of kernels that it did not."""

    graphs: int
    breaks: int
    generated: int
    extern: int

    def since(self, before: Counts) -> Counts:
        """What was counted after `before`."""
        return Counts(*(now - then for now, then in zip(self, before)))


def counts() -> Counts:
    """The counts of this process so far."""
    return Counts(
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
        torch._inductor.metrics.generated_kernel_count,
        counters["inductor"]["extern_calls"],
    )


@contextmanager
def generating() -> Iterator[None]:
    """Within the context inductor generates every kernel anew; what a cache hands out would depend on earlier runs."""
    local = torch._inductor.config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
    with local, torch._functorch.config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False):
        yield


@contextmanager
def traced_only() -> Iterator[None]:
    """Within the context `torch.compile` traces and guards as ever, and inductor returns the graph as it is.

    Whether a request compiles anew is decided before inductor's turn, and generating code takes most of the time.
    """
    module: Any = torch._inductor.compile_fx
    original = module.compile_fx
    module.compile_fx = lambda graph, *_, **__: graph
    try:
        yield
    finally:
        module.compile_fx = original
