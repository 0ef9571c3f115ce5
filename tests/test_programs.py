"""Exported programs: static, free of data-dependent operators, exactly as large as the schedule says."""

from __future__ import annotations

import collections
import dataclasses
import operator
import re

import pytest
import torch
from models import captured, pixels, shared, slow
from torch._inductor.utils import run_and_get_code
from torch.export import ExportedProgram

from vitcop_compile import RewriteError, ViTCoPConfig
from vitcop_compile.backends import backend_of
from vitcop_compile.families import family_of
from vitcop_compile.programs import Programs
from vitcop_compile.schedule import Schedule

# Lengths per layer 101, 85, 69: no two of all these sizes agree, nor with a width of the model.
LAYERS, BATCH, TEXT, N, MERGED, KEPT, CENTERS, ROOM, MORE = 6, 3, 58, 43, 27, 11, 5, 22, 7
TOKENS = TEXT + N
SHALLOW, DEEP, SCORED = 2, 4, 1
GROUPS = (TOKENS, TEXT + MERGED, TEXT + KEPT)
LENGTHS = [length for length in GROUPS for _ in "ab"]
ROWS = tuple(length + ROOM for length in GROUPS)
FORBIDDEN = (".item", "local_scalar", "nonzero", "masked_select", "unique", "sym_", "_assert_scalar", "_assert_async")
SDPA = torch.ops.aten.scaled_dot_product_attention.default
CONFIG = ViTCoPConfig(
    budgets=(N, MERGED, KEPT, CENTERS), shallow_layer=SHALLOW, deep_layer=DEEP, vision_layer=SCORED, scale_layers=False
)
ALL = ["vision", "prefill", "apart", "later", "decode", "extend"]


@pytest.fixture(scope="module")
def programs():
    model = shared(LAYERS)
    return Programs(family_of(model), captured(model), CONFIG)


@pytest.fixture(scope="module")
def vision(programs):
    return programs.export_vision(BATCH)


@pytest.fixture(scope="module")
def prefill(programs):
    return programs.export_prefill(BATCH, TEXT, 1, ROWS)


@pytest.fixture(scope="module")
def apart(programs):
    """The program of prefill that returns its keys and values."""
    return programs.export_prefill(BATCH, TEXT, in_place=False)


@pytest.fixture(scope="module")
def later(programs):
    """A prompt behind others."""
    return programs.export_prefill(BATCH, TEXT, 1, tuple(2 * rows for rows in ROWS), filled=True)


@pytest.fixture(scope="module")
def decode(programs):
    return programs.export_extend(BATCH, 1, ROWS)


@pytest.fixture(scope="module")
def extend(programs):
    return programs.export_extend(BATCH, MORE, ROWS)


def nodes(program: ExportedProgram, target=None) -> list:
    return [n for n in program.graph.nodes if n.op == "call_function" and target in (None, n.target)]


def tensors(program: ExportedProgram) -> list[tuple[str, torch.Tensor]]:
    """Every value that the graph computes."""
    found = []
    for node in nodes(program):
        value = node.meta.get("val")
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, torch.Tensor):
                found.append((node.name, item))
    return found


def outputs(program: ExportedProgram) -> list[tuple[int, ...]]:
    """Of what the caller gets."""
    found = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    return [tuple(found[name].shape) for name in program.graph_signature.user_outputs]


def caches(program: ExportedProgram) -> list[tuple[int, ...]]:
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"][-2 * LAYERS :]
    return [tuple(node.meta["val"].shape) for node in inputs]


def mutating(program: ExportedProgram) -> list:
    return [n for n in nodes(program) if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]


def operators(program: ExportedProgram) -> collections.Counter:
    return collections.Counter(str(node.target) for node in nodes(program))


@pytest.mark.parametrize("name", ALL)
def test_static_and_free_of_data_dependence(name, request):
    program = request.getfixturevalue(name)
    assert len(tensors(program)) > 50 and not program.range_constraints
    for node in program.graph.nodes:
        assert not any(word in str(node.target) for word in FORBIDDEN), node.format_node()
        for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
            assert not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool), node.format_node()
    for where, value in tensors(program):
        assert all(type(size) is int for size in value.shape), where
    # ATen all the way down: nothing of ours and no higher-order operator is left.
    targets = {node.target for node in nodes(program)} - {operator.getitem}
    assert {target.namespace for target in targets} == {"aten"}


@pytest.mark.parametrize("name", ["prefill", "apart"])
def test_prefill_holds_no_token_by_token_matrix(name, request):
    squares = [(where, tuple(value.shape)) for where, value in tensors(request.getfixturevalue(name)) if value.dim() > 1]
    assert any(shape[-2] == TOKENS for _, shape in squares)
    for where, shape in squares:
        assert not any(shape[-2] == shape[-1] == length for length in {*LENGTHS, TEXT}), (where, shape)
        assert shape.count(TOKENS) <= 1, (where, shape)
    # Merging compares the visual tokens with each other, and nothing else is compared.
    assert {shape[-1] for _, shape in squares if shape[-1] == shape[-2]} - {1} == {N}


def test_softmax_is_inside_attention(request):
    found = {name: request.getfixturevalue(name) for name in ALL}
    softmaxes = {name: [n for n in nodes(program) if "softmax" in str(n.target)] for name, program in found.items()}
    assert {name: len(each) for name, each in softmaxes.items()} == dict.fromkeys(ALL, 0) | {"vision": 1}
    # Only the CLS row: [B, 1 + patches, heads].
    assert tuple(softmaxes["vision"][0].meta["val"].shape) == (BATCH, 65, 4)
    assert [len(nodes(program, SDPA)) for program in found.values()] == [3, *[LAYERS] * 5]


def test_attention_masks(vision, prefill, apart, later, decode, extend):
    def arguments(node):
        names = [argument.name for argument in node.target._schema.arguments]
        return dict(zip(names, node.args)) | node.kwargs

    for node in nodes(vision, SDPA):
        assert arguments(node).get("attn_mask") is None and not arguments(node).get("is_causal")
    for node in (*nodes(prefill, SDPA), *nodes(apart, SDPA)):
        assert arguments(node).get("attn_mask") is None and arguments(node)["is_causal"] is True
    for program, queries, times in ((decode, [1] * LAYERS, 1), (extend, [MORE] * LAYERS, 1), (later, LENGTHS, 2)):
        for node, count, length in zip(nodes(program, SDPA), queries, LENGTHS, strict=True):
            mask = arguments(node)["attn_mask"].meta["val"]
            assert tuple(mask.shape) == (BATCH, 1, count, times * (length + ROOM)) and mask.dtype == torch.bool
            assert not arguments(node).get("is_causal")


def test_vision_shapes(vision):
    """Layers up to the scoring one see every patch, later ones those kept; the layer behind the features is gone."""
    queries = [tuple(node.args[0].meta["val"].shape) for node in nodes(vision, SDPA)]
    assert queries == [(BATCH, 4, 1 + (64 if layer <= SCORED else N), 8) for layer in range(3)]
    assert outputs(vision) == [(BATCH, N, 64), (BATCH, N), (BATCH, N)]


def test_prefill_shapes(programs, prefill, apart, later):
    schedule = programs.schedule
    assert list(schedule.kv_rows(TEXT)) == LENGTHS and schedule.prompt_tokens(TEXT) == TOKENS
    for program in (prefill, apart, later):
        assert outputs(program)[:3] == [(BATCH, 1, 96), (BATCH, MERGED), (BATCH, KEPT)]
        assert [tuple(node.args[0].meta["val"].shape)[2] for node in nodes(program, SDPA)] == LENGTHS
        # The head sees one row per prompt.
        assert tuple(nodes(program, torch.ops.aten.linear.default)[-1].args[0].meta["val"].shape) == (BATCH, 1, 64)
    assert outputs(apart)[3:] == [(BATCH, 4, length, 16) for length in LENGTHS for _ in "kv"]
    assert len(outputs(prefill)) == len(outputs(later)) == 3
    assert caches(prefill) == [(BATCH, 4, length + ROOM, 16) for length in LENGTHS for _ in "kv"]
    assert caches(later) == [(BATCH, 4, 2 * (length + ROOM), 16) for length in LENGTHS for _ in "kv"]


def test_prefill_of_several_images(programs):
    program = programs.export_prefill(1, TEXT, 2, in_place=False)
    assert outputs(program)[:3] == [(1, 1, 96), (1, 2 * MERGED), (1, 2 * KEPT)]
    lengths = [TEXT + 2 * (length - TEXT) for length in LENGTHS]
    assert outputs(program)[3:] == [(1, 4, length, 16) for length in lengths for _ in "kv"]
    pooled = dataclasses.replace(programs, method=dataclasses.replace(CONFIG, scope="pooled"))
    assert outputs(pooled.export_prefill(1, TEXT, 2, in_place=False)) == outputs(program)


def test_extend_shapes(decode, extend):
    for program in (decode, extend):
        assert outputs(program) == [(BATCH, 1, 96)]
        assert caches(program) == [(BATCH, 4, length + ROOM, 16) for length in LENGTHS for _ in "kv"]


def test_extend_apart_shapes(programs):
    program = programs.export_extend(BATCH, MORE, ROWS, in_place=False)
    assert outputs(program) == [(BATCH, 1, 96), *[(BATCH, 4, MORE, 16)] * (2 * LAYERS)]
    assert not mutating(program) and not nodes(program, SDPA)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_inductor_copies_no_cache(programs, name, request):
    """It writes where the cache is: no buffer of a cache's shape is made, as one would be to copy it out and back."""
    inputs = programs.extend_inputs(BATCH, 1, ROWS) if name == "decode" else programs.prefill_inputs(BATCH, TEXT, 1, ROWS)
    _, (code,) = run_and_get_code(backend_of("inductor")(request.getfixturevalue(name)), *inputs)
    sizes = {
        name: [int(n) for n in re.findall(r"\d+", held)] for name, held in re.findall(r"(int_array_\d+)\[\] = {(.*?)}", code)
    }
    made = {tuple(sizes[name]) for name in re.findall(r"aoti_torch_empty_strided\(\d+, (\w+),", code)}
    assert "extern" in code and (BATCH, 1, 64) in made and not made & {(BATCH, 4, length + ROOM, 16) for length in LENGTHS}


@pytest.mark.parametrize(("name", "operator"), [("prefill", "copy_"), slow("later", "index_put_"), ("extend", "index_put_")])
def test_programs_mutate_exactly_their_caches(name, operator, request):
    """In the graph, and by signature once functionalised."""
    program = request.getfixturevalue(name)
    names = [n.name for n in program.graph.nodes if n.op == "placeholder"][-2 * LAYERS :]
    assert [node.args[0].name for node in mutating(program)] == names
    assert {str(node.target) for node in mutating(program)} == {f"aten.{operator}.default"}
    signature = program.run_decompositions({}).graph_signature
    assert sorted(signature.user_inputs_to_mutate.values()) == sorted(names) and not signature.buffers_to_mutate


@pytest.mark.parametrize(("name", "count"), [("decode", 1), ("extend", MORE)])
def test_extend_writes_its_rows_and_no_others(programs, name, count, request):
    lengths, lost = torch.tensor([80, 101, 110]), torch.tensor([[0, 0, 0], [16, 3, 16], [32, 20, 32]])
    example = programs.extend_inputs(BATCH, count, ROWS)
    inputs = [torch.full((BATCH, count), 7), *example[1:2], lengths, lengths + 2, lost]
    inputs += [torch.randn_like(cache) for cache in example[5:]]
    before = [tensor.clone() for tensor in inputs]
    request.getfixturevalue(name).module(check_guards=False)(*inputs)
    assert all(torch.equal(new, old) for new, old in zip(inputs[:5], before[:5]))
    for i, (new, old) in enumerate(zip(inputs[5:], before[5:], strict=True)):
        rows, first = (new != old).any(-1).any(1), (lengths - lost[i // 4]).tolist()
        assert [row.nonzero().flatten().tolist() for row in rows] == [list(range(n, n + count)) for n in first]


def test_prefill_fills_and_clears_its_caches(programs, prefill, apart):
    example = programs.prefill_inputs(BATCH, TEXT, 1, ROWS)
    inputs = [torch.randint(0, 95, example[0].shape), *example[1:3], torch.randn_like(example[3]), *example[4:6]]
    held = [torch.full_like(cache, torch.nan) for cache in example[6:]]
    with torch.no_grad():
        results = prefill.module(check_guards=False)(*inputs, *held)
        expected = apart.module(check_guards=False)(*inputs)
    for found, value in zip(results, expected):
        torch.testing.assert_close(found, value)
    for cache, rows, length in zip(held, expected[3:], [n for n in LENGTHS for _ in "kv"], strict=True):
        torch.testing.assert_close(cache[:, :, :length], rows)
        assert not cache[:, :, length:].any()


def test_the_other_programs_mutate_nothing(vision, apart):
    for program in (vision, apart):
        signature = program.run_decompositions({}).graph_signature
        assert not signature.user_inputs_to_mutate and not signature.buffers_to_mutate


def test_programs_compute_the_same_as_before_export(programs, apart):
    module = programs.prefill_module(in_place=False)
    example = programs.prefill_inputs(BATCH, TEXT, in_place=False)
    torch.manual_seed(2)
    inputs = (
        torch.randint(0, 95, example[0].shape),
        torch.tensor([70, 100, 88]),
        example[2] + 3,
        torch.randn_like(example[3]),
        torch.arange(N).repeat(BATCH, 1) + torch.tensor([[0], [20], [5]]),
        torch.randint(0, CENTERS, (BATCH, N)),
    )
    with torch.no_grad():
        for found, expected in zip(apart.module(check_guards=False)(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(found, expected)


def test_all_logits(programs):
    """The variant for measuring: logits of every row that is left, the last of them those of the usual program."""
    inputs = programs.prefill_inputs(1, 7, in_place=False)
    inputs = (torch.arange(7 + N)[None], *inputs[1:3], torch.randn_like(inputs[3]), *inputs[4:])
    modules = [programs.prefill_module(in_place=False, all_logits=every) for every in (True, False)]
    with torch.no_grad():
        every, last = (module(*inputs)[0] for module in modules)
    assert every.shape == (1, 7 + KEPT, 96) and last.shape == (1, 1, 96)
    torch.testing.assert_close(every[:, -1:], last)


@pytest.mark.slow
def test_a_length_that_varies(programs):
    """One program for a range of text, whose budgets stay numbers."""
    program = programs.export_prefill(1, TEXT, in_place=False, least_text=5)
    module = programs.prefill_module(in_place=False)
    for text in (5, 31, TEXT):
        inputs = programs.prefill_inputs(1, text, in_place=False)
        inputs = (torch.randint(0, 95, inputs[0].shape), *inputs[1:3], torch.randn_like(inputs[3]), *inputs[4:])
        with torch.no_grad():
            for found, expected in zip(program.module()(*inputs), module(*inputs), strict=True):
                torch.testing.assert_close(found, expected)
    assert outputs(program)[1:3] == [(1, MERGED), (1, KEPT)]
    assert len(program.range_constraints) >= 1
    more = programs.export_extend(1, MORE, ROWS, in_place=False, least_tokens=2)
    for count in (2, MORE):
        inputs = programs.extend_inputs(1, count, ROWS)
        assert more.module()(*inputs)[1].shape == (1, 4, count, 16)


def test_batches_do_not_mix(programs):
    vision = programs.export_vision(2).module(check_guards=False)
    both = vision(pixels(2))
    alone = programs.export_vision(1).module(check_guards=False)
    for sample in range(2):
        for found, expected in zip(both, alone(pixels(2)[sample : sample + 1])):
            torch.testing.assert_close(found[sample : sample + 1], expected, atol=1e-5, rtol=0)


# A schedule that does not tell the truth about the graph


def tamper(programs: Programs, **shape) -> Programs:
    host = dataclasses.replace(programs.family.host, shape=dataclasses.replace(programs.family.shape, **shape))
    family = dataclasses.replace(programs.family, host=host)
    return dataclasses.replace(programs, family=family)


class Lying(Programs):
    """Programs that believe what `lie` makes of their schedule."""

    def schedule_of(self, layout):
        true = super().schedule_of(layout)
        values = {field.name: getattr(true, field.name) for field in dataclasses.fields(true)}
        return type("Lie", (Schedule,), self.lie)(**values)


def lying(programs: Programs, **lie) -> Lying:
    return type("Told", (Lying,), {"lie": lie})(programs.family, programs.captured, programs.method)


@pytest.mark.parametrize(
    ("shape", "found", "said"),
    [
        ({"kv_heads": 2}, "(1, 4, 60, 16)", "(1, 2, 60, 16)"),
        ({"head_dim": 8}, "(1, 4, 60, 16)", "(1, 4, 60, 8)"),
    ],
)
def test_tampered_kv_shape(programs, shape, found, said):
    with pytest.raises(RewriteError) as error:
        tamper(programs, **shape).export_prefill(1, 60 - N, in_place=False)
    assert found in str(error.value) and said in str(error.value) and "layer 0" in str(error.value)


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_tampered_layers(programs, layers):
    for export in (
        lambda made: made.export_prefill(1, 20),
        lambda made: made.export_extend(1, 1, (80, 70, 60)),
        lambda made: made.export_extend(1, 3, (80, 70, 60), in_place=False),
    ):
        with pytest.raises(RewriteError, match=f"{layers} groups .* {LAYERS} layers"):
            export(tamper(programs, layers=layers))


@pytest.mark.parametrize("in_place", [True, False])
def test_tampered_groups(programs, in_place):
    """Layer 5 is said to have the rows of layer 3."""
    lie = lying(programs, groups=(0, 0, 1, 1, 2, 1))
    with pytest.raises(RewriteError, match=rf"keys of layer 5 .*\(1, 4, {9 + KEPT}, 16\).*\(1, 4, {9 + MERGED}, 16\)"):
        lie.export_prefill(1, 9, 1, (9 + N,) * 3, in_place=in_place)


@pytest.mark.parametrize("in_place", [True, False])
def test_tampered_tokens(programs, in_place):
    lie = lying(programs, group_tokens=lambda self: (N, MERGED, KEPT + 1))
    with pytest.raises(RewriteError, match="keys of layer 4"):
        lie.export_prefill(1, 9, 1, (9 + N,) * 3, in_place=in_place)


def test_tampered_grid(programs):
    dense = dataclasses.replace(tamper(programs, grid=(7, 7)), method=ViTCoPConfig.dense())
    with pytest.raises(RewriteError, match=r"vision features.*\(1, 64\).*\(1, 49\)"):
        dense.export_vision(1)


def test_an_honest_schedule_passes(programs):
    assert outputs(tamper(programs).export_prefill(1, 17))[0] == (1, 1, 96)
    assert outputs(lying(programs).export_prefill(1, 17))[0] == (1, 1, 96)


def test_prefill_refuses_what_its_caches_cannot_hold(programs) -> None:
    made = programs
    least = [9 + tokens for tokens in made.schedule.group_tokens()]
    for group in range(len(least)):
        rows = [has - (i == group) for i, has in enumerate(least)]
        with pytest.raises(
            RewriteError, match=f"caches of {rows[group]} rows in group {group} hold no prompt of {least[group]}"
        ):
            made.export_prefill(1, 9, rows=rows)
    with pytest.raises(RewriteError, match="images=0: a prompt without an image is text, which export_extend takes"):
        made.export_prefill(1, 9, images=0)
