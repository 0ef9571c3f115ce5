"""What pipelines, servers and users ask of an optimized model beside `generate`, and its programs as they come and go."""

from __future__ import annotations

import logging
import threading
from functools import cache
from typing import Any

import models
import pytest
import torch
from PIL import Image
from transformers import LlavaProcessor, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

from vitcop_compile import InputError, ViTCoPConfig, program_cache, toy

LAYERS = 3
CONFIG = ViTCoPConfig(budgets=(20, 12, 5), shallow_layer=1, deep_layer=2, scale_layers=False)


def optimized(**settings: Any):
    return models.optimize(models.shared(LAYERS), CONFIG, **settings)


def test_it_answers_what_a_model_is_asked() -> None:
    stock, fast = models.shared(LAYERS), optimized()
    assert fast.eval() is fast and not fast.training
    assert fast.to("cpu") is fast and fast.to(torch.float32) is fast and fast.to(device="cpu", dtype=torch.float32) is fast
    assert fast.device.type == "cpu" and fast.dtype == torch.float32 and fast.can_generate()
    assert [id(p) for p in fast.parameters()] == [id(p) for p in stock.parameters()]
    assert fast.config is stock.config and fast.generation_config is stock.generation_config
    assert fast.pruning_config is CONFIG
    words = repr(fast)
    assert words.startswith("OptimizedModel(LlavaForConditionalGeneration, 64 to 12.3 visual tokens, backend='eager'")
    assert "0 vision, 0 prefill, 0 extend" in words
    fast.warmup(text_tokens=4)
    assert "1 vision, 1 prefill, 1 extend" in repr(fast)


@pytest.mark.parametrize("place", ["meta", torch.device("cuda"), torch.float16, "cuda:1"])
def test_it_is_not_moved_or_converted(place: Any) -> None:
    with pytest.raises(InputError, match="move or convert the stock model, and optimize that"):
        optimized().to(place)


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<pad>": 0, "<s>": 1} | {letter: toy.FIRST_BYTE + i for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(kinds.BPE(vocab | {"<image>": toy.IMAGE_TOKEN}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"}
    )
    template = (
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}{% endfor %}"
    )
    return LlavaProcessor(
        toy.processor(small().config), fast, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )  # fmt: skip


@cache
def small():
    """One for all tests, which leave it as it is."""
    sizes = {"vision_hidden": 32, "vision_layers": 3, "vision_heads": 2, "hidden": 32, "heads": 2, "layers": 3}
    return toy.small_llava(**sizes, intermediate=64, vocab=300, image_size=112)


def test_a_pipeline_serves_it(processor) -> None:
    """A dense configuration says what the stock model says."""
    model = small()
    fast = models.optimize(model, ViTCoPConfig.dense())
    photo = Image.effect_noise((120, 90), 80).convert("RGB")
    said = []
    for served in (model, fast):
        ask = pipeline("image-text-to-text", model=served, processor=processor)
        content = [{"type": "image", "image": photo}, {"type": "text", "text": "What?"}]
        chat = [{"role": "user", "content": content}]
        (answer,) = ask(text=chat, max_new_tokens=6, generate_kwargs={"do_sample": False}, return_full_text=False)
        said.append(answer["generated_text"])
    assert said[0] == said[1] and said[0]


def test_a_streamer_in_a_thread(processor) -> None:
    model = small()
    fast = models.optimize(model, ViTCoPConfig.dense())
    inputs = processor(images=Image.effect_noise((120, 90), 80).convert("RGB"), text="<image>What?", return_tensors="pt")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    given = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    asked: dict[str, Any] = given | {"max_new_tokens": 6, "do_sample": False}
    thread = threading.Thread(target=fast.generate, kwargs=asked | {"streamer": streamer})
    thread.start()
    said = "".join(streamer)
    thread.join()
    tokens = model.generate(**asked)[0, given["input_ids"].shape[1] :]
    assert said == processor.tokenizer.decode(tokens)


# Programs


def test_every_program_is_a_line_of_the_log(caplog) -> None:
    caplog.set_level(logging.INFO, "vitcop_compile")
    fast = optimized()
    given: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    fast.generate(models.prompt(), pixel_values=models.pixels(), **given)
    fast.generate(models.prompt().repeat(2, 1), pixel_values=models.pixels(2), **given)
    fast.generate(models.prompt(20, 20), pixel_values=models.pixels(), **given)
    lines = [record.getMessage() for record in caplog.records if record.name == "vitcop_compile"]
    heads = [line.split("; exported in ")[0] for line in lines]
    assert len(lines) == len(fast.compiled) and all("first call" in line for line in lines)
    assert heads[:3] == [
        "vision (images 1): the first of its kind",
        "prefill (batch 1, text rows 32, visual tokens ((20,), (12,), (5,)), cache rows (116, 108, 101), filled False): "
        "the first of its kind",
        "extend (batch 1, tokens 1, cache rows (116, 108, 101)): the first of its kind",
    ]
    assert "vision (images 2): other images" in heads
    assert any(head.endswith("filled False): other batch") for head in heads)
    assert any(head.endswith("filled False): other text rows, cache rows") for head in heads)
    caplog.clear()
    fast.generate(models.prompt(), pixel_values=models.pixels(), **given)
    assert not [record for record in caplog.records if record.name == "vitcop_compile"]


def test_the_program_used_longest_ago_is_let_go() -> None:
    made: list[tuple] = []

    def make(key: tuple, size: int):
        def build():
            made.append(key)
            return (lambda *_: key), size

        return build

    kept = program_cache.ProgramCache(limit=10)
    one, two, three = (("vision", i) for i in (1, 2, 3))
    for key in (one, two, one):
        assert kept.get(key, make(key, 4))() == key
    kept.get(three, make(three, 4))  # two was used before one
    assert set(kept.programs) == {one, three}
    kept.get(one, make(one, 4))
    kept.get(two, make(two, 4))
    assert set(kept.programs) == {one, two} and made == [one, two, three, two]
    # One that is larger than the bound is kept while it is the latest: it has been asked for.
    kept.get(three, make(three, 99))
    assert set(kept.programs) == {three}
    kept.release()
    assert not kept.programs


def test_programs_come_back_after_they_were_let_go() -> None:
    roomy, tight = optimized(), optimized(program_bytes=1)
    given: dict[str, Any] = {"pixel_values": models.pixels(), "max_new_tokens": 4, "do_sample": False}
    expected = roomy.generate(models.prompt(), **given).tolist()
    assert tight.generate(models.prompt(), **given).tolist() == expected and len(tight.compiled) == 1
    roomy.release()
    assert roomy.compiled == () and roomy.generate(models.prompt(), **given).tolist() == expected


def test_bytes_of_a_program() -> None:
    program = optimized().programs.export_vision(1)
    outputs = sum(tensor.nbytes for tensor in program.module()(models.pixels()))
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    largest = max(v.nbytes for n in program.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor))
    assert program_cache.bytes_of(program, copied=False) == outputs + 2 * largest
    assert program_cache.bytes_of(program, copied=True) == outputs + 2 * largest + weights
