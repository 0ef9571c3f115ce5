"""What methods kept of one picture at several retentions, and what the model answered: plain data, as the page holds it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..cache import Selection
from ..errors import InputError, RewriteError
from ..layout import Layout
from ..policies import policy_of
from ..schedule import Schedule, Stage
from .watch import Look


@dataclass(frozen=True)
class Panel:
    """A grid of tokens over a picture. first: the number of its first token, counted through all of the prompt, row by row;
    picture: which of `Record.pictures` it lies on."""

    label: str
    rows: int
    columns: int
    first: int
    picture: int = 0


@dataclass(frozen=True)
class Step:
    """One stage. where: in words; policy: its name; side, layer: as in `Stage`; kept: the tokens that leave it, ascending;
    groups: of each of them the tokens that were put into it, by those that entered the stage, None for a stage that leaves
    tokens as they are; scores: what its policy read of every token that entered, by name."""

    where: str
    policy: str
    side: str
    layer: int
    kept: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...] | None = None
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """tokens: the generated ids; pieces: the text that each adds; text: all of it, without what ends it."""

    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Run:
    """A method at one retention. left_out: why it cannot be had there, and then nothing else is known. mean_tokens: visual
    tokens, mean over the decoder's layers; clusters: those of the tokens that the encoder's last stage kept, -1 for none, None
    for a method that makes none; saliency: the share of the attention it scored by that these hold; differs: the first token
    that is not the dense answer's, None where both are equal; kl: KL(dense || pruned) of the first token's distribution, in
    nats."""

    left_out: str | None = None
    mean_tokens: float = 0.0
    steps: tuple[Step, ...] = ()
    clusters: tuple[int, ...] | None = None
    saliency: float | None = None
    answer: Answer | None = None
    differs: int | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Record:
    """pictures: files as data URIs; retentions: as they were asked for; runs: by method, one for each retention; random:
    whether the weights are, so that answers mean nothing."""

    model: str
    prompt: str
    pictures: tuple[str, ...]
    panels: tuple[Panel, ...]
    retentions: tuple[str, ...]
    dense: Answer
    runs: Mapping[str, tuple[Run, ...]]
    random: bool = False

    @property
    def patches(self) -> int:
        """Visual tokens of the unpruned prompt."""
        return sum(panel.rows * panel.columns for panel in self.panels)


def panels_of(layout: Layout, pictures: Sequence[int] | None = None) -> tuple[Panel, ...]:
    """The grids of a prompt's segments, frame by frame. pictures: on which picture each of them lies, by default all on one.
    Raises InputError for segments whose tokens are no grid."""
    found: list[Panel] = []
    first = 0
    for number, segment in enumerate(layout):
        time, rows, columns = segment.grid
        if segment.candidates != time * rows * columns:
            raise InputError(
                f"segment {number} of the prompt has {segment.candidates} tokens in a grid of {time} x {rows} x {columns}: "
                "what is kept cannot be drawn; give a picture of another shape"
            )
        name = "" if len(layout) == 1 else f"{segment.kind} {number + 1} of {len(layout)}"
        for step in range(time):
            label = f"{name}, frame {step + 1}".lstrip(", ") if time > 1 else name
            found.append(Panel(label, rows, columns, first, 0 if pictures is None else pictures[len(found)]))
            first += rows * columns
    return tuple(found)


def steps_of(looks: Sequence[Look], schedule: Schedule) -> tuple[Step, ...]:
    """What each stage kept, as tokens of the unpruned prompt."""
    entering, first = [], 0  # by segment before the decoder
    for segment in schedule.layout:
        entering.append(list(range(first, first + segment.candidates)))
        first += segment.candidates
    found = []
    for number, stage in enumerate(schedule.stages):
        parts = _parts([look for look in looks if look.stage == number], entering, stage)
        merges = policy_of(stage.policy).merges
        groups: list[tuple[int, ...]] = []
        scores: dict[str, list[float]] = {}
        for tokens, look, row in parts:
            for name, values in look.scored.items():
                scores.setdefault(name, []).extend(values[row, : len(tokens)].tolist())
            if look.mixed is not None:
                inside = look.mixed[row, :, : len(tokens)] != 0
                groups += [tuple(tokens[i] for i in own.nonzero()[:, 0].tolist()) for own in inside]
        entering = [[tokens[i] for i in look.index[row].tolist()] for tokens, look, row in parts]
        kept = tuple(token for tokens in entering for token in tokens)
        read = {name: tuple(values) for name, values in scores.items()}
        found.append(Step(_where(stage), stage.policy, stage.side, stage.layer, kept, tuple(groups) if merges else None, read))
    return tuple(found)


def check_steps(steps: Sequence[Step], selection: Selection) -> None:
    """Raises RewriteError unless `steps` are what the request's own cache says was kept of its one prompt."""
    before = [step.kept for step in steps if step.side != "decoder"][-1:]
    told = [] if selection.kept is None else [selection.kept]
    told += selection.stages
    found = [*before, *(step.kept for step in steps if step.side == "decoder")]
    if found != [tuple(rows[0].tolist()) for rows in told]:
        raise RewriteError("what policies chose is not what the cache was told: the record would be of another request")


def _parts(looks: Sequence[Look], entering: list[list[int]], stage: Stage) -> list[tuple[list[int], Look, int]]:
    """(tokens that enter, call, row of it) in the order of the tokens."""
    if stage.side != "decoder":
        rows = [(entering[segment], look, row) for look in looks for row, segment in enumerate(look.segments)]
        return sorted(rows, key=lambda part: part[0][0])
    tokens = [token for own in entering for token in own]
    parts, start = [], 0
    for look in looks:
        for row in range(len(look.index)):
            parts.append((tokens[start : start + look.width], look, row))
            start += look.width
    return parts


def _where(stage: Stage) -> str:
    if stage.side == "decoder":
        return f"before decoder layer {stage.layer}"
    return (
        f"{'behind' if stage.side == 'encoder' else 'by'} encoder layer {stage.layer}"
        if stage.side != "entry"
        else ("behind the projector")
    )
