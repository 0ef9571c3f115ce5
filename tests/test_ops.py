"""Every operation against its naive reference, at its edges, and as an exported graph."""

import math

import naive
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from vitcop_compile import ops
from vitcop_compile.ops.indexing import compact, put_rows, take_along, take_rows
from vitcop_compile.ops.saliency import attention_received

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SEEDS = st.integers(0, 2**32 - 1)
# Multiples of 1/8 below 16: exact in every dtype used here, and so are their squared distances in fp64.
STEP, BOUND = 0.125, 15.875


def quantized(rng: np.random.Generator, *shape: int, scale: float = 3.0) -> np.ndarray:
    return np.clip(np.round(rng.normal(0, scale, shape) / STEP) * STEP, -BOUND, BOUND).astype(np.float32)


# Saliency


@given(SEEDS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_cls_saliency(seed: int, batch: int, heads: int, patches: int, width: int, prefix: int) -> None:
    rng = np.random.default_rng(seed)
    query, key = rng.normal(0, 2, (2, batch, heads, prefix + patches, width)).astype(np.float32)
    found = ops.cls_saliency(torch.from_numpy(query), torch.from_numpy(key), width**-0.5, prefix)
    assert found.shape == (batch, patches) and found.dtype == torch.float32
    expected = [naive.cls_saliency(query[b], key[b], width**-0.5, prefix) for b in range(batch)]
    assert torch.allclose(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cls_saliency_is_computed_in_fp32(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(3)
    query, key = quantized(rng, 2, 1, 2, 7, 4)
    found = ops.cls_saliency(torch.from_numpy(query).to(dtype), torch.from_numpy(key).to(dtype), 0.5)
    assert found.dtype == torch.float32
    expected = torch.tensor(naive.cls_saliency(query[0], key[0], 0.5), dtype=torch.float64)
    assert torch.allclose(found[0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("prefix", [0, 4, 9])
def test_cls_saliency_refuses_a_prefix_that_does_not_fit(prefix: int) -> None:
    key = torch.zeros(1, 2, 4, 3)
    with pytest.raises(ValueError, match=f"prefix={prefix} does not fit 4 tokens"):
        ops.cls_saliency(key, key, 1.0, prefix)


@given(SEEDS, st.integers(1, 3), st.integers(1, 6), st.integers(1, 9), st.integers(1, 5), st.sampled_from(DTYPES))
def test_key_norm(seed: int, batch: int, heads: int, n: int, width: int, dtype: torch.dtype) -> None:
    key = quantized(np.random.default_rng(seed), batch, heads, n, width)
    found = ops.key_norm(torch.from_numpy(key).to(dtype))
    assert found.shape == (batch, n) and found.dtype == torch.float32
    expected = torch.tensor([naive.key_norm(key[b]) for b in range(batch)], dtype=torch.float64)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_key_norm_is_the_norm_of_the_mean_and_blind_to_rotation() -> None:
    key = torch.randn(2, 4, 5, 6)
    angle = torch.rand(5, 3) * 2 * math.pi
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    rotated = key * cos + torch.cat((-key[..., 3:], key[..., :3]), -1) * sin
    assert torch.allclose(ops.key_norm(rotated), ops.key_norm(key), atol=1e-5)
    assert not torch.allclose(key.norm(dim=-1).mean(1), ops.key_norm(key), atol=0.1)


@given(SEEDS, st.integers(1, 2), st.integers(1, 3), st.integers(1, 9), st.integers(0, 2), st.integers(1, 4))
def test_attention_received(seed: int, batch: int, heads: int, n: int, prefix: int, chunk: int) -> None:
    """Against every query's softmax in a loop; the chunk that queries are looked at in changes nothing."""
    rng = np.random.default_rng(seed)
    query, key = (quantized(rng, batch * heads * (prefix + n), 4).reshape(batch, heads, prefix + n, 4) for _ in range(2))
    found = attention_received(torch.from_numpy(query), torch.from_numpy(key), 0.7, prefix, chunk=chunk)
    assert found.shape == (batch, n) and found.dtype == torch.float32
    for sample in range(batch):
        total = [0.0] * (prefix + n)
        for head in range(heads):
            for q in query[sample, head].astype(np.float64):
                shares = [math.exp(0.7 * sum(a * b for a, b in zip(q, k))) for k in key[sample, head].astype(np.float64)]
                total = [a + b / sum(shares) for a, b in zip(total, shares, strict=True)]
        expected = torch.tensor(total[prefix:]) / (heads * (prefix + n))
        assert torch.allclose(found[sample], expected, atol=1e-6)
    # Rows of padding, whatever they hold, change nothing.
    padded = [torch.cat((torch.from_numpy(rows), torch.full((batch, heads, 3, 4), 9.0)), 2) for rows in (query, key)]
    real = torch.arange(prefix + n + 3).expand(batch, -1) < prefix + n
    assert torch.allclose(attention_received(*padded, 0.7, prefix, real, chunk)[:, :n], found, atol=1e-6)


# Clustering


def features_with_duplicates(rng: np.random.Generator, n: int, distinct: int, width: int) -> np.ndarray:
    rows = quantized(rng, distinct, width, scale=8 / math.sqrt(2 * width))
    return rows[rng.integers(0, distinct, n)] if distinct < n else rows[:n]


def grid_positions(rng: np.random.Generator, n: int) -> np.ndarray:
    patches = np.sort(rng.choice(576, n, replace=False))
    return (np.stack((patches // 24, patches % 24), -1) / 24).astype(np.float32)


@given(
    SEEDS, st.integers(1, 3), st.integers(1, 24), st.integers(1, 24), st.integers(2, 9), st.booleans(),
    st.sampled_from([(8.0, 0.6), (4.0, 0.2), (2.5, 0.35)]), st.sampled_from(DTYPES), st.data(),
)  # fmt: skip
def test_density_peaks(seed, batch, n, distinct, width, planar, setting, dtype, data) -> None:
    (density_width, reach), centers = setting, data.draw(st.integers(1, n))
    rng = np.random.default_rng(seed)
    features = np.stack([features_with_duplicates(rng, n, distinct, width) for _ in range(batch)])
    positions = np.stack([grid_positions(rng, n) for _ in range(batch)]) if planar else None
    expected = [
        naive.density_peaks(features[b], None if positions is None else positions[b], centers, density_width, reach)
        for b in range(batch)
    ]
    # Values that differ by less than fp32 resolves are no specification of an order; equal ones are, but for densities of
    # different points, which add the same terms in another order.
    assume(min(sample.margin for sample in expected) > 1e-5)
    for rows, sample in zip(features.tolist(), expected):
        assume(len(set(sample.rho)) == len(set(map(tuple, rows))))
    found = ops.density_peaks(
        torch.from_numpy(features).to(dtype),
        None if positions is None else torch.from_numpy(positions),
        centers,
        density_width,
        reach,
    )
    assert found.dtype == torch.int64
    assert found.tolist() == [sample.labels for sample in expected]


@pytest.mark.parametrize("width", [64, 1024])
def test_density_peaks_of_equal_rows_of_any_value(width: int) -> None:
    rng = np.random.default_rng(0)
    wrong, tried = [], 0
    for trial in range(20):
        features = rng.normal(0, 1, (12, width)).astype(np.float32)[rng.integers(0, 12, 40)]
        expected = naive.density_peaks(features, None, 10, density_width=width**0.5, reach=0.6)
        if expected.margin <= 1e-5:
            continue  # closer than fp32 resolves
        tried += 1
        if (
            ops.density_peaks(torch.from_numpy(features)[None], None, 10, density_width=width**0.5)[0].tolist()
            != expected.labels
        ):
            wrong.append(trial)
    assert tried >= 10 and not wrong


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_density_peaks_of_equal_points_goes_by_index(n: int) -> None:
    features = torch.full((2, n, 5), 1.375)
    for centers in {1, (n + 1) // 2, n}:
        # Center 0 is everybody's nearest.
        assert ops.density_peaks(features, None, centers).tolist() == [[*range(centers), *[0] * (n - centers)]] * 2


@pytest.mark.parametrize("planar", [True, False])
def test_density_peaks_leaves_cycles_and_what_hangs_from_them_unassigned(planar: bool) -> None:
    # Pairs of twins far apart; the densest group takes the only center, each other pair points at itself.
    features = torch.tensor([0.0, 0, 0, 100, 100, 200, 200, 300]).reshape(1, 8, 1)
    positions = torch.stack((torch.arange(8) / 8, torch.zeros(8)), -1)[None] if planar else None
    expected = naive.density_peaks(
        features[0].numpy(), None if positions is None else positions[0].numpy(), centers=1, density_width=8, reach=0.2
    )
    assert -1 in expected.labels
    assert ops.density_peaks(features, positions, 1, reach=0.2)[0].tolist() == expected.labels


def test_density_peaks_follows_a_chain_of_any_length() -> None:
    # Density falls along a line, so every point's nearest denser one is its left neighbour: one chain of n - 1 links.
    n = 65
    features = torch.cumsum(1 + torch.arange(n) / 64, 0).reshape(1, n, 1)
    expected = naive.density_peaks(features[0].numpy(), None, 1, density_width=200, reach=1)
    chain, links = expected.labels.index(0), 0
    for start in range(n):
        at, steps = start, 0
        while at != chain and steps < n:
            at, steps = expected.nearest[at], steps + 1
        links = max(links, steps)
    assert links > 32 and set(expected.labels) == {0}
    assert ops.density_peaks(features, None, 1, density_width=200)[0].tolist() == expected.labels


@pytest.mark.parametrize("centers", [0, -1, 5])
def test_density_peaks_refuses_centres_out_of_range(centers: int) -> None:
    with pytest.raises(ValueError, match=f"centers={centers} is out of range for 4 tokens: choose 1 to 4"):
        ops.density_peaks(torch.zeros(1, 4, 2), None, centers)


# Reduction

LABELS = st.sampled_from([-1, 0, 1, 2, 3, 17, -(2**40), 2**62])


@st.composite
def merges(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[list[int]], int]:
    batch, n, width = draw(st.integers(1, 3)), draw(st.integers(1, 24)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(SEEDS))
    labels = st.lists(LABELS, min_size=n, max_size=n) | st.permutations(range(n))  # few clusters, or only singletons
    # Whole numbers: sums are exact in any order, and ties abound.
    saliency = rng.integers(0, draw(st.integers(1, 40)), (batch, n)).astype(np.float32)
    budget = draw(st.sampled_from([1, n]) | st.integers(1, n))
    return quantized(rng, batch, n, width), saliency, [list(draw(labels)) for _ in range(batch)], budget


@given(merges(), st.sampled_from(DTYPES))
def test_merge_by_cluster(case: tuple, dtype: torch.dtype) -> None:
    hidden, saliency, labels, budget = case
    rows, index = ops.merge_by_cluster(
        torch.from_numpy(hidden).to(dtype), torch.from_numpy(saliency).to(dtype), torch.tensor(labels), budget
    )
    assert rows.dtype == dtype and index.dtype == torch.int64
    assert rows.shape == (*hidden.shape[:1], budget, hidden.shape[2])
    for b in range(len(labels)):
        expected_rows, expected_index = naive.merge_by_cluster(hidden[b], saliency[b], labels[b], budget)
        assert index[b].tolist() == expected_index
        # Computed in fp32 and rounded once: within half a unit in the last place of the input's type.
        expected = torch.from_numpy(expected_rows)
        assert torch.allclose(rows[b].double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(
    ("labels", "budget", "expected"),
    [
        pytest.param([0, 0, 0, 1, 1, 1], 1, {3: 4 + 3.5}, id="all in one, at the middle member"),
        pytest.param([4, 4, 9, 9, 7, 7], 2, {1: 2 + 1.5, 4: 5 + 4.5}, id="sums tie: the first cluster goes alone"),
        pytest.param([0, 1, 2, 3], 4, {0: 2, 1: 4, 2: 6, 3: 8}, id="singletons are doubled"),
        pytest.param([-1, -1, 3, -1, 3], 2, {1: 2 + 7 / 3, 4: 5 + 4}, id="-1 is a cluster"),
        pytest.param([5, 5, 5, 5], 3, {0: 1, 1: 2, 3: 4 + 3.5}, id="tokens tie: the lowest indices are kept"),
    ],
)
def test_merge_by_cluster_by_hand(labels: list[int], budget: int, expected: dict[int, float]) -> None:
    n = len(labels)
    hidden = torch.arange(1.0, n + 1).reshape(1, n, 1)
    rows, index = ops.merge_by_cluster(hidden, torch.ones(1, n), torch.tensor([labels]), budget)
    assert index.tolist() == [list(expected)]
    assert torch.allclose(rows.flatten(), torch.tensor(list(expected.values()), dtype=torch.float32))


@given(SEEDS, st.integers(1, 2), st.integers(2, 4), st.integers(1, 8), st.data())
def test_images_of_a_prompt_share_a_budget_and_keep_their_clusters(seed, batch, images, each, data) -> None:
    n = images * each
    budget = data.draw(st.sampled_from([1, n]) | st.integers(1, n))
    rng = np.random.default_rng(seed)
    hidden, saliency = quantized(rng, batch, n, 3), rng.integers(0, 9, (batch, n)).astype(np.float32)
    labels = rng.integers(-1, 3, (batch, n))
    rows, index = ops.merge_by_cluster(*map(torch.from_numpy, (hidden, saliency, labels)), budget, images=images)
    for b in range(batch):
        apart = [10 * (i // each) + label for i, label in enumerate(labels[b].tolist())]
        expected_rows, expected_index = naive.merge_by_cluster(hidden[b], saliency[b], apart, budget)
        assert index[b].tolist() == expected_index
        assert torch.allclose(rows[b].double(), torch.from_numpy(expected_rows), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("images", [0, -1, 2])
def test_merge_by_cluster_refuses_images_of_different_sizes(images: int) -> None:
    with pytest.raises(ValueError, match=f"images={images} does not divide 5 tokens"):
        ops.merge_by_cluster(torch.zeros(1, 5, 2), torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int64), 2, images)


@given(SEEDS, st.integers(1, 3), st.integers(1, 16), st.sampled_from(DTYPES), st.data())
def test_keep_lowest(seed: int, batch: int, n: int, dtype: torch.dtype, data: st.DataObject) -> None:
    budget = data.draw(st.sampled_from([1, n]) | st.integers(1, n))
    saliency = np.random.default_rng(seed).integers(0, 5, (batch, n)).astype(np.float32)
    index = ops.keep_lowest(torch.from_numpy(saliency).to(dtype), budget)
    assert index.dtype == torch.int64
    assert index.tolist() == [naive.keep_lowest(row, budget) for row in saliency]


@pytest.mark.parametrize("budget", [0, -3, 6])
def test_reductions_refuse_a_budget_out_of_range(budget: int) -> None:
    hidden, saliency, labels = torch.zeros(1, 5, 2), torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.int64)
    message = f"budget={budget} is out of range for 5 tokens: choose 1 to 5"
    with pytest.raises(ValueError, match=message):
        ops.keep_lowest(saliency, budget)
    with pytest.raises(ValueError, match=message):
        ops.merge_by_cluster(hidden, saliency, labels, budget)


# Indexing


@given(SEEDS, st.integers(1, 3), st.integers(1, 10), st.data())
def test_compaction_and_rows(seed: int, batch: int, n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    rng = np.random.default_rng(seed)
    chosen = np.stack([np.sort(rng.choice(n, count, replace=False)) for _ in range(batch)])
    mask = np.zeros((batch, n), dtype=bool)
    np.put_along_axis(mask, chosen, True, 1)
    index, slot = compact(torch.from_numpy(mask), count)
    assert index.tolist() == chosen.tolist()
    assert slot.gather(1, index).tolist() == [list(range(count))] * batch

    rows = rng.normal(size=(batch, n, 2))
    assert take_rows(torch.from_numpy(rows), index).tolist() == [
        [rows[b][i].tolist() for i in chosen[b]] for b in range(batch)
    ]
    put = put_rows(torch.from_numpy(rows), index, torch.zeros(batch, count, 2))
    assert np.array_equal(put.numpy(), np.where(mask[..., None], 0, rows))
    # A single sample stands for the batch, whatever the dimension.
    shared = rng.normal(size=(1, 2, n, 3))
    taken = take_along(torch.from_numpy(shared), index, 2)
    assert np.array_equal(taken.numpy(), np.stack([shared[0][:, chosen[b]] for b in range(batch)]))


# Export


class Operation(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor):
        return self.function(*inputs)


B, N, D = 2, 32, 48
EXPORTS = {
    "cls_saliency": (lambda q, k: ops.cls_saliency(q, k, 0.5), (torch.randn(B, 3, N, 4), torch.randn(B, 3, N, 4))),
    "key_norm": (ops.key_norm, (torch.randn(B, 3, N, 4),)),
    "density_peaks": (lambda x, p: ops.density_peaks(x, p, 5), (torch.randn(B, N, D), torch.rand(B, N, 2))),
    "merge_by_cluster": (
        lambda h, s, c: ops.merge_by_cluster(h, s, c, 9),
        (torch.randn(B, N, D), torch.rand(B, N), torch.arange(N).remainder(7).repeat(B, 1)),
    ),
    "keep_lowest": (lambda s: ops.keep_lowest(s, 9), (torch.rand(B, N),)),
    "attention_received": (
        lambda q, k: attention_received(q, k, 0.5, chunk=5),
        (torch.randn(B, 2, N, D), torch.randn(B, 2, N, D)),
    ),
}


def exported(name: str) -> torch.export.ExportedProgram:
    function, inputs = EXPORTS[name]
    return torch.export.export(Operation(function), inputs, strict=False).run_decompositions()


def values(node: torch.fx.Node) -> list:
    """What a node makes: tensors, or sizes if there are any."""
    made = node.meta.get("val")
    return [value for value in (made if isinstance(made, tuple | list) else [made]) if value is not None]


def as_tuple(result: Tensor | tuple) -> tuple:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", EXPORTS)
def test_export_is_static_and_reads_no_data(name: str) -> None:
    function, inputs = EXPORTS[name]
    program = exported(name)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    data_dependent = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    forbidden = ("_local_scalar_dense", "nonzero", "_assert_scalar", "sym_")
    for node in calls:
        assert not data_dependent.intersection(getattr(node.target, "tags", ())), node.target
        assert not any(word in str(node.target) for word in forbidden), node.target
        assert all(isinstance(value, Tensor) for value in values(node)), f"{node} is a size"
        assert all(isinstance(size, int) for value in values(node) for size in value.shape), f"{node} has a symbol"
    assert calls and any(values(node) for node in calls)
    for found, expected in zip(as_tuple(program.module()(*inputs)), as_tuple(function(*inputs)), strict=True):
        assert torch.equal(found, expected)


def test_density_peaks_never_holds_all_differences() -> None:
    sizes = [value.numel() for node in exported("density_peaks").graph.nodes for value in values(node)]
    assert B * N * N in sizes
    assert max(sizes) <= B * N * max(N, D)


def largest_value(images: int) -> int:
    """Elements of the largest tensor that both decoder stages make for the tokens of `images` images."""

    def both(hidden: Tensor, saliency: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        merged, index = ops.merge_by_cluster(hidden, saliency, labels, 9 * images, images)
        return merged, index, ops.keep_lowest(saliency.gather(1, index), 3 * images)

    n = images * N
    inputs = torch.randn(1, n, 4), torch.rand(1, n), torch.arange(n).remainder(7).reshape(1, n)
    program = torch.export.export(Operation(both), inputs, strict=False).run_decompositions()
    return max(value.numel() for node in program.graph.nodes for value in values(node))


def test_reductions_are_linear_in_images() -> None:
    assert [largest_value(images) for images in (1, 2, 8, 32)] == [N * N * images for images in (1, 2, 8, 32)]
