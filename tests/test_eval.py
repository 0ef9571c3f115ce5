"""What harnesses ask of a pruned model: answers and likelihoods in batches, told by stock models and by the reference."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import models
import pytest
import reference_llava as reference
import spoken
import torch
from spoken import asked

from vitcop_compile import ConfigError, InputError, UnsupportedError, ViTCoPConfig, methods
from vitcop_compile.config import DEFAULT_PRESET
from vitcop_compile.evaluation import Evaluator, Question, generation_of, method_of_words

PRUNED = ViTCoPConfig(budgets=(30, 18, 7, 5), shallow_layer=1, deep_layer=2, vision_layer=2, scale_layers=False)
SETTINGS = reference.Settings(30, 5, 18, 7, 2, 1, 2)
QUESTIONS = [asked("What?", 1), asked("Who is it?", 2), asked("Hi"), asked("Two?", 1, 2), asked("Where are they?", 3)]


@cache
def processor() -> Any:
    return spoken.processor()


def evaluator(config: ViTCoPConfig = PRUNED, batch: int = 2, **options: Any) -> Evaluator:
    fast = models.optimize(models.shared(3), config, prompt_buckets=(32, 64))
    return Evaluator(fast, processor(), batch_size=batch, max_new_tokens=4, **options)


def later(conversations: list[Any]) -> list[Question]:
    return [lambda own=own: own for own in conversations]


def given(conversation: Any) -> dict[str, torch.Tensor]:
    """What the stock processor makes of a prompt that is written here by hand."""
    (message,) = conversation
    pictures = [part["image"] for part in message["content"][:-1]]
    text = f"U:{'<image>' * len(pictures)}{message['content'][-1]['text']}A:"
    return dict(processor()(text=text, images=pictures or None, return_tensors="pt"))


def stock_answer(conversation: Any, steps: int, **options: Any) -> torch.Tensor:
    own = given(conversation)
    out = models.shared(3).generate(
        **own, max_new_tokens=steps, do_sample=False, pad_token_id=0, eos_token_id=spoken.END, **options
    )
    return out[0, own["input_ids"].shape[1] :]


def stock_likelihood(conversation: Any, text: str) -> tuple[float, bool]:
    """One forward of the stock model through prompt and continuation."""
    own, model = given(conversation), models.shared(3)
    words = torch.tensor([[spoken.FIRST + spoken.LETTERS.index(letter) for letter in text]])
    whole = {"input_ids": torch.cat((own["input_ids"], words), 1), "pixel_values": own.get("pixel_values")}
    with torch.no_grad():
        logits = model(**{name: value for name, value in whole.items() if value is not None}).logits.double()
    spread = logits[0, own["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
    return float(spread.gather(1, words.T).sum()), bool((spread.argmax(-1) == words[0]).all())


def text_of(tokens: torch.Tensor) -> str:
    return "".join(spoken.LETTERS[token - spoken.FIRST] for token in tokens.tolist() if token >= spoken.FIRST and token < 95)


def program_sizes(seen: Evaluator) -> set[int]:
    """Prompts of all programs of the language model that were made."""
    return {key[1] for key in seen.model.compiled if key[0] in ("prefill", "extend")}


def test_answers_are_the_stock_models_in_their_order() -> None:
    """Batches of two: of one picture each, of text alone and two pictures, which are asked apart, and the last one; those
    of one question are filled up."""
    seen = evaluator(ViTCoPConfig.dense())
    with mock.patch.object(seen.model, "generate", wraps=seen.model.generate) as asked:
        found = seen.answer(later(QUESTIONS), [{}] * 5)
    assert [len(call.kwargs["input_ids"]) for call in asked.call_args_list] == [2, 2, 2, 2]
    assert program_sizes(seen) == {2}
    told = [stock_answer(own, 4) for own in QUESTIONS]
    assert [own.text for own in found] == [text_of(tokens) for tokens in told]
    assert len({own.text for own in found}) > 3
    assert [own.prompt for own in found] == [given(own)["input_ids"].shape[1] for own in QUESTIONS]
    assert [own.tokens for own in found] == [int((tokens > spoken.END).sum()) for tokens in told]


@pytest.mark.slow
def test_requests_of_other_settings_have_a_batch_of_their_own() -> None:
    """Each request's own settings are honoured, wherever it stands."""
    seen = evaluator(ViTCoPConfig.dense())
    settings = [{"max_new_tokens": 2}, {}, {"max_new_tokens": 2}, {"repetition_penalty": 9.0}, {"max_new_tokens": 3}]
    with mock.patch.object(seen.model, "generate", wraps=seen.model.generate) as told:
        found = seen.answer(later(QUESTIONS), settings)
    alone = [stock_answer(own, more.pop("max_new_tokens", 4), **more) for own, more in zip(QUESTIONS, map(dict, settings))]
    assert [own.text for own in found] == [text_of(tokens) for tokens in alone]
    sizes = [len(call.kwargs["input_ids"]) for call in told.call_args_list]
    assert sizes == [2, 2, 2, 2, 2]  # of one group, which is smaller than a batch, or differs in having a picture
    assert program_sizes(seen) == {2}


def test_a_stop_string_ends_an_answer() -> None:
    whole = text_of(stock_answer(QUESTIONS[1], 4))
    seen = evaluator(ViTCoPConfig.dense(), batch=1)
    (found,) = seen.answer(later(QUESTIONS[1:2]), [{"until": [whole[1:3], "~~"]}])
    assert found.text == whole[:1] and found.tokens == 3
    (found,) = seen.answer(later(QUESTIONS[1:2]), [{"until": whole[0]}])
    assert found.text == "" and found.tokens == 1
    assert program_sizes(seen) == {1}


@pytest.mark.slow
def test_sampling_follows_the_seed_and_the_temperature() -> None:
    seen, said = evaluator(batch=1), []
    for temperature in (0.0, 1e-4, 50.0, 50.0):
        torch.manual_seed(5)
        said.append(seen.answer(later(QUESTIONS[:1]), [{"temperature": temperature, "max_new_tokens": 8}])[0].text)
    assert said[0] == said[1] != said[2] == said[3]


def test_likelihoods_are_the_stock_models() -> None:
    """Continuations of one prompt, of several and of different lengths, with and without a picture; dense."""
    best = text_of(stock_answer(QUESTIONS[3], 3))
    texts = [" cat", " car", "d", " no", best, best[:2] + " "]
    prompts = [0, 0, 0, 2, 3, 3]
    seen = evaluator(ViTCoPConfig.dense())
    with mock.patch.object(seen, "_told", wraps=seen._told) as told:
        found = seen.score(later([QUESTIONS[at] for at in prompts]), texts, prompts)
    expected = [stock_likelihood(QUESTIONS[at], text) for at, text in zip(prompts, texts)]
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]
    assert found[4][1] and not found[5][1]
    assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    rows = [len(call.args[0]) for call in told.call_args_list]
    assert sum(rows) == 4  # " cat" and " car" share one, and so do the last two
    assert [len(call.args[1]["input_ids"]) for call in told.call_args_list] == [2, 2, 2] and rows == [2, 1, 1]
    assert program_sizes(seen) == {2}


def test_likelihoods_behind_a_pruned_prompt_are_those_of_the_method_by_the_book() -> None:
    """Prefill pruned by the reference, and the continuation told to stock layers token by token."""
    texts, model = ["A cat", "A dog.", "no"], models.shared(3)
    found = evaluator().score(later(QUESTIONS[:1] * 3), texts, [0, 0, 0])
    own = given(QUESTIONS[0])
    for text, (total, likeliest) in zip(texts, found, strict=True):
        words = [spoken.FIRST + spoken.LETTERS.index(letter) for letter in text]
        run = reference.run(
            model, own["input_ids"], own["pixel_values"], SETTINGS, len(words), lambda _, step, w=words: w[step]
        )
        spread = torch.stack(run.logits).double().log_softmax(-1)
        assert total == pytest.approx(float(spread[range(len(words)), words].sum()), abs=1e-3)
        assert likeliest == (spread.argmax(-1).tolist() == words)
        assert abs(total - stock_likelihood(QUESTIONS[0], text)[0]) > 0.05


def test_what_a_pruned_model_says_is_likeliest_and_adds_up() -> None:
    seen = evaluator()
    own = given(QUESTIONS[4])
    out = seen.model.generate(
        **own, max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_logits=True
    )
    tokens = out.sequences[0, -3:]
    text = text_of(tokens)
    assert len(text) == 3
    spread = torch.stack(out.logits)[:, 0].log_softmax(-1)
    ((total, likeliest),) = seen.score(later(QUESTIONS[4:]), [text], [0])
    assert likeliest and total == pytest.approx(float(spread[range(3), tokens].sum()), abs=1e-4)


def test_white_space_before_a_continuation_is_the_prompts_or_its_own() -> None:
    seen = evaluator(batch=1)
    assert seen._tokens(QUESTIONS[2], " No") == [spoken.FIRST + spoken.LETTERS.index(letter) for letter in " No"]
    seen.template += "{{ '\n' }}"
    assert seen.render(QUESTIONS[2]).endswith("A:\n")
    assert seen._tokens(QUESTIONS[2], " No") == [spoken.FIRST + spoken.LETTERS.index(letter) for letter in "No"]
    for nothing in ("", "  "):
        with pytest.raises(InputError, match="has no token: ask for the likelihood of one or more"):
            seen._tokens(QUESTIONS[2], nothing)


def test_a_token_across_the_end_of_a_prompt_is_read_behind_it() -> None:
    seen = evaluator(batch=1)
    parts = {"U:HiA:": [1, 2], "U:HiA:no": [1, 9], "no": [7]}
    seen.tokenizer = lambda text, **_: {"input_ids": parts[text]}
    assert seen._tokens(QUESTIONS[2], "no") == [7]


def test_a_prompt_is_that_of_the_chat_template() -> None:
    seen = evaluator()
    assert seen.render(QUESTIONS[0]) == "U:<image>What?A:"
    seen.check_system("Be brief")
    (found,) = seen.answer(later([[{"role": "system", "content": [{"type": "text", "text": "Be brief"}]}]]), [{}])
    assert found.prompt == len("Be brief\nA:")
    seen.template = seen.template.replace("{{ message['content'][0]['text'] }}", "")
    with pytest.raises(UnsupportedError, match="leaves the system prompt 'Be brief' out: pass none, or chat_template=FILE"):
        seen.check_system("Be brief")


def test_a_model_without_a_template_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"LlavaProcessor has no chat template.*pass chat_template=FILE"):
        Evaluator(evaluator().model, spoken.processor(None))
    assert Evaluator(evaluator().model, spoken.processor(None), chat_template="x").render(QUESTIONS[0]) == "x"


@pytest.mark.parametrize("counts", [{"batch_size": 0}, {"max_new_tokens": -1}, {"batch_size": True}])
def test_counts_below_one_are_refused(counts: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is no count of 1 or more"):
        Evaluator(evaluator().model, processor(), **counts)


def test_a_video_is_refused_where_the_processor_takes_none() -> None:
    asks = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(InputError, match="LlavaProcessor takes no videos: choose tasks with images"):
        evaluator().answer(later([asks]), [{}])


@pytest.mark.parametrize(
    "settings, sample",
    [({}, False), ({"temperature": 0}, False), ({"temperature": 0.5}, True), ({"do_sample": True}, True),
     ({"do_sample": True, "temperature": 0.0}, False), ({"do_sample": False, "temperature": 0.7}, False)],
)  # fmt: skip
def test_when_it_samples(settings: dict[str, Any], sample: bool) -> None:
    options, stops = generation_of({"top_p": 0.5, "until": None} | settings, 7)
    assert options["do_sample"] is sample and options["max_new_tokens"] == 7 and options["num_beams"] == 1 and stops == ()
    assert options["top_p"] == (0.5 if sample else None)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(InputError, match="max_gen_toks, unti: no setting of `generate`: leave it out of generation_kwargs"):
        generation_of({"unti": ["x"], "max_gen_toks": 3}, 7)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("save_pretrained", 1, "save_pretrained: no setting of `generate`: leave it out of generation_kwargs"),
        ("transformers_version", "5", "transformers_version: no setting of `generate`"),
        ("max_length", 30, "max_length=30 cannot be chosen for an answer: use max_new_tokens"),
        ("min_length", 3, "min_length=3 cannot be chosen for an answer: use min_new_tokens"),
        ("stop_strings", ["a"], r"stop_strings=\['a'\] cannot be chosen for an answer: use until"),
        ("eos_token_id", 2, "eos_token_id=2 cannot be chosen for an answer: leave it out, the model's own is used"),
        ("pad_token_id", 0, "pad_token_id=0 cannot be chosen for an answer: leave it out"),
        ("use_cache", False, "use_cache=False cannot be had for an answer, only use_cache=True: leave it out"),
        ("num_return_sequences", 2, "num_return_sequences=2 cannot be had for an answer, only num_return_sequences=1"),
        ("return_dict_in_generate", True, "return_dict_in_generate=True cannot be had for an answer"),
        ("output_scores", True, "output_scores=True cannot be had for an answer"),
        ("guidance_scale", 1.5, "guidance_scale=1.5 cannot be had for an answer"),
        ("cache_implementation", "static", "cache_implementation='static' cannot be chosen .* brings its own cache"),
        ("prompt_lookup_num_tokens", 3, "prompt_lookup_num_tokens=3 cannot be chosen .* tokens that were guessed"),
        ("num_assistant_tokens", 3, "num_assistant_tokens=3 cannot be chosen .* tokens that were guessed"),
        ("penalty_alpha", 0.5, "penalty_alpha=0.5 cannot be chosen for an answer: leave it out, or use num_beams"),
    ],
)
def test_settings_that_are_not_a_requests_are_refused_before_the_work(name: str, value: Any, message: str) -> None:
    seen = evaluator()
    with mock.patch.object(seen, "_batches", side_effect=AssertionError), pytest.raises(InputError, match=message):
        seen.answer(later(QUESTIONS[:2]), [{}, {name: value}])


def test_settings_that_say_what_is_done_anyway_are_taken() -> None:
    said = {"use_cache": True, "num_return_sequences": 1, "guidance_scale": 1.0, "output_scores": False, "max_length": None}
    assert generation_of(said, 7) == generation_of({}, 7)


def test_methods_by_words(tmp_path: Path) -> None:
    assert method_of_words(None) == ViTCoPConfig.preset(DEFAULT_PRESET)
    assert method_of_words(None, "1/9") == method_of_words("vitcop", preset="1/9") == ViTCoPConfig.preset("1/9")
    assert math.isclose(method_of_words("vitcop", 0.2).retention, 0.2)
    assert method_of_words("fastv:layer=2,tokens=64") == methods.FastV(layer=2, tokens=64)
    assert method_of_words("dense") == ViTCoPConfig.dense()
    ViTCoPConfig.preset("2/9").save(tmp_path / "own.json")
    assert method_of_words(None, config=str(tmp_path / "own.json")) == ViTCoPConfig.preset("2/9")


@pytest.mark.parametrize(
    "words, message",
    [
        ({"method": "fastv:layer=2,tokens=64", "retention": "1/9"}, "both say how much stays: leave tokens or retention out"),
        ({"method": "dense", "retention": "1/9"}, "no setting of 'dense', which has none"),
        ({"method": "fastv", "preset": "1/9"}, "preset=1/9 is one of ViTCoP's"),
        ({"method": None, "retention": 0.1, "preset": "1/9"}, "preset=1/9 is one of ViTCoP's, and says its retention"),
        ({"method": None, "preset": "1/8"}, "preset='1/8' is unknown: use one of 1/3"),
        ({"method": "vitcop", "config": "a.json"}, "config=a.json says what is pruned, and method=vitcop too"),
        ({"method": None, "config": "nowhere.json"}, "config=nowhere.json cannot be read: No such file"),
        ({"method": "vitcup"}, "method 'vitcup' is unknown: use one of vitcop"),
        ({"method": None, "retention": "a third"}, "retention='a third' is not a number, such as 0.1 or 1/9"),
    ],
)
def test_words_that_name_no_method_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        method_of_words(**words)
