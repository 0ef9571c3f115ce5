"""The model that `optimize` returns: programs exported and compiled on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from .backends import Program, backend_of, writing_rows
from .cache import PrunedCache
from .config import ViTCoPConfig
from .errors import InputError
from .isolation import compiling_at_first_call, tracing
from .programs import Programs
from .prompt import ImageInput
from .runtime import CompiledModel, Plan, bucket
from .weights import Weights
from .worker import Worker

PROMPT_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
NEW_TOKEN_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)


class CompiledOnDemand:
    """Provides programs through a backend, one for every batch size and bucket that comes up. `compiled` holds them by key.

    Keys: ("vision", batch), ("prefill", batch, rows, image), ("decode", batch, cache rows).
    """

    def __init__(self, programs: Programs, text_programs: Programs, backend: str, prompt_buckets: Sequence[int]):
        self.programs, self.text_programs = programs, text_programs
        self.backend = backend_of(backend)
        self._text_buckets = _check_buckets(prompt_buckets)
        self.compiled: dict[tuple, Callable[..., Any]] = {}
        self._worker: Worker | None = None
        family, parameter = programs.family, next(programs.family.head.parameters())
        self.schedule = programs.schedule
        self.image = ImageInput(family.image_token_id, family.pixel_shape, family.shape.patches)
        self.device, self.dtype = parameter.device, parameter.dtype

    def plan(self, batch: int, text: int, new_tokens: int, image: bool) -> Plan:
        """Both lengths in their buckets.

        A cache has rows for an image whether there is one or not, so that both kinds of prompt share a decode program.
        """
        text_rows = bucket(text, self._text_buckets, "text tokens in a prompt")
        room = bucket(new_tokens, NEW_TOKEN_BUCKETS, "new tokens")
        pruned = self.schedule.image_tokens
        return Plan(text_rows + (pruned if image else 0), text_rows + pruned + room, room)

    def default_new_tokens(self) -> int:
        """Room of a cache made by `forward`."""
        return NEW_TOKEN_BUCKETS[0]

    def vision(self, batch: int) -> Callable[..., Any]:
        """The vision program for `batch` images."""
        return self._get(("vision", batch), lambda: self.programs.export_vision(batch, self.backend.exact))

    def prefill(self, batch: int, rows: int, image: bool) -> Callable[..., Any]:
        """The prefill program for `batch` prompts of `rows` rows."""
        programs = self.programs if image else self.text_programs
        return self._get(("prefill", batch, rows, image), lambda: programs.export_prefill(batch, rows, image))

    def decode(self, batch: int, cache_rows: int) -> Callable[..., Any]:
        """The decode program for `batch` sequences on caches of `cache_rows` rows in layer 0."""
        in_place, deltas = self.backend.in_place, self.schedule.removed_rows()
        return self._get(
            ("decode", batch, cache_rows),
            lambda: self.programs.export_decode(batch, cache_rows, in_place),
            lambda program: program if in_place else writing_rows(program, deltas),
        )

    def _get(
        self, key: tuple, export: Callable[[], ExportedProgram], around: Callable[[Program], Program] = lambda program: program
    ) -> Program:
        if key not in self.compiled:
            with tracing():
                if key not in self.compiled:  # another thread may have made it while this one waited
                    self.compiled[key] = self._owned(compiling_at_first_call(around(self.backend(export()))))
        return self.compiled[key]

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

    def __init__(self, model: PreTrainedModel, provider: CompiledOnDemand, pruning_config: ViTCoPConfig, backend: str):
        super().__init__(provider, model.config, model.generation_config)
        self._on_demand = provider
        self.model = model
        self.pruning_config = pruning_config
        self.backend = backend
        self._weights = Weights(model, copied=backend_of(backend).copies_weights)

    def check_weights(self) -> None:
        """Raises UnsupportedError if the model is no longer what was optimized; every request begins with this."""
        self._weights.check()

    def _prefill_prompt(self, *request: Any) -> Any:
        self.check_weights()
        return super()._prefill_prompt(*request)

    @property
    def on_demand(self) -> CompiledOnDemand:
        """The programs themselves, as `generate` calls them."""
        return self._on_demand

    @property
    def programs(self) -> Programs:
        """Where the vision, prefill and decode programs are exported: what `vitcop_compile.export` and benchmarks build on."""
        return self._on_demand.programs

    @property
    def text_programs(self) -> Programs:
        """The same for prompts without an image, which nothing is pruned from."""
        return self._on_demand.text_programs

    @property
    def image(self) -> ImageInput:
        """How prompts refer to an image."""
        return self._on_demand.image

    @property
    def compiled(self) -> tuple[tuple, ...]:
        """Keys of the programs made so far: ("vision", batch), ("prefill", batch, rows, image), ("decode", batch, rows)."""
        return tuple(self._on_demand.compiled)

    def warmup(self, batch: int = 1, text_tokens: int = 64, max_new_tokens: int = 64, image: bool = True) -> None:
        """Exports, compiles and runs once every program that such a request needs. Raises InputError without weights."""
        if self.device.type == "meta":
            raise InputError("the weights are on the meta device, which holds no values: load the model to warm it up")
        image_input = self._on_demand.image
        ids = torch.ones(batch, text_tokens, dtype=torch.int64, device=self.device)
        ids[ids == image_input.token_id] = 0
        pixels = None
        if image:
            run = torch.full((batch, image_input.patches), image_input.token_id, device=self.device)
            ids = torch.cat((ids[:, :1], run, ids[:, 1:]), 1)
            pixels = torch.zeros(batch, *image_input.pixel_shape, dtype=self.dtype, device=self.device)
        # CUDA graphs are recorded in the second call, and replayed from the third one on.
        for _ in range(3 if self.device.type == "cuda" else 1):
            cache = PrunedCache(max_length=ids.shape[1] + max_new_tokens)
            self.forward(input_ids=ids, pixel_values=pixels, past_key_values=cache)
            self.forward(input_ids=ids[:, :1], past_key_values=cache)


def _check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    values = tuple(buckets)
    counts = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
    if not values or not counts or list(values) != sorted(set(values)):
        raise InputError(f"prompt_buckets={values}: pass ascending positive numbers of text tokens")
    return values
