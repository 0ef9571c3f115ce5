"""A method's graphs as they are rewritten, run operator by operator, and what its policies looked at and chose there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import evaluating
from ..errors import RewriteError
from ..host import Images
from ..layout import Layout
from ..optimized import PROGRAM_BYTES, PROMPT_BUCKETS, CompiledOnDemand
from ..policies import POLICIES, Choice, Policy, Site
from ..program_modules import Select
from ..programs import Programs
from ..schedule import Method, ModelShape, Schedule, Stage

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Look:
    """One call of a policy. stage: its number in the schedule; segments: of which segment of the request each of the b rows
    is, () in the decoder, where rows follow one another; width: n, candidates of each; index: int64 [b, budget]; scored: what
    the policy read of the candidates, by name, fp32 [b, n]; mixed: fp32 [b, budget, n], how much of each candidate is in each
    row that it made, None where it makes none."""

    stage: int
    segments: tuple[int, ...]
    width: int
    index: Tensor
    scored: dict[str, Tensor]
    mixed: Tensor | None


@dataclass(frozen=True)
class _Asked(Site):
    """A site that remembers the norms it was asked for."""

    told: list[Tensor] = field(default_factory=list)

    def key_norms(self) -> Tensor:
        """As `Site.key_norms`."""
        self.told.append(super().key_norms())
        return self.told[-1]


@dataclass(frozen=True)
class _Renamed:
    """`method`, the policies of whose stages go by other names."""

    method: Method
    names: tuple[str, ...]

    def stages(self, shape: ModelShape, layout: Layout) -> tuple[Stage, ...]:
        """As `Method.stages`."""
        found = self.method.stages(shape, layout)
        return tuple(replace(stage, policy=name) for stage, name in zip(found, self.names, strict=True)) if layout else found

    def to_json(self) -> str:
        """As `Method.to_json`."""
        return self.method.to_json()


class Watched(CompiledOnDemand):
    """Provides the modules that programs are exported from, in their place: the same graphs, which tell of values. One request
    of one prompt; `looks` are the calls of policies, in order.

    images: those of the request."""

    def __init__(self, programs: Programs, names: tuple[str, ...], images: Images):
        renamed = replace(programs, method=_Renamed(programs.method, names))
        super().__init__(renamed, "eager", PROMPT_BUCKETS, PROGRAM_BYTES)
        self.looks: list[Look] = []
        self._places = _places(images, programs.family.shape.patches)
        self._modules: dict[tuple, nn.Module] = {}
        self._segments: tuple[int, ...] = ()

    def vision(self, images: int) -> Callable[..., Any]:
        """As of `Provider`."""
        return self._running(("vision",), self.programs.vision_module, lambda _: tuple(range(images)))

    def frames(self, frames: int) -> Callable[..., Any]:
        """As of `Provider`."""
        return self._running(("frames",), self.programs.frames_module, lambda _: tuple(range(frames)))

    def tower(self, tiles: int, slots: int) -> Callable[..., Any]:
        """As of `Provider`."""
        return self._running(("tower", tiles, slots), lambda: self.programs.tower_module(tiles, slots)[0])

    def select(
        self, tiles: int, slots: int, segments: int, candidates: int, taps: int, stage: Stage | None, axes: int = 2
    ) -> Callable[..., Any]:
        """As of `Provider`."""
        made = Select(self.programs.family, stage, taps, True)
        return self._running(("select", taps, stage), lambda: made, lambda given: self._of_tables(slots, given))

    def prefill(
        self, batch: int, text: int, schedule: Schedule, rows: tuple[int, ...], filled: bool = False
    ) -> Callable[..., Any]:
        """As of `Provider`."""
        return self._running(("prefill", filled), lambda: self.programs.prefill_module(schedule.layout, filled=filled))

    def extend(self, batch: int, tokens: int, rows: tuple[int, ...]) -> Callable[..., Any]:
        """As of `Provider`."""
        return self._running(("extend",), lambda: self.programs.extend_module(tokens))

    def _running(
        self,
        key: tuple,
        make: Callable[[], nn.Module],
        segments: Callable[[Sequence[Tensor]], tuple[int, ...]] = lambda _: (),
    ) -> Callable[..., Any]:
        if key not in self._modules:
            self._modules[key] = make()
        module = self._modules[key]

        def run(*inputs: Tensor) -> Any:
            self._segments = segments(inputs)
            with torch.no_grad(), evaluating(module):
                return module(*inputs)

        return run

    def _of_tables(self, slots: int, inputs: Sequence[Tensor]) -> tuple[int, ...]:
        """Which segments a selection is of: each has patches that no other has."""
        index = next(given for given in inputs if given.dtype == torch.int64)
        return tuple(self._places[slots, tuple(row[0].tolist())] for row in index)

    def watch(self, number: int, policy: Policy, site: Site, budget: int, **options: Any) -> Choice:
        """What `policy` chooses at stage `number`, of which a `Look` is kept."""
        asked = _Asked(**vars(site))
        choice = policy.choose(asked, budget, **options)
        scored = {} if site.score is None else {"attention": site.score[..., -1] if site.score.dim() > 2 else site.score}
        scored |= {"key norm": asked.told[0]} if asked.told else {}
        mixed = None if choice.rows is None else mixture(policy, site, budget, choice, options)
        self.looks.append(Look(number, self._segments, site.at.shape[1], choice.index, scored, mixed))
        return choice


def _places(images: Images, slots: int) -> dict[tuple[int, tuple[int, ...]], int]:
    """(patches of a tile, the patches of its first token among all tiles of so many) -> the segment."""
    sizes = [len(tile.order) for tile in images.cut] or [slots] * sum(images.tiles)
    starts = [sizes[:number].count(size) * size for number, size in enumerate(sizes)]
    found: dict[tuple[int, tuple[int, ...]], int] = {}
    tile = 0
    for packs, tiles in zip(images.packs, images.tiles):
        for pack in packs:
            found[sizes[tile], tuple((pack.index[0] + starts[tile]).tolist())] = len(found)
        tile += tiles
    return found


def mixture(policy: Policy, site: Site, budget: int, choice: Choice, options: dict[str, Any]) -> Tensor:
    """fp32 [b, budget, n]: how much of each candidate is in each row of `choice`, what `policy` made of `site`. A row is a sum
    of rows whose weights are given by what was chosen: its derivative by each of them. Raises RewriteError for a policy that
    chooses otherwise when asked again."""
    assert site.hidden is not None
    hidden = site.hidden.detach().clone().requires_grad_()
    with torch.enable_grad():
        again = policy.choose(replace(site, hidden=hidden), budget, **options)
    assert again.rows is not None
    if not torch.equal(again.index, choice.index):
        raise RewriteError("a policy that merges chose otherwise when it was asked again: it cannot be seen what it merged")
    width, parts = again.rows.shape[-1], []
    # Columns do not mix: each tells of one row, and so many rows at a time.
    for start in range(0, budget, width):
        stop = min(start + width, budget)
        probe = torch.zeros_like(again.rows)
        order = torch.arange(start, stop, device=probe.device)
        probe[:, order, order - start] = 1
        (found,) = torch.autograd.grad(again.rows, hidden, probe, retain_graph=stop < budget)
        parts.append(found[..., : stop - start].transpose(1, 2).float())
    return torch.cat(parts, 1)


@contextlib.contextmanager
def watched(programs: Programs, images: Images) -> Iterator[Watched]:
    """A provider that watches the policies of `programs`, for a request with `images`, within the context."""
    stages = programs.schedule.stages
    names = tuple(f"{stage.policy}, watched {next(_NUMBERS)}" for stage in stages)
    provider: list[Watched] = []

    def watching(number: int, policy: Policy) -> Callable[..., Choice]:
        return lambda site, budget, **options: provider[0].watch(number, policy, site, budget, **options)

    for number, (stage, name) in enumerate(zip(stages, names)):
        POLICIES[name] = replace(POLICIES[stage.policy], choose=watching(number, POLICIES[stage.policy]))
    try:
        provider.append(Watched(programs, names, images))
        yield provider[0]
    finally:
        for name in names:
            del POLICIES[name]
