"""Exported programs: static, free of data-dependent operators, exactly as large as the schedule says."""

from __future__ import annotations

import collections
import dataclasses
import operator
import re

import pytest
import torch
from models import captured, pixels, shared
from torch._inductor.utils import run_and_get_code
from torch.export import ExportedProgram

from vitcop_compile import RewriteError, ViTCoPConfig
from vitcop_compile.backends import backend_of
from vitcop_compile.families import family_of
from vitcop_compile.programs import Programs

# Lengths per layer 101, 85, 69: no two of all these sizes agree, nor with a width of the model.
LAYERS, BATCH, TOKENS, N, MERGED, KEPT, CENTERS, ROOM = 6, 3, 101, 43, 27, 11, 5, 22
SHALLOW, DEEP, SCORED = 2, 4, 1
LENGTHS = [TOKENS, TOKENS, TOKENS - N + MERGED, TOKENS - N + MERGED, TOKENS - N + KEPT, TOKENS - N + KEPT]
FORBIDDEN = (".item", "local_scalar", "nonzero", "masked_select", "unique", "sym_", "_assert_scalar", "_assert_async")
SDPA = torch.ops.aten.scaled_dot_product_attention.default


@pytest.fixture(scope="module")
def programs():
    config = ViTCoPConfig(
        budgets=(N, MERGED, KEPT, CENTERS),
        shallow_layer=SHALLOW,
        deep_layer=DEEP,
        vision_layer=SCORED,
        scale_layers=False,
    )
    model = shared(LAYERS)
    family = family_of(model)
    return Programs(family, captured(model), config.schedule(family.shape))


@pytest.fixture(scope="module")
def vision(programs):
    return programs.export_vision(BATCH)


@pytest.fixture(scope="module")
def prefill(programs):
    return programs.export_prefill(BATCH, TOKENS)


@pytest.fixture(scope="module")
def decode(programs):
    return programs.export_decode(BATCH, TOKENS + ROOM)


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
    return [tuple(value.meta["val"].shape) for value in next(iter(reversed(program.graph.nodes))).args[0]]


def operators(program: ExportedProgram) -> collections.Counter:
    return collections.Counter(str(node.target) for node in nodes(program))


@pytest.mark.parametrize("name", ["vision", "prefill", "decode"])
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


def test_prefill_holds_no_token_by_token_matrix(prefill):
    squares = [(where, tuple(value.shape)) for where, value in tensors(prefill) if value.dim() > 1]
    assert any(shape[-2] == TOKENS for _, shape in squares)
    for where, shape in squares:
        assert not any(shape[-2] == shape[-1] == length for length in {*LENGTHS, TOKENS - N}), (where, shape)
        assert shape.count(TOKENS) <= 1, (where, shape)
    # Merging compares the visual tokens with each other, and nothing else is compared.
    assert {shape[-1] for _, shape in squares if shape[-1] == shape[-2]} - {1} == {N}


def test_softmax_is_inside_attention(vision, prefill, decode):
    def softmaxes(program):
        return sum(count for name, count in operators(program).items() if "softmax" in name)

    assert (softmaxes(vision), softmaxes(prefill), softmaxes(decode)) == (1, 0, 0)
    (node,) = [n for n in nodes(vision) if "softmax" in str(n.target)]
    # Only the CLS row: [B, 1 + patches, heads].
    assert tuple(node.meta["val"].shape) == (BATCH, 65, 4)
    assert [len(nodes(p, SDPA)) for p in (vision, prefill, decode)] == [3, LAYERS, LAYERS]


def test_attention_masks(vision, prefill, decode):
    def arguments(node):
        names = [argument.name for argument in node.target._schema.arguments]
        return dict(zip(names, node.args)) | node.kwargs

    for node in nodes(vision, SDPA):
        assert arguments(node).get("attn_mask") is None and not arguments(node).get("is_causal")
    for node in nodes(prefill, SDPA):
        assert arguments(node).get("attn_mask") is None and arguments(node)["is_causal"] is True
    for node, length in zip(nodes(decode, SDPA), LENGTHS):
        mask = arguments(node)["attn_mask"].meta["val"]
        assert tuple(mask.shape) == (BATCH, 1, 1, length + ROOM) and mask.dtype == torch.bool


def test_vision_shapes(vision):
    """Layers up to the scoring one see every patch, later ones those kept; the layer behind the features is gone."""
    queries = [tuple(node.args[0].meta["val"].shape) for node in nodes(vision, SDPA)]
    assert queries == [(BATCH, 4, 1 + (64 if layer <= SCORED else N), 8) for layer in range(3)]
    assert outputs(vision) == [(BATCH, N, 64), (BATCH, N), (BATCH, N)]


def test_prefill_shapes(programs, prefill):
    found = outputs(prefill)
    assert found[:3] == [(BATCH, 1, 96), (BATCH, MERGED), (BATCH, KEPT)]
    assert found[3:] == [(BATCH, 4, length, 16) for length in LENGTHS for _ in "kv"]
    schedule = dataclasses.replace(programs.schedule, text_tokens=TOKENS - N)
    assert list(schedule.kv_rows()) == LENGTHS
    assert [tuple(node.args[0].meta["val"].shape)[2] for node in nodes(prefill, SDPA)] == LENGTHS
    # The head sees one row per prompt.
    assert tuple(nodes(prefill, torch.ops.aten.linear.default)[-1].args[0].meta["val"].shape) == (BATCH, 1, 64)


def test_decode_shapes(programs, decode):
    assert outputs(decode)[-1] == (BATCH, 1, 96)
    placeholders = [n for n in decode.graph.nodes if n.op == "placeholder"]
    caches = [tuple(node.meta["val"].shape) for node in placeholders[-2 * LAYERS :]]
    assert caches == [(BATCH, 4, length + ROOM, 16) for length in LENGTHS for _ in "kv"]


@torch.no_grad()
def test_inductor_copies_no_cache(programs, decode):
    """It writes where the cache is: no buffer of a cache's shape is made, as one would be to copy it out and back."""
    _, (code,) = run_and_get_code(backend_of("inductor")(decode), *programs.decode_inputs(BATCH, TOKENS + ROOM))
    made = {tuple(map(int, shape.split(", "))) for shape in re.findall(r"empty_strided_cpu\(\(([\d, ]+)\)", code)}
    assert made and not made & {(BATCH, 4, length + ROOM, 16) for length in LENGTHS}


def test_decode_mutates_exactly_its_caches(programs, decode):
    """In the graph, by signature once functionalised, and when run."""
    names = [n.name for n in decode.graph.nodes if n.op == "placeholder"][-2 * LAYERS :]
    in_place = [n for n in nodes(decode) if isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable]
    assert [node.args[0].name for node in in_place] == names
    assert {str(node.target) for node in in_place} == {"aten.index_put_.default"}
    signature = decode.run_decompositions({}).graph_signature
    assert sorted(signature.user_inputs_to_mutate.values()) == sorted(names) and not signature.buffers_to_mutate

    example = list(programs.decode_inputs(BATCH, TOKENS + ROOM))
    lengths = torch.tensor([80, 101, 122])
    inputs = [torch.full((BATCH, 1), 7), lengths, example[2], *(torch.randn_like(t) for t in example[3:])]
    before = [tensor.clone() for tensor in inputs]
    decode.module(check_guards=False)(*inputs)
    assert all(torch.equal(new, old) for new, old in zip(inputs[:3], before[:3]))
    for i, (new, old) in enumerate(zip(inputs[3:], before[3:])):
        rows = (new != old).any(-1).any(1)
        removed = TOKENS - LENGTHS[i // 2]
        assert [row.nonzero().flatten().tolist() for row in rows] == [[n - removed] for n in lengths.tolist()]


def test_prefill_and_vision_mutate_nothing(vision, prefill):
    for program in (vision, prefill):
        signature = program.run_decompositions({}).graph_signature
        assert not signature.user_inputs_to_mutate and not signature.buffers_to_mutate


def test_programs_compute_the_same_as_before_export(programs, prefill):
    module = programs.prefill_module()
    example = programs.prefill_inputs(BATCH, TOKENS)
    torch.manual_seed(2)
    inputs = (
        torch.randint(0, 95, example[0].shape),
        torch.tensor([70, 100, 88]),
        torch.randn_like(example[2]),
        torch.arange(N).repeat(BATCH, 1) + torch.tensor([[0], [20], [5]]),
        torch.randint(0, CENTERS, (BATCH, N)),
    )
    with torch.no_grad():
        for found, expected in zip(prefill.module(check_guards=False)(*inputs), module(*inputs), strict=True):
            torch.testing.assert_close(found, expected)


def test_all_logits(programs):
    """The variant for measuring: logits of every row that is left, the last of them those of the usual program."""
    inputs = programs.prefill_inputs(1, 50)
    inputs = (torch.arange(50)[None], inputs[1], torch.randn_like(inputs[2]), *inputs[3:])
    with torch.no_grad():
        every, last = programs.prefill_module(all_logits=True)(*inputs)[0], programs.prefill_module()(*inputs)[0]
    assert every.shape == (1, 50 - N + KEPT, 96) and last.shape == (1, 1, 96)
    torch.testing.assert_close(every[:, -1:], last)


def test_text_program(programs):
    dense = Programs(programs.family, programs.captured, ViTCoPConfig.dense().schedule(programs.schedule.shape))
    program = dense.export_prefill(1, 37, image=False)
    assert outputs(program) == [(1, 1, 96), *[(1, 4, 37, 16)] * (2 * LAYERS)]


def test_batches_do_not_mix(programs):
    vision = programs.export_vision(2).module(check_guards=False)
    both = vision(pixels(2))
    alone = programs.export_vision(1).module(check_guards=False)
    for sample in range(2):
        for found, expected in zip(both, alone(pixels(2)[sample : sample + 1])):
            torch.testing.assert_close(found[sample : sample + 1], expected, atol=1e-5, rtol=0)


# A schedule that does not tell the truth about the graph


def tamper(programs: Programs, **shape) -> Programs:
    schedule = dataclasses.replace(programs.schedule, shape=dataclasses.replace(programs.schedule.shape, **shape))
    return dataclasses.replace(programs, schedule=schedule)


@pytest.mark.parametrize(
    ("shape", "found", "said"),
    [
        ({"kv_heads": 2}, "(1, 4, 60, 16)", "(1, 2, 60, 16)"),
        ({"head_dim": 8}, "(1, 4, 60, 16)", "(1, 4, 60, 8)"),
    ],
)
def test_tampered_kv_shape(programs, shape, found, said):
    with pytest.raises(RewriteError) as error:
        tamper(programs, **shape).export_prefill(1, 60)
    assert found in str(error.value) and said in str(error.value) and "layer 0" in str(error.value)


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_tampered_layers(programs, layers):
    with pytest.raises(RewriteError, match=f"{layers} offsets .* {LAYERS} layers"):
        tamper(programs, layers=layers).export_decode(1, 80)


@pytest.mark.parametrize("layers", [LAYERS - 1, LAYERS + 1])
def test_tampered_layers_in_prefill(programs, layers):
    with pytest.raises(RewriteError):
        tamper(programs, layers=layers).export_prefill(1, 60)


def test_tampered_stage(programs):
    class Lying(type(programs.schedule)):
        def removed_rows(self):
            return (0, 0, N - MERGED, N - MERGED, N - KEPT, N - KEPT - 1)

    values = {f.name: getattr(programs.schedule, f.name) for f in dataclasses.fields(programs.schedule)}
    with pytest.raises(RewriteError, match="layer 5"):
        dataclasses.replace(programs, schedule=Lying(**values)).export_prefill(1, 60)


def test_tampered_grid(programs):
    dense = ViTCoPConfig.dense().schedule(dataclasses.replace(programs.schedule.shape, grid=(7, 7)))
    with pytest.raises(RewriteError, match=r"vision features.*\(1, 64\).*\(1, 49\)"):
        dataclasses.replace(programs, schedule=dense).export_vision(1)


def test_an_honest_schedule_passes(programs):
    assert outputs(tamper(programs).export_prefill(1, 60))[0] == (1, 1, 96)
