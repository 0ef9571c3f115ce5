"""TensorRT engines on a GPU: what `test_tensorrt.py` cannot run. Never run so far where this was written: no GPU was there."""

import importlib.util

import pytest
import torch

import vitcop_compile as vc
from vitcop_compile.toy import encode, small_llava

PRODUCTS = ("tensorrt", "tensorrt_rtx")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: TensorRT engines need one to run"),
]
SIZE = dict(vision_hidden=64, vision_layers=3, vision_heads=4, hidden=64, layers=4, heads=4, intermediate=128, vocab=300)
TEXT, NEW = 64, 16


def installed(product):
    return importlib.util.find_spec(product) is not None


@pytest.fixture(scope="module", params=PRODUCTS)
def pair(request, tmp_path_factory):
    """(optimized model in PyTorch, the same as engines), both on the GPU in float16."""
    from vitcop_compile.export import EngineModel, export

    if not installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    stock = small_llava(**SIZE, image_size=168, dtype=torch.float16)
    settings = vc.ViTCoPConfig.preset("1/9")
    folder = export(
        vc.optimize(stock, settings, backend="eager"),
        tmp_path_factory.mktemp("gpu") / "engines",
        format="tensorrt",
        max_text_len=TEXT,
        max_new_tokens=NEW,
        prompt_buckets=(32, TEXT),
        product=request.param,
    )
    engines = EngineModel.from_pretrained(folder)
    return vc.optimize(stock.cuda(), settings, backend="eager"), engines


def request_of(config, prompt):
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 168, 168, dtype=torch.float16)
    return dict(input_ids=encode(prompt, config).cuda(), pixel_values=pixels.cuda())


def close(value, want, share=0.05):
    assert (value.float() - want.float()).abs().max() <= share * want.float().abs().max()


@pytest.mark.parametrize("prompt", ["hi <image> ?", "a longer question, in the other profile: <image> what is it?"])
def test_logits_agree_in_every_profile(pair, prompt):
    eager, engines = pair
    inputs = request_of(eager.config, prompt)
    close(engines(**inputs).logits, eager(**inputs).logits)


def test_generation_with_a_graph_equals_generation_without(pair):
    """A replayed step and a plain one are the same program on the same buffers."""
    _, engines = pair
    inputs = request_of(engines.config, "<image> describe")
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True)
    graphed = engines.generate(**inputs, **options)
    step = engines.engines.extend(1, 1, engines.manifest.cache_rows)
    assert not step._plain and step._graph is not None, "the decode step was not captured"
    step._plain = True
    try:
        plain = engines.generate(**inputs, **options)
    finally:
        step._plain = False
    assert torch.equal(graphed.sequences, plain.sequences)
    for value, want in zip(graphed.logits, plain.logits, strict=True):
        close(value, want, 1e-3)


def test_two_requests_do_not_share_results(pair):
    """Outputs of prefill and logits of decode are the caller's own."""
    _, engines = pair
    first = engines(**request_of(engines.config, "one <image>"))
    kept, logits = first.past_key_values.selection.kept.clone(), first.logits.clone()
    engines(**request_of(engines.config, "<image> quite another text"))
    assert torch.equal(first.past_key_values.selection.kept, kept)
    assert torch.equal(first.logits, logits)


def test_text_alone_runs_through_the_same_decode(pair):
    eager, engines = pair
    ids = torch.randint(5, 200, (1, 20), device="cuda")
    close(engines(input_ids=ids).logits, eager(input_ids=ids).logits)
    assert engines.generate(input_ids=ids, max_new_tokens=6, do_sample=False).shape == (1, 26)


def test_damaged_plan_is_refused_by_the_product(pair, tmp_path):
    from vitcop_compile.export import FolderError
    from vitcop_compile.export.tensorrt_runtime import loader

    _, engines = pair
    spec = engines.manifest.program("decode")
    path = tmp_path / "engine.plan"
    path.write_bytes(b"\0" * 5000)
    _, load = loader(engines.manifest)
    with pytest.raises(FolderError, match=r"decode/engine\.plan cannot be loaded by"):
        load(path, spec)


@pytest.mark.skipif(not installed("torch_tensorrt"), reason="torch_tensorrt is not installed")
def test_torch_tensorrt_backend_takes_every_program_whole():
    stock = small_llava(**SIZE, image_size=168, dtype=torch.float16).cuda()
    settings = vc.ViTCoPConfig.preset("1/9")
    inputs = request_of(stock.config, "what is <image> ?")
    eager, engines = (vc.optimize(stock, settings, backend=name) for name in ("eager", "tensorrt"))
    close(engines(**inputs).logits, eager(**inputs).logits)
    assert engines.generate(**inputs, max_new_tokens=6, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 6
