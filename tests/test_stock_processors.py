"""A photograph through stock processors and chat templates, of families whose processors run without torchvision."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import families
import gemma
import matplotlib.cbook
import models
import pytest
import stock_family
import test_family_glm4v
import test_family_idefics3
import test_family_mistral3
import test_family_qwen3_vl
import tiled
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from transformers import (
    Gemma3Processor,
    Glm4vProcessor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from vitcop_compile import ViTCoPConfig
from vitcop_compile.families.registry import host_of
from vitcop_compile.schedule import resolve

# 256 bytes, and the tokens of the families.
VOCAB = 320
# (height, width), narrow, flat, tiny and larger than anything is left.
SIZES = (
    (56, 56), (37, 211), (600, 512), (41, 40), (999, 333), (130, 60), (9, 31), (301, 300), (77, 1000), (1201, 1900),
)  # fmt: skip
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Stock:
    """A family. tiny() -> its tiny model; processor(its config, tokenizer, more) -> the stock processor; placeholder: what its
    chat template says for an image; special: tokens by the names of the config's fields; named: by those that its processor
    asks a tokenizer for; others: that have neither; size: (height, width) of the photograph that is spoken about."""

    tiny: Callable[[], Any]
    processor: Callable[..., Any]
    placeholder: str
    special: dict[str, str]
    named: dict[str, str]
    others: tuple[str, ...] = ()
    size: tuple[int, int] = (150, 128)


def _side(config: Any) -> dict[str, int]:
    side = config.vision_config.image_size
    high, wide = (side, side) if isinstance(side, int) else side
    return {"height": high, "width": wide}


def _qwen(processor: Any) -> Callable[..., Any]:
    return lambda config, tokenizer, **more: processor(Qwen2VLImageProcessorPil(patch_size=14), tokenizer, **more)


def _glm(config: Any, tokenizer: Any, **more: Any) -> Any:
    return Glm4vProcessor(Glm4vImageProcessorPil(), tokenizer, **more)


def _internvl(config: Any, tokenizer: Any, **more: Any) -> Any:
    return InternVLProcessor(GotOcr2ImageProcessorPil(size=_side(config)), tokenizer, image_seq_length=16, **more)


def _next(config: Any, tokenizer: Any, **more: Any) -> Any:
    seen = LlavaNextImageProcessorPil(
        image_grid_pinpoints=config.image_grid_pinpoints, size={"shortest_edge": tiled.TILE}, crop_size=_side(config)
    )  # fmt: skip
    told = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaNextProcessor(seen, tokenizer, patch_size=tiled.TILE // tiled.GRID, **told, **more)


def _onevision(config: Any, tokenizer: Any, **more: Any) -> Any:
    seen = LlavaOnevisionImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints, size=_side(config))
    told = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": config.vision_aspect_ratio}
    return LlavaOnevisionProcessor(seen, tokenizer, num_image_tokens=tiled.GRID**2, **told, **more)


def _tiles(config: Any, kind: Any) -> Any:
    side = config.vision_config.image_size
    return kind(size={"longest_edge": 4 * side}, max_image_size={"longest_edge": side})


def _idefics3(config: Any, tokenizer: Any, **more: Any) -> Any:
    tokens = test_family_idefics3.TOKENS
    return Idefics3Processor(_tiles(config, Idefics3ImageProcessorPil), tokenizer, image_seq_len=tokens, **more)


def _smolvlm(config: Any, tokenizer: Any, **more: Any) -> Any:
    # Numbers are put into words for videos alone, whose processor needs torchvision, and says how many frames it takes.
    with mock.patch.object(processing_smolvlm, "num2words", str):
        return SmolVLMProcessor(
            _tiles(config, SmolVLMImageProcessorPil), tokenizer, SimpleNamespace(num_frames=8, fps=1),
            image_seq_len=test_family_idefics3.TOKENS, **more,
        )  # fmt: skip


def _gemma3(config: Any, tokenizer: Any, **more: Any) -> Any:
    return Gemma3Processor(Gemma3ImageProcessorPil(size=_side(config)), tokenizer, image_seq_length=gemma.TOKENS, **more)


class _Pixtral:
    """In place of the stock processor, which needs torchvision: the stock processor of images, and its rows with a break
    behind each."""

    def __init__(self, config: Any, tokenizer: Any, **more: Any):
        self.tokenizer, self.template = tokenizer, more["chat_template"]
        self.step = config.vision_config.patch_size * config.spatial_merge_size
        longest = {"longest_edge": config.vision_config.image_size}
        self.images = PixtralImageProcessorPil(size=longest, patch_size={"height": self.step, "width": self.step})

    def apply_chat_template(self, messages: Any, **more: Any) -> Any:
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        photographs = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        given = self.images(photographs, return_tensors="pt")
        for height, width in torch.as_tensor(given["image_sizes"]).tolist():
            rows = ["[IMG]" * (width // self.step)] * (height // self.step)
            text = text.replace("[IMG]", "[IMG_BREAK]".join(rows).replace("[IMG]", "<one>") + "[IMG_END]", 1)
        return dict(self.tokenizer(text.replace("<one>", "[IMG]"), return_tensors="pt")) | dict(given)


_VISION = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
_QWEN = _VISION | {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
_GLM = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip
_INTERNVL = {
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}  # fmt: skip
_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_BETWEEN = (
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)),
)  # fmt: skip
_PAD = "<|vision_start|><|image_pad|><|vision_end|>"
STOCK: dict[str, Stock] = {
    "qwen2_vl": Stock(lambda: families.model("qwen2_vl"), _qwen(Qwen2VLProcessor), _PAD, _QWEN, {}),
    "qwen2_5_vl": Stock(lambda: families.model("qwen2_5_vl"), _qwen(Qwen2_5_VLProcessor), _PAD, _QWEN, {}),
    "qwen3_vl": Stock(test_family_qwen3_vl.model, _qwen(Qwen3VLProcessor), _PAD, _QWEN, {}),
    "glm4v": Stock(
        test_family_glm4v.model, _glm, "<|begin_of_image|><|image|><|end_of_image|>", _GLM, {}
    ),
    "internvl": Stock(
        lambda: families.model("internvl"), _internvl, "<IMG_CONTEXT>\n", {"image_token_id": "<IMG_CONTEXT>"}, _INTERNVL
    ),
    "next": Stock(lambda: tiled.model("next"), _next, "<image>\n", {"image_token_id": "<image>"}, {}),
    "onevision": Stock(
        lambda: tiled.model("onevision"), _onevision, "<image>\n",
        {"image_token_id": "<image>", "video_token_id": "<video>"}, {},
    ),
    "idefics3": Stock(
        lambda: test_family_idefics3.model("idefics3"), _idefics3, "<image>", {"image_token_id": "<image>"}, {}, _BETWEEN
    ),
    "smolvlm": Stock(
        lambda: test_family_idefics3.model("smolvlm"), _smolvlm, "<image>", {"image_token_id": "<image>"}, {}, _BETWEEN
    ),
    "gemma3": Stock(gemma.model, _gemma3, "<start_of_image>", {"image_token_id": "<image_soft_token>"}, _GEMMA),
    "mistral3": Stock(
        test_family_mistral3.model, _Pixtral, "[IMG]", {"image_token_id": "[IMG]"}, {}, ("[IMG_BREAK]", "[IMG_END]")
    ),
}  # fmt: skip
ALL = pytest.mark.parametrize("name", STOCK)


def tokenizer(stock: Stock) -> PreTrainedTokenizerFast:
    """A token a byte, and the family's own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(kinds.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    spoken = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", extra_special_tokens=stock.named)
    spoken.add_tokens(["<|im_start|>", "<|im_end|>", *stock.special.values(), *stock.others], special_tokens=True)
    assert len(spoken) <= VOCAB
    return spoken


@contextlib.contextmanager
def _without_videos() -> Iterator[None]:
    # Processors of videos need torchvision, and are not asked for any.
    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", lambda *given: None):
        yield


@cache
def processor(name: str) -> Any:
    """The stock processor for the family's tiny model, with a chat template."""
    stock = STOCK[name]
    with _without_videos():
        return stock.processor(config(name), tokenizer(stock), chat_template=_CHAT.replace("PLACEHOLDER", stock.placeholder))


@cache
def config(name: str) -> Any:
    """That of the tiny model, with the vocabulary of the tokenizer."""
    stock = STOCK[name]
    made, spoken = copy.deepcopy(stock.tiny().config), tokenizer(stock)
    made.architectures = [type(stock.tiny()).__name__]
    made.text_config.vocab_size = VOCAB
    for field, token in stock.special.items():
        assert hasattr(made, field)
        setattr(made, field, spoken.convert_tokens_to_ids(token))
    return made


@cache
def model(name: str) -> Any:
    """A float32 model in evaluation mode with random weights."""
    made = type(STOCK[name].tiny())(config(name)).eval()
    stock_family.scatter(made)
    with torch.no_grad():
        for key, weight in made.named_parameters():
            if "lambda" in key:  # scales of whole layers
                weight.mul_(0.2)
    return made


@cache
def photograph(height: int, width: int) -> Image.Image:
    """Of Grace Hopper."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        return Image.open(file).convert("RGB").resize((width, height))


def asked(name: str, *sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What the processor makes of a question about photographs of those (height, width)."""
    content = [{"type": "image", "image": photograph(*size)} for size in sizes]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "Who is it?"}]}]
    return dict(
        processor(name).apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def said(name: str, model: Any, given: dict[str, torch.Tensor], steps: int = 8) -> Any:
    """Greedy tokens, none of which is a special one."""
    return model.generate(
        **given, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True, output_logits=True,
        suppress_tokens=[*range(256, VOCAB)],
    )  # fmt: skip


@ALL
def test_what_the_processor_makes_of_an_image_is_what_its_size_tells(name: str) -> None:
    """Placeholders and encoder inputs by the processor, and the segments that are read from what it gives."""
    host, spoken = host_of(config(name)), processor(name).tokenizer
    token = spoken.convert_tokens_to_ids(STOCK[name].special["image_token_id"])
    found = set()
    for size in SIZES:
        given = asked(name, size)
        layout = host.layout_of(*size)
        ids = given["input_ids"]
        assert int((ids == token).sum()) == sum(segment.tokens for segment in layout), size
        told = {key: value for key, value in given.items() if key in host.inputs}
        images = host.read(told, ids, torch.device("cpu"), torch.float32)
        assert tuple(segment for own in images.layouts for segment in own) == layout, size
        # Rows of tiles that are not padding.
        pixels = given["pixel_values"]
        rows = pixels.flatten(0, 1) if pixels.dim() == 5 else pixels
        if name in ("internvl", "next", "onevision", "idefics3", "smolvlm", "gemma3"):
            assert len(rows) == sum(segment.tiles for segment in layout), size
        found.add(layout)
    assert len(found) > 3 or name == "gemma3"


@pytest.mark.covers("image")
@pytest.mark.parametrize("name", [name if name == "next" else models.slow(name) for name in STOCK if name != "smolvlm"])
def test_a_photograph_says_what_it_says_to_the_stock_model(name: str) -> None:
    given = asked(name, STOCK[name].size)
    expected = said(name, model(name), given)
    found = said(name, models.optimize(model(name), ViTCoPConfig.dense()), given)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(set(found.sequences[0, -8:].tolist())) > 2
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=stock_family.NEAR, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "internvl", "onevision", "smolvlm", "mistral3"])
def test_a_photograph_is_pruned_by_the_schedule_of_its_size(name: str) -> None:
    given, preset = asked(name, STOCK[name].size), ViTCoPConfig.preset("1/3")
    with torch.no_grad():
        dense = model(name)(**given).logits[:, -1]
    fast = models.optimize(model(name), preset)
    found = fast(**given)
    schedule = resolve(preset, fast.host.shape, fast.layout_of(*STOCK[name].size))
    assert found.past_key_values.selection.kept.shape == (1, schedule.image_tokens)
    assert found.logits.isfinite().all()
    assert (found.logits[:, -1] - dense).abs().max() > 10 * stock_family.NEAR


@pytest.mark.slow
@pytest.mark.parametrize("name", ["next"])
def test_a_photograph_so_narrow_that_its_tiles_are_all_padding(name: str) -> None:
    """The stock models take its overview alone, though its tiles are seen."""
    size = (77, 1000)
    (segment,) = host_of(config(name)).layout_of(*size)
    assert (segment.tokens, segment.tiles) == (tiled.GRID**2, 4)
    given = asked(name, size)
    expected = said(name, model(name), given, 2)
    found = said(name, models.optimize(model(name), ViTCoPConfig.dense()), given, 2)
    torch.testing.assert_close(torch.cat(found.logits), torch.cat(expected.logits), atol=stock_family.NEAR, rtol=1e-4)
