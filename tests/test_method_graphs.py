"""What methods do to graphs: where they stand, how long every layer is, and that nothing is left that depends on data."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import models
import pytest
import torch
from graphs import calls, order, sources
from models import captured, exhaustive, shared, slow
from torch import fx, nn
from torch.export import ExportedProgram
from vitcop_compile.passes.prune import prune_tokens
from vitcop_compile.passes.unroll_loops import MOST_STEPS, unroll_loops

from vitcop_compile import ConfigError, RewriteError, UnsupportedError, ViTCoPConfig, methods, passes
from vitcop_compile.attention import sdpa
from vitcop_compile.families import family_of
from vitcop_compile.methods import Calibrated, CustomMethod, method_of
from vitcop_compile.ops import greedy
from vitcop_compile.policies import POLICIES, Site
from vitcop_compile.program_modules import Vision
from vitcop_compile.programs import Programs
from vitcop_compile.schedule import Schedule

# No two sizes that are told apart below agree, nor with a width of the model.
LAYERS, BATCH, TEXT, KEPT, PATCHES = 6, 2, 58, 19, 64
SDPA = torch.ops.aten.scaled_dot_product_attention.default
FORBIDDEN = (".item", "local_scalar", "nonzero", "masked_select", "unique", "sym_", "_assert_scalar", "rand")
# One of each side, and such as read other parts of a layer.
EVERY: dict[str, Any] = {
    "visionzip": methods.VisionZip(tokens=KEPT), "scope": methods.Scope(tokens=KEPT), "random": methods.Random(tokens=KEPT),
    "tome": methods.ToMe(tokens=KEPT), "divprune": methods.DivPrune(tokens=KEPT), "holov": methods.HoloV(tokens=KEPT),
    "vscan": methods.VScan(tokens=KEPT), "downsample": methods.Downsample(tokens=KEPT),
    "uniform": methods.Uniform(tokens=KEPT),
    "cdpruner": methods.CDPruner(tokens=KEPT), "zspaprune": methods.ZSPAPrune(tokens=KEPT),
    "fastv": methods.FastV(tokens=KEPT), "dart": methods.Dart(tokens=KEPT), "sparsevlm": methods.SparseVLM(tokens=KEPT),
    "v2drop": methods.V2Drop(tokens=KEPT), "pyramiddrop": methods.PyramidDrop(tokens=KEPT),
}  # fmt: skip
# In the default run: one of the encoder, of the entry, of the decoder, and of before its first layer.
QUICK = ("tome", "holov", "v2drop", "cdpruner")
NAMES = pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in EVERY])


def schedule(name: str) -> Schedule:
    shape = family_of(shared(LAYERS)).shape
    return EVERY[name].schedule(shape, (shape.image,))


@cache
def programs(name: str) -> Programs:
    model = shared(LAYERS)
    return Programs(family_of(model), captured(model), EVERY[name])


@cache
def prefill(name: str) -> ExportedProgram:
    return programs(name).export_prefill(BATCH, TEXT)


@cache
def vision(name: str) -> ExportedProgram:
    return programs(name).export_vision(3)


@cache
def encoder(name: str) -> fx.GraphModule:
    return passes.rewrite(captured(shared(LAYERS)).encoder, passes.encoder_passes(schedule(name)))


@cache
def decoder(name: str) -> fx.GraphModule:
    plan = schedule(name)
    states = programs(name).states if plan.decoder_stages else 0
    return passes.rewrite(captured(shared(LAYERS)).decoder, passes.prefill_passes(plan, states=states))


# Where nodes are


@pytest.mark.parametrize("name", EVERY)
def test_a_node_for_each_stage_behind_its_layer(name: str) -> None:
    """Inside the encoder each stage is a node behind its layer; one behind the projector is none, but for its tap; in the
    decoder each is a node in front of its layer, or of the first."""
    plan = schedule(name)
    inside = [stage for stage in plan.vision_stages if stage.side == "encoder"]
    graph, place = encoder(name), order(encoder(name))
    pruned, attention = calls(graph, prune_tokens), calls(graph, sdpa)
    assert [node.kwargs["tokens"] for node in pruned] == [stage.tokens for stage in inside]
    for node, stage in zip(pruned, inside, strict=True):
        assert place[attention[stage.layer]] < place[node] and node.kwargs["policy"] == stage.policy
        assert all(place[node] < place[behind] for behind in attention[stage.layer + 1 :])
        assert node.args[0].users == {node: None}
    tapped = bool(plan.vision and plan.vision.side == "entry" and plan.vision.tap)
    taps = calls(graph, POLICIES["cls_attention"].tap)
    assert len(taps) == tapped * (1 + len(plan.vision.also) if plan.vision else 0)
    graph, place = decoder(name), order(decoder(name))
    pruned, attention = calls(graph, prune_tokens), calls(graph, sdpa)
    assert [node.kwargs["tokens"] for node in pruned] == [stage.tokens for stage in plan.decoder_stages]
    for node, stage in zip(pruned, plan.decoder_stages, strict=True):
        needs = POLICIES[stage.policy].needs
        assert place[node] < place[attention[stage.layer]] and node in sources(attention[stage.layer])
        if stage.layer:
            assert place[attention[stage.layer - 1]] < place[node]
            queried, keyed, _, _ = attention[stage.layer - 1].args[:4]
            wired = (queried if "query" in needs else None, keyed if "key" in needs else None)
            assert node.args[3:5] == wired and attention[stage.layer - 1] in sources(node.args[0])
        assert {*(node.args[7] if len(node.args) > 7 else {})} == needs & {"entry", "text", "last", "before"}
        assert node.args[0].users.keys() <= {node} or stage.layer == 0


def test_what_a_layer_added_is_told_of_its_own_rows() -> None:
    """V2Drop before layers 1, 3 and 4: what entered the layer before, and where that is a stage, what the stage has left."""
    graph, plan = decoder("v2drop"), schedule("v2drop")
    assert [stage.layer for stage in plan.decoder_stages] == [1, 3, 4]
    first, second, third = calls(graph, prune_tokens)
    befores = [node.args[7]["before"] for node in (first, second, third)]
    attention = calls(graph, sdpa)
    assert befores[0].op == "placeholder"
    assert attention[1] in sources(befores[1]) and attention[2] not in sources(befores[1])
    # The cut of the second stage is what entered layer 3: it is told of as the stage has left it.
    assert befores[2].args == (second, 0)


# Exported programs


def lengths(program: ExportedProgram) -> list[int]:
    """Query rows of each layer's attention."""
    return [node.args[0].meta["val"].shape[2] for node in program.graph.nodes if node.target is SDPA]


def static(program: ExportedProgram) -> None:
    assert not program.range_constraints
    for node in program.graph.nodes:
        assert not any(word in str(node.target) for word in FORBIDDEN), node.format_node()
        assert not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*getattr(node.target, "tags", ())}
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            assert value is None or isinstance(value, torch.Tensor), node.format_node()
            assert value is None or all(type(size) is int for size in value.shape), node.format_node()
    used = {node.target.namespace for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    loops = {node.target for node in program.graph.nodes} & greedy.LOOPS.keys()
    # Of ours, choices made one by one alone.
    assert used == {"aten"} | ({"vitcop"} if loops else set())


@NAMES
def test_programs_are_static_and_as_long_as_the_schedule_says(name: str) -> None:
    plan, (seen, whole) = schedule(name), (vision(name), prefill(name))
    static(seen)
    static(whole)
    assert lengths(whole) == [TEXT + tokens for tokens in plan.visual_tokens()]
    # What policies are told of a prompt is worked out: programs take what they always do.
    state = programs(name).states if plan.decoder_stages else 0
    assert len(whole.graph_signature.user_inputs) == 5 + state + 2 * LAYERS
    kept = [PATCHES, *(stage.total for stage in plan.vision_stages if stage.side == "encoder")]
    if len(kept) == 2:
        # Behind the last layer but one, of four, whose result the model reads.
        assert plan.vision_stages[0].layer == 2 and lengths(seen) == [1 + PATCHES] * 3
    elif len(kept) > 2:
        assert lengths(seen) == [1 + tokens for tokens in kept[:-1]]
    else:
        assert lengths(seen) == [1 + PATCHES] * 3


@pytest.mark.parametrize("name", ["divprune", slow("scope"), slow("cdpruner"), slow("zspaprune")])
def test_choices_one_by_one_are_one_operator(name: str) -> None:
    program = prefill(name) if name in ("cdpruner", "zspaprune") else vision(name)
    assert sum(node.target in greedy.LOOPS for node in program.graph.nodes) == 1
    spelled = unroll_loops(program)
    assert not any(node.target in greedy.LOOPS for node in spelled.graph.nodes)
    static(spelled)


class Farthest(nn.Module):
    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, distance: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        return greedy.farthest(distance, start, self.count)


def test_loops_are_spelled_out_up_to_a_length() -> None:
    start = torch.arange(400).unsqueeze(0) == 7
    distance = torch.rand(1, 400, 400)
    program = torch.export.export(Farthest(9), (distance, start), strict=False)
    assert torch.equal(unroll_loops(program).module()(distance, start), greedy.farthest(distance, start, 9))
    long = torch.export.export(Farthest(MOST_STEPS + 1), (distance, start), strict=False)
    with pytest.raises(UnsupportedError, match=r"chooses 257 tokens one by one, .* 256 is the most that is unrolled"):
        unroll_loops(long)


# What all keep is the dense model


@pytest.mark.parametrize(
    "name", ["visionzip", *(slow(name) if name in QUICK else exhaustive(name) for name in EVERY if name != "visionzip")]
)
def test_all_tokens_are_the_dense_model(name: str) -> None:
    """To the last bit: nothing is merged, and rows are only moved."""
    model = shared(LAYERS)
    ids, pixels = models.prompt(), models.pixels()
    method = type(EVERY[name])(tokens=PATCHES, **({"last": 1.0} if name == "vscan" else {}))
    both = (models.optimize(model, own) for own in (ViTCoPConfig.dense(), method))
    expected, found = (fast(input_ids=ids, pixel_values=pixels).logits for fast in both)
    assert torch.equal(found, expected)


# CustomMethod


def custom(score: Any, **more: Any) -> Any:
    return models.optimize(shared(LAYERS), CustomMethod(score=score, tokens=KEPT, **more))


def selected(fast: Any) -> list[int]:
    out = fast(input_ids=models.prompt(), pixel_values=models.pixels())
    selection = out.past_key_values.selection
    return (selection.kept if selection.kept is not None else selection.stages[0])[0].tolist()


class Linear(nn.Module):
    """A trained score, as far as this goes."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(width, generator=generator))

    def forward(self, site: Site) -> torch.Tensor:
        return site.hidden @ self.weight


def by_embedding(score: Any) -> list[int]:
    """Of a score of what enters the decoder."""
    model = shared(LAYERS)
    with torch.no_grad():
        hidden = model.model.get_image_features(pixel_values=models.pixels()).pooler_output[0]
        values = score(Site(at=torch.arange(PATCHES)[None], hidden=hidden[None]))[0]
    return sorted(values.argsort(descending=True)[:KEPT].tolist())


@pytest.mark.parametrize("layer_and_side", [(0, "decoder"), (None, "entry")])
def test_a_module_is_traced_with_its_weights(layer_and_side: Any) -> None:
    """Values that change in place are followed by what runs on torch."""
    layer, side = layer_and_side
    score = Linear(64, 0)
    fast = custom(score, layer=layer, side=side)
    before = selected(fast)
    assert before == by_embedding(score)
    with torch.no_grad():
        score.weight.copy_(Linear(64, 1).weight)
    after = selected(fast)
    assert after == by_embedding(score) and after != before


def test_a_score_of_another_shape_is_refused() -> None:
    fast = custom(lambda site: site.hidden)
    with pytest.raises(RewriteError, match=r"score\(site\) is \(1, 64, 64\): return a tensor \(1, 64\), one number for each"):
        selected(fast)
    fast = custom(lambda site: 3)
    with pytest.raises(RewriteError, match=r"score\(site\) is int: return a tensor"):
        selected(fast)


def test_a_custom_method_without_a_score_is_refused() -> None:
    """Also inside another, before anything is traced."""
    again = method_of(CustomMethod(score=abs, tokens=KEPT).to_json())
    for method in (again, Calibrated(again)):
        with pytest.raises(ConfigError, match="a method that was read from a file, or has none, has no score: pass one"):
            models.optimize(shared(LAYERS), method)


def test_captures_of_another_model_are_refused() -> None:
    other = models.optimize(shared(LAYERS), EVERY["uniform"])
    with pytest.raises(ConfigError, match="like was made of another model: pass one that optimize returned for this model"):
        models.optimize(shared(3), EVERY["uniform"], like=other)


@torch.no_grad()
def test_a_score_can_be_shuffled() -> None:
    """What tells whether a score says anything: every patch has that of another, and what stays is where those went."""
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(0))
    kept = []
    for score in (lambda site: site.score, lambda site: site.score[:, order]):
        method = CustomMethod(score=score, needs=("score",), side="encoder", tokens=KEPT)
        vision = models.optimize(shared(LAYERS), method).on_demand.vision(2)
        kept.append(vision(models.pixels(2))[1])
    for plain, shuffled in zip(*kept, strict=True):
        assert shuffled.tolist() == [at for at, patch in enumerate(order.tolist()) if patch in plain]
        assert shuffled.tolist() != plain.tolist()


def seen_by(needs: tuple[str, ...], **more: Any) -> Site:
    found: list[Site] = []

    def score(site: Site) -> torch.Tensor:
        found.append(site)
        return torch.zeros(site.at.shape)

    made = custom(score, needs=needs, **more).programs
    _ = made.export_vision(1) if "side" in more else made.export_prefill(1, TEXT)
    return found[-1]


@pytest.mark.parametrize(
    ("needs", "more", "shapes"),
    [
        (
            ("query", "key", "value", "before", "whole", "entry", "text", "last"),
            {"layer": 2},
            {
                "query": (1, 4, 122, 16), "key": (1, 4, 122, 16), "value": (1, 4, 122, 16), "before": (1, 64, 64),
                "whole": (1, 122, 64), "entry": (1, 122, 64), "text": (1, 122), "last": (1,),
            },
        ),
        (
            ("hidden", "query", "key"),
            {"side": "encoder"},
            {"hidden": (1, 64, 32), "query": (1, 4, 65, 8), "key": (1, 4, 65, 8)},
        ),
        (("score", "features"), {"side": "encoder"}, {"score": (1, 64), "features": (1, 65, 32)}),
        (
            ("hidden", "score", "features"),
            {"side": "entry"},
            {"hidden": (1, 64, 64), "score": (1, 64), "features": (1, 64, 32)},
        ),
    ],
    ids=["decoder", "encoder", "encoder, tapped", "entry"],
)  # fmt: skip
def test_a_score_is_told_what_it_needs(needs: Any, more: dict[str, Any], shapes: dict[str, Any]) -> None:
    site = seen_by(needs, **more)
    for name, shape in shapes.items():
        assert tuple(getattr(site, name).shape) == shape, name
    others = {"query", "key", "value", "score", "features", "before", "whole", "entry", "text", "last"} - set(needs)
    assert all(getattr(site, name) is None for name in others)


# Taps


def test_a_stage_behind_the_projector_keeps_the_encoder_as_it_is() -> None:
    """All candidates go through it; the selection is in the program around it."""
    family, plan = family_of(shared(LAYERS)), schedule("holov")
    module = Vision(family.patches, encoder("holov"), family.projector, [plan.vision.of_segment(0)], plan.layout[0], True)
    features, kept = module(models.pixels(2))
    whole = family.projector(encoder("cdpruner")(family.patches(models.pixels(2)))[0])
    assert [tuple(part.shape) for part in (features, kept)] == [(2, KEPT, 64), (2, KEPT)]
    torch.testing.assert_close(features, whole.gather(1, kept.unsqueeze(2).expand(-1, -1, 64)), rtol=0, atol=0)


def test_stages_in_the_encoder_are_counted_through() -> None:
    """What each block of ToMe keeps of what the one before kept, and for how many it stands."""
    family, plan = family_of(shared(LAYERS)), schedule("tome")
    stages = [stage.of_segment(0) for stage in plan.vision_stages]
    _, kept, sizes = Vision(family.patches, encoder("tome"), family.projector, stages, plan.layout[0], True)(models.pixels(2))
    assert kept.shape == sizes.shape == (2, KEPT) and sizes.sum(1).tolist() == [PATCHES] * 2
    assert all(a < b for row in kept.tolist() for a, b in itertools.pairwise(row))
