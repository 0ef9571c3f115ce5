"""Engines of other families, built for real with TensorRT-RTX, which needs no GPU to build; nothing here runs one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import models
import pytest
import test_family_llava_next_video as next_video
import tiled
import torch
from test_families import pruned
from test_tensorrt import needs_rtx
from vitcop_compile.export import Manifest, export


def _layouts(name: str, fast: Any) -> list[Any]:
    """One image without a CLS token, positions of three coordinates, a clip of three frames."""
    if name == "onevision":
        return [[fast.layout_of(56, 56)]]
    if name == "qwen2_vl":
        ids, given = families.prompt(name, [3, (3, 4), 4])
        return fast.layouts_of(torch.tensor([ids]), **given)
    ids, given = next_video.request(3)
    return fast.layouts_of(torch.tensor([ids]), **given)


_MODELS = {
    "onevision": (lambda: tiled.model("onevision"), pruned(8, 6, 3, 3)),
    "qwen2_vl": (lambda: families.model("qwen2_vl"), pruned(8, 6, 3, 3)),
    "next_video": (next_video.model, pruned(3, 2, 1, 2)),
}


@needs_rtx
@pytest.mark.covers("RTX build")
@pytest.mark.parametrize("name", [models.slow("onevision"), models.exhaustive("qwen2_vl"), models.exhaustive("next_video")])
def test_rtx_builds_every_program(name: str, tmp_path: Path) -> None:
    """The builder parses and optimizes every graph; what it saw is what `vitcop.json` says, which `build_engine` compares."""
    make, config = _MODELS[name]
    fast = models.optimize(copy.deepcopy(make()).half(), config)
    root = export(
        fast, tmp_path / "f", format="tensorrt", product="tensorrt_rtx", optimization_level=2, timeout=240,
        layouts=_layouts(name, fast), max_text_len=16, max_new_tokens=8,
    )  # fmt: skip
    manifest = Manifest.read(root)
    manifest.verify(root)
    kinds = [spec.kind for spec in manifest.programs]
    assert set(kinds) == {"tower", "select", "prefill", "extend", "decode"} and kinds.count("prefill") == 1
    for spec in manifest.programs:
        assert spec.file.endswith("/engine.plan") and (root / spec.file).stat().st_size > 20_000
    for schedule in manifest.schedules:
        budgets = {f"stage_{stage.layer}": (1, stage.total) for stage in schedule.decoder_stages}
        (prefill,) = (spec for spec in manifest.programs if spec.kind == "prefill")
        assert {spec.name: spec.shape for spec in prefill.outputs if spec.name in budgets} == budgets
        assert len(schedule.layout) == {"onevision": 2, "qwen2_vl": 1, "next_video": 3}[name]  # segments of what is seen
