"""A picture that no model has learned from, with a question of each kind and the right answers: what the demo shows."""

from __future__ import annotations

import json
import random
from pathlib import Path

from .questions import KINDS, question
from .scenes import scene

PICTURE, QUESTIONS = "demo.png", "demo.json"


def write_sample(folder: Path, seed: int = 0) -> None:
    """demo.png and demo.json, {"picture": name, "questions": {question: answer}}: the first picture of `seed` that has six
    things or more, a sign, and room for a question of each kind."""
    at, found = 0, {}
    while len(found) < len(KINDS):
        rng = random.Random(f"sample {seed} {at}")
        at += 1
        seen = scene(rng, held_out=True, signs=1)
        asked = [question(kind, seen, rng, held_out=True) for kind in KINDS]
        found = dict(one for one in asked if one is not None) if len(seen.things) >= 6 else {}
    seen.image.save(folder / PICTURE)
    (folder / QUESTIONS).write_text(json.dumps({"picture": PICTURE, "questions": found}, indent=1) + "\n")
