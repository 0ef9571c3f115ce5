"""Requests through a decode batch of small models are answered as `generate` answers each of them alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import families
import folders
import models
import numpy as np
import pytest
import torch
from folders import CONFIG, LAYERS
from ledger import Clock, Heard, ask, serve
from models import VOCAB, exhaustive, pixels, slow, turn_ids
from torch import Tensor
from vitcop_compile.export import EngineModel, export

from vitcop_compile import ConfigError, InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.methods import Calibrated
from vitcop_compile.serve.features import Features
from vitcop_compile.serve.requests import Sampling
from vitcop_compile.serve.scheduler import SlotScheduler
from vitcop_compile.serve.slots import Slots

SHORT, LONG = 9, folders.TEXT  # text tokens in a bucket
BUCKETS = (SHORT, LONG)


@functools.cache
def eager(buckets: tuple[int, ...] = (LONG,)) -> Any:
    """The model of the folders."""
    return models.optimize(models.shared(LAYERS), CONFIG, prompt_buckets=buckets)


def slots_of(model: Any, count: int = 3, **options: Any) -> Slots:
    if not isinstance(model, EngineModel):
        layout = model.host.layout
        options = {"text_tokens": LONG, "max_new_tokens": 8, "layouts": [[layout], [layout] * 2]} | options
    return Slots(model, count, **options)


def made(model: Any, count: int = 3, **options: Any) -> SlotScheduler:
    return SlotScheduler(slots_of(model, count, **options), every=2, company=0, clock=Clock(), threaded=False)


def prompt(images: int, seed: int = 0, length: int = 0) -> dict[str, Tensor]:
    """What a processor says of text around so many images, with `length` words more."""
    ids = torch.tensor([[*models.text(length, seed + 50), *turn_ids(images, seed)]])
    return {"input_ids": ids} | ({"pixel_values": pixels(images, seed)} if images else {})


def alone(model: Any, inputs: dict[str, Any], seed: int | None = None, **settings: Any) -> list[int]:
    """What `generate` says."""
    if seed is not None:
        torch.manual_seed(seed)
    inputs = dict(inputs)
    if isinstance(model, EngineModel) and 1 not in model.manifest.batch_sizes:
        inputs = {name: torch.cat([value] * min(model.manifest.batch_sizes)) for name, value in inputs.items()}
    settings = {"do_sample": seed is not None, "max_new_tokens": 6, "top_k": 0} | settings
    return model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()


def mixed(model: Any, rng: np.random.Generator, count: int, images: tuple[int, ...] = (0, 1, 2)) -> None:
    """Random requests that arrive at random times, among them some that are cancelled."""
    scheduler, asked = made(model), []
    for _ in range(count):
        inputs = prompt(int(rng.choice(images)), int(rng.integers(6)), int(rng.choice([0, 3, 7])))
        new = int(rng.integers(1, 9))
        greedy = alone(model, inputs, max_new_tokens=new)
        stop = [int(rng.choice(greedy))] if rng.random() < 0.4 else []
        ticket, heard = ask(scheduler, inputs, max_new_tokens=new, stop_ids=tuple(stop), n=int(rng.choice([1, 1, 1, 2])))
        cancelled = rng.random() < 0.15
        asked.append((greedy, stop, heard, cancelled))
        for _ in range(int(rng.choice([0, 0, 1, 2, 5]))):
            scheduler.step()
        if cancelled:
            ticket.cancel()
    serve(scheduler)
    for greedy, stop, heard, cancelled in asked:
        end = greedy.index(stop[0]) + 1 if stop else len(greedy)
        for choice, reason in enumerate(heard.ends):
            said = heard.ids(choice)
            if reason == "cancelled":
                assert cancelled and said == greedy[: len(said)]
            else:
                assert said == greedy[:end] and reason == ("stop" if stop else "length")
    counts = scheduler.counts()
    assert counts["failed"] == counts["occupied"] == 0 and counts["finished"] + counts["cancelled"] == count


@pytest.mark.parametrize(
    ("buckets", "seed", "count"), [((LONG,), 0, 8), exhaustive(BUCKETS, 1, 30), exhaustive(BUCKETS, 2, 60)]
)
def test_any_mix_is_answered_as_alone(buckets: tuple[int, ...], seed: int, count: int) -> None:
    mixed(eager(buckets), np.random.default_rng(seed), count)


def test_within_autocast() -> None:
    """Of whoever asks, and of whoever drives the steps."""
    with torch.autocast("cpu", torch.bfloat16):
        mixed(eager(), np.random.default_rng(3), 4)


@pytest.mark.slow
def test_half_precision() -> None:
    mixed(models.optimize(models.llava(LAYERS).bfloat16(), CONFIG), np.random.default_rng(4), 5)


@pytest.mark.slow
def test_images_that_share_a_budget() -> None:
    mixed(models.optimize(models.shared(LAYERS), dataclasses.replace(CONFIG, scope="pooled")), np.random.default_rng(5), 8)


def test_a_thread_of_its_own() -> None:
    """Within inference mode, which its callers may be in, and threads are not."""
    asked = [prompt(images, 2) for images in (1, 0, 1)]
    with torch.inference_mode(), contextlib.closing(SlotScheduler(slots_of(eager()), company=0)) as scheduler:
        heard = [ask(scheduler, inputs, max_new_tokens=4)[1] for inputs in asked]
    assert [own.ids() for own in heard] == [alone(eager(), inputs, max_new_tokens=4) for inputs in asked]


SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.3, "repetition_penalty": 1.4, "top_p": 0.6},
    {"temperature": 0.0, "repetition_penalty": 1.7},
]


def test_drawn_answers_are_those_of_generate() -> None:
    """With its seed, whatever is decoded beside it; several answers draw with seeds that follow each other."""
    scheduler, asked = made(eager(), 4), []
    for number, settings in enumerate(SAMPLINGS):
        inputs = prompt(number % 3, number)
        many = 2 if number == 1 else 1
        _, heard = ask(scheduler, inputs, max_new_tokens=6, seed=11 * number, n=many, **settings)
        asked.append((inputs, settings, heard))
        scheduler.step()
    serve(scheduler)
    for number, (inputs, settings, heard) in enumerate(asked):
        for choice in range(heard.sampling.n):
            drawn = settings["temperature"] > 0
            given = settings if drawn else {name: settings[name] for name in settings if name != "temperature"}
            expected = alone(eager(), inputs, 11 * number + choice if drawn else None, **given)
            assert heard.ids(choice) == expected
    assert asked[1][2].ids(0) != asked[1][2].ids(1)


def test_ends_of_the_model_and_fewest_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer ends where `generate` ends it, unless it is to be ignored, and not before it may."""
    greedy = alone(eager(), prompt(1), max_new_tokens=8)
    monkeypatch.setattr(eager().generation_config, "eos_token_id", [greedy[2]])
    scheduler = made(eager())
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}), ({"min_new_tokens": 5}, {"min_new_tokens": 5})]
    for ours, theirs in cases:
        _, heard = ask(scheduler, prompt(1), max_new_tokens=8, **ours)
        serve(scheduler)
        assert heard.ids() == alone(eager(), prompt(1), max_new_tokens=8, **theirs)
    _, heard = ask(scheduler, prompt(1), max_new_tokens=8, ignore_end=True)
    serve(scheduler)
    assert heard.ids() == greedy and heard.ends == ["length"]


def test_presence_and_frequency_penalties() -> None:
    """By the logits of a runtime that is made to say the same tokens, in words of Python; without them one word is said
    again and again."""
    inputs, presence, frequency = prompt(0, 6), 2.0, 1.5
    _, heard = ask(
        scheduler := made(eager()), inputs, max_new_tokens=8, presence_penalty=presence, frequency_penalty=frequency
    )
    serve(scheduler)
    said: list[int] = []
    cache = None
    ids = inputs["input_ids"]
    for token in heard.ids():
        out = eager()(ids, past_key_values=cache)
        scores = [
            value - frequency * said.count(word) - presence * (word in said)
            for word, value in enumerate(out.logits[0, -1].tolist())
        ]
        assert token == max(range(VOCAB), key=scores.__getitem__)
        said.append(token)
        cache, ids = out["past_key_values"], torch.tensor([[token]])
    assert said != alone(eager(), inputs, max_new_tokens=8), "penalties change nothing here"


def test_log_probabilities() -> None:
    """Those of the model's own logits, whatever is made of these."""
    scheduler, inputs = made(eager()), prompt(1, 2)
    _, heard = ask(scheduler, inputs, max_new_tokens=4, logprobs=3, temperature=0.5, seed=3)
    _, plain = ask(scheduler, prompt(0, 2), max_new_tokens=4, logprobs=0)
    serve(scheduler)
    cache, ids, given = None, inputs["input_ids"], {"pixel_values": inputs["pixel_values"]}
    for token in heard.tokens[0]:
        out = eager()(ids, past_key_values=cache, **given)
        logs = out.logits[0, -1].double().log_softmax(-1)
        assert token.logprob == pytest.approx(float(logs[token.id]), abs=1e-4)
        best = logs.argsort(descending=True)[:3].tolist()
        assert [word for word, _ in token.top] == best
        assert [value for _, value in token.top] == pytest.approx(logs[best].tolist(), abs=1e-4)
        cache, ids, given = out["past_key_values"], torch.tensor([[token.id]]), {}
    assert all(token.top == () and token.logprob is not None and token.logprob < 0 for token in plain.tokens[0])


def test_nothing_of_an_earlier_request_is_left_in_a_slot() -> None:
    """Not even numbers that are none, of which nothing may be attended to."""
    slots = slots_of(eager(), 2)
    scheduler = SlotScheduler(slots, company=0, clock=Clock(), threaded=False)
    for tensor in slots._buffers.layers:
        tensor.fill_(torch.nan)
    heard = [ask(scheduler, prompt(images, 4), max_new_tokens=5)[1] for images in (0, 1)]
    serve(scheduler)
    for staged in slots._stages.values():
        for tensor in staged.layers:
            tensor.fill_(torch.nan)
    for tensor in slots._buffers.layers:
        tensor.fill_(torch.nan)
    heard += [ask(scheduler, prompt(images, 4), max_new_tokens=5)[1] for images in (0, 1)]
    serve(scheduler)
    for place, own in enumerate(heard):
        assert own.ids() == alone(eager(), prompt(place % 2, 4), max_new_tokens=5)


def test_a_picture_is_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever prompt it comes again, alone or beside another; one that differs in a bit is another."""
    asked: list[int] = []
    provider = eager().provider
    whole = type(provider).vision
    monkeypatch.setattr(type(provider), "vision", lambda self, images: asked.append(images) or whole(self, images))
    scheduler = made(eager(), 4)
    first, second = pixels(1, 1), pixels(1, 2)
    nearly = first.clone()
    nearly[0, 0, 0, 0] += 1e-6

    def serve_one(images: list[Tensor], seed: int) -> list[int]:
        inputs = {"input_ids": torch.tensor([turn_ids(len(images), seed)]), "pixel_values": torch.cat(images)}
        _, heard = ask(scheduler, inputs, max_new_tokens=3)
        serve(scheduler)
        begun = len(asked)
        assert heard.ids() == alone(eager(), inputs, max_new_tokens=3)
        del asked[begun:]
        return asked

    assert serve_one([first], 0) == [1]
    assert serve_one([first], 1) == [1]
    assert serve_one([second, first], 2) == [1, 1]
    assert serve_one([first, first], 3) == [1, 1]
    assert serve_one([nearly], 0) == [1, 1, 1]
    counts = scheduler.counts()
    assert (counts["feature_hits"], counts["feature_misses"]) == (4, 3)
    for seed in (1, 2):  # two prompts of one batch with the same new picture
        ask(scheduler, {"input_ids": torch.tensor([turn_ids(1, 3 * seed)]), "pixel_values": pixels(1, 7)}, max_new_tokens=1)
    serve(scheduler)
    assert asked[3:] == [1]


def test_features_are_bounded_in_bytes() -> None:
    slots = slots_of(eager(), 1)
    requests = [slots.examine(prompt(1, seed), Sampling(max_new_tokens=1)) for seed in range(4)]
    features = Features(eager().provider, 0, (1,))
    features.of(requests[:1])
    assert features.bytes == 0
    probe = Features(eager().provider, 2**20, (1,))
    probe.of(requests[:1])
    size = probe.bytes
    features = Features(eager().provider, 2 * size + 1, (1,))
    for number in (0, 1, 0, 2, 0, 1):  # 1 was used longest ago when 2 came
        features.of([requests[number]])
    assert features.bytes == 2 * size and (features.hits, features.misses) == (2, 4)


def test_pictures_go_through_the_vision_side_in_sizes_that_there_are_programs_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of some sizes alone, as in a folder; fewer are filled up, and what is more goes through by itself."""
    slots = slots_of(eager(), 1)
    requests = [slots.examine(prompt(1, seed), Sampling(max_new_tokens=1)) for seed in range(7)]
    expected = [Features(eager().provider, 0, (1,)).of([request])[0] for request in requests]
    seen: list[int] = []
    own = Features._seen
    monkeypatch.setattr(Features, "_seen", lambda self, units: seen.append(len(units)) or own(self, units))
    for found, right in zip(Features(eager().provider, 0, (2, 4)).of(requests), expected, strict=True):
        torch.testing.assert_close(found.features, right.features)
    assert seen == [4, 2, 2]


def test_features_follow_weights_that_change_in_place() -> None:
    model = models.llava(LAYERS)
    fast = models.optimize(model, CONFIG, prompt_buckets=(LONG,))
    scheduler, inputs = made(fast, 1), prompt(1)
    _, before = ask(scheduler, inputs, max_new_tokens=4)
    serve(scheduler)
    with torch.no_grad():
        for value in (*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()):
            value.copy_(value.flip(0))
    _, after = ask(scheduler, inputs, max_new_tokens=4)
    serve(scheduler)
    assert after.ids() == alone(fast, inputs, max_new_tokens=4) != before.ids()
    assert scheduler.counts()["feature_hits"] == 0


@pytest.mark.slow
def test_programs_are_made_ahead() -> None:
    """Every one that requests within the room need, and what was made of black pictures is not kept."""
    fast = models.optimize(models.shared(LAYERS), CONFIG, prompt_buckets=BUCKETS)
    slots = slots_of(fast, 2)
    assert slots.warmup() == len(BUCKETS) * 3 * 2
    scheduler = SlotScheduler(slots, company=0, clock=Clock(), threaded=False)
    known = set(fast.compiled)
    asked = [prompt(images, 3, length) for images in range(3) for length in (0, 9) for _ in range(2)]
    heard = [ask(scheduler, inputs, max_new_tokens=2)[1] for inputs in asked]
    serve(scheduler)
    assert set(fast.compiled) == known
    for inputs, own in zip(asked, heard, strict=True):
        assert own.ids() == alone(eager(), inputs, max_new_tokens=2)
    assert scheduler.counts()["feature_misses"] == 3


QWEN = ViTCoPConfig(vision_ratio=0.8, center_ratio=0.2, retention=0.5, vision_layer=1, shallow_layer=1, deep_layer=3,
                    scale_layers=False)  # fmt: skip
SHAPES: tuple[list[Any], ...] = ([3, (3, 4), 4], [2, (4, 4), 1, (2, 6), 3], [9], [5, (4, 4), 2])


@pytest.mark.slow
def test_positions_of_three_coordinates() -> None:
    """Images of several sizes, and text, decoded together."""
    fast = models.optimize(families.model("qwen2_5_vl"), QWEN, prompt_buckets=BUCKETS)
    whole = []
    for seed, parts in enumerate(SHAPES):
        ids, given = families.prompt("qwen2_5_vl", parts, seed)
        whole.append({"input_ids": torch.tensor([ids])} | given | (families.types(torch.tensor([ids])) if given else {}))
    layouts = [found for inputs in whole for found in fast.layouts_of(**inputs) if found]
    scheduler = SlotScheduler(
        Slots(fast, 3, text_tokens=LONG, max_new_tokens=8, layouts=layouts), company=0, clock=Clock(), threaded=False
    )
    for again in range(2):
        heard = [ask(scheduler, inputs, max_new_tokens=5)[1] for inputs in whole]
        serve(scheduler)
        for inputs, own in zip(whole, heard, strict=True):
            assert own.ids() == alone(fast, inputs, max_new_tokens=5)
        assert scheduler.counts()["feature_misses"] == 4 and scheduler.counts()["feature_hits"] == 4 * again


@pytest.mark.slow
def test_rows_that_stand_for_several_tokens() -> None:
    """How many each does moves with it."""
    fast = models.optimize(models.shared(LAYERS), Calibrated(CONFIG), prompt_buckets=BUCKETS)
    assert fast.schedule.told
    scheduler, asked = made(fast, 2), [prompt(images, images) for images in (1, 0, 2, 1)]
    heard = [ask(scheduler, inputs, max_new_tokens=5)[1] for inputs in asked]
    serve(scheduler)
    assert [own.ids() for own in heard] == [alone(fast, inputs, max_new_tokens=5) for inputs in asked]


# What is refused


@pytest.mark.parametrize(
    ("inputs", "settings", "said"),
    [
        (prompt(0, length=LONG), {}, "exceed the 24"),
        (prompt(1), {"max_new_tokens": 200}, "rows by group of layers"),
        (prompt(1), {"max_new_tokens": 2000}, "positions, the model has 1024"),
        (prompt(2) | {"pixel_values": pixels(3)}, {}, "3 images for placeholders of 2"),
        (prompt(0), {"n": 4}, "n=4 answers, there are 3 slots"),
        (prompt(0) | {"inputs_embeds": torch.zeros(1, 2, 3)}, {}, "inputs_embeds cannot be used"),
        ({"input_ids": torch.tensor([[3, 4], [5, 6]])}, {}, "one by one"),
        ({"input_ids": [3, 4]}, {}, "input_ids is a list"),
        ({}, {}, "input_ids is a NoneType"),
        ({"input_ids": torch.tensor([[3, VOCAB]])}, {}, "outside the vocabulary"),
        (prompt(1) | {"pixel_values": pixels() * torch.nan}, {}, "NaN"),
        (prompt(0) | {"attention_mask": torch.zeros_like(prompt(0)["input_ids"])}, {}, "without tokens"),
        (prompt(0) | {"attention_mask": torch.ones(1, 99)}, {}, "attention_mask is"),
    ],
)
def test_a_prompt_that_programs_cannot_take_is_refused(inputs: dict[str, Any], settings: dict[str, Any], said: str) -> None:
    scheduler = made(eager())
    with pytest.raises(InputError, match=said):
        ask(scheduler, inputs, **settings)
    assert scheduler.counts()["submitted"] == 0 and scheduler.step() is None


def test_more_images_than_slots_have_room_for_are_refused() -> None:
    scheduler = made(eager(), layouts=None)
    with pytest.raises(InputError, match="rows by group of layers"):
        ask(scheduler, prompt(2), max_new_tokens=8)
    _, heard = ask(scheduler, prompt(1), max_new_tokens=8)
    serve(scheduler)
    assert heard.ends == ["length"]


def test_slots_that_cannot_be_are_refused() -> None:
    for options in ({"count": 0}, {"text_tokens": 0}, {"max_new_tokens": 0}, {"prefill_batches": ()}):
        with pytest.raises(ConfigError, match="pass"):
            slots_of(eager(), **({"count": 2} | options))
    with pytest.raises(InputError, match="largest bucket"):
        slots_of(eager(), text_tokens=LONG + 1)
    with pytest.raises(ConfigError, match="say which by layouts="):
        Slots(models.optimize(families.model("qwen2_5_vl"), QWEN), 2)


def test_a_model_that_has_changed_fails_its_requests() -> None:
    model = models.llava(LAYERS)
    scheduler = made(models.optimize(model, CONFIG, prompt_buckets=BUCKETS))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    heard = Heard(Sampling(max_new_tokens=2))
    scheduler.submit(prompt(0), heard.sampling, heard)
    serve(scheduler)
    assert heard.ends == ["failed"] and isinstance(heard.error, UnsupportedError)


# Engine folders


@pytest.mark.parametrize("buckets", [slow(None), exhaustive(BUCKETS)])
def test_a_folder_answers_any_mix_as_alone(buckets: tuple[int, ...] | None, tmp_path: Any) -> None:
    layout = eager().host.layout
    with folders.without_collection():
        export(
            folders.optimized(), tmp_path / "folder", batch_size=(1, 3), max_text_len=LONG, max_new_tokens=8,
            prompt_buckets=buckets, layouts=[[layout], [layout] * 2],
        )  # fmt: skip
    engine = EngineModel.from_pretrained(tmp_path / "folder", threads=1)
    mixed(engine, np.random.default_rng(5), 30)
    with pytest.raises(InputError, match="images of 3 x 64 tokens"):
        ask(made(engine), prompt(3))
    with pytest.raises(InputError, match="max_new_tokens=9 exceeds"):
        ask(made(engine), prompt(0), max_new_tokens=9)


@pytest.mark.slow
def test_a_folder_of_one_batch_size() -> None:
    """Prefill takes two at a time, or one, filled up."""
    engine = EngineModel.from_pretrained(folders.folder("pair"), threads=1)
    scheduler, asked = made(engine, 2), [prompt(images, images) for images in (1, 1, 0, 1, 0)]
    heard = [ask(scheduler, inputs, max_new_tokens=5)[1] for inputs in asked]
    serve(scheduler)
    assert [own.ids() for own in heard] == [alone(engine, inputs, max_new_tokens=5) for inputs in asked]
    refused: list[tuple[int, dict[str, Any], str]] = [
        (3, {}, "slots=3: the folder decodes 2 sequences"),
        (2, {"layouts": [[engine.provider.host.layout]]}, "layouts: an engine folder says that itself"),
        (2, {"max_new_tokens": 3}, "max_new_tokens: an engine folder"),
        (2, {"text_tokens": 30}, "exceeds max_text_len"),
    ]
    for count, options, said in refused:
        with pytest.raises(ConfigError, match=said):
            Slots(engine, count, **options)
