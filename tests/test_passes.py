"""What the passes do to graphs, and which graphs they refuse."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
from models import captured, shared
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.fx.node import map_arg
from vitcop_compile.passes.clean import clean
from vitcop_compile.passes.decode_cache import attend, decode_cache, write_row
from vitcop_compile.passes.lower_attention import lower_attention
from vitcop_compile.passes.prune_decoder import prune_decoder, prune_tokens
from vitcop_compile.passes.prune_encoder import cluster_patches, prune_encoder, prune_patches
from vitcop_compile.passes.return_kv import return_kv
from vitcop_compile.passes.token_axis import layer_exit
from vitcop_compile.passes.truncate_encoder import truncate_encoder

from vitcop_compile import RewriteError, ViTCoPConfig, passes
from vitcop_compile.attention import ANCHOR, sdpa, sdpa_decode
from vitcop_compile.families import family_of
from vitcop_compile.ops.indexing import take_along
from vitcop_compile.schedule import Stage

LAYERS = 6


def schedule(shallow: int = 2, deep: int = 4, positions: str = "published", vision: int = 1):
    config = ViTCoPConfig(
        budgets=(40, 24, 8, 5),
        shallow_layer=shallow,
        deep_layer=deep,
        positions=positions,
        vision_layer=vision,
        scale_layers=False,
    )
    return config.schedule(family_of(shared(LAYERS)).shape)


@pytest.fixture(scope="module")
def graphs():
    return captured(shared(LAYERS))


def copy(module: fx.GraphModule) -> fx.GraphModule:
    """Another graph over the same module, with its metadata."""
    memo: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, memo))
    for old, new in memo.items():
        new.meta = dict(old.meta)
    return fx.GraphModule(module, graph)


def calls(module: fx.GraphModule, target) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "call_function" and node.target is target]


def order(module: fx.GraphModule) -> dict[fx.Node, int]:
    return {node: i for i, node in enumerate(module.graph.nodes)}


def results(module: fx.GraphModule) -> tuple:
    return next(iter(reversed(module.graph.nodes))).args[0]


def users(node: fx.Node) -> set[fx.Node]:
    """Every node computed from `node`."""
    found, stack = set(), [node]
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found.add(user)
                stack.append(user)
    return found


def sources(node: fx.Node, end: set[fx.Node] = frozenset()) -> set[fx.Node]:
    """Every node that `node` is computed from, not looking behind those in `end`."""
    found, stack = set(), [node]
    while stack:
        for value in stack.pop().all_input_nodes:
            if value not in found:
                found.add(value)
                if value not in end:
                    stack.append(value)
    return found


# Prefill


@pytest.mark.parametrize(("shallow", "deep"), [(2, 4), (1, 2), (1, 5), (4, 5)])
@pytest.mark.parametrize("positions", ["published", "original"])
def test_prefill_has_one_node_per_stage_in_place(graphs, shallow, deep, positions):
    plan = schedule(shallow, deep, positions)
    module = passes.rewrite_prefill(graphs.decoder, plan)
    place, attention, pruned = order(module), calls(module, sdpa), calls(module, prune_tokens)
    assert len(attention) == LAYERS and not calls(module, ANCHOR)
    assert [node.kwargs for node in pruned] == [
        {"policy": "merge_by_cluster", "tokens": 24},
        {"policy": "keep_lowest", "tokens": 8},
    ]
    for node, layer in zip(pruned, (shallow, deep)):
        hidden, key = node.args[:2]
        assert place[attention[layer - 1]] < place[node] < place[attention[layer]]
        assert key is attention[layer - 1].args[1]
        # The hidden state is final: the layer before is done with it, MLP included, and nothing goes around the stage
        # from it. (Its output, gate, up and down projections stand between attention and the cut.)
        assert attention[layer - 1] in sources(hidden) and hidden.users == {node: None}
        linear = [place[projection] for projection in calls(module, torch.ops.aten.linear.default)]
        assert sum(place[attention[layer - 1]] < at < place[node] for at in linear) == 4
        assert node in sources(attention[layer])


def test_stages_feed_each_other(graphs):
    module = passes.rewrite_prefill(graphs.decoder, schedule())
    first, second = calls(module, prune_tokens)
    parts = {node.args[1]: node for node in first.users if node.target is operator.getitem}
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    assert first.args[2:] == tuple(inputs[2:4])
    assert second.args[2] is parts[2]
    labels = second.args[3]
    assert labels.target is torch.gather and labels.args == (inputs[3], 1, parts[3])


@pytest.mark.parametrize("positions", ["published", "original"])
def test_tables_are_gathered_once_per_stage(graphs, positions):
    """cos and sin are all that crosses a cut beside the hidden state; their source is what `positions` means."""
    module = passes.rewrite_prefill(graphs.decoder, schedule(positions=positions))
    first, second = calls(module, prune_tokens)
    gathers = calls(module, take_along)
    assert len(gathers) == 4
    keep = {stage: next(n for n in stage.users if n.args[1] == 1) for stage in (first, second)}
    shallow, deep = ([g for g in gathers if g.args[1] is keep[stage]] for stage in (first, second))
    assert len(shallow) == len(deep) == 2
    tables = [g.args[0] for g in shallow]
    assert len(set(tables)) == 2 and all(g.args[2] == 1 for g in gathers)
    embeddings, positions_input = [node for node in module.graph.nodes if node.op == "placeholder"][:2]
    for table in tables:
        assert positions_input in sources(table) and not {first, embeddings} & sources(table)
    assert [g.args[0] for g in deep] == (tables if positions == "published" else shallow)
    # Every layer rotates by the tables of its own stage.
    others = {*calls(module, torch.ops.aten.linear.default), *calls(module, torch.ops.aten.sym_size.int)}
    for layer, node in enumerate(calls(module, sdpa)):
        for rotated in node.args[:2]:
            found = sources(rotated, {*tables, *gathers, *others}) & {*tables, *gathers}
            assert found == set(tables if layer < 2 else shallow if layer < 4 else deep)


def test_sizes_are_read_from_the_shortened_hidden_state(graphs):
    """Nothing behind a stage depends on the length before it, except through the stage itself."""
    module = passes.rewrite_prefill(graphs.decoder, schedule())
    place = order(module)
    for stage in calls(module, prune_tokens):
        for node in module.graph.nodes:
            if place[node] > place[stage] and node.op != "output":
                for value in node.all_input_nodes:
                    size = value.target is torch.ops.aten.sym_size.int and value.args[1] == 1
                    assert not (size and place[value] < place[stage]), node


def test_prefill_returns_selection_and_kv_in_order(graphs):
    module = passes.rewrite_prefill(graphs.decoder, schedule())
    hidden, *rest = results(module)
    first, second = calls(module, prune_tokens)
    assert [node.args for node in rest[:2]] == [(first, 3), (second, 3)]
    assert rest[2:] == [tensor for node in calls(module, sdpa) for tensor in node.args[1:3]]
    assert calls(module, sdpa)[-1] in sources(hidden)


def test_dense_prefill_only_returns_kv(graphs):
    plan = ViTCoPConfig.dense().schedule(family_of(shared(LAYERS)).shape)
    module = passes.rewrite_prefill(graphs.decoder, plan)
    assert not calls(module, prune_tokens) and not calls(module, take_along)
    assert len(results(module)) == 1 + 2 * LAYERS
    assert sum(node.op == "placeholder" for node in module.graph.nodes) == 2


def test_prefill_without_a_mask(graphs):
    for node in calls(passes.rewrite_prefill(graphs.decoder, schedule()), sdpa):
        assert len(node.args) == 5 and node.args[4] is True and not node.kwargs


# Encoder


@pytest.mark.parametrize("vision", [0, 1, 2])
def test_encoder_prunes_and_clusters_once(graphs, vision):
    module = passes.rewrite_encoder(graphs.encoder, schedule(vision=vision))
    place, attention = order(module), calls(module, sdpa)
    (pruned,), (clustered,) = calls(module, prune_patches), calls(module, cluster_patches)
    # Features are read after layer 2 of 4: the last layer is gone.
    assert len(attention) == 3 and not calls(module, ANCHOR)
    assert place[attention[vision]] < place[pruned]
    assert all(place[pruned] < place[node] for node in attention[vision + 1 :])
    assert pruned.args[1:] == (attention[vision].args[0], attention[vision].args[1], attention[vision].args[3])
    assert pruned.kwargs == {"tokens": 40, "prefix": 1}
    # No table crosses the cut of an encoder, so which rows stay matters to nobody.
    hidden, kept = sorted(pruned.users, key=lambda node: node.args[1])
    assert (hidden.args[1], kept.args[1]) == (0, 2) and clustered.args == (attention[vision].args[1], kept)
    assert clustered.kwargs["grid"] == (8, 8) and clustered.kwargs["centers"] == 5
    features, *rest = results(module)
    assert rest == [kept, clustered] and hidden in {*sources(features), features}
    assert all(node.args[4] is False for node in attention)
    assert users(pruned) > set(attention[vision + 1 :]) and not users(pruned) & set(attention[: vision + 1])


def test_dense_encoder_drops_cls_only(graphs):
    plan = ViTCoPConfig.dense().schedule(family_of(shared(LAYERS)).shape)
    module = passes.rewrite_encoder(graphs.encoder, plan)
    assert len(calls(module, sdpa)) == 3 and not calls(module, prune_patches) and len(results(module)) == 1
    hidden = torch.randn(2, 65, 32)
    stock = shared(LAYERS).model.vision_tower.encoder
    expected = hidden
    for layer in stock.layers[:3]:
        expected = layer(expected, None)
    torch.testing.assert_close(module(hidden)[0], expected[:, 1:])


# Decode


def test_decode_writes_and_attends_once_per_layer(graphs):
    plan = schedule()
    module = passes.rewrite_decode(graphs.decoder, plan)
    writes, attention = calls(module, write_row), calls(module, sdpa_decode)
    assert len(writes) == 2 * LAYERS and len(attention) == LAYERS
    assert not calls(module, attend) and not calls(module, ANCHOR) and not calls(module, prune_tokens)
    caches = [node for node in module.graph.nodes if node.op == "placeholder"][-2 * LAYERS :]
    assert [node.args[0] for node in writes] == caches
    slots = []
    for layer, node in enumerate(attention):
        assert node.args[1:3] == tuple(writes[2 * layer : 2 * layer + 2])
        assert {write.args[2] for write in node.args[1:3]} == {node.args[4]}
        slots.append(node.args[4])
    # One slot per length: layers 0-1, 2-3, 4-5.
    assert slots[0] is slots[1] and slots[2] is slots[3] and slots[4] is slots[5] and len(set(slots)) == 3


def test_decode_marks_run_only_once_lowered(graphs):
    module = decode_cache(clean(copy(graphs.decoder)), schedule().removed_rows())
    assert len(calls(module, attend)) == LAYERS
    with pytest.raises(RewriteError, match="lower_attention"):
        attend(*[torch.zeros(1)] * 5)


def test_write_row_and_sdpa_decode():
    """Rows behind the slot, whatever they hold, are not seen; every sample has its own slot."""
    torch.manual_seed(1)
    query, row = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 1, 8)
    cache, slot = torch.full((2, 2, 7, 8), torch.nan), torch.tensor([2, 5])
    for sample, last in enumerate(slot.tolist()):
        cache[sample, :, :last] = torch.randn(2, last, 8)
        cache[sample, :, last + 1 :] = 1e4
    written = write_row(cache, row, slot)
    assert written is cache and not cache.isnan().any()
    out = sdpa_decode(query, cache, cache, 0.3, slot)
    for sample, last in enumerate(slot.tolist()):
        for head in range(4):
            keys = cache[sample, head // 2, : last + 1]
            assert torch.equal(keys[-1], row[sample, head // 2, 0])
            weights = torch.softmax(keys @ query[sample, head, 0] * 0.3, 0)
            torch.testing.assert_close(out[sample, head, 0], weights @ keys)


# Copies


def test_rewriting_leaves_the_capture_alone(graphs):
    def state():
        return [
            (len(m.graph.nodes), m.code, [(n.name, str(n.target), map_arg(n.args, str)) for n in m.graph.nodes])
            for m in (graphs.encoder, graphs.decoder)
        ]

    def metadata():
        return [set(n.meta) for m in (graphs.encoder, graphs.decoder) for n in m.graph.nodes]

    before, keys = state(), metadata()
    for positions in ("published", "original"):
        passes.rewrite_encoder(graphs.encoder, schedule(positions=positions))
        passes.rewrite_prefill(graphs.decoder, schedule(positions=positions))
        passes.rewrite_decode(graphs.decoder, schedule(positions=positions))
    assert state() == before and metadata() == keys
    assert [len(calls(m, ANCHOR)) for m in (graphs.encoder, graphs.decoder)] == [4, LAYERS]


def test_rewritten_graphs_share_parameters(graphs):
    module = passes.rewrite_prefill(graphs.decoder, schedule())
    owned = {p.data_ptr() for p in shared(LAYERS).parameters()}
    assert {p.data_ptr() for p in module.parameters()} <= owned


def test_clean_removes_assertions(graphs):
    module = clean(copy(graphs.decoder))
    assert not [n for n in module.graph.nodes if "assert" in str(n.target) or n.target == "_guards_fn"]
    count = len(module.graph.nodes)
    assert len(clean(module).graph.nodes) == count


# Refusals


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([Stage(0, "keep_lowest", 8)], "layer 0 .* between layer 1 and 5"),
        ([Stage(LAYERS, "keep_lowest", 8)], "layer 6 .* between layer 1 and 5"),
        ([Stage(-1, "keep_lowest", 8)], "layer -1"),
        ([Stage(3, "keep_lowest", 8), Stage(2, "keep_lowest", 4)], "layer 2 .* between layer 4 and 5"),
        ([Stage(3, "keep_lowest", 8), Stage(3, "keep_lowest", 4)], "layer 3 .* between layer 4 and 5"),
        ([Stage(3, "keep_best", 8)], "'keep_best' .* merge_by_cluster, keep_lowest"),
    ],
)
def test_stages_that_do_not_fit(graphs, stages, reason):
    plan = dataclasses.replace(schedule(), stages=tuple(stages))
    with pytest.raises(RewriteError, match=reason):
        passes.rewrite_prefill(graphs.decoder, plan)
    passes.rewrite_prefill(graphs.decoder, schedule())


@pytest.mark.parametrize("count", [0, LAYERS - 1, LAYERS + 1])
def test_wrong_number_of_offsets(graphs, count):
    with pytest.raises(RewriteError, match=f"{count} offsets .* {LAYERS} layers"):
        decode_cache(clean(copy(graphs.decoder)), (0,) * count)


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_layer_exit_out_of_range(graphs, layer):
    with pytest.raises(RewriteError, match=f"layer {layer} is out of range.* {LAYERS} attention"):
        layer_exit(graphs.decoder.graph, layer)


def test_encoder_layers_out_of_range(graphs):
    with pytest.raises(RewriteError, match=r"layer 4 is out of range.* 4 attention"):
        truncate_encoder(clean(copy(graphs.encoder)), 4)
    stage = dataclasses.replace(schedule().vision, layer=7)
    with pytest.raises(RewriteError, match="layer 7 is out of range"):
        prune_encoder(clean(copy(graphs.encoder)), stage, (8, 8), 1)


def test_lowering_twice_or_to_nothing(graphs):
    module = lower_attention(clean(copy(graphs.decoder)), "sdpa")
    with pytest.raises(RewriteError, match="no attention"):
        lower_attention(module, "sdpa")
    with pytest.raises(RewriteError, match=r"'triton' is unknown.*sdpa"):
        lower_attention(clean(copy(graphs.decoder)), "triton")
    with pytest.raises(RewriteError, match="'triton' is unknown"):
        passes.rewrite_decode(graphs.decoder, schedule(), "triton")


# Graphs of other shapes than any model's we ship

WIDTH = 8


class Toy(nn.Module):
    """A decoder of one-headed attention layers over a table of positions.

    Before each layer, step(layer, x, table, seen) -> (x, table) has its way; `seen` is passed from one to the next.
    """

    def __init__(self, step=lambda layer, x, table, seen: (x, table), layers: int = 4):
        super().__init__()
        self.step, self.layers = step, layers
        self.mixes = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers)])

    def attention(self, layer: int, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """(output [B, t, D], key [B, t, D])."""
        query, key, value = (self.mixes[layer](x) * table.repeat(1, 1, 3)).unsqueeze(1).chunk(3, -1)
        return torch.ops.vitcop.attention(query, key, value, 0.3, True).squeeze(1), key.squeeze(1)

    def table(self, positions: Tensor) -> Tensor:
        return torch.cos(positions.unsqueeze(-1) * torch.arange(1.0, 1 + WIDTH) / WIDTH)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        table, seen = self.table(positions), {}
        for layer in range(self.layers):
            x, table = self.step(layer, x, table, seen)
            x = x + self.attention(layer, x, table)[0]
        return x


def trace(module: nn.Module) -> fx.GraphModule:
    axes = {0: Dim("batch", min=1), 1: Dim("tokens", min=1)}
    inputs = (torch.randn(2, 11, WIDTH), torch.arange(11).repeat(2, 1))
    names = ("x", "positions")
    program = torch.export.export(module.eval(), inputs, dynamic_shapes=dict.fromkeys(names, axes), strict=False)
    return copy(clean(program.module(check_guards=False)))


def stages(*layers: int, positions: str = "kept") -> tuple[Stage, ...]:
    return tuple(Stage(layer, "keep_lowest", 6 - i, positions) for i, layer in enumerate(layers))


def pruned_by_hand(toy: Toy, x: Tensor, budgets: dict[int, int], first: int, count: int, renumber: bool) -> Tensor:
    """The toy with stages, for a batch of one whose `count` visual rows begin at `first`: plain Python indexing."""
    positions, seen, key = list(range(x.shape[1])), {}, x
    for layer in range(toy.layers):
        if layer in budgets:
            norms = key[0, first : first + count].norm(dim=-1)
            kept = sorted(norms.argsort()[: budgets[layer]].tolist())
            rows = [*range(first), *(first + k for k in kept), *range(first + count, x.shape[1])]
            x, count = x[:, rows], budgets[layer]
            positions = rows if renumber else [positions[row] for row in rows]
        x, table = toy.step(layer, x, toy.table(torch.tensor([positions])), seen)
        out, key = toy.attention(layer, x, table)
        x = x + out
    return x


def sized(layer: int, x: Tensor, table: Tensor, seen: dict) -> tuple[Tensor, Tensor]:
    """Layers 0 and 2 use sizes of the token axis, and expressions of them."""
    size = x.shape[1]
    weight = torch.arange(2 * size).view(size, 2).sum(1, keepdim=True) / (size + 1)
    return (x + weight.repeat(1, WIDTH) if layer in (0, 2) else x), table


@pytest.mark.parametrize("toy", [Toy, lambda: Toy(sized)], ids=["plain", "sizes"])
@pytest.mark.parametrize("positions", ["kept", "index"])
def test_toy_equals_hand_pruning(toy, positions):
    torch.manual_seed(4)
    toy = toy()
    module = lower_attention(return_kv(prune_decoder(trace(toy), stages(1, 3, positions=positions))), "sdpa")
    x, visual = torch.randn(1, 14, WIDTH), torch.arange(3, 12)[None]
    hidden, *rest = module(x, torch.arange(14)[None], visual, torch.zeros_like(visual))
    expected = {p: pruned_by_hand(toy, x, {1: 6, 3: 5}, 3, 9, p == "index") for p in ("kept", "index")}
    assert not torch.allclose(expected["kept"], expected["index"], atol=1e-3)
    torch.testing.assert_close(hidden, expected[positions])
    assert [index.shape[1] for index in rest[:2]] == [6, 5] and [c.shape[2] for c in rest[2::2]] == [14, 11, 11, 10]


def test_part_of_a_size_is_refused():
    """A live-in with 2 t entries: which of them belong to a removed token is unknown."""

    def step(layer, x, table, seen):
        if layer == 0:
            seen["twice"] = torch.cat((table, -table), 1)
        return (x + seen["twice"].unflatten(1, (2, -1)).sum(1) if layer == 2 else x), table

    with pytest.raises(RewriteError, match=r"dimension 1 has size 2\*.*not the token axis"):
        prune_decoder(trace(Toy(step)), stages(1))


def test_two_values_out_of_attention_are_refused():
    """Attention's own output is used twice: no single value carries the layer's result on."""

    class Forked(Toy):
        def forward(self, x, positions):
            table = self.table(positions)
            out = torch.ops.vitcop.attention(x.unsqueeze(1), x.unsqueeze(1), x.unsqueeze(1), 0.3, True)
            key, value = out + 1, out * 2
            out = torch.ops.vitcop.attention(key, value, value, 0.3, True).squeeze(1)
            return self.attention(0, out, table)[0]

    with pytest.raises(RewriteError, match="layer 0 has no single exit"):
        prune_decoder(trace(Forked()), stages(1))


def test_two_streams_are_refused():
    """Both streams leave layer 1 and neither holds the other: merging tokens of one would leave the other behind."""

    class Streams(Toy):
        def forward(self, x, positions):
            table, other = self.table(positions), x * 2
            for layer in range(self.layers):
                out = self.attention(layer, x + other, table)[0]
                x, other = x + out, other * out
            return x + other

    with pytest.raises(RewriteError, match="layer 1 has no single exit"):
        prune_decoder(trace(Streams()), (Stage(2, "merge_by_cluster", 6),))


def test_positions_of_an_earlier_stage_are_refused():
    """Layer 1 doubles the table it got from the first stage; a second stage that renumbers cannot recompute that."""

    def step(layer, x, table, seen):
        return x, table * 2 if layer == 1 else table

    toy = Toy(step)
    prune_decoder(trace(toy), stages(1, 3))
    with pytest.raises(RewriteError, match="positions of an earlier stage"):
        prune_decoder(trace(toy), stages(1, 3, positions="index"))


def test_content_is_never_renumbered():
    """A gate computed from the hidden state crosses both cuts; it stays with its token, the table does not."""

    def step(layer, x, table, seen):
        if layer == 0:
            seen["gate"] = x.sigmoid()
        return (x * seen["gate"] if layer == 3 else x), table

    module = prune_decoder(trace(Toy(step)), stages(1, 2, positions="index"))
    gathers = calls(module, take_along)
    assert len(gathers) == 4
    chained = [g for g in gathers if g.args[0] in gathers]
    assert len(chained) == 1
    gate = chained[0].args[0].args[0]
    assert gate.target is torch.ops.aten.sigmoid.default


def test_untouched_values_are_not_gathered():
    """A value per sample and one per channel cross the cut and stay; a value used up before it is left alone."""

    def step(layer, x, table, seen):
        if layer == 0:
            seen.update(sample=x.mean(1, keepdim=True), channel=table.mean((0, 1)), early=x.sigmoid())
        if layer == 1:
            x = x + seen["early"]
        return (x + seen["sample"] * seen["channel"] if layer == 3 else x), table

    module = prune_decoder(trace(Toy(step)), stages(2))
    (table,) = [gather.args[0] for gather in calls(module, take_along)]
    assert table.target is torch.ops.aten.cos.default
