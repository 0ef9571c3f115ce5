"""What is compared behind one door: slots, `generate()` in a loop, and batches around `generate()`, dense and pruned."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from vitcop_compile import ViTCoPConfig, optimize
from vitcop_compile.bench import Shape
from vitcop_compile.bench.cases import DENSE
from vitcop_compile.isolation import plain
from vitcop_compile.optimized import OptimizedModel
from vitcop_compile.serve.door import Door, Limits, Served
from vitcop_compile.serve.intake import blanks
from vitcop_compile.serve.prompts import Prompts
from vitcop_compile.serve.requests import Event, Failed, Finished, Overloaded, Sampling, Token
from vitcop_compile.serve.scheduler import SlotScheduler
from vitcop_compile.serve.slots import Slots
from vitcop_compile.toy import IMAGE_TOKEN

# Tokens of text that programs are made for, and of answers.
BUCKETS, NEW = (32, 64, 128), 64
PATCH = 14
# A picture, or text.
CHAT = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %} {{ part.text }}{% endif %}{% endfor %}{% endfor %}"
)
# How long a batch waits for company, as `@serve.batch` does by default, and sizes of those that go through programs.
_WAIT = 0.01
_SIZES = (1, 2, 4, 8)


def processor_of(shape: Shape) -> LlavaProcessor:
    """A word for every token, so that each is told when it is known."""
    names = {place: f"w{place}" for place in range(shape.vocab)} | {IMAGE_TOKEN: "<image>"}
    made = Tokenizer(models.WordLevel({name: place for place, name in names.items()}, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w3", pad_token="w0", extra_special_tokens={"image_token": "<image>"}
    )
    side = {"height": shape.image_size, "width": shape.image_size}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": shape.image_size}, crop_size=side), tokenizer, patch_size=PATCH,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip


class _Asked:
    """A ticket of `Looped`."""

    def __init__(self, inputs: Mapping[str, Any], sampling: Sampling, listen: Callable[[Event], None]):
        self.inputs, self.sampling, self.listen = dict(inputs), sampling, listen
        self.text_tokens, self.image_tokens = inputs["input_ids"].numel(), 0
        self.cancelled = False

    def cancel(self) -> None:
        """Its answer is dropped; `generate` goes on, as it does where nothing can end it."""
        self.cancelled = True


class Looped:
    """`generate()` behind the protocol of a scheduler, in one thread: requests one by one, or at most `together` that came
    within 10 ms of each other and are alike, as a decorator for batches has it, in sizes that there are programs of. What
    waits longest is next."""

    def __init__(self, model: OptimizedModel, together: int = 1, most: int = 64):
        self._model, self._together, self._most = model, together, most
        self._waiting: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._held: list[_Asked] = []
        self._served = self._rejected = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, inputs: Mapping[str, Any], sampling: Sampling, listen: Callable[[Event], None]) -> _Asked:
        """As `Scheduler.submit`."""
        if self._waiting.qsize() + len(self._held) >= self._most:
            self._rejected += 1
            raise Overloaded("the queue is full: come back later", 1.0)
        asked = _Asked(inputs, sampling, listen)
        self._waiting.put(asked)
        return asked

    def counts(self) -> dict[str, float]:
        """As `Scheduler.counts`, of what there is here."""
        names = ("slots", "occupied", "oldest_queued_s", "heartbeat_age_s", "submitted", "cancelled", "failed", "prefills",
                 "decode_steps", "padded_rows", "text_rows", "feature_hits", "feature_misses")  # fmt: skip
        queued = self._waiting.qsize() + len(self._held)
        return dict.fromkeys(names, 0.0) | {"queued": queued, "finished": self._served, "rejected": self._rejected}

    def close(self, drain: bool = True) -> None:
        """As `Scheduler.close`, what waits is served."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            if not self._held:
                first = self._waiting.get()
                if first is None:
                    return
                self._held.append(first)
            until = time.monotonic() + (_WAIT if self._together > 1 else 0.0)
            ended = False
            while len(self._held) < self._together and (left := until - time.monotonic()) > 0:
                try:
                    asked = self._waiting.get(timeout=left)
                except queue.Empty:
                    break
                if asked is None:
                    ended = True
                    break
                self._held.append(asked)
            # Of one call all prompts have images or none, as many rows, and as many new tokens.
            key = _key(self._held[0])
            batch = [asked for asked in self._held if _key(asked) == key][: self._together]
            batch = batch[: max(size for size in _SIZES if size <= len(batch))]
            self._held = [asked for asked in self._held if asked not in batch]
            self._serve(batch)
            if ended:
                self._waiting.put(None)

    def _serve(self, batch: list[_Asked]) -> None:
        first = batch[0].inputs
        given = {name: torch.cat([asked.inputs[name] for asked in batch]) for name in first}
        new = batch[0].sampling.max_new_tokens
        try:
            self._model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False, streamer=_Telling(batch))
        except Exception as error:
            for asked in batch:
                asked.listen(Failed(error))
            return
        self._served += len(batch)
        for asked in batch:
            asked.listen(Finished(0, "length"))


def _key(asked: _Asked) -> tuple[Any, ...]:
    shapes = {name: tuple(value.shape) for name, value in asked.inputs.items()}
    return (asked.sampling.max_new_tokens, *sorted(shapes.items()))


class _Telling(BaseStreamer):
    """Tells every listener of a batch its token."""

    def __init__(self, batch: list[_Asked]):
        self._batch, self._begun = batch, False

    def put(self, value: torch.Tensor) -> None:
        """transformers': the prompt first, then a token of each sequence."""
        if self._begun:
            for asked, token in zip(self._batch, value.reshape(-1).tolist(), strict=True):
                asked.listen(Token(0, token))
        self._begun = True

    def end(self) -> None:
        """transformers'."""


def warmed(model: Any, label: str, backend: str, slots: int) -> tuple[OptimizedModel, Slots]:
    """A setting of a model and slots of it, with every program made that an arm may ask for. A picture is never kept."""
    config = ViTCoPConfig.dense() if label == DENSE else ViTCoPConfig.preset(label)
    optimized = optimize(model, config, backend=backend)
    optimized.generation_config.eos_token_id = None
    own = Slots(optimized, slots, text_tokens=BUCKETS[-1], max_new_tokens=NEW, feature_bytes=0)
    own.warmup()
    for size, text, images in itertools.product((size for size in _SIZES if size <= slots), BUCKETS, (0, 1)):
        optimized.warmup(size, text, NEW, images, processes=1)
    return optimized, own


def work(own: Mapping[str, Slots], image_share: float, rounds: int = 5) -> dict[str, dict[str, float]]:
    """By setting, measured in turns: ms of prefill of a request, over `BUCKETS` and that share of pictures, their encoding and
    the selection with it; ms of a decode step of all slots."""
    kinds = {label: list(blanks(slots.model, slots.room, slots.count)) for label, slots in own.items()}
    prefill: dict[str, list[float]] = {label: [] for label in own}
    step: dict[str, list[float]] = {label: [] for label in own}
    with plain():
        for _ in range(rounds):
            for label, slots in own.items():
                total = 0.0
                for request in kinds[label]:
                    share = image_share if request.pictures else 1 - image_share
                    if request.turn.text in BUCKETS:
                        total += share / len(BUCKETS) * _seconds(lambda: slots.prefill([request], [[0]]))  # noqa: B023
                prefill[label].append(total)
                step[label].append(_seconds(lambda: slots.decode([0] * slots.count)))  # noqa: B023
        for slots in own.values():
            slots.clear()
    return {label: {"prefill_ms": 1e3 * median(prefill[label]), "step_ms": 1e3 * median(step[label])} for label in own}


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def door(shape: Shape, presets: tuple[str, ...], backend: str, slots: int, queued: int) -> tuple[Door, dict[str, Slots]]:
    """Every arm as a model behind a door, "slots dense", "loop 1/9", "batch 1/9", ... All share one model's weights."""
    model, processor = shape.model(), processor_of(shape)
    served: list[Served] = []
    own: dict[str, Slots] = {}
    for label in (DENSE, *presets):
        optimized, own[label] = warmed(model, label, backend, slots)
        prompts = Prompts(processor, optimized.host.inputs, optimized.host.token_ids)
        arms = {
            "slots": SlotScheduler(own[label], most_queued=queued),
            "loop": Looped(optimized, 1, queued),
            "batch": Looped(optimized, slots, queued),
        }
        served += [Served(f"{name} {label}", arm, prompts, NEW, queue=queued) for name, arm in arms.items()]
    return Door(served, Limits(preparing=4096)), own
