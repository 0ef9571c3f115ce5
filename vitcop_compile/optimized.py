"""The model that `optimize` returns: programs exported and compiled on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from . import kernels
from .backends import Program, backend_of, writing_rows
from .cache import PrunedCache
from .errors import InputError
from .fillers import fill
from .host import Host, blank_words
from .kept import Kept
from .layout import Layout
from .program_cache import FIELDS, ProgramCache, bytes_of
from .programs import Programs
from .provider import Ask, Plan, bucket
from .rehearsal import Rehearsal
from .runtime import CompiledModel
from .schedule import Method, Schedule, Stage
from .weights import Weights
from .worker import Worker

PROMPT_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
NEW_TOKEN_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)
# What programs may hold together, weights that they share left out.
PROGRAM_BYTES = 8 * 2**30
# Caches of later turns grow in steps, so that few programs serve many conversations.
_ROWS = 256


class CompiledOnDemand:
    """Provides programs through a backend, one for every batch size and bucket that comes up. `compiled` holds them by key.

    Keys: ("vision", images), ("frames", frames), ("tower", tiles, slots), ("select", tiles, slots, segments, candidates, taps,
    stage, axes), ("prefill", batch, text rows, visual tokens, cache rows, filled), ("extend", batch, tokens, cache rows), with
    the rows of the caches by group of layers and visual tokens as in `Schedule.key`.
    """

    def __init__(
        self,
        programs: Programs,
        backend: str,
        prompt_buckets: Sequence[int],
        program_bytes: int,
        kept: Kept | None = None,
        precision: str | None = None,
    ):
        self.programs, self.kept = programs, kept
        self._cache = ProgramCache(program_bytes)
        self._prompt_buckets = _check_buckets(prompt_buckets)
        self._worker: Worker | None = None
        family, parameter = programs.family, programs.family.example
        self.host = family.host
        self.position_dims = family.shape.position_dims
        self.device, self.dtype = parameter.device, parameter.dtype
        self.backend = backend_of(backend, precision, self.dtype)

    @property
    def compiled(self) -> dict[tuple, Program]:
        """The programs made so far by key."""
        return self._cache.programs

    def has(self, name: str, arguments: tuple) -> bool:
        """Whether the program that the method `name` returns is held, or kept."""
        key, schedule = (name, *arguments), self.schedule
        if name == "prefill":
            batch, text, schedule, rows, filled = arguments
            key = (name, batch, text, schedule.key, rows, filled)
        return key in self.compiled or (self.kept is not None and self.kept.has(key, schedule))

    def release(self) -> None:
        """Lets all programs go; the next request makes its own."""
        self._cache.release()

    @property
    def schedule(self) -> Schedule:
        """That of a prompt with one image."""
        return self.programs.schedule

    def schedule_of(self, layout: Layout) -> Schedule:
        """That of a prompt with the images of `layout`."""
        return self.programs.schedule_of(layout)

    def plan(self, ask: Ask) -> Plan:
        """Text in its bucket, and caches with room for it, the images and new tokens in theirs.

        A first turn makes caches for as many images as its richest prompt has, one at least, so that all kinds of prompts
        share a program for decoding; where images differ in size, it makes them in steps. A later one keeps them where it
        fits, or asks for larger ones, in steps.
        """
        text = bucket(ask.text, self._prompt_buckets, "text tokens in a prompt")
        room = bucket(NEW_TOKEN_BUCKETS[0] if ask.new is None else ask.new, NEW_TOKEN_BUCKETS, "new tokens")
        least = self.schedule.group_tokens()
        most = ask.visual or (0,) * len(least)
        if not ask.held:
            visual = tuple(map(max, most, least)) if self.host.fixed else most
            rows = tuple(text + tokens + room for tokens in visual)
            return Plan(text, rows if self.host.fixed else tuple(-(-count // _ROWS) * _ROWS for count in rows))
        # Pads of the bucket are written too, and the next token over them.
        needed = [held + tokens + max(text, ask.text + (ask.new or 1)) for held, tokens in zip(ask.held, most, strict=True)]
        if all(rows >= count for rows, count in zip(ask.rows, needed, strict=True)):
            return Plan(text, ask.rows)
        return Plan(text, tuple(-(-(held + tokens + text + room) // _ROWS) * _ROWS for held, tokens in zip(ask.held, most)))

    def vision(self, images: int) -> Callable[..., Any]:
        """The vision program for so many images."""
        return self._get(("vision", images), lambda: self.programs.export_vision(images, self.backend.exact))

    def frames(self, frames: int) -> Callable[..., Any]:
        """The vision program for so many frames of videos that have an encoder of their own."""
        return self._get(("frames", frames), lambda: self.programs.export_frames(frames, self.backend.exact))

    def tower(self, tiles: int, slots: int) -> Callable[..., Any]:
        """The tower program for so many tiles of so many patches."""
        return self._get(("tower", tiles, slots), lambda: self.programs.export_tower(tiles, slots))

    def select(
        self, tiles: int, slots: int, segments: int, candidates: int, taps: int, stage: Stage | None, axes: int = 2
    ) -> Callable[..., Any]:
        """The program that selects from segments that are alike; axes: coordinates of a candidate's place."""
        key = (tiles, slots, segments, candidates, taps, stage, axes)
        return self._get(("select", *key), lambda: self.programs.export_select(*key, self.backend.exact))

    def prefill(
        self, batch: int, text: int, schedule: Schedule, rows: tuple[int, ...], filled: bool = False
    ) -> Callable[..., Any]:
        """The prefill program for `batch` prompts of so many text rows and the images of `schedule`."""
        in_place, exact = self.backend.in_place, self.backend.exact
        options = {"filled": filled, "in_place": in_place, "exact": exact}
        return self._get(
            ("prefill", batch, text, schedule.key, rows, filled),
            lambda: self.programs.export_prefill(batch, text, schedule.layout, rows, **options),
            lambda program: program if in_place else self._writing(program, filled),
            schedule,
        )

    def extend(self, batch: int, tokens: int, rows: tuple[int, ...]) -> Callable[..., Any]:
        """The program for `tokens` more of `batch` sequences: 1 is a decoding step."""
        in_place = self.backend.in_place
        ours = self.backend.kernels and tokens == 1 and self.device.type == "cpu"

        def export() -> ExportedProgram:
            if ours:
                kernels.load()
            return self.programs.export_extend(batch, tokens, rows, in_place=in_place, kernels=ours)

        return self._get(
            ("extend", batch, tokens, rows),
            export,
            lambda program: program if in_place else self._writing(program, True),
        )

    def _get(
        self,
        key: tuple,
        export: Callable[[], ExportedProgram],
        around: Callable[[Program], Program] = lambda program: program,
        schedule: Schedule | None = None,
    ) -> Program:
        """schedule: what the program follows, by default that of a prompt with one image."""

        def make() -> tuple[Program, int, str]:
            found = None if self.kept is None else self.kept.load(key, schedule or self.schedule)
            if found is None and self.backend.kernels and self.device.type == "cpu":
                kernels.begin()
            compiled, size, how = found or self._compiled(key, export(), schedule or self.schedule)
            return self._owned(around(compiled)), size, how

        return self._cache.get(key, make)

    def _compiled(self, key: tuple, program: ExportedProgram, schedule: Schedule) -> tuple[Program, int, str]:
        size = bytes_of(program, self.backend.copies_weights)
        compiled = None if self.kept is None else self.kept.compile(key, schedule, program, size)
        if compiled is None:
            return self.backend(program), size, "exported"
        return compiled, size, "exported and compiled"

    def _writing(self, program: Program, filled: bool) -> Program:
        return writing_rows(program, self.schedule.groups, filled=filled, told=self.schedule.told)

    def _owned(self, program: Program) -> Program:
        """CUDA graphs belong to the thread that recorded them: one thread calls all programs, whoever asks."""
        if not self.backend.graphs or self.device.type != "cuda":
            return program
        self._worker = self._worker or Worker()
        return self._worker.calling(program)


class OptimizedModel(CompiledModel):
    """A pruned, compiled model with transformers' `generate()`, made by `optimize`.

    Programs are exported and compiled when a batch size and a bucket of prompt lengths are first seen, and kept; `compiled`
    lists them, and `warmup` makes them ahead of time. Weights are the model's own, shared by all programs: values that change
    in place are followed, but for backends that copy them; any other change is refused (`check_weights`).
    """

    def __init__(self, model: PreTrainedModel, provider: CompiledOnDemand, pruning_config: Method, backend: str):
        super().__init__(provider, model.config, model.generation_config)
        self._on_demand = provider
        self.model = model
        self.pruning_config = pruning_config
        self.backend = backend
        self._weights = Weights(model, copied=backend_of(backend).copies_weights)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Those of the stock model, which the programs share."""
        return self.model.parameters(recurse)

    def __repr__(self) -> str:
        made = [key[0] for key in self.compiled]
        seeing = ("vision",) if not self._host.shape.packed else ("tower", "select")
        kinds = ", ".join(f"{made.count(kind)} {kind}" for kind in (*seeing, "prefill", "extend"))
        tokens = f"{self.schedule.patches} to {self.schedule.mean_visual_tokens():.1f} visual tokens"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {tokens}, backend={self.backend!r}, "
            f"{self.dtype} on {self.device}, programs: {kinds})"
        )

    def check_weights(self) -> None:
        """Raises UnsupportedError if the model is no longer what was optimized; every request begins with this."""
        self._weights.check()

    @property
    def weights_version(self) -> int:
        """A number that grows with every change of weights in place: what was computed before one is out of date."""
        return self._weights.version

    def _turn(self, *request: Any) -> Any:
        self.check_weights()
        return super()._turn(*request)

    @property
    def on_demand(self) -> CompiledOnDemand:
        """The programs themselves, as `generate` calls them."""
        return self._on_demand

    @property
    def programs(self) -> Programs:
        """Where the vision, prefill and decode programs are exported: what `vitcop_compile.export` and benchmarks build on."""
        return self._on_demand.programs

    @property
    def host(self) -> Host:
        """How prompts refer to images."""
        return self._on_demand.host

    @property
    def compiled(self) -> tuple[tuple, ...]:
        """Keys of the programs made so far, as `CompiledOnDemand` has them."""
        return tuple(self._on_demand.compiled)

    def release(self) -> None:
        """Lets all programs go: the next request makes its own again. Caches keep what they hold."""
        self._on_demand.release()

    def export(self, folder: str | Path, **options: Any) -> Path:
        """Writes a folder that deploys without this model, as `vitcop_compile.export.export` with `options` does."""
        from .export import export  # needs packages that are optional

        return export(self, folder, **options)

    def warmup(
        self,
        batch_size: int = 1,
        text_tokens: int = 64,
        max_new_tokens: int = 64,
        images: int = 1,
        layouts: Sequence[Layout] | None = None,
        processes: int | None = None,
        run: bool = True,
    ) -> None:
        """Exports, compiles and runs once every program that a request of `batch_size` prompts with so many `images` each
        needs.

        text_tokens: of each prompt, protected tokens of its images among them; layouts: of the images of each prompt in place
        of a number of images, see `layout_of`; processes: that compile at the same time where programs are kept (see `store`),
        by default one a core; run: whether they are called too, or only compiled and kept, for which weights need no values.
        Raises InputError without weights, and if programs that are not run are not kept either.
        """
        each = [self.host.layout] * images if layouts is None else list(layouts)
        if not run:
            return self.keep([(batch_size, text_tokens, each)], max_new_tokens, processes)
        request = self._blank(batch_size, text_tokens, each)
        ids = request["input_ids"]
        if self._on_demand.kept is not None:
            asked = self._asked(request, max_new_tokens)
            fill(self._on_demand, self.model, self.pruning_config, self.backend, asked, processes)
        # CUDA graphs are recorded in the second call, and replayed from the third one on.
        for _ in range(3 if self.device.type == "cuda" else 1):
            cache = PrunedCache(max_length=ids.shape[1] + max_new_tokens)
            self.forward(**request, past_key_values=cache)
            self.forward(input_ids=ids[:, :1], past_key_values=cache)

    def keep(
        self,
        requests: Sequence[tuple[int, int, Sequence[Layout]]],
        max_new_tokens: int = 64,
        processes: int | None = None,
        kinds: Sequence[str] = tuple(FIELDS),
    ) -> None:
        """Exports, compiles and keeps every program that requests need, without calling one: `warmup` of several at once, for
        which the weights need no values.

        requests: of each the number of prompts, of text tokens, and the layouts of a prompt's images; processes: as in
        `warmup`; kinds: of programs, as `compiled` names them first, others are left out. Raises InputError as that does, for
        a kind that there is not, and where programs are not kept.
        """
        if unknown := [kind for kind in kinds if kind not in FIELDS]:
            raise InputError(f"kinds={unknown[0]!r} is no kind of program: use some of {', '.join(FIELDS)}")
        if self._on_demand.kept is None:
            raise InputError("keep(), or run=False leaves nothing where programs are not kept: set VITCOP_CACHE, or run them")
        asked: list[tuple[str, tuple]] = []
        for request in requests:
            found = self._asked(self._blank(*request), max_new_tokens)
            asked += [each for each in found if each not in asked and each[0] in kinds]
        fill(self._on_demand, self.model, self.pruning_config, self.backend, asked, processes)
        for name, arguments in asked:
            getattr(self._on_demand, name)(*arguments)

    def _blank(self, batch_size: int, text_tokens: int, layouts: Sequence[Layout]) -> dict[str, Any]:
        """A request whose pixels and words say nothing. Raises InputError without weights."""
        if self.device.type == "meta":
            raise InputError("the weights are on the meta device, which holds no values: load the model to warm it up")
        given = self.host.blank(list(layouts) * batch_size, self.device, self.dtype) if layouts else None
        words = [blank_words(self.host, list(layouts), text_tokens)] * batch_size
        return {"input_ids": torch.tensor(words, device=self.device), "pixel_values": given}

    def _asked(self, request: dict[str, Any], max_new_tokens: int) -> list[tuple[str, tuple]]:
        """The programs that a request and a token after it ask for; nothing is compiled."""
        rehearsal = Rehearsal(self._on_demand, self.programs)
        model = CompiledModel(rehearsal, self.model.config, self.model.generation_config)
        cache = PrunedCache(max_length=request["input_ids"].shape[1] + max_new_tokens)
        model.forward(**request, past_key_values=cache)
        model.forward(input_ids=request["input_ids"][:, :1], past_key_values=cache)
        return rehearsal.asked


def _check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    values = tuple(buckets)
    counts = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
    if not values or not counts or list(values) != sorted(set(values)):
        raise InputError(f"prompt_buckets={values}: pass ascending positive numbers of text tokens")
    return values
