"""The runtime: transformers' generation loop over three compiled programs, wherever they come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import CACHE_NAME, BufferPool, PrunedCache, Selection
from .errors import InputError
from .explain import explain
from .isolation import plain
from .prompt import ImageInput, Prompt, align, check_ids, check_mask, check_pixels, check_vocabulary, facts, refuse
from .schedule import Schedule

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


class Plan(NamedTuple):
    """rows: prompt rows of the prefill program (images at their pruned length); cache_rows: rows of layer 0's KV cache; room:
    new tokens that fit into it."""

    rows: int
    cache_rows: int
    room: int


class Provider(Protocol):
    """Where programs come from: compiled on demand, or loaded from a folder of engines.

    vision(pixels) -> (features, kept, labels) or (features,); prefill(ids, last[, features, visual[, labels]]) -> (logits,
    index per stage..., k0, v0, ...); decode(token, length, offsets, k0, v0, ...) -> (logits,), caches updated in place.
    """

    schedule: Schedule
    image: ImageInput
    device: torch.device
    dtype: torch.dtype

    def plan(self, batch: int, text: int, new_tokens: int, image: bool) -> Plan: ...

    def vision(self, batch: int) -> Callable[..., Any]: ...

    def prefill(self, batch: int, rows: int, image: bool) -> Callable[..., Any]: ...

    def decode(self, batch: int, cache_rows: int) -> Callable[..., Any]: ...

    def default_new_tokens(self) -> int: ...


class CompiledModel(GenerationMixin):
    """A pruned, compiled model with transformers' `generate()`.

    One image per prompt, or none in the whole batch; prompts may be of different lengths, padded on either side.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    _is_stateful = False

    def __init__(self, provider: Provider, config: Any, generation_config: GenerationConfig):
        self._provider = provider
        self.config = config
        self.generation_config = generation_config
        deltas = provider.schedule.removed_rows()
        groups = tuple(dict.fromkeys(deltas))
        self._offsets = torch.tensor(groups, dtype=torch.int64, device=provider.device)
        self._none_removed = torch.zeros_like(self._offsets)
        self._pool = BufferPool()
        # Reading values back is free on a CPU. On a GPU it would stall the device before the first token.
        self._postpone = provider.device.type != "cpu"
        self._running = threading.local()

    @property
    def device(self) -> torch.device:
        """Where the programs run."""
        return self._provider.device

    @property
    def dtype(self) -> torch.dtype:
        """The programs' floating-point type."""
        return self._provider.dtype

    @property
    def schedule(self) -> Schedule:
        """What the programs meet exactly."""
        return self._provider.schedule

    def explain(self) -> str:
        """The schedule as a table: tokens, KV rows and FLOPs per group of layers."""
        return explain(self.schedule)

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def get_experts_implementation(self) -> dict:
        """Part of transformers' loop; there are no experts here."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: PrunedCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | None = None,
        cache: PrunedCache | None = None,
        **unsupported: Any,
    ) -> CausalLMOutputWithPast:
        """One forward pass: a whole prompt, or one more token on a filled cache.

        input_ids: int64 [B, T], image placeholders expanded by the processor; pixel_values: [B, channels, height, width];
        attention_mask: [B, T], 0 for pads; past_key_values: what an earlier call returned, also by its newer name `cache`.
        Returns logits [B, 1, vocab] *of each prompt's last token only*, wherever its pads stand, and the cache to pass on. A
        cache made here has room for the smallest bucket of new tokens.

        Raises InputError for inputs that the programs cannot take, before anything is exported or compiled.
        """
        given = sorted(name for name, value in unsupported.items() if value is not None and value is not False)
        if given:
            raise InputError(f"{', '.join(given)} cannot be used with a compiled model: pass input_ids and pixel_values")
        if logits_to_keep not in (None, 0, 1):
            raise InputError(f"logits_to_keep={logits_to_keep}: only the last token's logits are computed; pass 1 or nothing")
        if use_cache is False:
            raise InputError("use_cache=False is not supported: the decode program works on its KV cache; leave it out")
        held = _one_cache(past_key_values, cache)
        if held is not None and not isinstance(held, PrunedCache):
            raise InputError(f"past_key_values is a {type(held).__name__}: a compiled model works on the cache it returns")
        ids = check_ids(input_ids, self.device)
        if ids.is_cuda:
            # What earlier calls returned has been copied out: CUDA graphs may write over it.
            torch.compiler.cudagraph_mark_step_begin()
        with plain():
            if held is not None and held.filled:
                held.verify_prompt()
                return self._decode(ids, pixel_values, held)
            # An empty Cache is falsy.
            return self._prefill_prompt(ids, pixel_values, attention_mask, PrunedCache() if held is None else held)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with the prompt checked before its loop starts. Raises InputError as `forward` does."""
        check_ids(kwargs.get("input_ids") if inputs is None else inputs, self.device)
        given = [name for name in ("position_ids", "inputs_embeds") if kwargs.get(name) is not None]
        if given:
            raise InputError(f"{', '.join(given)} cannot be used with a compiled model: pass input_ids and pixel_values")
        if self.device.type == "meta":
            raise InputError("the weights are on the meta device, which holds no values: load the model to generate")
        if CACHE_NAME != "past_key_values" and "past_key_values" in kwargs:
            kwargs[CACHE_NAME] = _one_cache(kwargs.pop("past_key_values"), kwargs.get(CACHE_NAME))
        self._running.cache = None
        try:
            result = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
            if self._running.cache is not None:
                self._running.cache.verify()
            return result
        finally:
            self._running.cache = None

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: PrunedCache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        cache: PrunedCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Part of transformers' loop: the whole prompt first, then one token at a time."""
        held = _one_cache(past_key_values, cache)
        if held is not None and held.filled:
            return {"input_ids": input_ids[:, -1:], CACHE_NAME: held}
        rest = {name: kwargs[name] for name in ("use_cache",) if name in kwargs}
        return {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            CACHE_NAME: held,
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
        if getattr(generation_config, "guidance_scale", None) not in (None, 1, 1.0):
            raise InputError(
                f"guidance_scale={generation_config.guidance_scale} is not supported: its second, unconditional pass would "
                "need a prompt and a cache of its own; leave it out"
            )
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(generation_config, name, None):
                raise InputError(f"{name} is not available: a compiled model returns logits and its cache only")
        if model_kwargs.get(CACHE_NAME) is not None:
            raise InputError(
                "past_key_values cannot be passed to generate(): continuing a conversation on a pruned cache is not "
                "supported yet; pass the whole conversation"
            )
        self._running.cache = model_kwargs[CACHE_NAME] = PrunedCache(max_length=generation_config.max_length)

    def _prefill_prompt(self, ids: Tensor, pixels: object, mask: object, cache: PrunedCache) -> CausalLMOutputWithPast:
        batch, length = ids.shape
        provider, schedule, image = self._provider, self.schedule, pixels is not None
        real = check_mask(mask, ids)
        images = check_pixels(pixels, provider.image, batch, self.device, self.dtype) if image else None
        if not self._postpone:
            self._check_values(ids, real, images, cache)
        kept = schedule.image_tokens if image else 0
        text = length - (schedule.shape.patches if image else 0)
        new_tokens = max(1, cache.max_length - length) if cache.max_length else provider.default_new_tokens()
        self._check_length(text + kept, new_tokens)
        plan = provider.plan(batch, text, new_tokens, image)

        prompt = align(ids, real, provider.image.token_id, kept, plan.rows, image, schedule.shape.vocab)
        inputs, selection = self._see(prompt, images)
        logits, *rest = provider.prefill(batch, plan.rows, image)(prompt.ids, prompt.last, *inputs)
        stages = rest[: len(rest) - 2 * schedule.shape.layers]
        caches = rest[len(stages) :]
        cache.selection = _raster(selection, stages)
        cache.fill(
            self._pool.lend(cache, schedule.cache_shapes(batch, plan.cache_rows), caches[0], len(self._offsets)),
            caches,
            length=prompt.last + 1,
            offsets=self._offsets if image else self._none_removed,
            seen=length,
            room=plan.room,
        )
        if self._postpone:  # behind the programs: some sixty small launches that need not come before the first token
            self._check_values(ids, real, images, cache)
        return _answer(logits, cache)

    def _check_values(self, ids: Tensor, real: Tensor, images: Tensor | None, cache: PrunedCache) -> None:
        """Raises InputError for values the programs cannot take: at once where reading them is free, else postponed."""
        shape, image = self.schedule.shape, self._provider.image
        found = facts(ids, real, images, image.token_id, shape.vocab)
        if self._postpone:
            cache.expect(lambda: refuse(found, images is not None, image.patches, shape.vocab))
        else:
            refuse(found, images is not None, image.patches, shape.vocab)

    def _see(self, prompt: Prompt, images: Tensor | None) -> tuple[tuple[Tensor, ...], Selection]:
        """What prefill takes beside the ids: (features, visual rows, labels)."""
        if images is None or prompt.visual is None:
            return (), Selection()
        features, *selection = self._provider.vision(images.shape[0])(images)
        if not selection:
            return (features, prompt.visual), Selection()
        kept, labels = selection
        return (features, prompt.visual, labels), Selection(_owned(kept), _owned(labels))

    def _decode(self, ids: Tensor, pixels: object, cache: PrunedCache) -> CausalLMOutputWithPast:
        if pixels is not None or ids.shape[1] != 1:
            raise InputError(
                f"{ids.shape[1]} tokens{' and an image' if pixels is not None else ''} on a filled cache: only one token at "
                "a time can follow; pass the whole conversation with a fresh cache"
            )
        if ids.shape[0] != cache.length.shape[0]:
            raise InputError(f"{ids.shape[0]} tokens for a cache of {cache.length.shape[0]} sequences: pass one each")
        cache.check_room()
        if not self._postpone:  # a read from a GPU, each step, would cost more than the check is worth
            check_vocabulary(ids, self.schedule.shape.vocab)
        cache.take_token(ids, self.schedule.shape.vocab, check=self._postpone)
        decode = self._provider.decode(ids.shape[0], cache.rows)
        logits, *_ = decode(cache.token, cache.length, cache.offsets, *cache.buffers)
        cache.advance()
        return _answer(logits, cache)

    def _check_length(self, prompt: int, new_tokens: int) -> None:
        shape = self.schedule.shape
        if prompt + new_tokens > shape.most_tokens:
            limit = f"{shape.max_positions}" if shape.most_tokens == shape.max_positions else f"a window of {shape.window}"
            raise InputError(
                f"a prompt of {prompt} rows and {new_tokens} new tokens need {prompt + new_tokens} positions, the model has "
                f"{limit}: shorten the prompt or lower max_new_tokens"
            )


def _one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, by whichever of its names. Raises InputError for two."""
    if past_key_values is not None and cache is not None:
        raise InputError("past_key_values and cache were given, two names of one thing: pass one")
    return cache if past_key_values is None else past_key_values


def _answer(logits: Tensor, cache: PrunedCache) -> CausalLMOutputWithPast:
    return CausalLMOutputWithPast(logits=_owned(logits), **{CACHE_NAME: cache})  # type: ignore[arg-type]


def _owned(output: Tensor) -> Tensor:
    """An output that the caller may keep: on CUDA, the next replay of a graph writes over its own."""
    return output.clone() if output.is_cuda else output


def _raster(selection: Selection, stages: list[Tensor]) -> Selection:
    """Stage indices count within the stage before; patches count in the image."""
    if selection.kept is None:
        return selection
    found, current = [], selection.kept
    for index in stages:
        current = current.gather(1, index)
        found.append(current)
    return Selection(selection.kept, selection.labels, tuple(found))


def bucket(count: int, buckets: Sequence[int], what: str) -> int:
    """The least of `buckets` that holds `count`. Raises InputError beyond the largest."""
    for size in buckets:
        if count <= size:
            return size
    raise InputError(f"{count} {what} exceed the largest bucket, {buckets[-1]}: ask for fewer, or build with larger buckets")
