"""A processor for the tiny LLaVA of `models`: a token a character, and a chat template; pictures of a few colours."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PAD, END, FIRST = 0, 2, 3
LETTERS = [letter for letter in map(chr, range(32, 127)) if letter not in "^`~\\"] + ["\n"]
CHAT = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}\n{% else %}"
    "{{ message['role'][0].upper() }}:{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Pad, begin, end, the letters, and the token of images, which is the last of the model's vocabulary."""
    words = {"<pad>": PAD, "<s>": 1, "</s>": END} | {letter: FIRST + number for number, letter in enumerate(LETTERS)}
    made = Tokenizer(kinds.WordLevel(words, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    found.add_tokens(["<image>"], special_tokens=True)
    assert found.convert_tokens_to_ids("<image>") == models.IMAGE
    return found


def processor(template: str | None = CHAT) -> Any:
    """The stock processor of LLaVA-1.5."""
    side = {"height": models.SIDE, "width": models.SIDE}
    seen = CLIPImageProcessorPil(size={"shortest_edge": models.SIDE}, crop_size=side)
    told = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(seen, tokenizer(), patch_size=models.SIDE // models.GRID, chat_template=template, **told)


@cache
def picture(seed: int) -> Image.Image:
    """224 x 224, of 8 x 8 squares of any colour."""
    import numpy as np

    colours = np.random.default_rng(seed).integers(0, 256, (models.GRID, models.GRID, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((2 * models.SIDE, 2 * models.SIDE), Image.Resampling.NEAREST)


def asked(text: str, *pictures: int) -> list[dict[str, Any]]:
    """A conversation of one question behind its pictures."""
    seen = [{"type": "image", "image": picture(seed)} for seed in pictures]
    return [{"role": "user", "content": [*seen, {"type": "text", "text": text}]}]
