"""TensorRT: engines built for real with TensorRT-RTX, which needs no GPU to build; nothing here runs one.

Numerics come from onnxruntime on the very same ONNX files. That is no TensorRT run.
"""

import dataclasses
import importlib
import importlib.util
import shutil
import sys

import pytest
import torch
from vitcop_compile.export import (
    EngineModel,
    FolderError,
    Manifest,
    export,
    tensorrt,
    writer,
)
from vitcop_compile.export.manifest import NAME
from vitcop_compile.export.ort import OrtProgram
from vitcop_compile.export.writer import _seal

import vitcop_compile as vc
from vitcop_compile.errors import UnsupportedError
from vitcop_compile.toy import small_llava

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
needs_rtx = pytest.mark.skipif(not HAS_RTX, reason="tensorrt_rtx is not installed: pip install 'vitcop-compile[tensorrt-rtx]'")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
PRESETS = ("1/3", "2/9", "1/9")
SIZE = dict(vision_hidden=32, vision_layers=2, vision_heads=2, hidden=32, layers=3, heads=2, intermediate=64, vocab=260)
TEXT, NEW = 16, 8
BUCKETS = (8, 16)


def export_both(monkeypatch, root, optimized, **options):
    """(ONNX folder, engine folder): one export, its ONNX files kept aside before they become engines."""
    onnx, real = root / "onnx", tensorrt.finisher

    def finisher(dtype, **build_options):
        finish = real(dtype, **build_options)

        def keep(folder, manifest, progress):
            shutil.copytree(folder, onnx)
            _seal(onnx, dataclasses.replace(manifest, files={}))
            return finish(folder, manifest, progress)

        return keep

    monkeypatch.setattr(tensorrt, "finisher", finisher)
    return onnx, export(optimized, root / "engines", format="tensorrt", max_text_len=TEXT, max_new_tokens=NEW, **options)


# Half a minute each: every preset, and both types.
_BUILT = [
    pytest.param((dtype, preset), id=f"{dtype}-{preset}", marks=mark)
    for dtype, preset, mark in zip(
        ("float16", "float16", "bfloat16"),
        PRESETS,
        (pytest.mark.exhaustive, pytest.mark.exhaustive, pytest.mark.slow),
        strict=True,
    )
]


@pytest.fixture(scope="module", params=_BUILT)
def built(request, tmp_path_factory):
    """(optimized model, ONNX folder, engine folder). Opset 18 in float16, 23 in bfloat16; "2/9" has text buckets."""
    dtype, preset = request.param
    # 576 patches, as in the model the presets were published for.
    optimized = vc.optimize(small_llava(**SIZE, dtype=DTYPES[dtype]), vc.ViTCoPConfig.preset(preset), backend="eager")
    with pytest.MonkeyPatch.context() as monkeypatch:
        opset = 23 if dtype == "bfloat16" else 18
        buckets = BUCKETS if preset == "2/9" else None
        options = dict(product="tensorrt_rtx", timeout=120, workspace=1 << 28, optimization_level=2)
        folders = export_both(
            monkeypatch, tmp_path_factory.mktemp("rtx"), optimized, opset=opset, prompt_buckets=buckets, **options
        )
    return optimized, *folders


@needs_rtx
@pytest.mark.covers("RTX build", family="llava")
def test_rtx_builds_every_program_whole(built):
    """One engine per program, the ONNX files gone; what the builder saw is what `vitcop.json` says."""
    _, onnx, engines = built
    manifest, source = Manifest.read(engines), Manifest.read(onnx)
    manifest.verify(engines)
    assert manifest.product == "tensorrt_rtx"
    assert manifest.versions["tensorrt_rtx"] == importlib.import_module("tensorrt_rtx").__version__
    assert [spec.kind for spec in manifest.programs] == ["vision", "prefill", "extend", "decode"]
    plans = {f"{spec.kind}/engine.plan" for spec in manifest.programs}
    assert {spec.file for spec in manifest.programs} == plans
    assert {path.relative_to(engines).as_posix() for path in engines.rglob("*") if path.is_file()} == plans | {
        NAME,
        "config.json",
        "generation_config.json",
    }
    for engine, graph in zip(manifest.programs, source.programs, strict=True):
        assert (engine.inputs, engine.outputs, engine.rows) == (graph.inputs, graph.outputs, graph.rows)
        assert (engines / engine.file).stat().st_size > 100_000


@needs_rtx
def test_rtx_budgets_are_static_and_profiles_span_the_rows(built):
    optimized, _, engines = built
    manifest, schedule = Manifest.read(engines), optimized.schedule
    by_kind = {spec.kind: spec for spec in manifest.programs}
    shapes = {spec.name: spec.shape for spec in (*by_kind["vision"].outputs, *by_kind["prefill"].outputs)}
    assert shapes["kept"] == shapes["state_0"] == (1, schedule.image_tokens)
    for stage in schedule.decoder_stages:
        assert shapes[f"stage_{stage.layer}"] == (1, stage.total)
    for kind, image in (("prefill", schedule.image_tokens), ("extend", 0)):
        if manifest.prompt_buckets is None:
            assert by_kind[kind].profiles == ((2 + image, TEXT + image, TEXT + image),)
        else:
            assert by_kind[kind].profiles == tuple((size + image,) * 3 for size in BUCKETS)
        assert by_kind[kind].rows == (by_kind[kind].profiles[0][0], by_kind[kind].profiles[-1][2])
    assert by_kind["vision"].profiles == by_kind["decode"].profiles == ()
    for kind in ("extend", "decode"):
        for spec, rows in zip(by_kind[kind].inputs[5::2], manifest.kv_rows, strict=True):
            assert spec.shape[2] == rows


@needs_rtx
def test_onnxruntime_agrees_on_the_files_the_rtx_engines_were_built_from(built):
    """Prefill, then more text or a decode step, from the same features: the graph's own arithmetic, not TensorRT's."""
    optimized, onnx, _ = built
    if optimized.dtype == torch.bfloat16:
        pytest.skip("onnxruntime's CPU provider has no bfloat16 kernels for these graphs; the float16 files are compared")
    manifest, programs = Manifest.read(onnx), optimized.programs
    load = {spec.kind: spec for spec in manifest.programs}
    run = {kind: OrtProgram(onnx / spec.file, spec) for kind, spec in load.items()}
    pixels = torch.randn(1, 3, 336, 336).to(optimized.dtype)
    features, kept, labels = run["vision"](pixels)
    wanted = programs.export_vision(1, exact=False).module(check_guards=False)(pixels)
    same = len(set(kept[0].tolist()) & set(wanted[1][0].tolist()))
    assert same >= 0.95 * kept.shape[1]
    rows = optimized.schedule.image_tokens + TEXT
    caches = compare_prefill(run["prefill"], programs, (features, labels), rows)
    for kind, tokens in (("decode", 1), ("extend", 8)):
        taken = extend_inputs(programs, caches, rows, tokens, manifest.cache_rows)
        plain = programs.export_extend(1, tokens, manifest.cache_rows, in_place=False).module(check_guards=False)
        for value, expected in zip(run[kind](*taken), plain(*taken), strict=True):
            close(value, expected)


@torch.no_grad()
def compare_prefill(run, programs, image, rows):
    """Compares prefill in onnxruntime and in PyTorch; returns onnxruntime's caches.

    In half precision two scores can be closer than the difference of two kernels: then another token stays, and all behind
    it shifts. Where both select alike everything must agree; where no prompt of eight is, what does not hang on one token.
    """
    features, labels = image
    stages = len(programs.schedule.decoder_stages)
    positions = torch.arange(rows).repeat(1, 1, 1)
    visual = torch.arange(features.shape[1])[None] + 2
    module = programs.prefill_module(in_place=False)
    for _ in range(8):
        inputs = (torch.randint(3, 200, (1, rows)), torch.tensor([rows - 1]), positions, features, visual, labels)
        got, want = run(*inputs), module(*inputs)
        alike = all(torch.equal(got[1 + i], want[1 + i]) for i in range(stages))
        chosen = slice(None) if alike else slice(1 + stages, 3 + stages)  # keys and values before the first stage
        for value, expected in zip(got[chosen], want[chosen], strict=True):
            close(value, expected)
        if alike:
            break
        assert len(set(got[1][0].tolist()) & set(want[1][0].tolist())) >= 0.9 * got[1].shape[1]
        close(got[0], want[0], 0.15)
    return got[1 + stages :]


def close(value, want, share=0.03):
    assert (value.float() - want.float()).abs().max() <= share * want.float().abs().max()


def extend_inputs(programs, caches, rows, tokens, cache_rows):
    ids, last, length, position, removed, *buffers = programs.extend_inputs(1, tokens, cache_rows)
    for buffer, cache in zip(buffers, caches, strict=True):
        buffer[:, :, : cache.shape[2]] = cache
    return torch.full_like(ids, 7), last, torch.full_like(length, rows), torch.full_like(position, rows), removed, *buffers


@pytest.fixture(scope="module")
def folder_of_stubs(tmp_path_factory):
    """An engine folder whose plans were never built: for checks that come before a plan is loaded."""
    root = tmp_path_factory.mktemp("stubs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tensorrt, "product_of", lambda name: ("tensorrt_rtx", None))
        monkeypatch.setattr(tensorrt, "check_graph", lambda path, kind: {})
        monkeypatch.setattr(writer, "_exporter", lambda model, wanted, rows: wanted.spec)

        def write(spec, path, *rest):
            path.write_bytes(b"")
            return spec.inputs, spec.outputs

        monkeypatch.setattr(writer, "write_onnx", write)

        def build(onnx, plan, *rest):
            plan.parent.mkdir()
            plan.write_bytes(b"plan" * 100)
            return "1.0.0"

        monkeypatch.setattr(tensorrt, "build_engine", build)
        tiny = vc.optimize(small_llava(**SIZE, image_size=56, dtype=torch.float16), vc.ViTCoPConfig.preset("1/3"))
        return export(tiny, root / "engines", format="tensorrt", max_text_len=16, max_new_tokens=4)


@needs_rtx
@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a CUDA device")
def test_rtx_folder_needs_a_gpu_to_run(folder_of_stubs, tmp_path):
    here = importlib.import_module("tensorrt_rtx").__version__
    folder = changed(folder_of_stubs, tmp_path, "tensorrt_rtx", here)
    with pytest.raises(UnsupportedError, match=r"tensorrt_rtx run on an NVIDIA GPU.*format='onnx'"):
        EngineModel.from_pretrained(folder)


def changed(source, tmp_path, product, version):
    """A copy of an engine folder that says it was built by another product."""
    folder = tmp_path / "engines"
    shutil.copytree(source, folder)
    manifest = Manifest.read(folder)
    other = dataclasses.replace(manifest, product=product, versions=manifest.versions | {product: version})
    (folder / NAME).write_text(other.to_json())
    return folder


@needs_rtx
@pytest.mark.parametrize(
    ("product", "version", "error", "match"),
    [
        (
            "tensorrt",
            "10.0",
            UnsupportedError,
            r"holds engines of tensorrt, no other product loads them.*pip install tensorrt",
        ),
        ("tensorrt_rtx", "1.0.0", FolderError, r"built by tensorrt_rtx 1\.0\.0, .* is installed.*export again"),
    ],
)
def test_rtx_folder_of_another_product_or_version_is_refused(
    folder_of_stubs, tmp_path, monkeypatch, product, version, error, match
):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(error, match=match):
        EngineModel.from_pretrained(changed(folder_of_stubs, tmp_path, product, version))


def test_truncated_plan_is_named(folder_of_stubs, tmp_path):
    folder = tmp_path / "engines"
    shutil.copytree(folder_of_stubs, folder)
    plan = folder / "decode" / "engine.plan"
    plan.write_bytes(plan.read_bytes()[:-100])
    with pytest.raises(FolderError, match=r"decode/engine\.plan has 300 bytes, 400 were written: the file is truncated"):
        EngineModel.from_pretrained(folder)
