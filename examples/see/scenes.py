"""Pictures with known contents: things of one colour and a sign on a cluttered ground, drawn with the fonts of matplotlib.

A picture has 192 x 192 pixels, 24 x 24 patches of 8, and nine places of 64 x 64. A thing takes 3 to 5 patches a side, a letter
of a sign one to two. Everything follows from a `random.Random`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, PATCH, PLACE = 192, 8, 64
GRID = SIDE // PATCH
THINGS = {
    "star": "★", "heart": "❤", "umbrella": "☂", "phone": "☎", "plane": "✈", "horse": "♞", "sun": "☀", "cloud": "☁",
    "anchor": "⚓", "gear": "⚙", "note": "♫", "club": "♣", "crown": "♛", "flower": "✿", "flag": "⚑", "tower": "♜",
}  # fmt: skip
COLOURS = {
    "red": (205, 25, 30), "orange": (245, 135, 15), "yellow": (250, 230, 30), "green": (25, 140, 45), "blue": (25, 60, 215),
    "purple": (135, 30, 165), "white": (252, 252, 252), "black": (10, 10, 12),
}  # fmt: skip
NAMES, SHADES = tuple(THINGS), tuple(COLOURS)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
MOST = 4  # of one name
_FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
_SIGNS = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")


@dataclass(frozen=True)
class Thing:
    """place: 0 to 8, row by row; box: left, top, right, bottom of what is drawn, in pixels."""

    name: str
    colour: str
    place: int
    box: tuple[int, int, int, int]

    @property
    def held_out(self) -> bool:
        """Whether no picture of the training has this name in this colour: an eighth of all pairs."""
        return (NAMES.index(self.name) + SHADES.index(self.colour)) % 8 == 0


@dataclass(frozen=True)
class Scene:
    """word: on the sign, "" without one, of several all in a row. Labels of patches, int64 [24, 24], 0 for none: `names` 1 to
    16, 17 the sign; `colours` 1 to 8; `letters` 1 to 26; `orders` 1 to 4, which letter of the word; `centres` 1 where a
    thing's centre is; `places` 0 to 8, of every patch."""

    image: Image.Image
    things: tuple[Thing, ...]
    word: str
    labels: dict[str, np.ndarray]


# How many values the labels of a patch have.
LABELS = {
    "names": len(NAMES) + 2, "colours": len(SHADES) + 1, "letters": len(LETTERS) + 1, "orders": 5, "centres": 2, "places": 9,
}  # fmt: skip
_PLACES = np.add.outer(3 * (np.arange(GRID) * 3 // GRID), np.arange(GRID) * 3 // GRID)


@lru_cache(maxsize=4096)
def _glyph(font: str, size: int, text: str) -> np.ndarray:
    """What `text` covers, uint8 [height, width], without margins."""
    face = ImageFont.truetype(str(_FONTS / f"{font}.ttf"), size)
    left, top, right, bottom = face.getbbox(text)
    mask = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(mask).text((-left, -top), text, font=face, fill=255)
    found = np.asarray(mask)
    rows, columns = np.flatnonzero(found.max(1)), np.flatnonzero(found.max(0))
    return found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _ground(rng: random.Random) -> np.ndarray:
    """A dull colour that changes slowly, grain, and strokes and blots of little contrast: float32 [192, 192, 3]."""
    noise = np.random.default_rng(rng.getrandbits(32))
    base = noise.uniform(95, 185) + noise.uniform(-18, 18, (3, 3, 3))
    ground = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(ground)
    for _ in range(rng.randint(0, 12)):
        x, y = rng.randrange(SIDE), rng.randrange(SIDE)
        shade = tuple(int(np.clip(value + rng.uniform(-35, 35), 0, 255)) for value in ground.getpixel((x, y)))
        dx, dy = rng.randint(-50, 50), rng.randint(-50, 50)
        if rng.random() < 0.6:
            draw.line((x, y, x + dx, y + dy), fill=shade, width=rng.randint(1, 3))
        else:
            draw.ellipse((x, y, x + abs(dx) // 3, y + abs(dy) // 3), fill=shade)
    grain = noise.standard_normal((SIDE, SIDE, 1), dtype=np.float32) * rng.uniform(1, 7)
    return np.asarray(ground, dtype=np.float32) + grain


def _share(covered: np.ndarray, left: int, top: int) -> np.ndarray:
    """How much of each patch is covered, [24, 24]; covered: bool, of a box at (left, top)."""
    canvas = np.zeros((SIDE, SIDE), dtype=np.float32)
    canvas[top : top + covered.shape[0], left : left + covered.shape[1]] = covered
    return np.add.reduceat(np.add.reduceat(canvas, range(0, SIDE, PATCH), 0), range(0, SIDE, PATCH), 1) / PATCH**2


def _where(rng: random.Random, place: int, width: int, height: int) -> tuple[int, int]:
    """Left and top of a box anywhere in its place."""
    row, column = divmod(place, 3)
    return column * PLACE + rng.randint(1, PLACE - width - 1), row * PLACE + rng.randint(1, PLACE - height - 1)


def _pairs(rng: random.Random, number: int, repeated: int, held_out: bool) -> list[tuple[str, str]]:
    """Name and colour of each thing: one name `repeated` times, no other twice; held-out pairs only where they are asked for,
    then at least one."""
    first, *others = rng.sample(NAMES, len(NAMES))
    names = [first] * repeated + others[: number - repeated]

    def pair(name: str, wanted: bool | None) -> tuple[str, str]:
        known = [colour for colour in SHADES if wanted is None or wanted == Thing(name, colour, 0, (0, 0, 0, 0)).held_out]
        return name, rng.choice(known)

    chosen = rng.randrange(number) if held_out else -1
    return [pair(name, at == chosen or (None if held_out else False)) for at, name in enumerate(names)]


def scene(rng: random.Random, held_out: bool = False, signs: int | None = None) -> Scene:
    """A picture with 2 to 7 things, and `signs` signs, up to 7; None is one in three pictures of four. held_out: with a pair
    of name and colour that no picture has otherwise; words of a sum of letters divisible by five are on signs only there."""
    repeated = rng.randint(1, MOST)
    number = rng.randint(max(2, repeated), 7)
    many = int(rng.random() < 0.75) if signs is None else signs
    number = min(number, 9 - many)
    repeated = min(repeated, number)
    places = rng.sample(range(9), number + max(1, many))
    labels = {kind: np.zeros((GRID, GRID), dtype=np.int64) for kind in LABELS}
    labels["places"] = _PLACES
    pixels = _ground(rng)
    things = []
    for place, (name, colour) in zip(places, _pairs(rng, number, repeated, held_out)):
        glyph = _sized(name, rng.randint(26, 46))
        height, width = glyph.shape
        left, top = _where(rng, place, width, height)
        tint = np.array(COLOURS[colour], dtype=np.float32) + rng.uniform(-8, 8)
        part = pixels[top : top + height, left : left + width]
        part += (glyph / np.float32(255))[..., None] * (tint - part)
        here = _share(glyph > 127, left, top) >= 0.1
        labels["names"][here], labels["colours"][here] = NAMES.index(name) + 1, SHADES.index(colour) + 1
        labels["centres"][(top + height // 2) // PATCH, (left + width // 2) // PATCH] = 1
        things.append(Thing(name, colour, place, (left, top, left + width, top + height)))
    word = "".join(_write(rng, pixels, labels, place, held_out) for place in places[number : number + many])
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    return Scene(image, tuple(things), word, labels)


def _sized(name: str, side: int) -> np.ndarray:
    """The thing's picture, its longer side `side` pixels."""
    large = _glyph("DejaVuSans", 96, THINGS[name])
    scale = side / max(large.shape)
    size = (max(1, round(large.shape[1] * scale)), max(1, round(large.shape[0] * scale)))
    return np.asarray(Image.fromarray(large).resize(size, Image.Resampling.LANCZOS))


def _word(rng: random.Random, held_out: bool) -> str:
    while True:
        word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 4)))
        if (sum(map(ord, word)) % 5 == 0) == held_out:
            return word


def _write(rng: random.Random, pixels: np.ndarray, labels: dict[str, np.ndarray], place: int, held_out: bool) -> str:
    """A sign with a word, in place."""
    word, font = _word(rng, held_out), rng.choice(_SIGNS)
    size, gap, width = rng.randint(15, 18), 3, PLACE
    while width > PLACE - 3:  # wide letters
        glyphs = [_glyph(font, size, letter) for letter in word]
        width = sum(glyph.shape[1] for glyph in glyphs) + gap * (len(word) + 1)
        size, gap = size - 1, 2
    height = max(glyph.shape[0] for glyph in glyphs) + 2 * gap
    left, top = _where(rng, place, width, height)
    light = rng.random() < 0.5
    board, ink = ((235, 30) if light else (30, 240))[:2]
    pixels[top : top + height, left : left + width] = board + rng.uniform(-12, 12)
    labels["names"][_share(np.ones((height, width), dtype=bool), left, top) >= 0.1] = len(NAMES) + 1
    most = np.zeros((GRID, GRID))
    x = left + gap
    for order, (letter, glyph) in enumerate(zip(word, glyphs)):
        high, wide = glyph.shape
        y = top + (height - high) // 2
        part = pixels[y : y + high, x : x + wide]
        part += (glyph / np.float32(255))[..., None] * (ink - part)
        share = _share(np.ones((high, wide), dtype=bool), x, y)
        here = (share > most) & (share >= 0.1)
        labels["letters"][here], labels["orders"][here] = LETTERS.index(letter) + 1, order + 1
        most = np.maximum(most, share)
        x += wide + gap
    return word
