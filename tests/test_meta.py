"""A model on the meta device: planned, exported and counted without a single weight.

LLaVA-1.5-7B's shape is captured here, which takes several seconds.
"""

from __future__ import annotations

import models
import pytest
import torch
from models import pixels
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vitcop_compile
from vitcop_compile import ModelShape, UnsupportedError, ViTCoPConfig
from vitcop_compile.backends import backend_of

NINTH = ViTCoPConfig.preset("1/9")
# Published settings of preset 1/9: 172 visual tokens, 77 from layer 2 on, 15 from layer 22 on; 64 text tokens beside them.
TEXT, TOKENS = 64, [172] * 2 + [77] * 20 + [15] * 10


@pytest.fixture(scope="module")
def llava_7b():
    """LLaVA-1.5-7B as its config states it."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
        vocab_size=32000,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()
    return vitcop_compile.optimize(model, NINTH)


def test_7b_is_optimized_without_a_weight(llava_7b):
    """How long it takes is what `python benchmarks/startup.py` measures."""
    assert all(parameter.is_meta for parameter in llava_7b.model.parameters())
    assert not llava_7b.compiled


def test_7b_is_planned(llava_7b):
    fast = llava_7b
    assert fast.schedule == NINTH.schedule() and fast.schedule_of(2) == NINTH.schedule(layout=(ModelShape().image,) * 2)
    assert list(fast.schedule.visual_tokens()) == TOKENS
    words = fast.explain()
    assert "63.6 mean" in words and "keep_lowest to 15" in words


@pytest.mark.slow
def test_7b_prefill_has_the_published_rows(llava_7b):
    program = llava_7b.programs.export_prefill(1, TEXT, in_place=False)
    outputs = [tuple(value.meta["val"].shape) for value in program.graph.output_node().args[0]]
    assert outputs[:3] == [(1, 1, 32064), (1, 77), (1, 15)]
    assert outputs[3:] == [(1, 32, TEXT + tokens, 128) for tokens in TOKENS for _ in "kv"]
    assert program.graph.output_node().args[0][3].meta["val"].device.type == "meta"


@pytest.fixture(scope="module")
def both():
    """A small model twice: with its weights, and on meta."""
    loaded = models.optimize(models.shared(4), NINTH)
    return loaded, models.optimize(models.llava(4).to("meta"), NINTH)


def operators(program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    "export",
    [
        lambda programs: programs.export_vision(2),
        lambda programs: programs.export_prefill(2, 40),
        lambda programs: programs.export_prefill(1, 9, 2, (160, 150, 140), filled=True),
        lambda programs: programs.export_extend(2, 1, (90, 80, 70)),
        lambda programs: programs.export_extend(2, 5, (90, 80, 70), in_place=False),
    ],
    ids=["vision", "prefill", "prefill of a later turn", "decode", "extend apart"],
)
def test_programs_are_those_of_the_loaded_model(both, export):
    loaded, planned = (export(fast.programs) for fast in both)
    assert len(operators(planned)) > 100 and operators(planned) == operators(loaded)


@pytest.mark.parametrize("backend", ["inductor", "aotinductor", "onnxruntime", "openvino"])
def test_programs_without_weights_are_not_compiled(both, backend):
    program = both[1].programs.export_vision(1)
    with pytest.raises(UnsupportedError, match=rf"backend='{backend}' .* on meta.*load the model, or use backend='eager'"):
        backend_of(backend)(program)


def test_eager_programs_compute_shapes(both):
    features, kept, labels = both[1].on_demand.vision(2)(pixels(2).to("meta"))
    assert features.is_meta and features.shape == (2, 19, 64) and kept.shape == labels.shape == (2, 19)
