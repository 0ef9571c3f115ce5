"""The compiled model: transformers' generation loop over three programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .backends import backend_of
from .cache import PrunedCache, Selection
from .errors import InputError
from .explain import explain
from .programs import Programs
from .prompt import Prompt, align, check_ids, check_mask, check_pixels, check_values
from .schedule import Schedule

TEXT_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
NEW_TOKEN_BUCKETS = (64, 128, 256, 512, 1024, 2048, 4096)
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


class OptimizedModel(GenerationMixin):
    """A pruned, compiled model with transformers' `generate()`.

    Programs are exported and compiled when a batch size and a bucket of prompt lengths are first seen, and kept; `compiled`
    lists them, and `warmup` makes them ahead of time. One image per prompt, or none in the whole batch; prompts may be of
    different lengths, padded on either side. Weights are the model's own, shared by all programs.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _is_stateful = False

    def __init__(
        self,
        model: PreTrainedModel,
        programs: Programs,
        text_programs: Programs,
        backend: str,
        text_buckets: Sequence[int] = TEXT_BUCKETS,
    ):
        self._model, self._programs, self._text_programs = model, programs, text_programs
        self._backend = backend_of(backend)
        self._text_buckets = _check_buckets(text_buckets)
        self._compiled: dict[tuple, Callable[..., Any]] = {}
        self.backend = backend
        self.generation_config = model.generation_config

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._model.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type."""
        return self._model.dtype

    @property
    def schedule(self) -> Schedule:
        """What the programs meet exactly."""
        return self._programs.schedule

    @property
    def programs(self) -> Programs:
        """Where the vision, prefill and decode programs are exported: what `vitcop_compile.export` and benchmarks build on."""
        return self._programs

    @property
    def compiled(self) -> tuple[tuple, ...]:
        """Keys of the programs made so far: ("vision", batch), ("prefill" | "decode", batch, rows, image)."""
        return tuple(self._compiled)

    def explain(self) -> str:
        """The schedule as a table: tokens, KV rows and FLOPs per group of layers."""
        return explain(self.schedule)

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def get_experts_implementation(self) -> dict:
        """Part of transformers' loop; there are no experts here."""
        return {}

    def warmup(self, batch: int = 1, text_tokens: int = 64, max_new_tokens: int = 64, image: bool = True) -> None:
        """Exports, compiles and runs once every program that such a request needs."""
        shape = self.schedule.shape
        ids = torch.ones(batch, text_tokens, dtype=torch.int64, device=self.device)
        ids[ids == self._programs.family.image_token_id] = 0
        pixels = None
        if image:
            run = torch.full((batch, shape.patches), self._programs.family.image_token_id, device=self.device)
            ids = torch.cat((ids[:, :1], run, ids[:, 1:]), 1)
            pixels = torch.zeros(batch, *self._programs.family.pixel_shape, dtype=self.dtype, device=self.device)
        cache = PrunedCache(max_length=ids.shape[1] + max_new_tokens)
        self.forward(input_ids=ids, pixel_values=pixels, past_key_values=cache)
        self.forward(input_ids=ids[:, :1], past_key_values=cache)

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: PrunedCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | None = None,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast:
        """One forward pass: a whole prompt, or one more token on a filled cache.

        input_ids: int64 [B, T], image placeholders expanded by the processor; pixel_values: [B, channels, height, width];
        attention_mask: [B, T], 0 for pads. Returns logits [B, 1, vocab] *of each prompt's last token only*, wherever its pads
        stand, and the cache to pass on. A cache made here has room for the smallest bucket of new tokens.

        Raises InputError for inputs that the programs cannot take, before anything is exported or compiled.
        """
        given = sorted(name for name, value in unsupported.items() if value is not None and value is not False)
        if given:
            raise InputError(f"{', '.join(given)} cannot be used with a compiled model: pass input_ids and pixel_values")
        if logits_to_keep not in (None, 0, 1):
            raise InputError(f"logits_to_keep={logits_to_keep}: only the last token's logits are computed; pass 1 or nothing")
        if use_cache is False:
            raise InputError("use_cache=False is not supported: the decode program works on its KV cache; leave it out")
        if past_key_values is not None and not isinstance(past_key_values, PrunedCache):
            raise InputError(
                f"past_key_values is a {type(past_key_values).__name__}: a compiled model works on the cache it returns"
            )
        ids = check_ids(input_ids, self.device)
        if past_key_values is not None and past_key_values.filled:
            return self._decode(ids, pixel_values, past_key_values)
        return self._prefill_prompt(ids, pixel_values, attention_mask, past_key_values or PrunedCache())

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: PrunedCache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Part of transformers' loop: the whole prompt first, then one token at a time."""
        if past_key_values is not None and past_key_values.filled:
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values}
        rest = {name: kwargs[name] for name in ("use_cache",) if name in kwargs}
        return {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            **rest,
        }

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        if generation_mode not in _MODES:
            names = ", ".join(mode.value for mode in _MODES)
            raise InputError(f"generation mode {generation_mode.value!r} is not supported: use one of {names}")
        if generation_config.use_cache is False:
            raise InputError("use_cache=False is not supported: the decode program works on its KV cache; leave it out")
        for name in ("cache_implementation", "prefill_chunk_size"):
            if getattr(generation_config, name, None) is not None:
                raise InputError(f"{name} cannot be chosen: a compiled model brings its own static cache and prefill")
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name, None):
                raise InputError(f"{name} is not available: a compiled model returns logits and its cache only")
        given = model_kwargs.get("past_key_values")
        if given is not None:
            raise InputError(
                "past_key_values cannot be passed to generate(): continuing a conversation on a pruned cache is not "
                "supported yet; pass the whole conversation"
            )
        model_kwargs["past_key_values"] = PrunedCache(max_length=generation_config.max_length)

    def _prefill_prompt(self, ids: Tensor, pixels: object, mask: object, cache: PrunedCache) -> CausalLMOutputWithPast:
        batch, length = ids.shape
        family, image = self._programs.family, pixels is not None
        programs = self._programs if image else self._text_programs
        real = check_mask(mask, ids)
        images = check_pixels(pixels, family, batch, self.device, self.dtype) if image else None
        check_values(ids, real, images, family, programs.schedule.shape.vocab)
        kept = programs.schedule.image_tokens if image else 0
        text = length - (programs.schedule.shape.patches if image else 0)
        new_tokens = max(1, cache.max_length - length) if cache.max_length else NEW_TOKEN_BUCKETS[0]
        self._check_length(text + kept, new_tokens)
        rows = _bucket(text, self._text_buckets, "text tokens in a prompt") + kept
        room = _bucket(new_tokens, NEW_TOKEN_BUCKETS, "new tokens")

        prompt = align(ids, real, family.image_token_id, kept, rows, image)
        inputs, selection = self._see(prompt, images)
        prefill = self._program(("prefill", batch, rows, image))
        logits, *rest = prefill(prompt.ids, prompt.last, *inputs)
        stages, caches = rest[: len(programs.schedule.stages)], rest[len(programs.schedule.stages) :]
        cache.selection = _raster(selection, stages)
        shapes = programs.cache_shapes(batch, rows + room)
        cache.fill(("decode", batch, rows + room, image), prompt.last + 1, caches, shapes, length, room)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _see(self, prompt: Prompt, images: Tensor | None) -> tuple[tuple[Tensor, ...], Selection]:
        """What prefill takes beside the ids: (features, visual rows, labels)."""
        if images is None or prompt.visual is None:
            return (), Selection()
        features, *selection = self._program(("vision", images.shape[0]))(images)
        if not selection:
            return (features, prompt.visual), Selection()
        kept, labels = selection
        return (features, prompt.visual, labels), Selection(kept, labels)

    def _decode(self, ids: Tensor, pixels: object, cache: PrunedCache) -> CausalLMOutputWithPast:
        if pixels is not None or ids.shape[1] != 1:
            raise InputError(
                f"{ids.shape[1]} tokens{' and an image' if pixels is not None else ''} on a filled cache: only one token at "
                "a time can follow; pass the whole conversation with a fresh cache"
            )
        if ids.shape[0] != cache.length.shape[0]:
            raise InputError(f"{ids.shape[0]} tokens for a cache of {cache.length.shape[0]} sequences: pass one each")
        cache.check_room()
        cache.token.copy_(ids)
        (logits,) = _as_tuple(self._program(cache.key)(cache.token, cache.length, *cache.buffers))
        cache.advance()
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _program(self, key: tuple) -> Callable[..., Any]:
        if key not in self._compiled:
            kind, batch, *rest = key
            if kind == "vision":
                program = self._programs.export_vision(batch)
            else:
                rows, image = rest
                programs = self._programs if image else self._text_programs
                if kind == "prefill":
                    program = programs.export_prefill(batch, rows, image)
                else:
                    program = programs.export_decode(batch, rows)
            self._compiled[key] = self._backend(program)
        return self._compiled[key]

    def _check_length(self, prompt: int, new_tokens: int) -> None:
        limit = self.schedule.shape.max_positions
        if prompt + new_tokens > limit:
            raise InputError(
                f"a prompt of {prompt} rows and {new_tokens} new tokens need {prompt + new_tokens} positions, the model has "
                f"{limit}: shorten the prompt or lower max_new_tokens"
            )


def _raster(selection: Selection, stages: list[Tensor]) -> Selection:
    """Stage indices count within the stage before; patches count in the image."""
    if selection.kept is None:
        return selection
    found, current = [], selection.kept
    for index in stages:
        current = current.gather(1, index)
        found.append(current)
    return Selection(selection.kept, selection.labels, tuple(found))


def _bucket(count: int, buckets: Sequence[int], what: str) -> int:
    for bucket in buckets:
        if count <= bucket:
            return bucket
    raise InputError(
        f"{count} {what} exceed the largest bucket, {buckets[-1]}: ask for fewer, or optimize() with larger buckets"
    )


def _check_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    values = tuple(buckets)
    counts = all(isinstance(value, int) and not isinstance(value, bool) and value > 0 for value in values)
    if not values or not counts or list(values) != sorted(set(values)):
        raise InputError(f"text_buckets={values}: pass ascending positive numbers of text tokens")
    return values


def _as_tuple(result: Any) -> tuple:
    return tuple(result) if isinstance(result, tuple | list) else (result,)
