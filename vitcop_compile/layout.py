"""What the images of a prompt are, in numbers: who owns a budget, and where its tokens lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """One image, group of tiles, frame or clip of a prompt: what owns a budget.

    kind: "image" or "video"; grid: (time, rows, columns) in tokens of the language model, by which tokens are neighbors, time
    above 1 where the frames of a clip share a budget; tokens: placeholders in the prompt, protected ones included; protected:
    offsets among these that are never pruned, such as the line breaks of a packed image; lead: the first so many of them,
    which the encoder makes, such as a CLS token; tiles: inputs of the encoder that it is made of; taps: tokens of the encoder
    that each candidate is blended from; whole: candidates of the image that this is a part of, None if it is no part; broken:
    whether tokens of text stand among its own, such as a line break behind every row.
    """

    kind: str
    grid: tuple[int, int, int]
    tokens: int
    protected: tuple[int, ...] = ()
    tiles: int = 1
    taps: int = 1
    whole: int | None = None
    broken: bool = False
    lead: int = 0

    @property
    def candidates(self) -> int:
        """Tokens that may be pruned."""
        return self.tokens - len(self.protected)

    def offsets(self) -> tuple[int, ...]:
        """The offset of every candidate."""
        protected = set(self.protected)
        return tuple(offset for offset in range(self.tokens) if offset not in protected)


# The segments of one sample, in the order of the prompt; () is a prompt of text alone.
Layout = tuple[Segment, ...]
