"""The golden cases from pixels to tokens, through ONNX folders, in all that runs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import golden
import models
import pytest
import test_golden_e2e as e2e
from folders import generate, without_collection
from golden import largest_error
from vitcop_compile.export import EngineModel, Manifest, export
from vitcop_compile.export import onnx as onnx_export
from vitcop_compile.export.engine import RUNTIMES


@pytest.fixture(scope="module")
def golden_model() -> Any:
    index = golden.index("e2e")
    made = golden.tiny_llava(index["vision_config"], index["config"], image_token_id=index["config"]["vocab_size"])
    made.load_state_dict({e2e._renamed(key): t for key, t in golden.load("e2e", "weights.safetensors").items()})
    return made


def _golden_params() -> list:
    """A case at each opset, which is slow: 32 layers take half a minute. VITCOP_GOLDEN_ALL=1: all cases at both."""
    cases = filter(e2e._one_image, golden.cases("e2e"))
    every = bool(os.environ.get("VITCOP_GOLDEN_ALL"))
    chosen = [
        (case, opset) for case in cases for opset in (18, 23) if every or {"1_9": 18, "1_3": 23}.get(case["name"]) == opset
    ]
    # The second one is for a release: CI has one at the later opset.
    marks = [pytest.mark.exhaustive if opset == 18 else pytest.mark.slow for _, opset in chosen]
    return [pytest.param(case, opset, id=f"{case['name']}-{opset}", marks=mark) for (case, opset), mark in zip(chosen, marks)]


@pytest.mark.parametrize(("case", "opset"), _golden_params())
def test_golden(case: dict, opset: int, golden_model: Any, tmp_path: Path) -> None:
    data, config = golden.load("e2e", case["file"]), e2e._config(case["env"])
    fast = models.optimize(golden_model, config)
    ids = e2e._expanded(data["input_ids"], golden_model.config.image_token_id, fast.schedule.shape.patches)
    length = case["pre"] + case["post"]
    # One bucket: static rows export in half the time of dynamic ones, which the small folders below have.
    numbers = {"max_text_len": length, "max_new_tokens": len(case["tokens"]), "prompt_buckets": [length]}
    with without_collection():
        export(fast, tmp_path / "f", opset=opset, **numbers)
    for runtime in RUNTIMES:
        engine = EngineModel.from_pretrained(tmp_path / "f", threads=1, runtime=runtime)
        tokens, logits = generate(engine, ids, data["pixel_values_int8"].float() / 64, len(case["tokens"]) - 1)
        assert tokens[0].tolist() == case["tokens"][1:]
        assert largest_error(logits[0], data["sdpa/scores"]) < 1e-3
    manifest = Manifest.read(tmp_path / "f")
    new = manifest.max_new_tokens
    assert [rows - new for rows in manifest.kv_rows] == case["kv_len_prefill"]
    attentions = "Attention" if opset == 23 else "Softmax"
    assert onnx_export.op_counts(tmp_path / "f" / manifest.program("prefill").file)[attentions] == 32
