"""Methods through other backends and in folders: as eager has them, which `test_methods_by_hand` compares with the book."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import families
import models
import pytest
import torch
from folders import without_collection
from models import exhaustive, shared, slow
from vitcop_compile.export import EngineModel
from vitcop_compile.passes import unroll_loops

from vitcop_compile import UnsupportedError, backends, methods
from vitcop_compile.methods import CustomMethod
from vitcop_compile.policies import Site

LAYERS, KEPT, NEAR = 3, 9, 1e-4


class Score(torch.nn.Module):
    """What is most like a direction, as if trained."""

    def __init__(self) -> None:
        super().__init__()
        self.direction = torch.nn.Linear(64, 1)
        models.randomize(self, 5)

    def forward(self, site: Site) -> torch.Tensor:
        return self.direction(site.hidden).squeeze(-1)


@cache
def method(name: str) -> Any:
    """One of each; a custom one equals itself alone."""
    if name.startswith("custom"):
        return CustomMethod(score=Score(), side=name.split()[1], layer=None if name.endswith("entry") else 1, tokens=KEPT)
    # On decoders of three layers.
    more: dict[str, Any] = {
        "fastv": {"layer": 1}, "dart": {"layer": 1}, "pyramiddrop": {"layers": (10, 20)}, "sparsevlm": {"layers": (10, 20)},
        "v2drop": {"layers": (10, 20)}, "vscan": {"window": 3},
    }  # fmt: skip
    # ToMe takes a half of what there is in each of three blocks at most.
    return methods.METHODS[name](tokens=30 if name == "tome" else KEPT, **more.get(name, {}))


@cache
def optimized(name: str, backend: str = "eager") -> Any:
    return models.optimize(shared(LAYERS), method(name), backend=backend)


def generate(model: Any, ids: Any, given: dict[str, Any], steps: int = 3, **more: Any) -> Any:
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), **given, max_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, suppress_tokens=list(range(families.START, models.VOCAB)), **more,
    )  # fmt: skip


def check(found: Any, expected: Any, groups: tuple[int, ...]) -> None:
    """What stays, what is said, logits, keys and values; groups: that of every layer."""
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=NEAR, atol=NEAR)
    ours, theirs = found.past_key_values, expected.past_key_values
    kept = [(cache.selection.kept, *cache.selection.stages) for cache in (ours, theirs)]
    for one, other in zip(*kept, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert ours.held == theirs.held
    for number, (one, other) in enumerate(zip(ours.buffers, theirs.buffers, strict=True)):
        rows = ours.held[groups[number // 2]]
        torch.testing.assert_close(one[:, :, :rows], other[:, :, :rows], rtol=NEAR, atol=NEAR)


def prompts(images: int = 1) -> tuple[torch.Tensor, dict[str, Any]]:
    rows = [models.prompt(3, 0, seed) for seed in range(images)] + [torch.tensor([models.text(6)])]
    return torch.cat(rows, 1), {"pixel_values": models.pixels(images)}


# Of each kind one that no folder below has, whose programs are the same: merging block by block, behind the projector, pivots.
FEW = ("tome", "vscan", "dart")
ALL = [name for name in methods.METHODS if name != "custom"]


@pytest.mark.covers("onnxruntime", family="llava")
@pytest.mark.parametrize(
    "name", [slow(name) if name in FEW else exhaustive(name) for name in (*ALL, "custom entry", "custom decoder")]
)
def test_onnxruntime_does_as_eager_does(name: str) -> None:
    ids, given = prompts()
    fast = optimized(name)
    check(generate(optimized(name, "onnxruntime"), ids, given), generate(fast, ids, given), fast.schedule.groups)


@pytest.mark.covers("onnxruntime", family="qwen2_5_vl")
@pytest.mark.parametrize("name", [slow("divprune"), exhaustive("visionzip"), exhaustive("sparsevlm")])
def test_onnxruntime_serves_tokens_of_any_number(name: str) -> None:
    ids, given = families.prompt("qwen2_5_vl", [2, (3, 4), 3, (4, 4), 5])
    rows = torch.tensor([ids])
    given = given | families.types(rows)
    model, own = families.model("qwen2_5_vl"), methods.METHODS[name](tokens=5)
    eager, other = (models.optimize(model, own, backend=backend) for backend in ("eager", "onnxruntime"))
    check(generate(other, rows, given), generate(eager, rows, given), eager.schedule.groups)


def test_long_loops_are_refused_where_they_are_unrolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compiled, with the reason."""
    assert unroll_loops.MOST_STEPS == 256
    monkeypatch.setattr(unroll_loops, "MOST_STEPS", KEPT - 2)
    with pytest.raises(UnsupportedError, match=r"chooses 8 tokens one by one, .* 7 is the most that is unrolled: lower"):
        models.optimize(shared(LAYERS), method("divprune"), backend="onnxruntime").on_demand.vision(1)


@pytest.mark.covers("inductor", family="llava")
@pytest.mark.parametrize("name", [slow("divprune"), exhaustive("sparsevlm")])
def test_inductor_does_as_eager_does(name: str) -> None:
    ids, given = prompts()
    fast = optimized(name)
    check(generate(optimized(name, "inductor"), ids, given, 2), generate(fast, ids, given, 2), fast.schedule.groups)


def filled(program: Any) -> tuple[torch.Tensor, ...]:
    """Random inputs of a program: words, features and caches; numbers as its examples have them."""
    examples = program.example_inputs[0]
    words = torch.randint(3, models.IMAGE, examples[0].shape) if len(examples) > 1 else torch.randn(examples[0].shape)
    return (words, *(torch.randn(one.shape) if one.is_floating_point() else one.clone() for one in examples[1:]))


def loop_of(name: str) -> Any:
    """The program that has it: of the vision side, or before the decoder's first layer, where caches are written in place."""
    made = models.optimize(shared(2), methods.METHODS[name](tokens=5)).programs
    return made.export_vision(1) if name == "divprune" else made.export_prefill(1, 6, rows=[70, 70])


def compared(one: Any, other: Any, program: Any) -> int:
    """How many inputs are written; they, and results, are the same by both."""
    given = filled(program)
    ours, theirs = ([value.clone() for value in given] for _ in "ab")
    found, expected = one(*ours), other(*theirs)
    for mine, wanted in zip((*found, *ours), (*expected, *theirs), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=NEAR, atol=NEAR)
    return sum(not torch.equal(before, after) for before, after in zip(given, ours, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["cdpruner", exhaustive("zspaprune")])
def test_loops_are_unrolled_in_programs_that_write_their_inputs(name: str) -> None:
    program = loop_of(name)
    unrolled = unroll_loops.unroll_loops(program)
    assert len(unrolled.graph_signature.user_inputs_to_mutate) == 4
    assert compared(unrolled.module(check_guards=False), program.module(check_guards=False), program) == 4


@torch.no_grad()
@pytest.mark.parametrize("name", [exhaustive("divprune"), slow("cdpruner")])
def test_aotinductor_does_as_eager_does(name: str) -> None:
    """The program with the loop, which for `cdpruner` stands before the decoder's first layer."""
    program = loop_of(name)
    written = compared(backends.aotinductor(program), program.module(check_guards=False), program)
    assert written == (0 if name == "divprune" else 4)


@pytest.mark.covers("folder", "onnxruntime", family="llava")
@pytest.mark.parametrize(
    "name", [*map(slow, ("visionzip", "fastv", "cdpruner", "custom entry")), *map(exhaustive, ("divprune", "custom decoder"))]
)
def test_a_folder_does_as_eager_does(name: str, tmp_path: Path) -> None:
    """Two turns, the second of text."""
    fast = optimized(name)
    with without_collection():
        fast.export(tmp_path / "f", max_text_len=24, max_new_tokens=16)
    engine = EngineModel.from_pretrained(tmp_path / "f")
    # Of a custom method all but its score is told, which is in the programs.
    assert type(engine.manifest.config) is type(method(name)) and engine.schedule == fast.schedule
    ids, given = prompts()
    found, expected = generate(engine, ids, given), generate(fast, ids, given)
    check(found, expected, fast.schedule.groups)
    more = torch.cat((expected.sequences, torch.tensor([models.text(5, 9)])), 1)
    later, as_expected = (
        generate(model, more, {}, past_key_values=own.past_key_values) for model, own in ((engine, found), (fast, expected))
    )
    assert torch.equal(later.sequences, as_expected.sequences)
    torch.testing.assert_close(torch.stack(later.logits), torch.stack(as_expected.logits), rtol=NEAR, atol=NEAR)


@pytest.mark.covers("folder", family="qwen2_5_vl")
@pytest.mark.parametrize("name", [exhaustive("scope"), slow("zspaprune")])
def test_a_folder_of_tokens_of_any_number_does_as_eager_does(name: str, tmp_path: Path) -> None:
    ids, given = families.prompt("qwen2_5_vl", [2, (3, 4), 6])
    rows = torch.tensor([ids])
    given = given | families.types(rows)
    fast = models.optimize(families.model("qwen2_5_vl"), methods.METHODS[name](tokens=5))
    with without_collection():
        fast.export(tmp_path / "f", layouts=fast.layouts_of(rows, **given), max_text_len=16, max_new_tokens=4)
    engine = EngineModel.from_pretrained(tmp_path / "f")
    check(generate(engine, rows, given), generate(fast, rows, given), fast.schedule.groups)
