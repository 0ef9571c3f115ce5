"""Streams of random requests through one model, each answered as a fresh model answers it.

The reference is a runtime without a past (no buffers, no caches) for every request, on eager programs; a conversation has one
of its own. Where an image prompt has as many rows as a prompt without one, what serves both must tell them apart: 64 patches
stay, and buckets differ by 64. What the eager programs compute is compared with stock layers in `test_turns`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import models
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule, run_state_machine_as_test
from vitcop_compile.export import EngineModel, export

from vitcop_compile import InputError, ViTCoPConfig
from vitcop_compile.runtime import CompiledModel

LAYERS, NEAR = 3, 1e-4
CONFIG = ViTCoPConfig(budgets=(64, 32, 8), shallow_layer=1, deep_layer=2, scale_layers=False)
BUCKETS = (32, 96)
STEPS = 50  # of one example, at most
SPOKEN = 3  # new tokens of a request, however many it asks for: its caches are made for those


@dataclass(frozen=True)
class Request:
    """lengths: text tokens of every prompt; images: of every prompt; side: where pads stand; beams: 1 for greedy or, with a
    seed, for sampling."""

    lengths: tuple[int, ...]
    images: tuple[int, ...]
    side: str = "left"
    beams: int = 1
    new_tokens: int = 2
    seed: int | None = None

    def inputs(self) -> dict[str, torch.Tensor]:
        prompts = []
        for at, (length, images) in enumerate(zip(self.lengths, self.images, strict=True)):
            words = torch.tensor([models.text(length, seed=7 * length + at)])
            run = torch.full((1, models.PATCHES), models.IMAGE)
            cut = length // (images + 1)
            parts = [part for i in range(images) for part in (words[:, i * cut : (i + 1) * cut], run)]
            prompts.append(torch.cat((*parts, words[:, images * cut :]), 1))
        ids, mask = models.pad(prompts, self.side)
        total = sum(self.images)
        pixels = {"pixel_values": models.pixels(total, sum(self.lengths))} if total else {}
        return {"input_ids": ids, "attention_mask": mask} | pixels


@dataclass
class Held:
    """A cache that waits for its next token, beside the one of the reference."""

    ours: Any
    reference: Any
    batch: int
    room: int = field(default=60)
    turns: int = field(default=0)


@pytest.fixture(autouse=True)
def silent(caplog) -> None:
    """transformers advises on the side of pads for every prompt."""
    caplog.set_level("ERROR", "transformers")


@cache
def eager():
    return models.optimize(models.shared(LAYERS), CONFIG, prompt_buckets=BUCKETS)


@cache
def onnxruntime():
    return models.optimize(models.shared(LAYERS), CONFIG, backend="onnxruntime", prompt_buckets=BUCKETS)


def fresh(model: CompiledModel) -> CompiledModel:
    """The same programs in a runtime that has served nothing."""
    return CompiledModel(model._provider, model.config, model.generation_config)


def generate(model: CompiledModel, request: Request) -> Any:
    torch.manual_seed(request.seed or 0)
    inputs = request.inputs()
    most = inputs["input_ids"].shape[1] + SPOKEN

    def spoken(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= most)

    return model.generate(
        **inputs, max_new_tokens=request.new_tokens, num_beams=request.beams, do_sample=request.seed is not None,
        return_dict_in_generate=True, output_logits=True, stopping_criteria=[spoken],
    )  # fmt: skip


@cache
def expected(request: Request) -> tuple[list, torch.Tensor]:
    out = generate(fresh(eager()), request)
    return out.sequences.tolist(), torch.stack(out.logits)


class Stream(RuleBasedStateMachine):
    """What is common to all; `model`, `batches`, `beams` and `rooms` say what an arm can take.

    narrow: every prompt of one image is as long, in its bucket, as one without, none has two, and few tokens are asked for:
    that is where they must be told apart, and takes a third of the programs.
    """

    held = Bundle("held")
    model: Any = None
    served = 0
    narrow = False
    batches: tuple[int, ...] = (1, 2)
    beams: tuple[int, ...] = (1, 1, 1, 2)
    rooms: tuple[int, ...] = (1, 2, 2, 5, 66)
    sampled = True
    # Of each prompt: whether prompts of a batch may differ, how many there may be, and whether later turns bring some.
    mixed = True
    images: tuple[int, ...] = (0, 0, 1, 1, 2)
    later_images: tuple[int, ...] = (0, 0, 1)

    def __init__(self) -> None:
        super().__init__()
        self.ours = fresh(type(self).model())
        self.kept: list[Any] = []

    def request(self, data: Any, **fixed: Any) -> Request:
        beams = data.draw(st.sampled_from(self.beams))
        batch = data.draw(st.sampled_from([size for size in self.batches if size % beams == 0])) // beams
        images = self.counts(data, batch, self.images)
        drawn = Request(
            tuple(data.draw(st.sampled_from(self.lengths(count))) for count in images),
            images,
            data.draw(st.sampled_from(("left", "right"))),
            beams,
            data.draw(st.sampled_from([room for room in self.rooms if room < 66 or not self.narrow])),
            data.draw(st.sampled_from((None, 1))) if self.sampled and beams == 1 else None,
        )
        return dataclasses.replace(drawn, **fixed)

    def counts(self, data: Any, batch: int, of: tuple[int, ...]) -> tuple[int, ...]:
        count = st.sampled_from([images for images in of if images < 2 or not self.narrow])
        return tuple(data.draw(count) for _ in range(batch)) if self.mixed else (data.draw(count),) * batch

    def lengths(self, images: int) -> tuple[int, ...]:
        short, long = (1, 2, 20, 31, 32), (33, 90, 96)
        return (long, short)[images] if self.narrow else short + long

    @rule(data=st.data(), keep=st.booleans())
    def serve(self, data: Any, keep: bool) -> None:
        request = self.request(data)
        out = generate(self.ours, request)
        sequences, logits = expected(request)
        assert out.sequences.tolist() == sequences
        torch.testing.assert_close(torch.stack(out.logits), logits, atol=NEAR, rtol=0)
        self.kept = [*self.kept, out][-2:] if keep else []
        self.count()

    @rule(data=st.data(), target=held)
    def begin(self, data: Any) -> Held:
        request = self.request(data, beams=1, seed=None)
        if len(request.lengths) not in self.batches:
            request = dataclasses.replace(request, lengths=request.lengths * 2, images=request.images * 2)
        inputs = request.inputs()
        ours, reference = self.ours(**inputs), fresh(eager())(**inputs)
        torch.testing.assert_close(ours.logits, reference.logits, atol=NEAR, rtol=0)
        self.count()
        return Held(ours["past_key_values"], reference["past_key_values"], len(request.lengths), self.least_room())

    @rule(at=consumes(held), token=st.integers(3, 90), target=held)
    def step(self, at: Held, token: int) -> Any:
        ids = torch.arange(token, token + at.batch)[:, None] % models.IMAGE
        ours = self.ours(input_ids=ids, past_key_values=at.ours).logits
        reference = eager()(input_ids=ids, past_key_values=at.reference).logits
        torch.testing.assert_close(ours, reference, atol=NEAR, rtol=0)
        self.count()
        at.room -= 1
        return at if at.room > 1 else multiple()

    @rule(data=st.data(), at=consumes(held), target=held)
    def turn(self, data: Any, at: Held) -> Any:
        lengths = tuple(data.draw(st.sampled_from((2, 3, 20))) for _ in range(at.batch))
        inputs = Request(
            lengths, self.counts(data, at.batch, self.later_images), data.draw(st.sampled_from(("left", "right")))
        ).inputs()
        ours = self.ours(**inputs, past_key_values=at.ours)
        reference = eager()(**inputs, past_key_values=at.reference)
        torch.testing.assert_close(ours.logits, reference.logits, atol=NEAR, rtol=0)
        self.count()
        at.turns, at.room = at.turns + 1, self.least_room() - 24 * (at.turns + 1)
        return at if at.turns < 2 else multiple()

    @rule(at=held)
    def refuse_another_batch(self, at: Held) -> None:
        with pytest.raises(InputError, match=f"{at.batch + 1} samples for a cache of {at.batch}"):
            self.ours(input_ids=torch.full((at.batch + 1, 2), 5), past_key_values=at.ours)
        self.count()

    @rule(data=st.data(), wrong=st.sampled_from(("ids", "pixels", "placeholders", "length")))
    def refuse(self, data: Any, wrong: str) -> None:
        request = self.request(data, beams=1)
        inputs = dataclasses.replace(request, images=(1,) * len(request.lengths)).inputs()
        if wrong == "ids":
            inputs["input_ids"][0, -1] = models.VOCAB + 5
            inputs["attention_mask"][0, -1] = 1
        elif wrong == "pixels":
            inputs["pixel_values"][0, 0, 0, 0] = torch.nan
        elif wrong == "placeholders":
            inputs["input_ids"][inputs["input_ids"] == models.IMAGE] = 7
        else:
            batch = inputs["input_ids"].shape[0]
            inputs = Request((97,) * batch, (0,) * batch).inputs()
        with pytest.raises(InputError):
            self.ours.generate(**inputs, max_new_tokens=1)
        self.count()

    @rule(at=consumes(held))
    def forget(self, at: Held) -> None:
        del at
        self.count()

    def least_room(self) -> int:
        return 60

    def count(self) -> None:
        type(self).served += 1


class Eager(Stream):
    model = staticmethod(eager)
    batches = (1, 2)
    rooms = (1, 2, 5)  # another bucket of new tokens is another set of programs, and a test of its own below


class OnnxRuntime(Stream):
    """Every batch size and bucket is another program to export: few of them."""

    model = staticmethod(onnxruntime)
    batches = (2,)
    beams = (1, 1, 2)
    rooms = (1, 2, 5)
    sampled = False  # by the last bit, a draw may differ
    mixed, images, later_images = False, (0, 1), (0,)


@cache
def folder() -> EngineModel:
    import tempfile

    place = tempfile.mkdtemp() + "/folder"
    fast = models.optimize(models.shared(LAYERS), CONFIG)
    export(fast, place, batch_size=2, max_text_len=96, max_new_tokens=66)
    return EngineModel.from_pretrained(place)


class Folder(Stream):
    """A folder takes two sequences: two prompts, or one of two beams. Its text axis is dynamic: rows are text plus image."""

    model = staticmethod(folder)
    batches = (2,)
    beams = (1, 1, 2)
    rooms = (1, 2, 5, 66)
    sampled = False
    mixed, images, later_images = False, (0, 1), (0,)


ARMS = {"eager": Eager, "onnxruntime": OnnxRuntime, "folder": Folder}


def run(arm: type[Stream], steps: int, narrow: bool) -> None:
    arm.served, arm.narrow = 0, narrow
    chosen = settings.get_profile("suite")
    examples = round(1.3 * steps / STEPS) + 1  # some end early
    run_state_machine_as_test(arm, settings=settings(chosen, max_examples=examples, stateful_step_count=STEPS))
    assert arm.served >= steps


@pytest.mark.parametrize("name", ["eager", "folder", models.exhaustive("onnxruntime")])
def test_a_stream_is_served_as_fresh_models_serve_it(name: str) -> None:
    run(ARMS[name], 200, narrow=True)


@pytest.mark.parametrize(
    ("name", "steps"),
    [models.slow("eager", 400), *(models.exhaustive(name, 1000) for name in ("eager", "folder", "onnxruntime"))],
)
def test_a_long_stream_is_served_as_fresh_models_serve_it(name: str, steps: int) -> None:
    run(ARMS[name], steps, narrow=False)


def test_equal_rows_of_both_kinds() -> None:
    """The stream that failed: an image prompt and a longer one without, of 96 rows each in layer 0, in one set of buffers."""
    model = fresh(eager())
    for request in (Request((20,), (1,), new_tokens=66), Request((90,), (0,)), Request((20,), (1,), new_tokens=66)):
        out = generate(model, request)
        assert out.sequences.tolist() == expected(request)[0]
        del out


def test_every_row_that_was_asked_for_can_be_used() -> None:
    inputs = Request((20, 7), (1, 1)).inputs()
    for model in (fresh(eager()), fresh(folder())):
        out = model.generate(**inputs, max_new_tokens=66, do_sample=False)
        assert torch.equal(out, fresh(eager()).generate(**inputs, max_new_tokens=66, do_sample=False))
