"""What inductor generates for a GPU that is not there: counted, and run on CPU tensors by triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vitcop_compile.regress import cuda
from vitcop_compile.regress.cuda import generated

needs_triton = pytest.mark.skipif(cuda.missing() is not None, reason=f"no CUDA code: {cuda.missing()}")
HERE = Path(__file__).parent
SOURCE = '''
triton_poi_fused_add_0 = async_compile.triton('triton_poi_fused_add_0', """
    tmp3 = triton_helpers.div_rn(tmp1, tmp2)
""", device_str='cuda')
triton_red_fused_sum_1 = async_compile.triton('triton_red_fused_sum_1', """
""", device_str='cuda')
cpp_fused_2 = async_compile.cpp_pybinding(['float*'], """
""")
        # Topologically Sorted Source Nodes: [topk], Original ATen: [aten.topk] torch.ops.aten.topk.default(a, 2)
        buf0 = empty_strided_cuda((2, 5), (5, 1), torch.bfloat16)
        buf1 = empty_strided_cuda((3, ), (1, ), torch.int64)
        buf2 = empty_strided_cuda((), (), torch.float32)
        triton_poi_fused_add_0.run(arg0_1, buf0, 10, stream=raw_stream0)
        triton_red_fused_sum_1.run(buf0, buf1, 3, stream=raw_stream0)
        triton_poi_fused_add_0.run(buf0, buf0, 10, stream=raw_stream0)
        extern_kernels.mm(buf0, arg1_1, out=buf3)
        extern_kernels.mm(buf0, arg1_1, out=buf4)
        buf5 = torch.ops.aten.topk.default(buf4, 2)
        assert_size_stride(buf5, (2, ), (1, ), 'torch.ops.aten.topk.default')
'''


def made(**changes: Any) -> generated.Generated:
    inputs = (torch.zeros(2, 5), torch.zeros(7), torch.zeros(2, 5, dtype=torch.int64))
    given: dict[str, Any] = {
        "source": SOURCE, "inputs": inputs, "static": frozenset((0, 1)), "written": frozenset((0,)), "refused": None,
        "partitions": 1,
    }  # fmt: skip
    return generated.Generated(**given | changes)


def test_facts_are_counted_in_the_source() -> None:
    assert generated.facts_of(made()) == {
        "kernels": 2, "launches": 3, "extern": {"mm": 2, "topk": 1}, "allocated_bytes": 2 * 5 * 2 + 3 * 8 + 4, "div_rn": 1,
        "inputs": 3, "static": 2, "written": 1, "written_moving": 0, "cache_copies": 1, "cpp_kernels": 1, "refused": 0,
        "partitions": 1,
    }  # fmt: skip
    other = generated.facts_of(made(written=frozenset((1, 2)), refused="a device is missing", partitions=2))
    changed = {"written": 2, "written_moving": 1, "cache_copies": 0, "refused": 1, "partitions": 2}
    assert other == generated.facts_of(made()) | changed


def test_kernels_that_were_not_built_are_named() -> None:
    first, second = "triton_poi_fused_add_0", "triton_red_fused_sum_1"
    built = [generated.Kernel(first, (("sm_90", 10), ("sm_90", 20))), generated.Kernel(second, (("sm_90", 1),))]
    assert generated.unbuilt(made(kernels=tuple(built)), "sm_90") == []
    assert generated.unbuilt(made(kernels=tuple(built[:1])), "sm_90") == [second]
    assert generated.unbuilt(made(kernels=tuple(built)), "sm_80") == [first, second]
    assert generated.unbuilt(made(kernels=(generated.Kernel(first, ()), generated.Kernel(second, (("sm_90", 0),)))), "sm_90")


def child(script: str, *arguments: str, out: Path, **variables: str) -> Any:
    given = [sys.executable, str(HERE / script), *arguments, str(out)]
    done = subprocess.run(given, env=os.environ | variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@needs_triton
@pytest.mark.slow
def test_what_is_wrong_on_purpose_is_seen(tmp_path: Path) -> None:
    found = child("cuda_controls.py", out=tmp_path / "facts.json")
    right = found["right"]
    assert (right["written"], right["written_moving"], right["cache_copies"], right["refused"]) == (1, 0, 0, 0)
    assert right["kernels"] == right["launches"] > 0 and right["static"] == right["inputs"] == 3
    assert found["moving"]["written_moving"] == 1 and found["moving"]["static"] == 0
    assert found["copied"]["cache_copies"] >= 1 and found["copied"]["written_moving"] == 0
    host = found["on the host"]
    assert host["cpp_kernels"] == 1  # which inductor says nothing about, and puts a copy behind


@needs_triton
@pytest.mark.exhaustive
def test_every_kernel_of_a_small_model_is_built(tmp_path: Path) -> None:
    """In CI the gate builds its own subject, for both architectures."""
    from vitcop_compile.regress import Settings, compare

    settings = Settings(hidden=64, layers=3, vision_hidden=64, vision_layers=2, cuda=("sm_90",))
    found = cuda.measure(settings)["1/9"]
    common = {"stream": {"graph_breaks": 0, "recompiles": 0}, "reads": {"program": 0}}
    assert not compare.broken_promises("", common | {"cuda": found}, "eager")
    vision, prefill, decode = (found["sm_90"][name] for name in ("vision", "prefill", "decode"))
    assert decode["static"] == decode["inputs"] and decode["written"] == prefill["written"] == 2 * 3
    # Products of a single row are searched for and generated.
    assert decode["extern"] == {"_scaled_dot_product_efficient_attention": 3}
    assert prefill["extern"]["_scaled_dot_product_flash_attention"] == 3 and prefill["extern"]["topk"] == 2
    assert vision["extern"]["_cdist_forward"] == vision["extern"]["convolution"] == 1
    assert prefill["div_rn"] > 0 and all(program["kernels"] <= program["launches"] for program in found["sm_90"].values())


NUMBERS = [pytest.param("float32", marks=pytest.mark.slow), pytest.param("bfloat16", marks=pytest.mark.exhaustive)]


@needs_triton
@pytest.mark.parametrize("dtype", NUMBERS)
def test_generated_kernels_choose_what_eager_programs_do(dtype: str, tmp_path: Path) -> None:
    found = child("interpreted.py", dtype, out=tmp_path / "found.json", TRITON_INTERPRET="1")
    changed = {name: of for name, of in found.items() if ": " in name}
    kept = {name: of for name, of in found.items() if name not in changed}
    assert {name.split(",")[0] for name in kept} == {"vision", "prefill", "decode"} and len(kept) == (
        9 if dtype == "float32" else 8
    )
    assert all(of["integers"] == 0 for of in kept.values()), kept
    assert all(of["floats"] < (1e-5 if dtype == "float32" else 0.1) for of in kept.values()), kept
    for control in {name.split(": ")[0] for name in changed}:
        assert any(of["integers"] for name, of in changed.items() if name.startswith(f"{control}: ")), (control, changed)
    assert len({name.split(": ")[0] for name in changed}) == (3 if dtype == "float32" else 0)
