"""Graphs as text: a file for every pass of every program that is made, with the shapes that the schedule says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from models import optimize, shared

from vitcop_compile import ViTCoPConfig

LAYERS, BATCH, TEXT = 3, 2, 32
N, MERGED, KEPT = 23, 13, 7
CONFIG = ViTCoPConfig(budgets=(N, MERGED, KEPT, 5), shallow_layer=1, deep_layer=2, vision_layer=1, scale_layers=False)
PREFILL = ["00_captured", "01_clean", "02_prune", "03_attach_cache", "04_lower_attention"]
EXTEND = ["00_captured", "01_clean", "02_attach_cache", "03_lower_attention"]
ENCODER = ["00_captured", "01_clean", "02_truncate_encoder", "03_prune", "04_drop_prefix", "05_lower_attention"]
LINE = re.compile(r"(\w+)(?:: (\w+)\[([\d, ]*)\]|: -?\d+|) = (\w+) (\S+?)\((.*)\)")


def lines(path: Path) -> list[tuple[str, list[int] | None, str, str]]:
    """(name, shape, kind of node, what it calls) of every line."""
    found = []
    for line in path.read_text().splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        name, _, shape, kind, called, _ = match.groups()
        found.append((name, None if shape is None else [int(size) for size in shape.split(", ") if size], kind, called))
    return found


def calls(path: Path, called: str) -> list[list[int] | None]:
    return [shape for _, shape, kind, what in lines(path) if kind == "call_function" and what == called]


def inputs(path: Path) -> dict[str, list[int] | None]:
    return {name: shape for name, shape, kind, _ in lines(path) if kind == "placeholder"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return optimize(shared(LAYERS), CONFIG, dump=tmp_path_factory.mktemp("dump") / "graphs")


def rows_of(model) -> tuple[int, ...]:
    return tuple(TEXT + tokens for tokens in model.schedule.group_tokens())


@pytest.fixture(scope="module")
def exported(model) -> list[torch.export.ExportedProgram]:
    """Those of a prompt with one image, one with two behind it, text and a token."""
    programs, rows = model.programs, rows_of(model)
    assert not programs.dump.exists()  # until a program is made
    made = [programs.export_vision(BATCH)]
    assert sorted(path.name for path in programs.dump.iterdir()) == ["encoder"]
    made.append(programs.export_prefill(BATCH, TEXT, 1, rows))
    made.append(programs.export_prefill(BATCH, TEXT, 2, tuple(3 * count for count in rows), filled=True))
    return [*made, *(programs.export_extend(BATCH, tokens, rows) for tokens in (TEXT, 1))]


@pytest.fixture(scope="module")
def folder(model, exported) -> Path:
    """What they leave."""
    return model.programs.dump


def test_every_pass_of_every_program_is_a_file(folder) -> None:
    expected = {
        "encoder": ENCODER,
        "prefill_1": PREFILL,
        "prefill_2_filled": PREFILL,
        "extend_1": EXTEND,
        f"extend_{TEXT}": EXTEND,
    }
    found = {part.name: sorted(path.stem for path in part.iterdir()) for part in folder.iterdir()}
    assert found == expected
    assert {path.suffix for path in folder.rglob("*.*")} == {".txt"}


def test_shapes_of_prefill(model, folder) -> None:
    lengths = list(model.schedule.kv_rows(TEXT))
    assert lengths == [TEXT + N, TEXT + MERGED, TEXT + KEPT]
    part = folder / "prefill_1"
    # Before the pass that prunes every layer sees the whole prompt, and has no kernel yet.
    whole = [[BATCH, 4, TEXT + N, 16]] * LAYERS
    assert calls(part / "01_clean.txt", "attention.default") == whole
    assert len(inputs(part / "01_clean.txt")) == 2
    for name in PREFILL[2:]:
        pruned = [shape for n, shape, _, _ in lines(part / f"{name}.txt") if n.startswith("getitem")]
        # Of each stage: hidden state, rows that stay, where the visual ones are, which they are, clusters.
        first, second = ([BATCH, tokens] for tokens in (MERGED, KEPT))
        assert [BATCH, TEXT + MERGED, 64] in pruned and [BATCH, TEXT + KEPT, 64] in pruned
        assert pruned.count(first) >= 2 and pruned.count(second) >= 1
        target = "sdpa" if name == PREFILL[-1] else "attention.default"
        found = calls(part / f"{name}.txt", target)
        assert found == [[BATCH, 4, length, 16] for length in lengths]
    given = inputs(part / "04_lower_attention.txt")
    assert given["visual"] == given["state_0"] == [BATCH, N]
    assert [given[f"key_{layer}"] for layer in range(LAYERS)] == [[BATCH, 4, length, 16] for length in lengths]
    assert len(calls(part / "03_attach_cache.txt", "fill_rows")) == 2 * LAYERS


def test_shapes_of_a_later_prompt(model, folder) -> None:
    lengths = list(model.schedule_of(2).kv_rows(TEXT))
    path = folder / "prefill_2_filled" / "04_lower_attention.txt"
    assert calls(path, "sdpa_cached") == [[BATCH, 4, length, 16] for length in lengths]
    assert calls(path, "cache_rows") == [[BATCH, length] for length in lengths]
    held = [[BATCH, 4, 3 * rows, 16] for rows in model.schedule.kv_rows(TEXT)]
    assert calls(path, "write_rows") == [shape for shape in held for _ in "kv"]
    given = inputs(path)
    assert given["visual"] == [BATCH, 2 * N] and given["length"] == [BATCH] and given["removed"] == [LAYERS, BATCH]


def test_shapes_of_extend(folder) -> None:
    for tokens in (1, TEXT):
        part = folder / f"extend_{tokens}"
        marks = calls(part / "02_attach_cache.txt", "attend")
        assert marks == calls(part / "03_lower_attention.txt", "sdpa_cached") == [[BATCH, 4, tokens, 16]] * LAYERS
        assert inputs(part / "03_lower_attention.txt")["removed"] == [LAYERS, BATCH]


def test_shapes_of_the_encoder(folder) -> None:
    part = folder / "encoder"
    whole, pruned = [BATCH, 4, 65, 8], [BATCH, 4, 1 + N, 8]
    assert calls(part / "01_clean.txt", "attention.default") == [whole] * 4
    assert calls(part / "02_truncate_encoder.txt", "attention.default") == [whole] * 3
    assert calls(part / "03_prune.txt", "attention.default") == [whole, whole, pruned]
    assert calls(part / "05_lower_attention.txt", "sdpa") == [whole, whole, pruned]
    assert [BATCH, N, 32] in calls(part / "04_drop_prefix.txt", "getitem")


def test_no_shape_is_a_symbol(folder) -> None:
    for path in folder.rglob("*.txt"):
        assert len(lines(path)) > 50 and not re.search(r"\bs\d+\b", path.read_text())


def test_dumping_changes_nothing(model, exported) -> None:
    plain = optimize(shared(LAYERS), CONFIG).programs
    assert plain.dump is None
    for dumped, program in (
        (exported[0], plain.export_vision(BATCH)),
        (exported[-1], plain.export_extend(BATCH, 1, rows_of(model))),
    ):
        found, expected = ([(node.name, str(node.target)) for node in made.graph.nodes] for made in (dumped, program))
        assert found == expected


@pytest.mark.slow
def test_other_ways_to_make_programs(tmp_path) -> None:
    """Programs apart from their caches, dense ones, and those of a model that only has shapes."""
    programs = optimize(shared(LAYERS), CONFIG, dump=str(tmp_path / "a")).programs
    programs.export_prefill(1, TEXT, in_place=False)
    programs.export_prefill(1, TEXT, 1, (99, 89, 79), filled=True, in_place=False)
    programs.export_extend(1, 2, (99, 89, 79), in_place=False)
    assert [path.stem for path in sorted((tmp_path / "a" / "prefill_1").iterdir())] == PREFILL
    assert [path.stem for path in sorted((tmp_path / "a" / "prefill_1_filled").iterdir())] == PREFILL[:-1]
    apart = tmp_path / "a" / "extend_2" / "02_attach_cache.txt"
    assert calls(apart, "attend_apart") == [[1, 4, 2, 16]] * LAYERS
    dense = optimize(shared(LAYERS), ViTCoPConfig.dense(), dump=tmp_path / "b").programs
    dense.export_vision(1)
    dense.export_prefill(1, TEXT)
    assert calls(tmp_path / "b" / "prefill_1" / "04_lower_attention.txt", "sdpa") == [[1, 4, TEXT + 64, 16]] * LAYERS
    # Modules that are not exported have no example to take shapes from.
    before = sorted(tmp_path.rglob("*"))
    dense.prefill_module(2)
    assert sorted(tmp_path.rglob("*")) == before


def test_generate_writes_what_it_makes(tmp_path) -> None:
    model = optimize(shared(LAYERS), CONFIG, dump=tmp_path / "graphs", prompt_buckets=(TEXT,))
    assert not (tmp_path / "graphs").exists()
    model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=2, do_sample=False)
    assert sorted(path.name for path in (tmp_path / "graphs").iterdir()) == ["extend_1", f"extend_{TEXT}"]
