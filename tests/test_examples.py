"""The trained examples' pictures, questions and training: against stock models and processors, and by hand."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.see import decoder, evaluate, models, questions, tower
from examples.see.learner import Learner, digest
from examples.see.questions import KINDS, WORDS, question
from examples.see.scenes import COLOURS, GRID, NAMES, PLACE, SHADES, SIDE, Scene, scene
from examples.see.start import begin


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene(random.Random(f"test {at}"), held_out=at % 2 == 1) for at in range(60)]


def test_pictures_hold_what_they_say(scenes: list[Scene]) -> None:
    for one in scenes:
        assert one.image.size == (SIDE, SIDE) and 2 <= len(one.things) <= 7
        assert len({thing.place for thing in one.things}) == len(one.things)
        shown = np.asarray(one.image, dtype=float)
        for thing in one.things:
            left, top, right, bottom = thing.box
            row, column = divmod(thing.place, 3)
            assert (
                column * PLACE <= left and right <= (column + 1) * PLACE and row * PLACE <= top and bottom <= (row + 1) * PLACE
            )
            inside = np.abs(shown[top:bottom, left:right] - np.array(COLOURS[thing.colour])).max(-1) < 25
            assert inside.mean() > 0.15, f"hardly any {thing.colour} in a {thing.name}"
            names = one.labels["names"][top // 8 : bottom // 8 + 1, left // 8 : right // 8 + 1]
            assert NAMES.index(thing.name) + 1 in names
        assert one.labels["centres"].sum() == len(one.things)
        found = {value for value in one.labels["names"].flatten().tolist() if value}
        assert found == {NAMES.index(thing.name) + 1 for thing in one.things} | ({17} if one.word else set())
        read = {
            order: letter for order, letter in zip(one.labels["orders"].flatten(), one.labels["letters"].flatten()) if order
        }
        assert "".join(chr(64 + read[order]) for order in sorted(read)) == one.word


def test_the_same_seed_gives_the_same_picture() -> None:
    one, two = (scene(random.Random(3)) for _ in range(2))
    assert one.image.tobytes() == two.image.tobytes() and one.things == two.things and one.word == two.word


def test_what_is_held_out_is_in_no_training(scenes: list[Scene]) -> None:
    for at, one in enumerate(scenes):
        pairs = [(NAMES.index(thing.name) + SHADES.index(thing.colour)) % 8 == 0 for thing in one.things]
        assert any(pairs) if at % 2 else not any(pairs)
        if one.word:
            assert (sum(map(ord, one.word)) % 5 == 0) == bool(at % 2)


def _answer(text: str, one: Scene) -> str:
    """The answer, from the question's words alone."""
    words = text.split()
    named = [thing for thing in one.things if thing.name in words]
    if text.startswith("what is the "):
        return next(thing.name for thing in one.things if thing.colour == words[3])
    if text.startswith("what is at "):
        place = 3 * ("top", "middle", "bottom").index(words[4]) + ("left", "center", "right").index(words[5])
        return next(thing.name for thing in one.things if thing.place == place)
    if text.startswith("where"):
        row, column = divmod(named[0].place, 3)
        return f"{('top', 'middle', 'bottom')[row]} {('left', 'center', 'right')[column]}"
    if text.startswith("what colour"):
        return named[0].colour
    if text.startswith("how many"):
        return str(sum(f"{thing.name}s" == words[2] for thing in one.things))
    if text.startswith("is there"):
        return "yes" if named else "no"
    if "higher" in words:
        return min(named, key=lambda thing: thing.box[1]).name
    if "further" in words:
        return min(named, key=lambda thing: thing.box[0]).name
    return " ".join(one.word)


def test_questions_have_one_right_answer(scenes: list[Scene]) -> None:
    rng, asked = random.Random(0), Counter()
    for one in scenes:
        for kind in KINDS:
            for _ in range(3):
                found = question(kind, one, rng, held_out=rng.random() < 0.5)
                if found is not None:
                    asked[kind] += 1
                    assert found[1] == _answer(found[0], one), found
                    assert set(found[0].split()) | set(found[1].split()) <= set(WORDS)
    assert min(asked[kind] for kind in KINDS) > 60


@pytest.fixture(scope="module", params=models.MODELS)
def subject(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    return request.param, models.make(request.param).eval(), models.processor_of(request.param)


def test_pixels_equal_the_stock_processors(subject: tuple[str, Any, Any], scenes: list[Scene]) -> None:
    kind, _, processor = subject
    found = tower.pixels_of(kind, scenes[:2])
    wanted = processor.image_processor([one.image for one in scenes[:2]], return_tensors="pt")
    assert found.keys() == dict(wanted).keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-6)


def _stock(kind: str, model: Any, processor: Any, one: Scene, text: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in front of every token of the answer, and the tokens, from the model as users run it."""
    given = processor(images=[[one.image]], text=[models.prompt(kind, text)], return_tensors="pt")
    said = torch.tensor([*processor.tokenizer.convert_tokens_to_ids(answer.split()), processor.tokenizer.eos_token_id])
    ids = torch.cat([given["input_ids"], said[None]], 1)
    given = dict(given) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return model(**given).logits[0, -len(said) - 1 : -1], said


def test_packed_questions_cost_what_each_costs_alone(subject: tuple[str, Any, Any], scenes: list[Scene]) -> None:
    kind, model, processor = subject
    rng = random.Random(1)
    plan = decoder.plan_of(kind, model, processor.tokenizer, 1)
    with torch.no_grad():
        features, _ = tower.features_of(kind, model, tower.pixels_of(kind, scenes[:1]))
        asked = decoder.questions_of(scenes[0], rng)
        loss, shares = decoder.loss_of(kind, model, processor.tokenizer, plan, 1, features, [asked])
        alone = [_stock(kind, model, processor, scenes[0], text, answer) for _, text, answer in asked[::3]]
        wanted = [F.cross_entropy(logits, said, reduction="sum") for logits, said in alone]
        # The others' part is what is left when the questions between are asked without them.
        rest = [one for at, one in enumerate(asked) if at % 3]
        filler = [rest[0]] * (len(asked) - len(rest)) + rest
        total = loss * sum(len(answer.split()) + 1 for _, _, answer in asked)
        less, _ = decoder.loss_of(kind, model, processor.tokenizer, plan, 1, features, [filler])
        less = less * sum(len(answer.split()) + 1 for _, _, answer in filler)
        first, _ = decoder.loss_of(kind, model, processor.tokenizer, plan, 1, features, [[rest[0]] * len(asked)])
        first = first * (len(rest[0][2].split()) + 1)
    torch.testing.assert_close(total - less + (len(asked) - len(rest)) * first, sum(wanted), rtol=1e-5, atol=1e-4)
    assert set(shares) == {"loss"} | {name for name, _, _ in asked}


def test_processors_survive_saving(subject: tuple[str, Any, Any], scenes: list[Scene], tmp_path: Path) -> None:
    kind, model, processor = subject
    models.save(model, processor, tmp_path / "model")
    loaded = models.load_processor(tmp_path / "model")
    text = models.prompt(kind, "is there any star ?")
    one, two = (known(images=[[scenes[0].image]], text=[text], return_tensors="pt") for known in (processor, loaded))
    assert all(torch.equal(one[name], two[name]) for name in one)
    content = [{"type": "image"}, {"type": "text", "text": "is there any star ?"}]
    assert loaded.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True) == text
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) < 12e6


def test_held_out_questions_are_the_same_each_time() -> None:
    for kind in ("where", "read"):
        one, two = (list(evaluate.held_out(kind, 3)) for _ in range(2))
        assert [(a.question, a.answer) for a in one] == [(b.question, b.answer) for b in two]
        assert one[0].image.tobytes() == two[0].image.tobytes()
        assert next(evaluate.held_out(kind, 3, seed=1)).image.tobytes() != one[0].image.tobytes()


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)]
)
def test_intervals(right: int, asked: int, low: float, high: float) -> None:
    # The values of Wilson's interval in Newcombe (1998), table I, and of Brown, Cai and DasGupta (2001).
    assert evaluate.interval(right, asked) == pytest.approx((low, high), abs=5e-5)


class _Stop(Exception):
    pass


def test_a_stopped_training_goes_on(tmp_path: Path) -> None:
    def trained(file: Path, stop: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        net = nn.ModuleDict({"inner": nn.Linear(4, 4), "head": nn.Linear(4, 1)})
        done = 0

        def loss_of(rng: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
            nonlocal done
            if stop is not None and done == stop:
                raise _Stop
            done += 1
            given = torch.tensor([[rng.random() for _ in range(4)]])
            loss = (net["head"](net["inner"](given).relu()) - 1).square().sum()
            return loss, {"loss": loss.item()}

        Learner("part", net, 12, 1e-2, 0, keep=5).run(loss_of, file, Console(quiet=True))
        return net.state_dict()

    wanted = trained(tmp_path / "whole.pt", None)
    with pytest.raises(_Stop):
        trained(tmp_path / "part.pt", 7)
    found = trained(tmp_path / "part.pt", None)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert {file.name for file in tmp_path.iterdir()} == {"whole.pt", "part.pt"}
    parts = nn.ModuleDict({"inner": nn.Linear(4, 4)})
    for steps, rate, seed, of in ((13, 1e-2, 0, ""), (12, 1e-3, 0, ""), (12, 1e-2, 1, ""), (12, 1e-2, 0, "tower 1")):
        other = Learner("part", parts, steps, rate, seed, of=of)
        with pytest.raises(SystemExit, match=f"is of a training of 12 steps at 0.01, seed 0, not of {other.of}: name another"):
            other.run(None, tmp_path / "part.pt", Console(quiet=True))


def test_features_of_another_tower_are_refused(subject: tuple[str, Any, Any], tmp_path: Path) -> None:
    kind, model, _ = subject
    given = kind, model
    made = decoder.Pictures(*given, "one", 2, 0, tmp_path / "features.pt", Console(quiet=True))
    again = decoder.Pictures(*given, "one", 2, 0, tmp_path / "features.pt", Console(quiet=True))
    assert torch.equal(made.features, again.features) and len(again.scenes) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["features.pt"]
    for made_by, number, seed in (("two", 2, 0), ("one", 3, 0), ("one", 2, 1)):
        with pytest.raises(SystemExit, match="is of 2 pictures of seed 0, tower one, not of"):
            decoder.Pictures(*given, made_by, number, seed, tmp_path / "features.pt", Console(quiet=True))


def test_a_digest_is_of_every_weight() -> None:
    net = nn.Linear(3, 2)
    before = digest(net)
    with torch.no_grad():
        net.bias[1] += 1
    assert digest(net) != before and len(before) == 8


def test_everything_has_a_word() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert all(f"{name}s" in WORDS for name in NAMES)
    assert questions.place_name(5) == "middle right"
    assert (
        models.processor_of("llava")
        .tokenizer.decode(
            models.processor_of("llava")(images=[[scene(random.Random(0)).image]], text=[models.prompt("llava", "yes")])[
                "input_ids"
            ][0]
        )
        .count("<image>")
        == GRID * GRID
    )


def test_a_decoder_starts_with_words_that_ask_for_what_shows_them(subject: tuple[str, Any, Any]) -> None:
    kind, _, processor = subject
    model = models.make(kind)
    heads = tower.Heads(128, kind == "llava")
    features = torch.randn(6, GRID * GRID, 128, generator=torch.Generator().manual_seed(0))
    # A picture in which one patch shows what the head of names reads as an anchor, and nothing else does.
    anchor = heads.patch["head_names"].weight[NAMES.index("anchor") + 1].detach()
    with torch.no_grad():
        begin(kind, model, processor.tokenizer, heads, features, seed=0)
        shown = features[:1].clone()
        shown[0, 4 * GRID : 6 * GRID] = 0
        shown[0, 5 * GRID + 7] = 30 * anchor / anchor.norm()
        rows = decoder._image_rows(kind, model, shown, 1)[0]
        layer = model.model.language_model.layers[3]
        word = model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("anchor")]
        asked = layer.self_attn.q_proj(layer.input_layernorm(word))
        logits = layer.self_attn.k_proj(layer.input_layernorm(rows)) @ asked
    side = int(len(rows) ** 0.5)
    assert divmod(int(logits.argmax()), side) == (5 * side // GRID, 7 * side // GRID)
    one = [processor.tokenizer.convert_tokens_to_ids(text) for text in ("anchor", "anchors")]
    similar = torch.cosine_similarity(*model.get_input_embeddings().weight[one], dim=0)
    assert similar > 0.7
