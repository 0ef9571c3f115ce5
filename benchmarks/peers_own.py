"""This environment's side of benchmarks/peers.py: stock transformers and this package's backends, as `python peers_own.py`
serves them, and the model's folder that every arm reads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_protocol import peak_around, question, serve
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, StaticCache
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vitcop_compile import ViTCoPConfig, optimize
from vitcop_compile.bench import Shape
from vitcop_compile.bench.environment import environment
from vitcop_compile.bench.models import DTYPES, WEIGHTS
from vitcop_compile.cache import CACHE_NAME

PAD, START, SEEN_FROM, SEEN_TO = 0, 1, 2, 3
# answer(inputs of the stock model, note) -> None; `note` is called with every token, [1] or [1, 1].
Answer = Callable[[dict[str, Tensor], Callable[[Tensor], None]], None]


def write_model(shape: Shape, seed: int, folder: Path) -> None:
    """The stock model of `shape`, a Qwen2.5-VL or Qwen2-VL, in float32, with a tokenizer of bytes and a processor that leaves
    pictures of its size as they are: what `from_pretrained`, and a converter, load."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    shape.model(seed).save_pretrained(folder)
    special = {"<pad>": PAD, "<|im_start|>": START, "<|vision_start|>": SEEN_FROM, "<|vision_end|>": SEEN_TO}
    special |= {"<|video_pad|>": shape.vocab - 2, "<|image_pad|>": shape.vocab - 1}
    # Every id has a word: random weights answer with any.
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"w{place}" for place in range(len(words), shape.vocab - len(special))]
    vocabulary = special | {word: SEEN_TO + 1 + place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>").save_pretrained(folder)
    side = shape.image_size**2
    image = Qwen2VLImageProcessorPil(size={"shortest_edge": side, "longest_edge": side}).to_dict()
    files = {
        # OpenVINO GenAI reads min_pixels and max_pixels; its converter knows the class by its older name.
        "preprocessor_config.json": image
        | {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": side, "max_pixels": side},
        "chat_template.json": {"chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}"},
        "generation_config.json": {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": PAD},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


class Own:
    """Arms that share one model, under the commands of a worker."""

    def __init__(self) -> None:
        self._arms: dict[str, Answer] = {}
        self._given: dict[str, Any] = {}

    def build(
        self,
        folder: str,
        threads: int,
        side: int,
        text: int,
        tokens: int,
        dtype: str,
        arms: dict[str, dict[str, Any]],
        weights: str = "float",
    ) -> dict[str, Any]:
        """Loads the model in `dtype`, its linear layers held as `weights` says ("float", "int8"), and makes its arms, which
        compile at their first answer. side, text, tokens: as in peers_genai.py; arms: {"kind": "stock_eager", "stock_compile"}
        or {"kind": "ours", "backend", "preset"} and, for a backend with a choice, "precision"."""
        torch.set_num_threads(threads)
        model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
        model.generation_config.eos_token_id = None
        WEIGHTS[weights](model)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self._given = {"side": side, "text": text, "tokens": tokens, "model": model}
        self._given |= {"tokenizer": tokenizer, "processor": processor}
        for name, arm in arms.items():
            self._arms[name] = _KINDS[arm.pop("kind")](model, text, tokens, **arm)
        return {"versions": environment()}

    @torch.no_grad()
    def answer(self, arm: str, seed: int, ids: bool = False) -> dict[str, Any]:
        """One answer about picture and prompt number `seed`: the clock starts with text and uint8 pixels in hand, and is read
        when a token is known. Raises RuntimeError where it is not of the length asked for."""
        given = self._given
        shown = (given["side"], given["side"], 3)
        picture = np.random.default_rng(seed).integers(0, 256, shown, dtype=np.uint8)
        words = question(seed, given["text"] - 2)
        found: list[int] = []
        times: list[float] = []

        def note(token: Tensor) -> None:
            found.append(int(token.reshape(())))
            times.append(time.perf_counter())

        def call() -> tuple[float, float]:
            start = time.perf_counter()
            inputs = self._inputs(picture, words)
            ready = time.perf_counter()
            self._arms[arm](inputs, note)
            return start, ready

        (start, ready), peak = peak_around(call)
        if len(found) != given["tokens"]:
            raise RuntimeError(f"generated {len(found)} tokens, not {given['tokens']}")
        return {
            "ttft_ms": 1e3 * (times[0] - start),
            "tpot_ms": 1e3 * (times[-1] - times[0]) / max(1, len(times) - 1),
            "answer_ms": 1e3 * (times[-1] - start),
            "tokens": len(found),
            "preprocessing_ms": 1e3 * (ready - start),
            "peak_bytes": peak,
            "ids": found,
        }

    def _inputs(self, picture: np.ndarray, words: str) -> dict[str, Tensor]:
        model, processor = self._given["model"], self._given["processor"]
        seen = processor(picture, return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // processor.merge_size**2
        image = [SEEN_FROM, *[model.config.image_token_id] * count, SEEN_TO]
        ids = torch.tensor([image + self._given["tokenizer"](words, add_special_tokens=False).input_ids])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == model.config.image_token_id).int(),
            "pixel_values": seen["pixel_values"].to(model.dtype),
            "image_grid_thw": seen["image_grid_thw"],
        }


class _Notes:
    """A streamer of transformers: `put` gets the prompt first."""

    def __init__(self, note: Callable[[Tensor], None]):
        self._note, self._begun = note, False

    def put(self, tokens: Tensor) -> None:
        if self._begun:
            self._note(tokens)
        self._begun = True

    def end(self) -> None:
        pass


def generated(model: Any, tokens: int) -> Answer:
    """`generate`, as a user calls it."""

    def answer(inputs: dict[str, Tensor], note: Callable[[Tensor], None]) -> None:
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=_Notes(note))

    return answer


def stock_eager(model: Any, text: int, tokens: int) -> Answer:
    """transformers as it is, with torch's fused attention."""
    return generated(model, tokens)


def stock_compile(model: Any, text: int, tokens: int) -> Answer:
    """The stock model under torch.compile at static shapes, as the arm of `vitcop_compile.bench`: the prompt makes its cache
    inside the graph, without a mask; decoding is one full graph on a StaticCache, which it is copied into. Greedy, and without
    the loop of `generate`: better than what a user has."""
    cache: Any = None

    def prompt(inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
        rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
        found = model(**rest, use_cache=True, logits_to_keep=1)
        return found.logits, [(layer.keys, layer.values) for layer in found[CACHE_NAME].layers]

    def step(token: Tensor, place: Tensor) -> Tensor:
        given = {CACHE_NAME: cache, "position_ids": place}
        return model(input_ids=token, use_cache=True, logits_to_keep=1, **given).logits

    first, further = torch.compile(prompt, dynamic=False), torch.compile(step, fullgraph=True, dynamic=False)

    def answer(inputs: dict[str, Tensor], note: Callable[[Tensor], None]) -> None:
        nonlocal cache
        length = inputs["input_ids"].shape[1]
        if cache is None:
            cache = StaticCache(config=model.config, max_cache_len=length + tokens)
            # transformers installs its hooks, and allocates the cache, in a first call, which dynamo cannot trace.
            model(**inputs, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})
        logits, held = first(inputs)
        token = logits[:, -1].argmax(-1, keepdim=True)
        note(token)
        about = {name: inputs[name] for name in ("input_ids", "image_grid_thw", "mm_token_type_ids")}
        places = model.model.get_rope_index(**about)[0]
        place = (places.amax((0, 2), keepdim=True) + 1).expand(len(places), 1, 1).contiguous()
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys[:, :, :length].copy_(keys)
            layer.values[:, :, :length].copy_(values)
            layer.cumulative_length.fill_(length)
        for _ in range(tokens - 1):
            token = further(token, place)[:, -1].argmax(-1, keepdim=True)
            note(token)
            place = place + 1

    return answer


def ours(model: Any, text: int, tokens: int, backend: str, preset: str, **precision: str) -> Answer:
    """`optimize`, and `generate` of what it returns."""
    config = ViTCoPConfig.dense() if preset == "dense" else ViTCoPConfig.preset(preset)
    return generated(optimize(model, config, backend=backend, prompt_buckets=(text,), **precision), tokens)


_KINDS: dict[str, Callable[..., Answer]] = {"stock_eager": stock_eager, "stock_compile": stock_compile, "ours": ours}

if __name__ == "__main__":
    own = Own()
    serve({"build": own.build, "answer": own.answer})
