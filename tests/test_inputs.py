"""Bad input is refused by name, value and bound, before anything is exported or compiled."""

from __future__ import annotations

import math

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import IMAGE, PATCHES, SIDE, VOCAB, optimize, pixels, prompt, shared
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import vitcop_compile
from vitcop_compile import Budgets, ConfigError, InputError, UnsupportedError, ViTCoPConfig, VitcopError, backends
from vitcop_compile.cache import PrunedCache

CONFIG = ViTCoPConfig(budgets=(12, 6, 3, 2), shallow_layer=1, deep_layer=2)
LIMIT = 300


@pytest.fixture(scope="module")
def small():
    return models.llava(3, positions=LIMIT)


@pytest.fixture
def fast(small):
    """A compiled model that must not export anything."""
    model = optimize(small, CONFIG, prompt_buckets=(16, 64))
    yield model
    assert model.compiled == ()


def text(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


def spoil(images: torch.Tensor, value: float) -> torch.Tensor:
    images[0, 2, 100, 7] = value
    return images


def noncontiguous() -> torch.Tensor:
    ids = prompt()
    ids[0, 30], ids[0, 2] = 7, IMAGE
    return ids


def mixed() -> torch.Tensor:
    return torch.cat((prompt(4, 4), torch.full((1, 8 + PATCHES), 5)))


TWO_IMAGES = torch.tensor([[4, *[IMAGE] * PATCHES, 5, *[IMAGE] * PATCHES, 6]])
IDS, PIXELS = prompt(), pixels()
FORWARD = {
    "image token without pixels": ({"input_ids": IDS}, ["placeholders of 1 images", "no pixel_values"]),
    "pixels without image token": ({"input_ids": text(3, 4), "pixel_values": PIXELS}, ["no image token"]),
    "pixels without text": ({"pixel_values": PIXELS}, ["input_ids", "NoneType"]),
    "an image too many in a batch": ({"input_ids": mixed(), "pixel_values": pixels(2)}, ["2 images", "placeholders of 1"]),
    "one image for two": ({"input_ids": TWO_IMAGES, "pixel_values": PIXELS}, ["1 images", "placeholders of 2"]),
    "three images for two": ({"input_ids": TWO_IMAGES, "pixel_values": pixels(3)}, ["3 images", "placeholders of 2"]),
    "63 placeholders": ({"input_ids": prompt(image_tokens=63), "pixel_values": PIXELS}, ["63", "64"]),
    "65 placeholders": ({"input_ids": prompt(image_tokens=65), "pixel_values": PIXELS}, ["65", "64"]),
    "one of two short": (
        {"input_ids": torch.cat((prompt(4, 4), prompt(4, 5, image_tokens=63))), "pixel_values": pixels(2)},
        ["63", "64"],
    ),
    "a masked placeholder": (
        {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": torch.arange(78)[None] != 20},
        ["63", "64"],
    ),
    "not contiguous": ({"input_ids": noncontiguous(), "pixel_values": PIXELS}, ["64", "contiguous"]),
    "image size": ({"input_ids": IDS, "pixel_values": torch.zeros(1, 3, 98, 112)}, ["98", str(SIDE)]),
    "image channels": ({"input_ids": IDS, "pixel_values": torch.zeros(1, 1, SIDE, SIDE)}, ["(1, 1, 112, 112)", "3"]),
    "3-D pixels": ({"input_ids": IDS, "pixel_values": PIXELS[0]}, ["(3, 112, 112)"]),
    "5-D pixels": ({"input_ids": IDS, "pixel_values": PIXELS[None]}, ["(1, 1, 3, 112, 112)"]),
    "no image": ({"input_ids": IDS, "pixel_values": PIXELS[:0]}, ["placeholders of 1 images", "no pixel_values"]),
    "integer pixels": ({"input_ids": IDS, "pixel_values": PIXELS.byte()}, ["torch.uint8", "floating"]),
    "complex pixels": ({"input_ids": IDS, "pixel_values": PIXELS + 0j}, ["torch.complex64"]),
    "list of pixels": ({"input_ids": IDS, "pixel_values": [PIXELS]}, ["pixel_values", "list"]),
    "NaN": ({"input_ids": IDS, "pixel_values": spoil(pixels(), math.nan)}, ["NaN"]),
    "infinity": ({"input_ids": IDS, "pixel_values": spoil(pixels(), -math.inf)}, ["infinite"]),
    "infinite once converted": ({"input_ids": IDS, "pixel_values": spoil(pixels().double(), 1e300)}, ["infinite"]),
    "float ids": ({"input_ids": IDS.float(), "pixel_values": PIXELS}, ["torch.float32", "int64"]),
    "bool ids": ({"input_ids": IDS > 0}, ["torch.bool", "int64"]),
    "id beyond vocabulary": ({"input_ids": text(3, VOCAB)}, ["1 ids", str(VOCAB)]),
    "negative ids": ({"input_ids": text(3, -1, -200)}, ["2 ids", str(VOCAB)]),
    "no prompt": ({"input_ids": IDS[:0]}, ["(0, 78)"]),
    "empty prompt": ({"input_ids": IDS[:, :0]}, ["(1, 0)"]),
    "1-D ids": ({"input_ids": IDS[0]}, ["(78,)", "[batch, tokens]"]),
    "3-D ids": ({"input_ids": IDS[None]}, ["(1, 1, 78)", "[batch, tokens]"]),
    "list of ids": ({"input_ids": IDS.tolist()}, ["input_ids", "list"]),
    "nothing": ({}, ["input_ids", "NoneType"]),
    "ids elsewhere": ({"input_ids": IDS.to("meta")}, ["meta", "cpu"]),
    "pixels elsewhere": ({"input_ids": IDS, "pixel_values": PIXELS.to("meta")}, ["meta", "cpu"]),
    "short mask": ({"input_ids": text(3, 4), "attention_mask": torch.ones(1, 1)}, ["(1, 1)", "(1, 2)"]),
    "4-D mask": ({"input_ids": text(3, 4), "attention_mask": torch.ones(1, 1, 2, 2)}, ["(1, 1, 2, 2)", "(1, 2)"]),
    "list mask": ({"input_ids": text(3, 4), "attention_mask": [[1, 1]]}, ["list", "(1, 2)"]),
    "all-zero mask row": (
        {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])},
        ["without tokens"],
    ),
    "beyond the largest bucket": ({"input_ids": prompt(30, 35), "pixel_values": PIXELS}, ["65 text tokens", "64"]),
    "beyond the positions": (
        {"input_ids": text(*[5] * 64), "past_key_values": PrunedCache(max_length=LIMIT + 1)},
        [str(LIMIT + 1), str(LIMIT)],
    ),
    "wrong batch": ({"input_ids": IDS, "pixel_values": pixels(2)}, ["2 images", "placeholders of 1"]),
    "use_cache": ({"input_ids": text(3), "use_cache": False}, ["use_cache=False"]),
    "output_attentions": ({"input_ids": text(3), "output_attentions": True}, ["output_attentions"]),
    "output_hidden_states": ({"input_ids": text(3), "output_hidden_states": True}, ["output_hidden_states"]),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 3, 64)}, ["inputs_embeds"]),
    "position_ids": ({"input_ids": text(3), "position_ids": text(0)}, ["position_ids"]),
    "labels": ({"input_ids": text(3), "labels": text(3)}, ["labels", "train the stock model"]),
    "logits_to_keep": ({"input_ids": text(3), "logits_to_keep": 2}, ["logits_to_keep=2"]),
    "foreign cache": ({"input_ids": text(3), "past_key_values": DynamicCache()}, ["DynamicCache"]),
    "unknown argument": ({"input_ids": text(3), "image_sizes": text(3)}, ["image_sizes"]),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_refuses(fast, name):
    request, words = FORWARD[name]
    with pytest.raises(InputError) as error:
        fast(**request)
    assert all(word in str(error.value) for word in words), str(error.value)


GENERATE = {
    "assistant": ({"assistant_model": shared(3)}, ["assistant_model", "take back"]),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, ["prompt_lookup_num_tokens", "take back"]),
    "use_cache": ({"use_cache": False}, ["use_cache=False"]),
    "prefill_chunk_size": ({"prefill_chunk_size": 8}, ["prefill_chunk_size"]),
    "cache_implementation": ({"cache_implementation": "static"}, ["cache_implementation"]),
    "guidance_scale": ({"guidance_scale": 1.5}, ["guidance_scale=1.5"]),
    "output_attentions": ({"output_attentions": True}, ["output_attentions"]),
    "output_hidden_states": ({"output_hidden_states": True}, ["output_hidden_states"]),
    "foreign cache": ({"past_key_values": DynamicCache()}, ["past_key_values"]),
    "beyond the positions": ({"max_new_tokens": LIMIT - 25}, [str(LIMIT + 1), str(LIMIT)]),
    "position_ids": ({"position_ids": torch.arange(78)[None]}, ["position_ids"]),
    "labels": ({"labels": IDS}, ["labels"]),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 78, 64)}, ["inputs_embeds"]),
    "1-D ids": ({"input_ids": IDS[0]}, ["(78,)"]),
    "list of ids": ({"input_ids": IDS.tolist()}, ["list"]),
    "float ids": ({"input_ids": IDS.float()}, ["torch.float32"]),
    "id beyond vocabulary": ({"input_ids": IDS + 1}, [str(VOCAB)]),
    "no pixels": ({"pixel_values": None}, ["placeholders of 1 images"]),
    "mask of another length": ({"attention_mask": torch.tensor([[0, 1, 1]])}, ["(1, 3)", "(1, 78)"]),
    "all-zero mask": ({"attention_mask": torch.zeros(1, 78)}, ["without tokens"]),
    "NaN": ({"pixel_values": spoil(pixels(), math.nan)}, ["NaN"]),
}


@pytest.mark.parametrize("name", GENERATE)
def test_generate_refuses(fast, name):
    request, words = GENERATE[name]
    with pytest.raises(ValueError) as error:
        fast.generate(**{"input_ids": IDS, "pixel_values": PIXELS, "max_new_tokens": 2, "do_sample": False} | request)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.fixture(scope="module")
def running(small):
    return optimize(small, CONFIG, prompt_buckets=(16, 64))


def filled(running, tokens: int = 0) -> PrunedCache:
    cache = running(IDS, PIXELS).past_key_values
    for _ in range(tokens):
        running(text(3), past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"input_ids": text(*[5] * 65)}, ["65 text tokens", "largest bucket, 64"]),
        ({"input_ids": IDS, "pixel_values": pixels(2)}, ["2 images", "placeholders of 1"]),
        ({"input_ids": text(3), "pixel_values": PIXELS}, ["no image token"]),
        ({"input_ids": torch.tensor([[3], [4]])}, ["2 samples", "a cache of 1"]),
        ({"input_ids": text(3).float()}, ["torch.float32"]),
        ({"input_ids": text(VOCAB)}, [f"vocabulary of {VOCAB}"]),
        ({"input_ids": text(3), "use_cache": False}, ["use_cache=False"]),
        ({"input_ids": text(3), "position_ids": text(90)}, ["position_ids"]),
    ],
)
def test_filled_cache_refuses(running, request_, words):
    cache = filled(running)
    before = [buffer.clone() for buffer in cache.buffers]
    made = running.compiled
    with pytest.raises(InputError) as error:
        running(past_key_values=cache, **request_)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert running.compiled == made and cache.get_seq_length() == 78 and cache.length.tolist() == [26]
    assert all(torch.equal(old, new) for old, new in zip(before, cache.buffers))


def test_cache_overflow(running):
    cache = filled(running, 66)  # 64, and what the bucket of the prompt has left
    assert cache.get_max_cache_shape() == cache.get_seq_length() == 78 + 66
    with pytest.raises(InputError, match=r"full after 144 tokens.*max_new_tokens"):
        running(text(3), past_key_values=cache)


def test_a_refused_prompt_leaves_the_cache_empty(running):
    cache = PrunedCache(max_length=100)
    with pytest.raises(InputError):
        running(IDS, past_key_values=cache)
    assert not cache.filled
    assert running(IDS, PIXELS, past_key_values=cache).past_key_values.filled


# Model, backend, configuration


def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=1, **sizes))


def mixed_types():
    model = models.llava(3)
    model.lm_head.half()
    return model


def mixed_devices():
    model = models.llava(3)
    model.lm_head.to("meta")
    return model


def weights_alone_on_meta():
    model = models.llava(3).to("meta")
    model.model.language_model.rotary_emb.inv_freq = torch.ones(8)
    return model


@pytest.mark.parametrize(
    ("build", "settings_", "words"),
    [
        (llama, {}, ["LlamaForCausalLM", "LlavaForConditionalGeneration"]),
        (lambda: models.llava(3).double(), {}, ["float64", "bfloat16"]),
        (mixed_devices, {}, ["cpu, meta", "one device"]),
        (weights_alone_on_meta, {}, ["cpu, meta", "all of it on 'meta'"]),
        (mixed_types, {}, ["float16", "float32"]),
        (lambda: models.llava(3, vision_feature_layer=[-2, -1]), {}, ["[-2, -1]", "single layer"]),
        (lambda: models.llava(3, vision_feature_layer=-5), {}, ["-5", "4"]),
        (lambda: shared(3), {"backend": "tvm"}, ["'tvm'", "inductor", "eager"]),
        (lambda: shared(3), {"attn_implementation": "flash_attention_2"}, ["flash_attention_2", "cpu", "sdpa"]),
        (lambda: shared(3), {"attn_implementation": "xformers"}, ["'xformers'", "sdpa"]),
    ],
)
def test_optimize_refuses(build, settings_, words, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("traced"))
    with pytest.raises(UnsupportedError) as error:
        vitcop_compile.optimize(build(), CONFIG, **{"backend": "eager"} | settings_)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("buckets", [(), (0, 4), (-1,), (8, 4), (4, 4), (4.0,), (True, 4), ("4",)])
def test_text_buckets(buckets):
    with pytest.raises(VitcopError) as error:
        optimize(shared(3), CONFIG, prompt_buckets=buckets)
    assert str(buckets) in str(error.value) and "ascending" in str(error.value)


def fixed(**values) -> ViTCoPConfig:
    return ViTCoPConfig(**{"shallow_layer": 1, "deep_layer": 2, "scale_layers": False} | values)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: fixed(budgets=(8, 4, 2), shallow_layer=2), ["shallow_layer=2", "deep_layer=2"]),
        (lambda: fixed(budgets=(8, 4, 2), shallow_layer=3), ["shallow_layer=3", "deep_layer=2"]),
        (lambda: fixed(budgets=(8, 4, 2), shallow_layer=0), ["shallow_layer=0", "1"]),
        (lambda: fixed(budgets=(8, 4, 2), deep_layer=3), ["deep_layer=3", "3 decoder layers"]),
        (lambda: fixed(budgets=(8, 4, 2), vision_layer=3), ["vision_layer=3", "layer 2"]),
        (lambda: fixed(budgets=(8, 4, 2), vision_layer=-1), ["vision_layer=-1", "layer 3"]),
        (lambda: fixed(budgets=(8, 4, 2), vision_layer=-5), ["vision_layer=-5", "-4"]),
        (lambda: fixed(budgets=(65, 4, 2)), ["65", "64 patches"]),
        (lambda: fixed(budgets=(8, 9, 2)), ["8, 9, 2", "vision >= shallow"]),
        (lambda: fixed(budgets=(8, 4, 5)), ["8, 4, 5", ">= deep"]),
        (lambda: fixed(budgets=(8, 4, 0)), ["budgets.deep=0", "1"]),
        (lambda: fixed(budgets=(-8, 4, 1)), ["budgets.vision=-8", "1"]),
        (lambda: fixed(budgets=(8, 4, 2, 9)), ["centers=9", "8"]),
        (lambda: fixed(budgets=Budgets(8, 4.0, 2)), ["budgets.shallow=4.0", "integer"]),
        (lambda: fixed(retention=0.0), ["retention=0.0", "(0, 1]"]),
        (lambda: fixed(retention=1.01), ["retention=1.01", "(0, 1]"]),
        (lambda: fixed(retention=-0.5), ["retention=-0.5", "(0, 1]"]),
        (lambda: fixed(retention=math.nan), ["retention=nan"]),
        (lambda: fixed(retention=0.9), ["retention=0.9", "32"]),
        (lambda: fixed(retention=0.17), ["retention=0.17", "below 1"]),
        (lambda: fixed(mean_tokens=65), ["mean_tokens=65", "64"]),
        (lambda: fixed(retention=0.3, vision_ratio=0.01), ["vision_ratio=0.01", "64"]),
        (lambda: fixed(), ["exactly one target"]),
    ],
)
def test_configuration_refuses(config, words, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: pytest.fail("traced"))
    with pytest.raises(ConfigError) as error:
        vitcop_compile.optimize(shared(3), config(), backend="eager")
    assert all(word in str(error.value) for word in words), str(error.value)


# Whatever is sent: an error of ours, or a result


@pytest.fixture(scope="module")
def stub(small):
    """A model whose programs return zeros of the right shapes, and the list of the programs made."""
    made = []

    def zeros(program):
        made.append(program)
        values = next(iter(reversed(program.graph.nodes))).args[0]
        shapes = [(tuple(value.meta["val"].shape), value.meta["val"].dtype) for value in values]
        return lambda *inputs: tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in shapes)

    backends.BACKENDS["stub"] = backends.Backend(zeros)
    yield optimize(small, CONFIG, backend="stub", prompt_buckets=(16, 64)), made
    del backends.BACKENDS["stub"]


FAULTS = ["count", "ids", "gap", "shape", "dtype", "mask", "pixels", "batch", "kind"]
ID_TYPES = [torch.float32, torch.bool, torch.int32, torch.uint8, torch.complex64, torch.int8]


@st.composite
def requests(draw):
    """Mostly nearly right: a few of the ways to be wrong at once, or none."""
    wrong = draw(st.sets(st.sampled_from(FAULTS), max_size=3))
    batch = draw(st.integers(1, 2))
    image = draw(st.booleans())
    run = [IMAGE] * (PATCHES if image else 0)
    if "count" in wrong:
        run = [IMAGE] * draw(st.sampled_from([0, 1, 63, 65, 128]))
    rows = []
    for _ in range(batch):
        before = draw(st.integers(0, 20))
        rows.append([*[7] * before, *run, *[9] * (20 - before)])
    ids = torch.tensor(rows)
    if "gap" in wrong:
        ids = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))]
    if "ids" in wrong:
        at = draw(st.integers(0, batch - 1)), draw(st.integers(0, 19))
        ids[at] = draw(st.sampled_from([-200, -1, 94, VOCAB, 2**40]))
    if "shape" in wrong:
        ids = draw(st.sampled_from([ids[0], ids[None], ids[:0], ids[:, :0], ids.repeat(1, 4), ids[:, :1]]))
    if "dtype" in wrong:
        ids = ids.to(draw(st.sampled_from(ID_TYPES)))
    mask = None
    if draw(st.booleans()) and ids.dim() == 2:
        mask = torch.ones(ids.shape, dtype=draw(st.sampled_from([torch.int64, torch.bool, torch.float32])))
        pads = draw(st.integers(0, 5))
        mask[:, :pads] = 0
    if "mask" in wrong:
        size = [draw(st.integers(0, 3)), draw(st.integers(0, 90))]
        some = torch.arange(ids.numel()).view(ids.shape) % draw(st.integers(2, 9)) > 0
        mask = draw(st.sampled_from([torch.zeros(ids.shape), torch.zeros(size), torch.ones(1), [1, 1], some]))
    images = pixels(1).expand(batch, -1, -1, -1) if image else None
    if "pixels" in wrong:
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, SIDE]), max_size=5))
        dtype = draw(st.sampled_from([torch.float16, torch.float64, torch.int64, torch.bool]))
        whole = torch.full((batch, 3, SIDE, SIDE), draw(st.sampled_from([0.0, math.nan, math.inf, 1e5])))
        images = draw(st.sampled_from([torch.zeros(shape).to(dtype), whole, whole.to(dtype), None, "image"]))
    if "batch" in wrong:
        images = pixels(draw(st.integers(1, 3)))
    request = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
    if "kind" in wrong:
        request[draw(st.sampled_from(["labels", "use_cache", "past_key_values", "input_ids"]))] = draw(
            st.sampled_from([None, False, True, 1, "x", DynamicCache(), PrunedCache(), PrunedCache(max_length=10**6)])
        )
    return request


outcomes = {"refused": 0, "answered": 0}


@settings(max_examples=400)
@given(request=requests())
def test_any_request_is_answered_or_refused(stub, request):
    fast, made = stub
    before = len(made)
    try:
        out = fast(**request)
    except VitcopError:
        assert len(made) == before
        outcomes["refused"] += 1
    else:
        assert out.logits.shape == (request["input_ids"].shape[0], 1, VOCAB)
        assert out.past_key_values.filled
        outcomes["answered"] += 1


def test_the_requests_were_of_both_kinds(stub):
    assert min(outcomes.values()) > 40, outcomes
