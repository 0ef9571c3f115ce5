"""What the passes do to graphs, and which graphs they refuse."""

from __future__ import annotations

import dataclasses
import itertools
import operator

import pytest
import torch
from graphs import calls, copy, order, results, sources, users
from models import captured, shared
from torch import fx
from torch.fx.node import map_arg
from vitcop_compile.passes.attach_cache import attach_cache, attend, attend_apart, cache_rows, fill_rows, write_rows
from vitcop_compile.passes.clean import clean
from vitcop_compile.passes.drop_prefix import drop_prefix
from vitcop_compile.passes.lower_attention import lower_attention
from vitcop_compile.passes.prune import prune, prune_tokens
from vitcop_compile.passes.token_axis import layer_exit
from vitcop_compile.passes.truncate_encoder import truncate_encoder

from vitcop_compile import RewriteError, ViTCoPConfig, passes
from vitcop_compile.attention import ANCHOR, sdpa, sdpa_cached
from vitcop_compile.families import family_of
from vitcop_compile.ops.indexing import take_along
from vitcop_compile.schedule import Schedule, Stage

LAYERS = 6


def schedule(shallow: int = 2, deep: int = 4, positions: str = "published", vision: int = 1, images: int = 1, **changes):
    config = ViTCoPConfig(
        budgets=(40, 24, 8, 5),
        shallow_layer=shallow,
        deep_layer=deep,
        positions=positions,
        vision_layer=vision,
        scale_layers=False,
        **changes,
    )
    shape = family_of(shared(LAYERS)).shape
    return config.schedule(shape, (shape.image,) * images)


def dense() -> Schedule:
    return ViTCoPConfig.dense().schedule(family_of(shared(LAYERS)).shape)


@pytest.fixture(scope="module")
def graphs():
    return captured(shared(LAYERS))


def prefill(graphs, plan: Schedule, **settings) -> fx.GraphModule:
    return passes.rewrite(graphs.decoder, passes.prefill_passes(plan, states=1 if plan.decoder_stages else 0, **settings))


def encoder(graphs, plan: Schedule) -> fx.GraphModule:
    return passes.rewrite(graphs.encoder, passes.encoder_passes(plan))


def extend(graphs, plan: Schedule, **settings) -> fx.GraphModule:
    return passes.rewrite(graphs.decoder, passes.extend_passes(plan, **settings))


def inputs(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


# The lists


def test_pass_lists_are_data():
    def names(found):
        assert all(callable(run) for _, run in found)
        return [name for name, _ in found]

    plan = schedule()
    whole = ["clean", "truncate_encoder", "prune", "drop_prefix", "lower_attention"]
    assert names(passes.encoder_passes(plan)) == names(passes.encoder_passes(dense())) == whole
    fresh = ["clean", "prune", "attach_cache", "lower_attention"]
    for settings in ({}, {"in_place": False}, {"filled": True}):
        assert names(passes.prefill_passes(plan, states=1, **settings)) == fresh
    # Attention that reads caches without writing to them is spelled out.
    assert names(passes.prefill_passes(plan, states=1, filled=True, in_place=False)) == fresh[:-1]
    assert names(passes.extend_passes(plan)) == ["clean", "attach_cache", "lower_attention"]
    assert names(passes.extend_passes(plan, in_place=False)) == ["clean", "attach_cache"]


def test_rewrite_runs_what_it_is_given(graphs):
    ran = []

    def watching(module):
        ran.append(module)
        return module

    module = passes.rewrite(graphs.decoder, (("clean", clean), ("watch", watching), ("again", watching)))
    assert ran == [module, module] and module is not graphs.decoder
    assert len(calls(module, ANCHOR)) == LAYERS


# Prefill


@pytest.mark.parametrize(("shallow", "deep"), [(2, 4), (1, 2), (1, 5), (4, 5)])
@pytest.mark.parametrize("positions", ["published", "original"])
def test_prefill_has_one_node_per_stage_in_place(graphs, shallow, deep, positions):
    module = prefill(graphs, schedule(shallow, deep, positions))
    place, attention, pruned = order(module), calls(module, sdpa), calls(module, prune_tokens)
    assert len(attention) == LAYERS and not calls(module, ANCHOR)
    rest = {"options": {}, "site": {}}
    assert [node.kwargs for node in pruned] == [
        {"policy": "merge_by_cluster", "incoming": (40,), "tokens": (24,), **rest},
        {"policy": "keep_lowest", "incoming": (24,), "tokens": (8,), **rest},
    ]
    for node, layer in zip(pruned, (shallow, deep), strict=True):
        hidden = node.args[0]
        assert place[attention[layer - 1]] < place[node] < place[attention[layer]]
        # Of the layer before, a stage reads what its policy needs: the keys.
        assert node.args[3:] == (None, attention[layer - 1].args[1], None, None)
        # The hidden state is final: the layer before is done with it, MLP included, and nothing goes around the stage
        # from it. (Its output, gate, up and down projections stand between attention and the cut.)
        assert attention[layer - 1] in sources(hidden) and hidden.users == {node: None}
        linear = [place[projection] for projection in calls(module, torch.ops.aten.linear.default)]
        assert sum(place[attention[layer - 1]] < at < place[node] for at in linear) == 4
        assert node in sources(attention[layer])


@pytest.mark.parametrize(
    ("scope", "tokens"), [("per_image", [(40, 40, 40), (24, 24, 24), (8, 8, 8)]), ("pooled", [(40, 40, 40), (72,), (24,)])]
)
def test_several_images_make_no_more_nodes(graphs, scope, tokens):
    one, several = (prefill(graphs, schedule(images=images, scope=scope)) for images in (1, 3))
    pruned = calls(several, prune_tokens)
    assert [(node.kwargs["incoming"], node.kwargs["tokens"]) for node in pruned] == list(itertools.pairwise(tokens))
    assert [str(node.target) for node in several.graph.nodes] == [str(node.target) for node in one.graph.nodes]


def test_stages_feed_each_other(graphs):
    module = prefill(graphs, schedule())
    first, second = calls(module, prune_tokens)
    parts = {node.args[1]: node for node in first.users if node.target is operator.getitem}
    visual, state = inputs(module)[2:4]
    assert (visual.target, state.target) == ("visual", "state_0")
    assert first.args[1:3] == (visual, (state,))
    assert second.args[1:3] == (parts[2], (parts[4],))


@pytest.mark.parametrize("positions", ["published", "original"])
def test_tables_are_gathered_once_per_stage(graphs, positions):
    """cos and sin are all that crosses a cut beside the hidden state; their source is what `positions` means."""
    module = prefill(graphs, schedule(positions=positions))
    first, second = calls(module, prune_tokens)
    gathers = calls(module, take_along)
    assert len(gathers) == 4
    keep = {stage: next(n for n in stage.users if n.args[1] == 1) for stage in (first, second)}
    shallow, deep = ([g for g in gathers if g.args[1] is keep[stage]] for stage in (first, second))
    assert len(shallow) == len(deep) == 2
    tables = [g.args[0] for g in shallow]
    assert len(set(tables)) == 2 and all(g.args[2] == 1 for g in gathers)
    embeddings, positions_input = inputs(module)[:2]
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
    module = prefill(graphs, schedule())
    place = order(module)
    for stage in calls(module, prune_tokens):
        for node in module.graph.nodes:
            if place[node] > place[stage] and node.op != "output":
                for value in node.all_input_nodes:
                    size = value.target is torch.ops.aten.sym_size.int and value.args[1] == 1
                    assert not (size and place[value] < place[stage]), node


def test_prefill_fills_its_caches(graphs):
    module = prefill(graphs, schedule())
    hidden, *rest = results(module)
    first, second = calls(module, prune_tokens)
    assert [node.args for node in rest] == [(first, 3), (second, 3)]
    attention, filled, place = calls(module, sdpa), calls(module, fill_rows), order(module)
    rows = [tensor for node in attention for tensor in node.args[1:3]]
    assert [node.args for node in filled] == list(zip(inputs(module)[4:], rows, strict=True))
    assert all(place[filled[i]] < place[attention[i // 2]] for i in range(2 * LAYERS))
    assert [node.target for node in inputs(module)[4:6]] == ["key_0", "value_0"]
    assert attention[-1] in sources(hidden)


def test_prefill_apart_returns_selection_and_kv_in_order(graphs):
    module = prefill(graphs, schedule(), in_place=False)
    hidden, *rest = results(module)
    first, second = calls(module, prune_tokens)
    assert [node.args for node in rest[:2]] == [(first, 3), (second, 3)]
    assert rest[2:] == [tensor for node in calls(module, sdpa) for tensor in node.args[1:3]]
    assert calls(module, sdpa)[-1] in sources(hidden)
    assert len(inputs(module)) == 4 and not calls(module, fill_rows)


@pytest.mark.parametrize("in_place", [True, False])
def test_prefill_behind_other_turns(graphs, in_place):
    """Tokens are pruned as in a first prompt, and what is left attends to the caches too."""
    module = prefill(graphs, schedule(), filled=True, in_place=in_place)
    assert len(calls(module, prune_tokens)) == 2 and not calls(module, fill_rows) and not calls(module, sdpa)
    visual, state, length, removed, *caches = inputs(module)[2:]
    assert [node.target for node in (visual, state, length, removed)] == ["visual", "state_0", "length", "removed"]
    found = calls(module, cache_rows)
    assert [node.args[:3] for node in found] == [(length, removed, group) for group in range(3)]
    attention = calls(module, sdpa_cached if in_place else attend_apart)
    # Rows are counted where a layer has them: behind the stages before it.
    assert [node.args[3] for node in found] == [new_rows(attention[layer], in_place)[0] for layer in (0, 2, 4)]
    assert [node.args[-1] for node in attention] == [at for at in found for _ in "ab"]
    held = [node for step in attention for node in (step.args[1:3])]
    assert ([write.args[0] for write in held] if in_place else held) == caches
    assert len(results(module)) == 3 + (0 if in_place else 2 * LAYERS)


def new_rows(step: fx.Node, in_place: bool) -> tuple:
    """The new keys and values of an attention over caches."""
    return tuple(write.args[1] for write in step.args[1:3]) if in_place else step.args[3:5]


def test_dense_prefill_only_fills_caches(graphs):
    module = prefill(graphs, dense())
    assert not calls(module, prune_tokens) and not calls(module, take_along)
    assert len(results(module)) == 1 and len(calls(module, fill_rows)) == 2 * LAYERS
    assert len(inputs(module)) == 2 + 2 * LAYERS
    apart = prefill(graphs, dense(), in_place=False)
    assert len(results(apart)) == 1 + 2 * LAYERS and len(inputs(apart)) == 2


def test_prefill_without_a_mask(graphs):
    for node in calls(prefill(graphs, schedule()), sdpa):
        assert len(node.args) == 5 and node.args[4] is True and not node.kwargs


# Encoder


@pytest.mark.parametrize("vision", [0, 1, 2])
def test_encoder_prunes_and_clusters_once(graphs, vision):
    module = encoder(graphs, schedule(vision=vision))
    place, attention = order(module), calls(module, sdpa)
    (pruned,) = calls(module, prune_tokens)
    # Features are read after layer 2 of 4: the last layer is gone.
    assert len(attention) == 3 and not calls(module, ANCHOR)
    assert place[attention[vision]] < place[pruned]
    assert all(place[pruned] < place[node] for node in attention[vision + 1 :])
    query, key, _, scale = attention[vision].args[:4]
    assert pruned.args[1:] == (1, (), query, key, None, scale)
    assert pruned.kwargs == {
        "policy": "cls_attention",
        "incoming": (64,),
        "tokens": (40,),
        "options": {"centers": 5, "density_width": 8.0, "reach": 0.6},
        "site": {"prefix": 1, "grid": (8, 8), "exact": True},
    }
    # No table crosses the cut of an encoder, so which rows stay matters to nobody.
    hidden, kept, state = sorted(pruned.users, key=lambda node: node.args[1])
    assert [node.args[1] for node in (hidden, kept, state)] == [0, 3, 4]
    features, *rest = results(module)
    assert rest == [kept, state] and hidden in {*sources(features), features}
    assert features.target is operator.getitem and features.args[1] == (slice(None), slice(1, None))
    assert all(node.args[4] is False for node in attention)
    assert users(pruned) > set(attention[vision + 1 :]) and not users(pruned) & set(attention[: vision + 1])


def test_dense_encoder_drops_cls_only(graphs):
    module = encoder(graphs, dense())
    assert len(calls(module, sdpa)) == 3 and not calls(module, prune_tokens) and len(results(module)) == 1
    hidden = torch.randn(2, 65, 32)
    stock = shared(LAYERS).model.vision_tower.encoder
    expected = hidden
    for layer in stock.layers[:3]:
        expected = layer(expected, None)
    torch.testing.assert_close(module(hidden)[0], expected[:, 1:])


def test_without_a_prefix_nothing_is_dropped(graphs):
    module = clean(copy(graphs.encoder))
    before = results(module)
    assert drop_prefix(module, 0) is module and results(module) == before


# Extend


def test_extend_writes_and_attends_once_per_layer(graphs):
    module = extend(graphs, schedule())
    writes, attention = calls(module, write_rows), calls(module, sdpa_cached)
    assert len(writes) == 2 * LAYERS and len(attention) == LAYERS
    assert not calls(module, attend) and not calls(module, ANCHOR) and not calls(module, prune_tokens)
    assert [node.target for node in inputs(module)[2:6]] == ["length", "removed", "key_0", "value_0"]
    assert [node.args[0] for node in writes] == inputs(module)[4:] and len(results(module)) == 1
    places = []
    for layer, node in enumerate(attention):
        assert node.args[1:3] == tuple(writes[2 * layer : 2 * layer + 2])
        assert {write.args[2] for write in node.args[1:3]} == {node.args[4]}
        places.append(node.args[4])
    # One place per group: layers 0-1, 2-3, 4-5.
    assert places == [at for at in calls(module, cache_rows) for _ in "ab"]
    assert [at.args[2] for at in calls(module, cache_rows)] == [0, 1, 2]


def test_extend_apart_reads_and_returns(graphs):
    module = extend(graphs, schedule(), in_place=False)
    attention = calls(module, attend_apart)
    assert len(attention) == LAYERS and not calls(module, write_rows) and not calls(module, ANCHOR)
    assert [cache for node in attention for cache in node.args[1:3]] == inputs(module)[4:]
    assert list(results(module)[1:]) == [rows for node in attention for rows in node.args[3:5]]


def test_extend_marks_run_only_once_lowered(graphs):
    module = attach_cache(clean(copy(graphs.decoder)), schedule().groups, filled=True)
    assert len(calls(module, attend)) == LAYERS
    with pytest.raises(RewriteError, match="lower_attention"):
        attend(*[torch.zeros(1)] * 5)


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
        plan = schedule(positions=positions)
        encoder(graphs, plan)
        for settings in ({}, {"in_place": False}, {"filled": True}):
            prefill(graphs, plan, **settings)
        extend(graphs, plan)
    assert state() == before and metadata() == keys
    assert [len(calls(m, ANCHOR)) for m in (graphs.encoder, graphs.decoder)] == [4, LAYERS]


def test_rewritten_graphs_share_parameters(graphs):
    module = prefill(graphs, schedule())
    owned = {p.data_ptr() for p in shared(LAYERS).parameters()}
    assert {p.data_ptr() for p in module.parameters()} <= owned


def test_clean_removes_assertions(graphs):
    module = clean(copy(graphs.decoder))
    assert not [n for n in module.graph.nodes if "assert" in str(n.target) or n.target == "_guards_fn"]
    views = [n for n in module.graph.nodes if str(n.target) in ("aten.view.default", "aten.reshape.default")]
    assert views and not [
        n for n in views for size, known in zip(n.args[1], n.meta["val"].shape) if (size, type(known)) == (-1, int)
    ]
    count = len(module.graph.nodes)
    assert len(clean(module).graph.nodes) == count


# Refusals


def stage(layer: int, policy: str = "keep_lowest", tokens: int = 8) -> Stage:
    return Stage("decoder", layer, policy, (tokens,))


@pytest.mark.parametrize(
    ("stages", "reason"),
    [
        ([stage(0)], "'keep_lowest' looks at key of a layer before: none is before layer 0"),
        ([stage(LAYERS)], "layer 6 .* between layer 0 and 5"),
        ([stage(-1)], "layer -1 .* between layer 0 and 5"),
        ([stage(3), stage(2, tokens=4)], "layer 2 .* between layer 4 and 5"),
        ([stage(3), stage(3, tokens=4)], "layer 3 .* between layer 4 and 5"),
        ([stage(3, "keep_best")], "'keep_best' is unknown: use one of .*merge_by_cluster, .*keep_lowest"),
    ],
)
def test_stages_that_do_not_fit(graphs, stages, reason):
    plan = dataclasses.replace(schedule(), stages=(schedule().stages[0], *stages))
    with pytest.raises(RewriteError, match=reason):
        prefill(graphs, plan)
    prefill(graphs, schedule())


def test_options_that_differ_by_segment(graphs):
    plan = schedule(images=2)
    odd = dataclasses.replace(plan.stages[1], options=(("width", (3, 4)),))
    with pytest.raises(RewriteError, match=r"differ in an option: \(3, 4\)"):
        prefill(graphs, dataclasses.replace(plan, stages=(plan.stages[0], odd)))


@pytest.mark.parametrize("count", [0, LAYERS - 1, LAYERS + 1])
@pytest.mark.parametrize("filled", [True, False])
def test_wrong_number_of_groups(graphs, count, filled):
    with pytest.raises(RewriteError, match=f"{count} groups .* {LAYERS} layers"):
        attach_cache(clean(copy(graphs.decoder)), (0,) * count, filled=filled)


@pytest.mark.parametrize("layer", [-1, LAYERS, 99])
def test_layer_exit_out_of_range(graphs, layer):
    with pytest.raises(RewriteError, match=f"layer {layer} is out of range.* {LAYERS} attention"):
        layer_exit(graphs.decoder.graph, layer)


def test_encoder_layers_out_of_range(graphs):
    with pytest.raises(RewriteError, match=r"layer 4 is out of range.* 4 attention"):
        truncate_encoder(clean(copy(graphs.encoder)), 4)
    late = dataclasses.replace(schedule().vision, layer=7)
    with pytest.raises(RewriteError, match="layer 7 is out of place: stages ascend between layer 0 and 3"):
        prune(clean(copy(graphs.encoder)), (late,), (64,), prefix=1)


def test_lowering_twice_or_to_nothing(graphs):
    module = lower_attention(clean(copy(graphs.decoder)), "sdpa")
    with pytest.raises(RewriteError, match="no attention"):
        lower_attention(module, "sdpa")
    with pytest.raises(RewriteError, match=r"'triton' is unknown.*sdpa"):
        lower_attention(clean(copy(graphs.decoder)), "triton")
    with pytest.raises(RewriteError, match="'triton' is unknown"):
        extend(graphs, schedule(), attn_implementation="triton")
