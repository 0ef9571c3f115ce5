"""Golden data: inputs and outputs of the published code, and the tiny models they belong to.

`VITCOP_GOLDEN` names a folder of the same format; without it the full data beside the repository is used where it exists,
else the subset committed here (`build_golden_subset.py`). A subset may lack folders, files, cases and tensors.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

_HERE = Path(__file__).resolve().parent
FULL = _HERE.parents[1] / "shared" / "golden"
SUBSET = _HERE / "golden"
GOLDEN = Path(os.environ.get("VITCOP_GOLDEN") or (FULL if FULL.is_dir() else SUBSET))
TOLERANCE = 1e-4  # fp32 with another order of operations


@functools.cache
def index(part: str) -> dict[str, Any]:
    """The index of a folder; one without cases where the data lacks the folder."""
    path = GOLDEN / part / "index.json"
    return json.loads(path.read_text()) if path.is_file() else {"cases": []}


def cases(part: str) -> list[dict[str, Any]]:
    """The cases of a folder whose files are present."""
    return [case for case in index(part)["cases"] if "file" not in case or has(part, case["file"])]


def params(found: Iterable[dict[str, Any]]) -> list:
    """Cases as parameters of a test, under their names."""
    return [pytest.param(case, id=case["name"]) for case in found]


def has(part: str, file: str) -> bool:
    return (GOLDEN / part / file).is_file()


@functools.cache
def load(part: str, file: str) -> dict[str, Tensor]:
    """The tensors of one file; skips the test where the data lacks it."""
    if not has(part, file):
        pytest.skip(f"the golden data lacks {part}/{file}")
    return load_file(GOLDEN / part / file)


def of_case(part: str, name: str) -> dict[str, Tensor]:
    """The tensors `name/...` of the one file of a folder, without the prefix."""
    prefix = name + "/"
    return {key.removeprefix(prefix): t for key, t in load(part, f"{part}.safetensors").items() if key.startswith(prefix)}


def partition(labels: Tensor) -> list[int]:
    """Labels renamed by first appearance: equal for equal partitions. -1, which means unassigned, stays."""
    names: dict[int, int] = {-1: -1}
    return [names.setdefault(label, len(names)) for label in labels.tolist()]


def largest_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference of two tensors of one shape."""
    assert found.shape == expected.shape
    return (found - expected).abs().max().item()


def runs(parts: list[list]) -> list[tuple[int, int]]:
    """(start, stop) of every maximal run of visual tokens in a prompt of parts ["t" | "v", length]."""
    found: list[tuple[int, int]] = []
    at = 0
    for kind, length in parts:
        if kind == "v" and length:
            start = found.pop()[0] if found and found[-1][1] == at else at
            found.append((start, at + length))
        at += length
    return found


def tiny_llava(vision: dict[str, Any], text: dict[str, Any], image_token_id: int) -> LlavaForConditionalGeneration:
    """A stock LLaVA from the configurations of an index, with random weights."""
    told = {"architectures", "model_type", "torch_dtype", "transformers_version"}
    vision = {key: value for key, value in vision.items() if key not in told}
    text = {key: value for key, value in text.items() if key not in told and not key.startswith("mm_")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision), text_config=LlamaConfig(**text), image_token_id=image_token_id
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).eval()
