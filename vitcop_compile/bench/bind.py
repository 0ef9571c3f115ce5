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

# Of a provider, "extend" by one token is a decoding step; by more it is a text prompt, or a later turn.
PROGRAMS = ("vision", "prefill", "decode")
_KINDS = ("vision", "prefill", "extend")
# wrap(name, make) -> the program that is called; make() exports and compiles the provider's own.
Wrap = Callable[[str, Callable[[], Program]], Program]


def with_programs(optimized: OptimizedModel, wrap: Wrap) -> OptimizedModel:
    """`optimized` with other programs, of PROGRAMS, in its own runtime; `wrap` is called once for each that comes up."""
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
        return functools.partial(self._program, name, found) if name in _KINDS else found

    def _program(self, kind: str, make: Callable[..., Program], *key: Any) -> Program:
        name = "decode" if kind == "extend" and key[1] == 1 else kind
        if name not in PROGRAMS:
            return make(*key)
        if (name, key) not in self._made:
            self._made[name, key] = self._wrap(name, functools.partial(make, *key))
        return self._made[name, key]


class Served:
    """One prompt and one more token on their way through the runtime of `optimized`, as far as they are asked for.

    The request is `bench.inputs`, the same for every model of one shape.
    """

    def __init__(self, optimized: OptimizedModel, request: Request):
        self.prompt: dict[str, Any] = inputs(optimized.model, request)
        self._optimized, self._length = optimized, self.prompt["input_ids"].shape[1] + request.new_tokens
        self._filled: PrunedCache | None = None

    def forward(self, model: OptimizedModel | None = None) -> Any:
        """`forward` from ids and pixels to the first logits, on `optimized` or a model like it, with a fresh cache."""
        return (model or self._optimized).forward(**self.prompt, past_key_values=PrunedCache(max_length=self._length))

    def prefill(self, model: OptimizedModel) -> None:
        """The prompt; its cache is held from now on, as its buffers would serve another request once it is gone."""
        if self._filled is None:
            cache = PrunedCache(max_length=self._length)
            model.forward(**self.prompt, past_key_values=cache)
            self._filled = cache

    def decode(self, model: OptimizedModel) -> None:
        """The prompt and one token."""
        self.prefill(model)
        model.forward(input_ids=self.prompt["input_ids"][:, :1], past_key_values=self._filled)


class _Enough(Exception):
    """Ends a request whose further programs nobody has asked for."""


class _Noted(Served):
    """Serves the request once, and calls its programs again with what they were given."""

    def __init__(self, optimized: OptimizedModel, request: Request):
        super().__init__(optimized, request)
        self._model = with_programs(optimized, self._noting)
        self._again: dict[str, Call] = {}
        self._returned: list[Any] = []
        self._last = ""

    @torch.no_grad()
    def call(self, name: str) -> Any:
        if name not in self._again:
            self._last = name
            with contextlib.suppress(_Enough):
                (self.decode if name == "decode" else self.prefill)(self._model)
            self._returned.clear()
        begin_step(self.prompt["input_ids"].device)
        return self._again[name]()

    def _noting(self, name: str, make: Callable[[], Program]) -> Program:
        if PROGRAMS.index(name) > PROGRAMS.index(self._last):
            raise _Enough
        program = make()

        def noted(*given: Any) -> Any:
            if name not in self._again:
                self._again[name] = functools.partial(program, *tree_map(self._kept, given))
            found = program(*given)
            self._returned += tree_leaves(found)
            return found

        return noted

    def _kept(self, value: Any) -> Any:
        """As it is now: the runtime counts on in its integers, and a CUDA graph writes over what it has returned."""
        if isinstance(value, Tensor) and (not value.is_floating_point() or any(value is one for one in self._returned)):
            return value.clone()
        return value


def bind(optimized: OptimizedModel, request: Request) -> dict[str, Call]:
    """Calls of "vision", "prefill", "decode" (one token, always into the same row of a filled cache) and "ttft" (`forward`:
    ids and pixels to the first logits, checks and cache included), on the same random request for every model of one shape.

    A program is exported and compiled when its call, or the call of one that needs it, is first made: the request passes
    through the runtime up to there, and what the program was given is what it is given from then on. Calls change no state.
    """
    served = _Noted(optimized, request)
    calls: dict[str, Call] = {name: functools.partial(served.call, name) for name in PROGRAMS}
    return calls | {"ttft": served.forward}


def compiled_by(optimized: OptimizedModel, compile: Callable[[ExportedProgram], Program]) -> OptimizedModel:
    """`optimized` without programs, making its own with `compile` in place of its backend, whose other properties it keeps.

    `compile` is given what the backend would be; its programs run in the thread that calls them.
    """
    provider = copy.copy(optimized.on_demand)
    provider._cache = ProgramCache(provider._cache.limit)
    provider.backend = dataclasses.replace(BACKENDS[optimized.backend], compile=compile, graphs=False)
    other = copy.copy(optimized)
    other._provider = other._on_demand = provider
    return other


def exported(optimized: OptimizedModel, request: Request) -> dict[str, ExportedProgram]:
    """The programs that serve `request`, by name, as the backend is given them. Runs them once, uncompiled."""
    found: dict[str, ExportedProgram] = {}
    current = ""

    def note(program: ExportedProgram) -> Program:
        found[current] = program
        return program.module(check_guards=False)

    def named(name: str, make: Callable[[], Program]) -> Program:
        nonlocal current
        current = name
        return make()

    with torch.no_grad():
        Served(optimized, request).decode(with_programs(compiled_by(optimized, note), named))
    return found
