"""A compiled model's programs bound to one request: called with what the runtime gives them, whatever that is."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map

from ..backends import BACKENDS, Program
from ..cache import PrunedCache
from ..optimized import OptimizedModel
from ..program_cache import ProgramCache
from .arms import Request, begin_step, inputs
from .timing import Call

PROGRAMS = ("vision", "prefill", "decode")
# A stage may be several programs: where tokens are put together behind the encoder, these two are "vision".
_SEEING = ("tower", "select")
# wrap(name, make) -> the program that is called; make() exports and compiles the provider's own.
Wrap = Callable[[str, Callable[[], Program]], Program]


def with_programs(optimized: OptimizedModel, wrap: Wrap) -> OptimizedModel:
    """`optimized` with other programs, of PROGRAMS, in its own runtime; `wrap` is called once for each that comes up, by the
    names "tower" and "select" where these are its vision programs."""
    other = copy.copy(optimized)
    other._provider = _Wrapped(optimized.on_demand, wrap)  # type: ignore[assignment]
    return other


class _Wrapped:
    """A provider like the one given, but for its programs."""

    def __init__(self, provider: Any, wrap: Wrap):
        self._provider, self._wrap = provider, wrap
        self._made: dict[tuple, Program] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._provider, name)
        known = ("vision", *_SEEING, "prefill", "extend")
        return functools.partial(self._program, name, found) if name in known else found

    def _program(self, kind: str, make: Callable[..., Program], *key: Any) -> Program:
        if kind == "extend" and key[1] > 1:
            return make(*key)  # a text prompt, or a later turn
        if (kind, key) not in self._made:
            name = "decode" if kind == "extend" else kind
            self._made[kind, key] = self._wrap(name, functools.partial(make, *key))
        return self._made[kind, key]


class Served:
    """One prompt and one more token on their way through a runtime, as far as they are asked for: that of `optimized`, or of a
    model like it. The request is `inputs`, the same for every model of one shape."""

    def __init__(self, optimized: OptimizedModel, request: Request):
        self.prompt: dict[str, Any] = inputs(optimized.model, request)
        self.filled: PrunedCache | None = None
        self._length = self.prompt["input_ids"].shape[1] + request.new_tokens

    def forward(self, model: OptimizedModel) -> Any:
        """`forward` from ids and pixels to the first logits, with a fresh cache."""
        return model.forward(**self.prompt, past_key_values=PrunedCache(max_length=self._length))

    def prefill(self, model: OptimizedModel) -> None:
        """The prompt, once: its cache is held, as its buffers would serve another request if it were gone."""
        if self.filled is None:
            self.filled = self.forward(model).past_key_values

    def decode(self, model: OptimizedModel) -> None:
        """The prompt and one token."""
        self.prefill(model)
        model.forward(input_ids=self.prompt["input_ids"][:, :1], past_key_values=self.filled)


class _Enough(Exception):
    """Ends a request whose further programs nobody has asked for."""


def bind(optimized: OptimizedModel, request: Request) -> dict[str, Call]:
    """Calls of "vision" (where it is two programs, also of "tower" and "select"), "prefill", "decode" (one token, always into
    the same row of a filled cache) and "ttft" (`forward`: ids and pixels to the first logits, checks and cache included), on
    the same random request for every model of one shape.

    A program is exported and compiled when its call, or the call of one that needs it, is first made: the request passes
    through the runtime up to there, and what the program was given is what it is given from then on. Calls change no state.
    """
    again: dict[str, list[Call]] = {}
    passing: dict[str, list[Call]] = {}
    returned: list[Any] = []
    last = ""

    def kept(value: Any) -> Any:
        # As it is now: the runtime counts on in its integers, and a CUDA graph writes over what it has returned.
        if isinstance(value, Tensor) and (not value.is_floating_point() or any(value is one for one in returned)):
            return value.clone()
        return value

    def noting(name: str, make: Callable[[], Program]) -> Program:
        stage = "vision" if name in _SEEING else name
        if PROGRAMS.index(stage) > PROGRAMS.index(last):
            raise _Enough
        program = make()

        def noted(*given: Any) -> Any:
            if stage not in again:
                for each in dict.fromkeys((stage, name)):
                    passing.setdefault(each, []).append(functools.partial(program, *tree_map(kept, given)))
            found = program(*given)
            returned.extend(tree_leaves(found))
            return found

        return noted

    served, model = Served(optimized, request), with_programs(optimized, noting)

    @torch.no_grad()
    def call(name: str) -> Any:
        nonlocal last
        if name not in again:
            last = "vision" if name in _SEEING else name
            with contextlib.suppress(_Enough):
                (served.decode if name == "decode" else served.prefill)(model)
            again.update(passing)
            passing.clear()
            returned.clear()
        begin_step(optimized.device)
        return [program() for program in again[name]][-1]

    names = (*PROGRAMS, *(_SEEING if optimized.host.shape.packed else ()))
    calls: dict[str, Call] = {name: functools.partial(call, name) for name in names}
    return calls | {"ttft": functools.partial(served.forward, optimized)}


def compiled_by(optimized: OptimizedModel, compile: Callable[[ExportedProgram], Program]) -> OptimizedModel:
    """`optimized` without programs, making its own with `compile` in place of its backend, whose other properties it keeps.

    `compile` is given what the backend would be; its programs run in the thread that calls them.
    """
    provider = copy.copy(optimized.on_demand)
    provider._cache, provider.kept = ProgramCache(provider._cache.limit), None
    provider.backend = dataclasses.replace(BACKENDS[optimized.backend], compile=compile, graphs=False)
    other = copy.copy(optimized)
    other._provider = other._on_demand = provider
    return other


def exported(optimized: OptimizedModel, request: Request) -> dict[str, ExportedProgram]:
    """The programs that serve `request`, by name, as the backend is given them. Runs them once, uncompiled."""
    found: list[ExportedProgram] = []

    def note(program: ExportedProgram) -> Program:
        found.append(program)
        return program.module(check_guards=False)

    with torch.no_grad():
        Served(optimized, request).decode(compiled_by(optimized, note))
    return dict(zip(PROGRAMS, found, strict=True))
