"""What the images of a prompt are, in numbers: who owns a budget, and where its tokens lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """One image, group of tiles, frame or clip of a prompt: what owns a budget.

    kind: "image" or "video"; grid: (time, rows, columns) in tokens of the language model, by which tokens are neighbors;
    tokens: placeholders in the prompt, protected ones included; protected: offsets among these that are never pruned, such as
    the line breaks of a packed image.
    """

    kind: str
    grid: tuple[int, int, int]
    tokens: int
    protected: tuple[int, ...] = ()

    @property
    def candidates(self) -> int:
        """Tokens that may be pruned."""
        return self.tokens - len(self.protected)


# The segments of one sample, in the order of the prompt; () is a prompt of text alone.
Layout = tuple[Segment, ...]
