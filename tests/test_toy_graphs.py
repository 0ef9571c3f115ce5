"""Pruning of graphs of other shapes than any model's we ship."""

from __future__ import annotations

import pytest
import torch
from graphs import calls, copy
from torch import Tensor, fx, nn
from torch.export import Dim
from vitcop_compile.passes.attach_cache import attach_cache
from vitcop_compile.passes.clean import clean
from vitcop_compile.passes.lower_attention import lower_attention
from vitcop_compile.passes.prune import prune

from vitcop_compile import RewriteError
from vitcop_compile.ops.indexing import take_along
from vitcop_compile.schedule import Stage

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
    return tuple(Stage("decoder", layer, "keep_lowest", (6 - i,), (), positions) for i, layer in enumerate(layers))


def pruned(toy: Toy, stages: tuple[Stage, ...], states: int = 0) -> fx.GraphModule:
    """The graph of `toy` for prompts with nine visual tokens."""
    return prune(trace(toy), stages, (9,), states=states)


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
    module = pruned(toy, stages(1, 3, positions=positions))
    module = lower_attention(attach_cache(module, (0, 1, 1, 2), filled=False, in_place=False), "sdpa")
    x, visual = torch.randn(1, 14, WIDTH), torch.arange(3, 12)[None]
    hidden, *rest = module(x, torch.arange(14)[None], visual)
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
        pruned(Toy(step), stages(1))


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
        pruned(Forked(), stages(1))


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
        pruned(Streams(), (Stage("decoder", 2, "merge_by_cluster", (6,)),), states=1)


def test_positions_of_an_earlier_stage_are_refused():
    """Layer 1 doubles the table it got from the first stage; a second stage that renumbers cannot recompute that."""

    def step(layer, x, table, seen):
        return x, table * 2 if layer == 1 else table

    toy = Toy(step)
    pruned(toy, stages(1, 3))
    with pytest.raises(RewriteError, match="positions of an earlier stage"):
        pruned(toy, stages(1, 3, positions="index"))


def test_content_is_never_renumbered():
    """A gate computed from the hidden state crosses both cuts; it stays with its token, the table does not."""

    def step(layer, x, table, seen):
        if layer == 0:
            seen["gate"] = x.sigmoid()
        return (x * seen["gate"] if layer == 3 else x), table

    module = pruned(Toy(step), stages(1, 2, positions="index"))
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

    module = pruned(Toy(step), stages(2))
    (table,) = [gather.args[0] for gather in calls(module, take_along)]
    assert table.target is torch.ops.aten.cos.default
