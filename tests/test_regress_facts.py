"""The facts of the regression gate, against numbers counted by hand; and what changes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import GRID, PATCHES, SIDE, VOCAB
from regress_subject import (
    BATCH,
    HEAD,
    HEADS,
    HIDDEN,
    KEPT,
    KV_HEADS,
    LAYERS,
    MERGED,
    REQUEST,
    ROOM,
    ROWS,
    TEXT,
    VISION,
    VISION_LAYERS,
    VISION_WIDE,
    VISUAL,
    WIDE,
    build,
    exported,
    measured,
)
from torch import nn

from vitcop_compile import ConfigError, UnsupportedError, backends, kernels, programs, turn
from vitcop_compile.bench import bind
from vitcop_compile.kernels import Rule, products
from vitcop_compile.regress import compare, facts, flops, stream
from vitcop_compile.regress.reads import reads


def test_flops_are_those_counted_by_hand() -> None:
    found = measured()[1]["flops"]
    layer = (HIDDEN, HEADS, KV_HEADS, HEAD, WIDE)
    head, merging = 2 * HIDDEN * VOCAB, 2 * MERGED * KEPT * HIDDEN
    assert found["prefill"] == BATCH * (sum(naive.decoder_layer_flops(rows, *layer) for rows in ROWS) + head + merging)

    encoder = VISION_LAYERS * naive.encoder_layer_flops(PATCHES + 1, VISION, VISION_WIDE)
    embedding = 2 * PATCHES * 3 * (SIDE // GRID) ** 2 * VISION
    projector = 2 * KEPT * (VISION * HIDDEN + HIDDEN * HIDDEN)
    distances = 2 * KEPT * KEPT * VISION  # of the clustering; the saliency before it is elementwise
    assert found["vision"] == BATCH * (encoder + embedding + projector + distances)

    weights = naive.decoder_layer_flops(1, *layer) - 4 * HEADS * HEAD  # a layer on one token, without attention
    attention = sum(4 * (rows + ROOM) * HEADS * HEAD for rows in ROWS)
    assert found["decode"] == BATCH * (LAYERS * weights + attention + head)


def test_the_schedule_counts_all_but_the_selection() -> None:
    found = measured()[1]
    assert found["flops"]["prefill"] - found["schedule_flops"]["prefill"] == BATCH * 2 * MERGED * KEPT * HIDDEN
    assert found["flops"]["vision"] - found["schedule_flops"]["vision"] == BATCH * 2 * KEPT * KEPT * VISION


def test_tokens_rows_and_bytes_are_those_of_the_method() -> None:
    found = measured()[1]
    assert (found["visual_tokens"], found["kv_rows"]) == (VISUAL, ROWS)
    assert found["kv_bytes"] == BATCH * sum(ROWS) * 2 * KV_HEADS * HEAD * 4
    assert len({*VISUAL}) == 3


def test_nodes_are_those_of_the_architecture() -> None:
    found = measured()[1]["nodes"]
    linear, attention = "aten.linear.default", "aten.scaled_dot_product_attention.default"
    assert [found[name][linear] for name in ("prefill", "decode")] == [7 * LAYERS + 1] * 2
    assert found["vision"][linear] == 6 * VISION_LAYERS + 2
    assert [found[name][attention] for name in ("vision", "prefill", "decode")] == [VISION_LAYERS, LAYERS, LAYERS]
    assert found["decode"]["aten.index_put_.default"] == 2 * LAYERS and "_operator.getitem" in found["prefill"]


def test_eager_programs_read_nothing_and_the_entry_once() -> None:
    assert measured()[1]["reads"] == {
        "program": 0,
        "entry": 5,
    }  # ids and mask, copied and looked at, and whether pixels are finite
    assert "kernels" not in measured()[1]


def test_the_stream_makes_a_program_per_batch_and_bucket() -> None:
    """vision of 1 and 2 images; prefill at 1 and 2 prompts and at a second length; a text prompt, and a step for three."""
    expected = {"programs": 2 + 3 + 1 + 3, "graphs": 0, "graph_breaks": 0, "recompiles": 0}
    optimized = build()
    assert stream.stream(optimized, TEXT, stream.counts()) == expected == measured()[1]["stream"]
    kinds = [key[0] for key in optimized.compiled]
    assert [kinds.count(kind) for kind in ("vision", "prefill", "extend")] == [2, 3, 4]


@pytest.mark.slow
def test_the_inductor_backend_traces_one_graph_a_program() -> None:
    with stream.traced_only():  # no code is generated, so that this takes a second and not a minute
        found, _ = facts.measure(build(backend="inductor"), REQUEST)
    assert found["stream"] == {"programs": 9, "graphs": 9, "graph_breaks": 0, "recompiles": 0}
    assert not compare.broken_promises("", found, "inductor")
    assert found["kernels"] == {name: {"generated": 0, "extern": 0} for name in ("vision", "prefill", "decode")}


class Small(nn.Module):
    """A product that inductor leaves to a library, and a chain that it fuses into one kernel."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ((a @ b).relu() * 2 + 1).sin()


def test_kernels_are_counted_afresh() -> None:
    """Compiles one kernel twice; some seconds of C++."""
    for _ in range(2):
        torch._dynamo.reset()
        before = stream.counts()
        with stream.generating(), torch.no_grad():
            torch.compile(Small(), fullgraph=True)(torch.ones(8, 8), torch.ones(8, 8))
        assert stream.counts().since(before) == (1, 0, 1, 1)


def test_calls_are_counted_alike_whichever_kernel_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(16, 16).requires_grad_(False) for _ in range(2))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            for linear in self.linears:
                x = linear(x).exp()
            return (x.topk(3, dim=0).values + x.topk(2, dim=0).indices[:1],)

    kernels.load()
    with torch.no_grad():
        program = torch.export.export(Chosen(), (torch.ones(5, 16),), strict=False)
        for rule in (Rule(1, "aten"), Rule(1, "onednn"), Rule(8, "aten")):
            monkeypatch.setattr(products, "_rule", lambda dtype, threads, rule=rule: rule)
            before = stream.counts()
            with stream.generating():
                backends.backend_of("inductor")(program)(torch.ones(5, 16))
            assert stream.counts().since(before).extern == 4  # two products and two choices


def test_a_model_with_compiled_programs_is_refused() -> None:
    with pytest.raises(ConfigError, match="programs of the model are compiled already"):
        facts.measure(measured()[0], REQUEST)


def attention(a, b, **settings):
    return F.scaled_dot_product_attention(a, b, b, **settings)


def few_rows(a, b):
    kernels.load()
    return torch.ops.vitcop_cpu.linear_few(a, b, None)


def one_query(query, cache):
    kernels.load()
    return torch.ops.vitcop_cpu.decode_attention(query, cache, cache, 1.0, query.new_zeros((2, 1), dtype=torch.int64))


# (function, shapes, FLOPs): every multiply-add counted in a loop over what the operation says.
FORMULAS: dict[str, tuple[Callable, list[tuple[int, ...]], int]] = {
    "linear": (F.linear, [(2, 3, 5), (7, 5)], 2 * (2 * 3) * 5 * 7),
    "vitcop linear": (lambda a, b: torch.ops.vitcop.linear(a, b, None), [(2, 3, 5), (7, 5)], 2 * (2 * 3) * 5 * 7),
    "few rows": (few_rows, [(2, 3, 5), (7, 5)], 2 * (2 * 3) * 5 * 7),
    "one query": (one_query, [(2, 6, 1, 8), (2, 3, 5, 8)], 2 * 2 * (2 * 6) * 5 * 8),
    "matmul": (torch.matmul, [(2, 1, 3, 5), (4, 5, 7)], 2 * (2 * 4) * 3 * 5 * 7),
    "vectors": (torch.matmul, [(5,), (5,)], 2 * 5),
    "mm": (torch.mm, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
    "bmm": (torch.bmm, [(2, 3, 5), (2, 5, 7)], 2 * 2 * 3 * 5 * 7),
    "addmm": (torch.addmm, [(7,), (3, 5), (5, 7)], 2 * 3 * 5 * 7),
    "conv2d": (lambda a, b: F.conv2d(a, b, stride=2, groups=2), [(2, 4, 7, 7), (6, 2, 3, 3)], 2 * (2 * 6 * 3 * 3) * 2 * 3 * 3),
    "attention": (attention, [(2, 3, 4, 8), (2, 3, 6, 8)], 2 * 2 * (2 * 3) * 4 * 6 * 8),
    "causal": (lambda a, b: attention(a, b, is_causal=True), [(2, 3, 4, 8), (2, 3, 4, 8)], 2 * 2 * (2 * 3) * 10 * 8),
    "causal, short": (lambda a, b: attention(a, b, is_causal=True), [(1, 1, 4, 8), (1, 1, 2, 8)], 2 * 2 * 7 * 8),
    "grouped": (lambda a, b: attention(a, b, enable_gqa=True), [(1, 4, 3, 8), (1, 2, 5, 8)], 2 * 2 * 4 * 3 * 5 * 8),
    "anchor": (lambda a, b: torch.ops.vitcop.attention(a, b, b, 1.0, True), [(1, 2, 3, 8)] * 2, 2 * 2 * 2 * 6 * 8),
    "flash-attn": (lambda a, b: torch.ops.vitcop.flash_prefill(a, b, b, 1.0, True), [(1, 2, 3, 8)] * 2, 2 * 2 * 2 * 6 * 8),
    "flash-attn, cached": (
        lambda a, b: torch.ops.vitcop.flash_cached(a, b, b, 1.0, torch.zeros(2, 4, dtype=torch.int64)),
        [(2, 3, 4, 8), (2, 3, 6, 8)],
        2 * 2 * (2 * 3) * 4 * 6 * 8,
    ),
    "elementwise": (lambda a, b: (a + b).softmax(-1), [(3, 5), (3, 5)], 0),
}


def export_function(function: Callable, shapes: list[tuple[int, ...]]) -> torch.export.ExportedProgram:
    class Wrapped(nn.Module):
        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            return function(*given)

    return torch.export.export(Wrapped(), tuple(torch.ones(shape) for shape in shapes), strict=False)


@pytest.mark.parametrize("name", FORMULAS)
def test_flop_formulas(name: str) -> None:
    function, shapes, expected = FORMULAS[name]
    assert flops.count(export_function(function, shapes)) == expected


@torch.library.custom_op("vitcop_tests::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


product.register_fake(lambda a, b: a @ b)


@pytest.mark.parametrize(
    ("function", "name"), [(product, "vitcop_tests::product"), (lambda a, b: torch.mv(a, b[0]), "aten::mv")]
)
def test_an_operator_without_a_formula_is_refused(function: Callable, name: str) -> None:
    program = export_function(function, [(3, 3), (3, 3)])
    with pytest.raises(UnsupportedError, match=f"{name} has no FLOP formula"):
        flops.count(program)


READS: dict[str, tuple[Callable, int]] = {
    "item": (lambda x: x.sum().item(), 1),
    "float": (lambda x: float(x[0]), 1),
    "branch": (lambda x: 1 if x[0] > 0 else 2, 1),
    "tolist": (lambda x: x.tolist(), 1),
    "numpy": (lambda x: np.asarray(x), 1),
    "cpu": (lambda x: x.cpu(), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "where": (lambda x: torch.where(x > 1), 1),
    "equal": (lambda x: torch.equal(x, x), 1),
    "masked_select": (lambda x: x.masked_select(x > 1), 1),
    "mask": (lambda x: x[x > 1], 1),
    "two": (lambda x: (x.max().item(), x.min().item()), 2),
    "index": (lambda x: x[torch.tensor([1, 2])], 0),
    "arithmetic": (lambda x: torch.where(x > 1, x, 0).sum().to(torch.float64), 0),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_counted(name: str) -> None:
    function, expected = READS[name]
    with reads() as found:
        function(torch.arange(4.0))
    assert found.count == expected


# What breaks a fact


def failures_of(before: Any, now: Any) -> set[str]:
    return {failure.what for failure in compare.compare_facts("", before, now)[0]}


def test_a_pass_that_adds_a_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before, original = measured()[1], programs.prefill_passes

    def slower(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
        (output,) = [node for node in module.graph.nodes if node.op == "output"]
        hidden = output.args[0][0]
        with module.graph.inserting_before(output):
            turned = module.graph.call_function(torch.transpose, (hidden, 1, 2))
            square = module.graph.call_function(torch.matmul, (hidden, turned))
            more = module.graph.call_function(torch.matmul, (square, hidden))
        output.args = ((more, *output.args[0][1:]),)
        module.recompile()
        return module

    monkeypatch.setattr(programs, "prefill_passes", lambda *given, **named: (*original(*given, **named), ("slower", slower)))
    optimized = build()
    found = facts.graph_facts(optimized, REQUEST, bind.exported(optimized, REQUEST))
    expected = {"flops.prefill", "nodes.prefill.aten.matmul.default", "nodes.prefill.aten.transpose.int"}
    assert failures_of({name: before[name] for name in found}, found) == expected
    assert found["flops"]["prefill"] - before["flops"]["prefill"] == BATCH * 2 * 2 * ROWS[-1] ** 2 * HIDDEN


def test_a_read_inside_a_program_or_at_the_entry_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    optimized, before = measured()
    module = exported()["vision"].module(check_guards=False)

    class Reading:
        def module(self, **_: Any) -> Callable:
            return lambda pixels: (pixels.sum().item(), module(pixels))[1]

    found = facts.count_reads(optimized, REQUEST, exported() | {"vision": Reading()})
    assert found == before["reads"] | {"program": 1}
    broken = compare.broken_promises("subject", before | {"reads": found}, "eager")
    assert [(failure.what, failure.found) for failure in broken] == [("reads.program", "1")]

    see = turn.see
    monkeypatch.setattr(
        turn, "see", lambda provider, images, *rest: (images.pixels.max().item(), see(provider, images, *rest))[1]
    )
    assert facts.count_reads(optimized, REQUEST, exported()) == before["reads"] | {"entry": before["reads"]["entry"] + 1}


def test_programs_beyond_the_buckets_count_as_recompilations() -> None:
    optimized = build()
    provider, extend = optimized.on_demand, optimized.on_demand.extend
    made: list[int] = []

    def stray(*key: int) -> Callable:
        made.append(1)
        provider.compiled[("stray", len(made))] = extend(*key)
        return extend(*key)

    provider.extend = stray
    found = stream.stream(optimized, TEXT, stream.counts())
    assert found["recompiles"] == len(made) > 0 and found["programs"] == 9 + len(made) // 2
    wrong = {failure.what for failure in compare.broken_promises("", {"stream": found, "reads": {"program": 0}}, "eager")}
    assert wrong == {"stream.recompiles"}


def test_graph_breaks_and_graphs_beyond_the_programs_are_seen() -> None:
    optimized = build()
    provider, vision = optimized.on_demand, optimized.on_demand.vision

    @torch.compile(backend="eager", dynamic=False)
    def broken(pixels: torch.Tensor) -> torch.Tensor:
        half = pixels * 0.5
        torch._dynamo.graph_break()
        return half * 2

    provider.vision = lambda batch: lambda pixels: vision(batch)(broken(pixels))
    found = stream.stream(optimized, TEXT, stream.counts())
    # A batch of 1 and one of 2, two halves each.
    assert found["graphs"] == 4 and found["graph_breaks"] >= 1
    wrong = {failure.what for failure in compare.broken_promises("", {"stream": found, "reads": {"program": 0}}, "inductor")}
    assert wrong == {"stream.graph_breaks", "stream.graphs"}
