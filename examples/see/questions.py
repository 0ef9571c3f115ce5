"""Questions about a picture, of seven kinds, each with one right answer."""

from __future__ import annotations

import random
from collections import Counter

from .scenes import COLUMNS, LETTERS, MOST, NAMES, ROWS, SHADES, Scene, Thing

KINDS = ("what", "where", "colour", "count", "any", "compare", "read")
_FRAMES = (
    "what is the {} thing ?", "what is at the {} {} ?", "where is the {} ?", "what colour is the {} ?", "how many {} ?",
    "is there any {} ?", "which is higher , the {} or the {} ?", "which is further left , the {} or the {} ?",
    "what does the sign say ?",
)  # fmt: skip
# Every word that a question or an answer can have.
WORDS = tuple(
    dict.fromkeys(
        [word for frame in _FRAMES for word in frame.split() if word != "{}"]
        + [*NAMES, *(f"{name}s" for name in NAMES), *SHADES, *ROWS, *COLUMNS, "yes", "no"]
        + [str(number) for number in range(1, MOST + 1)]
        + list(LETTERS)
    )
)


def place_name(place: int) -> str:
    """ "top left" to "bottom right"."""
    return f"{ROWS[place // 3]} {COLUMNS[place % 3]}"


def question(kind: str, scene: Scene, rng: random.Random, held_out: bool = False) -> tuple[str, str] | None:
    """(question, answer), None where the picture allows none of this kind. held_out: where one thing is asked about, one of a
    pair that is held out, if what is asked allows."""
    names = Counter(thing.name for thing in scene.things)
    single = [thing for thing in scene.things if names[thing.name] == 1]
    asked = [thing for thing in single if thing.held_out] if held_out else single
    return _ASK[kind](scene, rng, asked if kind in ("where", "colour") else single, names)


def _what(scene: Scene, rng: random.Random, single: list[Thing], names: Counter[str]) -> tuple[str, str] | None:
    thing = rng.choice(scene.things)
    shades = Counter(other.colour for other in scene.things)
    if shades[thing.colour] == 1 and rng.random() < 0.5:
        return f"what is the {thing.colour} thing ?", thing.name
    return f"what is at the {place_name(thing.place)} ?", thing.name


def _where(scene: Scene, rng: random.Random, single: list[Thing], names: Counter[str]) -> tuple[str, str] | None:
    if not single:
        return None
    thing = rng.choice(single)
    return f"where is the {thing.name} ?", place_name(thing.place)


def _colour(scene: Scene, rng: random.Random, single: list[Thing], names: Counter[str]) -> tuple[str, str] | None:
    if not single:
        return None
    thing = rng.choice(single)
    return f"what colour is the {thing.name} ?", thing.colour


def _count(scene: Scene, rng: random.Random, single: list[Thing], names: Counter[str]) -> tuple[str, str] | None:
    (name, number), *others = names.most_common()  # from one to four, each as often
    if others and rng.random() < 0.25:
        name, number = rng.choice(others)
    return f"how many {name}s ?", str(number)


def _any(scene: Scene, rng: random.Random, single: list[Thing], names: Counter[str]) -> tuple[str, str] | None:
    if rng.random() < 0.5:
        return f"is there any {rng.choice(sorted(names))} ?", "yes"
    return f"is there any {rng.choice([name for name in NAMES if name not in names])} ?", "no"


def _compare(scene: Scene, rng: random.Random, single: list[Thing], names: Counter[str]) -> tuple[str, str] | None:
    along = {"higher": lambda thing: thing.place // 3, "further left": lambda thing: thing.place % 3}
    word, place = rng.choice(sorted(along.items()))
    pairs = [(one, two) for one in single for two in single if place(one) < place(two)]
    if not pairs:
        return None
    pair = rng.choice(pairs)
    first, second = rng.sample(pair, 2)
    return f"which is {word} , the {first.name} or the {second.name} ?", pair[0].name


def _read(scene: Scene, rng: random.Random, single: list[Thing], names: Counter[str]) -> tuple[str, str] | None:
    return ("what does the sign say ?", " ".join(scene.word)) if scene.word else None


_ASK = dict(zip(KINDS, (_what, _where, _colour, _count, _any, _compare, _read)))
