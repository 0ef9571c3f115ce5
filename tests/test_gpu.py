"""What only a CUDA device can show; skipped elsewhere, with the reason."""

import importlib.util

import pytest
import torch

import vitcop_compile
from vitcop_compile import ViTCoPConfig
from vitcop_compile.toy import encode, small_llava

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: CUDA graphs, flash-attn"),
]


def greedy(model, ids, pixels):
    out = model.generate(
        input_ids=ids, pixel_values=pixels, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return out.sequences, torch.stack(out.logits)


@pytest.fixture(scope="module")
def model():
    return small_llava(layers=4, hidden=256, intermediate=512, heads=4, dtype=torch.bfloat16).cuda()


@pytest.fixture(scope="module")
def request_(model):
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 336, 336).cuda()
    return encode("what is this?", model.config).cuda(), pixels


def test_inductor_with_cuda_graphs_equals_eager(model, request_):
    config = ViTCoPConfig.preset("1/9")
    expected, logits = greedy(vitcop_compile.optimize(model, config, backend="eager"), *request_)
    fast = vitcop_compile.optimize(model, config, backend="inductor")
    for _ in range(3):  # warm-up, recording, replay
        found, replayed = greedy(fast, *request_)
    assert torch.equal(found, expected)
    # Nothing skipped says nothing of what ran: past a limit torch falls back without a word.
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiler:
        greedy(fast, *request_)
    launched = {event.key: event.count for event in profiler.key_averages()}
    assert launched.get("cudaGraphLaunch", 0) >= 2 + 7, "vision, prefill and seven steps are not all CUDA graphs"
    torch.testing.assert_close(replayed, logits, atol=5e-2, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is None, reason="needs the flash-attn package")
def test_flash_attn_equals_sdpa(model, request_):
    config = ViTCoPConfig.preset("1/9")
    expected, logits = greedy(vitcop_compile.optimize(model, config, backend="eager"), *request_)
    fast = vitcop_compile.optimize(model, config, backend="eager", attn_implementation="flash_attention_2")
    found, flashed = greedy(fast, *request_)
    generated = request_[0].shape[1]
    assert found.shape == expected.shape and found.shape[1] == generated + 8
    for step in range(8):
        torch.testing.assert_close(flashed[step], logits[step], atol=5e-2, rtol=0)
        if found[0, generated + step] != expected[0, generated + step]:
            best, second = logits[step][0].topk(2).values
            assert best - second < 0.1, f"token {step} differs beyond rounding"
            break  # from here on the two see different prompts
