"""Tables: names and cells, as something rich prints or as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

# Columns of text; the others are numbers.
_WORDS = {"arm", "backend", "fact", "measure", "preset", "process", "program", "settings", "subject", "verdict", "what"}


def printed(names: Iterable[str], rows: Iterable[Sequence[str | Text]], title: str | None = None) -> Table:
    """Columns `names`, numbers to the right; a cell is taken as it is, without markup."""
    out = Table(title=title, title_justify="left")
    for name in names:
        out.add_column(name, justify="left" if name in _WORDS else "right", overflow="fold" if name in _WORDS else "ellipsis")
    for row in rows:
        out.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return out


def markdown(names: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """The same as lines of Markdown."""
    names = list(names)
    rule = ["---" if name in _WORDS else "---:" for name in names]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (names, rule, *rows))
