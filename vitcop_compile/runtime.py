"""The runtime: transformers' generation loop over three compiled programs, wherever they come from."""

from __future__ import annotations

import itertools
import threading
from typing import Any, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import CACHE_NAME, BufferPool, PrunedCache
from .errors import InputError
from .explain import explain
from .host import Images
from .isolation import plain
from .layout import Layout
from .prompt import among, check_ids, check_length, check_mask, check_vocabulary, finite, read, refuse_pixels
from .provider import Ask, Provider
from .schedule import Schedule
from .turn import Turn, positions_of, run_turn

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)


class CompiledModel(GenerationMixin):
    """A pruned, compiled model with transformers' `generate()`.

    Any number of images per prompt, with text between; prompts of a batch may differ in both, padded on either side.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("text",)
    training = False
    _is_stateful = False

    def __init__(self, provider: Provider, config: Any, generation_config: GenerationConfig):
        self._provider = provider
        self.config = config
        self.generation_config = generation_config
        self._pool = BufferPool()
        self._host, self._vocab = provider.host, provider.host.shape.vocab
        # Placeholders of an image, where that is one number.
        self._fixed = sum(segment.tokens for segment in self._host.layout) if self._host.fixed else None
        # Reading values back is free on a CPU. On a GPU it would stall the device before the first token.
        self._postpone = provider.device.type != "cpu"
        self._running = threading.local()

    @property
    def provider(self) -> Provider:
        """Where the programs come from."""
        return self._provider

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
        """What the programs meet exactly, for a prompt with one image (where sizes matter, one of 2 x 2 tiles)."""
        return self.schedule_of(1)

    def schedule_of(self, images: int | Layout) -> Schedule:
        """The same for a prompt with so many images, or with those of a layout."""
        return self._provider.schedule_of(self._host.layout * images if isinstance(images, int) else images)

    def layout_of(self, height: int, width: int, images: int = 1) -> Layout:
        """How an image of so many pixels lies in a prompt of so many images. Raises InputError for sizes below 1."""
        return self._host.layout_of(height, width, images)

    def layouts_of(self, input_ids: Tensor, **given: Any) -> list[tuple[Layout, ...]]:
        """How the images of a request lie in each of its prompts, in order: what `warmup` and an export take.

        input_ids: int64 [B, T]; given: what the processor says beside them. Raises InputError as `forward` does.
        """
        ids = check_ids(input_ids, self.device)
        named = {name: given[name] for name in self._host.inputs if name in given}
        images = self._images(ids, named.pop(self._host.inputs[0], None), named)
        found = () if images is None else images.layouts
        real = check_mask(given.get("attention_mask"), ids)
        counts = read(ids, real, self._host.token_ids, self._vocab, found, self._fixed).images
        ends = itertools.accumulate(counts)
        return [found[end - count : end] for end, count in zip(ends, counts, strict=True)]

    def explain(self) -> str:
        """The schedule as a table: tokens, KV rows and FLOPs per group of layers."""
        return explain(self.schedule)

    def eval(self) -> Self:
        """The model itself: programs are made for evaluation."""
        return self

    def to(self, *place: Any, **named: Any) -> Self:
        """The model itself, for the device and type that it has. Raises InputError for others: programs are made for one."""
        wanted = [*place, *named.values()]
        device = torch.device(next((item for item in wanted if isinstance(item, str | torch.device | int)), self.device))
        dtype = next((item for item in wanted if isinstance(item, torch.dtype)), self.dtype)
        same = device.type == self.device.type and device.index in (None, self.device.index)
        if not same or dtype != self.dtype:
            raise InputError(
                f"the programs are made for {self.dtype} on {self.device}, not for {dtype} on {device}: move or convert the "
                "stock model, and optimize that"
            )
        return self

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
        pixel_values: Tensor | Images | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: PrunedCache | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | None = None,
        cache: PrunedCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """One forward pass: a whole prompt, or what follows on a filled cache: a token, or a turn of text and images.

        input_ids: int64 [B, T], image placeholders expanded by the processor, on a filled cache the new ones alone;
        pixel_values: what the processor made of the images of `input_ids` in their order, [images, channels, height, width] or
        as the family's `Host.read` says, with the others that it names beside; attention_mask: [B, T], 0 for pads, or of the
        whole conversation; past_key_values: what an earlier call returned, also by its newer name `cache`. Returns logits [B,
        1, vocab] *of each sample's last token only*, wherever its pads stand, and the cache to pass on.

        Raises InputError for inputs that the programs cannot take, before anything is exported or compiled.
        """
        about_images = {name: others.pop(name) for name in self._host.inputs[1:] if name in others}
        given = sorted(name for name, value in others.items() if value is not None and value is not False)
        if "labels" in given:
            raise InputError(
                "labels need the logits of every position, and gradients: programs compute the last token's alone; train the "
                "stock model"
            )
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
            images = self._images(ids, pixel_values, about_images)
            if held is None or not held.filled:
                # An empty Cache is falsy.
                return self._turn(ids, images, attention_mask, PrunedCache() if held is None else held)
            held.verify_prompt()
            if ids.shape[0] != held.batch:
                raise InputError(f"{ids.shape[0]} samples for a cache of {held.batch}: pass the same batch")
            if ids.shape[1] == 1 and images is None:
                return self._decode(ids, held)
            return self._turn(ids, images, attention_mask, held)

    def _images(self, ids: Tensor, pixels: Tensor | Images | None, others: dict[str, Any]) -> Images | None:
        """The images of a request, read and checked."""
        if isinstance(pixels, Images):
            return pixels
        given = {self._host.inputs[0]: pixels} | others
        if all(value is None for name, value in given.items() if name.startswith("pixel_values")):
            return None
        return self._host.read(given, ids, self.device, self.dtype)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with the prompt checked before its loop starts. Raises InputError as `forward` does."""
        check_ids(kwargs.get("input_ids") if inputs is None else inputs, self.device)
        given = [name for name in ("position_ids", "inputs_embeds") if kwargs.get(name) is not None]
        if given:
            raise InputError(f"{', '.join(given)} cannot be used with a compiled model: pass input_ids and pixel_values")
        for name in ("assistant_model", "prompt_lookup_num_tokens"):
            if kwargs.get(name) is not None:
                raise InputError(
                    f"{name} is not supported: a pruned cache cannot take back tokens that were guessed; leave it out"
                )
        if self.device.type == "meta":
            raise InputError("the weights are on the meta device, which holds no values: load the model to generate")
        if CACHE_NAME != "past_key_values" and "past_key_values" in kwargs:
            kwargs[CACHE_NAME] = _one_cache(kwargs.pop("past_key_values"), kwargs.get(CACHE_NAME))
        self._running.cache, self._running.begun, self._running.beams = None, False, 1
        try:
            result = super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
            if self._running.cache is not None:
                self._running.cache.verify()
            return result
        finally:
            self._running.cache, self._running.beams = None, 1

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: PrunedCache | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        cache: PrunedCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Part of transformers' loop: what is new of the conversation first, then one token at a time."""
        held = _one_cache(past_key_values, cache)
        if getattr(self._running, "begun", False):
            return {"input_ids": input_ids[:, -1:], CACHE_NAME: held}
        self._running.begun = True
        rest = {name: kwargs[name] for name in ("use_cache",) if name in kwargs}
        others = {name: kwargs[name] for name in self._host.inputs[1:] if name in kwargs}
        with plain():
            images = self._images(input_ids[:: self._running.beams], pixel_values, others)
        if held is not None and held.filled:
            input_ids, images = self._unseen(input_ids, images, attention_mask, held)
        return {
            "input_ids": input_ids,
            "pixel_values": images,
            "attention_mask": attention_mask,
            CACHE_NAME: held,
            **rest,
        }

    def _unseen(
        self, ids: Tensor, images: Images | None, mask: Tensor | None, cache: PrunedCache
    ) -> tuple[Tensor, Images | None]:
        """What a cache has not seen of a conversation: ids int64 [B, S] and their images.

        As in transformers, ids are those of the whole conversation, or new ones alone beside a longer mask. Processors send
        all images again: those seen are left out.
        """
        if mask is None or mask.shape[1] == ids.shape[1]:
            seen = cache.get_seq_length()
            if ids.shape[1] <= seen:
                raise InputError(
                    f"input_ids holds {ids.shape[1]} tokens and the cache has seen {seen}: pass the whole conversation with "
                    "something new at its end"
                )
            found = tuple(among(ids[:, :seen], self._host.token_ids).sum(1).tolist())
            if found != cache.placeholders:
                raise InputError(
                    f"the part of input_ids that the cache has seen holds {found} image tokens, it was told of "
                    f"{cache.placeholders}: some processors cut an image into fewer tiles once others join it; pass the new "
                    "ids alone with a mask of the whole conversation, or the conversation without a cache"
                )
            ids = ids[:, seen:]
        if images is None:
            return ids, None
        beams = self._running.beams
        counts, old = among(ids[::beams], self._host.token_ids).sum(1).tolist(), cache.images[::beams]
        number = len(images.layouts)
        if not any(counts) and number == sum(old):
            return ids, None
        new, at, short = [], 0, 0
        for count, before in zip(counts, old, strict=True):
            at += before
            while count > 0 and at < number:
                count -= images.tokens[at]
                new.append(at)
                at += 1
            short += count
        # Else they are the new ones alone, or wrong, which is found out where all are checked.
        return ids, images.take(new) if at == number and not short else images

    def _expand_inputs_for_generation(  # type: ignore[override]
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **model_kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Part of transformers' loop: beams repeat samples, whose images are seen once."""
        images = {name: model_kwargs.pop(name) for name in self._host.inputs if name in model_kwargs}
        self._running.beams = expand_size
        ids, rest = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size,
            is_encoder_decoder,
            input_ids,  # type: ignore[arg-type]
            **model_kwargs,
        )
        return ids, rest | images

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Part of transformers' loop: what a family's processor gives for images is no unknown argument."""
        super()._validate_model_kwargs(  # type: ignore[misc]
            {name: value for name, value in model_kwargs.items() if name not in self._host.inputs[1:]}
        )

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
        cache = model_kwargs.get(CACHE_NAME)
        if cache is None:
            cache = model_kwargs[CACHE_NAME] = PrunedCache()
        elif not isinstance(cache, PrunedCache):
            raise InputError(f"past_key_values is a {type(cache).__name__}: a compiled model works on the cache it returns")
        elif cache.filled and cache.batch != batch_size * (expand := _expansion(generation_config)):
            raise InputError(
                f"{batch_size * expand} sequences (prompts times beams) follow on a cache of {cache.batch}: beams need a "
                "cache of their own; pass the whole conversation without one"
            )
        cache.max_length = generation_config.max_length
        self._running.cache = cache

    def _turn(self, ids: Tensor, images: Images | None, mask: object, cache: PrunedCache) -> CausalLMOutputWithPast:
        """A prompt, or what follows on a filled cache."""
        batch, length = ids.shape
        provider, host = self._provider, self._host
        beams = getattr(self._running, "beams", 1)
        real = check_mask(_of_turn(mask, length, cache), ids)
        layouts = () if images is None else images.layouts
        reading = read(ids, real, host.token_ids, self._vocab, layouts, self._fixed, beams)
        if images is not None:
            self._check_pixels(images.pixels, cache)
        found = {layout: self.schedule_of(layout) for layout in set(reading.layouts)}
        schedules = tuple(found[layout] for layout in reading.layouts)
        visual = [schedule.group_tokens() for schedule in schedules]
        seen = cache.get_seq_length()
        new = max(1, cache.max_length - seen - length) if cache.max_length else None
        rows = [text + tokens[0] for text, tokens in zip(reading.text, visual, strict=True)]
        positions = taken = None
        if images is not None and any(schedule.placed for schedule in schedules):
            positions, taken = positions_of(host, reading, images.about, beams)
        ends = rows if taken is None else taken.tolist()
        check_length(self.schedule.shape, cache.reaches(rows, ends), new or 1)
        most = tuple(map(max, zip(*visual, strict=True)))
        ask = Ask(batch, max(reading.text), max(reading.images), new, cache.held, cache.rows, most, tuple(found))
        plan = provider.plan(ask)
        if not cache.filled or plan.rows != cache.rows:
            shapes = self.schedule.cache_shapes(batch, plan.rows)
            like = torch.empty((), dtype=self.dtype, device=self.device)
            buffers = self._pool.lend(cache, shapes, plan.rows, like, self.schedule.told)
            cache.take(buffers, clear=() in reading.layouts)
        turn = Turn(images, reading, schedules, plan.text, seen > 0, beams, positions, taken)
        with cache.unless_it_fails():
            logits = run_turn(provider, turn, cache)
        removed = [[tokens[0] - tokens[group] for tokens in visual] for group in range(len(plan.rows))]
        placeholders = tuple(sum(segment.tokens for segment in layout) for layout in reading.layouts)
        cache.account(length, rows, removed, reading.images, placeholders, ends)
        return _answer(logits, cache)

    def _check_pixels(self, images: Tensor, cache: PrunedCache) -> None:
        """Raises InputError for pixels that are not finite: at once where reading them is free, else when the host waits."""
        found = finite(images)
        if self._postpone:
            cache.expect(lambda: refuse_pixels(found))
        else:
            refuse_pixels(found)

    def _decode(self, ids: Tensor, cache: PrunedCache) -> CausalLMOutputWithPast:
        cache.check_room()
        if not self._postpone:  # a read from a GPU, each step, would cost more than the check is worth
            check_vocabulary(ids, self._vocab)
        cache.take_token(ids, self._vocab, check=self._postpone)
        held = cache.held_buffers
        step = self._provider.extend(ids.shape[0], 1, held.rows)
        logits, *_ = step(held.token, held.last, held.length, held.position, held.removed, *held.written)
        cache.advance()
        return _answer(logits, cache)


def _one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache, by whichever of its names. Raises InputError for two."""
    if past_key_values is not None and cache is not None:
        raise InputError("past_key_values and cache were given, two names of one thing: pass one")
    return cache if past_key_values is None else past_key_values


def _expansion(config: Any) -> int:
    """Sequences that `generate` makes of one prompt."""
    return max(config.num_beams or 1, config.num_return_sequences or 1)


def _of_turn(mask: Any, length: int, cache: PrunedCache) -> Any:
    """The part of an attention mask that belongs to the turn: it may be that of the whole conversation."""
    if cache.filled and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > length:
        return mask[:, mask.shape[1] - length :]
    return mask


def _answer(logits: Tensor, cache: PrunedCache) -> CausalLMOutputWithPast:
    # The caller may keep them: on CUDA, the next replay of a graph writes over its own.
    owned = logits.clone() if logits.is_cuda else logits
    return CausalLMOutputWithPast(logits=owned, **{CACHE_NAME: cache})  # type: ignore[arg-type]
