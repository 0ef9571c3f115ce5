"""Asks a model one question about one picture: as it is, and by every method at every retention."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ..cache import CACHE_NAME
from ..config import ViTCoPConfig
from ..errors import ConfigError, InputError, UnsupportedError
from ..layout import Layout
from ..optimized import OptimizedModel
from ..picture import photograph
from ..pipeline import optimize
from ..policies import policy_of
from ..progress import Steps
from ..runtime import CompiledModel
from ..schedule import Method, Schedule, resolve
from .record import Answer, Record, Run, Step, check_steps, panels_of, steps_of
from .render import picture_uri
from .watch import watched

# ids of an answer -> its text.
Read = Callable[[list[int]], str]


class Collector:
    """Runs of one request. inputs: what a processor makes of one prompt with its picture; read: ids to text, None where that
    means nothing. Raises InputError for several prompts, without a picture, and for logits that are not finite."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], *, read: Read | None = None, new_tokens: int = 24):
        if new_tokens < 1:
            raise InputError(f"max_new_tokens={new_tokens} is below 1: ask for 1 or more")
        self.model, self.read = model, read
        self._settings = {"max_new_tokens": new_tokens, "do_sample": False, "num_beams": 1}
        self._whole: OptimizedModel = optimize(model, ViTCoPConfig.dense(), backend="eager")
        named = {"input_ids", "attention_mask", *self._whole.host.inputs}
        self.inputs = {name: value for name, value in inputs.items() if name in named}
        images = self._whole.layouts_of(**self.inputs)
        if len(images) != 1:
            raise InputError(f"{len(images)} prompts were given: one is seen at a time")
        self.layout: Layout = tuple(itertools.chain(*images[0]))
        if not self.layout:
            raise InputError("the prompt has no picture, and nothing of text is pruned: give one")
        if len(kinds := {segment.kind for segment in self.layout}) > 1:
            raise InputError(f"the prompt has {' and '.join(sorted(kinds))}: give one kind alone")
        host = self._whole.host
        about = {host.inputs[0]: None} | {name: self.inputs[name] for name in host.inputs if name in self.inputs}
        self._images = host.read(about, self.inputs["input_ids"], self._whole.device, self._whole.dtype)
        tokens, self._logits, _ = self._asked(model, "the dense answer")
        self.dense = self._answer(tokens)

    def record(
        self,
        methods: Mapping[str, Sequence[Method]],
        retentions: Sequence[str],
        pictures: Sequence[Image.Image],
        steps: Steps,
        *,
        model: str,
        prompt: str,
        normal: tuple[Sequence[float], Sequence[float]] | None = None,
        random: bool = False,
    ) -> Record:
        """Runs and pictures together.

        methods: by name, one for each of `retentions`; pictures: of every image or frame of the request; where the encoder
        merges frames, a step of the video is shown on its first, and the pictures may be one for each step; normal: the mean
        and deviation that its processor normalises by, so that the encoder's inputs can be shown as it sees them. Raises
        InputError for tokens that lie in no grid, for pictures that are missing or too many, and as `run`, and ConfigError if
        no method can be had.
        """
        drawn, places = self._pictures(pictures, normal)
        panels = panels_of(self.layout, places)
        found = self.runs(methods, steps)
        return Record(model, prompt, tuple(map(picture_uri, drawn)), panels, tuple(retentions), self.dense, found, random)

    def _pictures(
        self, given: Sequence[Image.Image], normal: tuple[Sequence[float], Sequence[float]] | None
    ) -> tuple[list[Image.Image], list[int]]:
        """(pictures, which of them each panel lies on): an input of the encoder where a segment is all of one, which may be a
        part of a picture, else one of those given."""
        images = self._images
        count, merged = self._steps()
        if len(given) > count and len(given) != count * merged:
            raise self._miscounted(len(given))
        apart = max(1, len(given) // count)  # a step's first frame from that of the next
        packs = list(itertools.chain(*images.packs))
        found: list[Image.Image] = []
        places: list[int] = []
        owners: dict[int, int] = {}
        numbers = [number for number, layout in enumerate(images.layouts) for _ in layout]
        tile = frame = 0
        for place, (number, segment) in enumerate(zip(numbers, self.layout, strict=True)):
            whole = not packs or packs[place].index.numel() == self._whole.host.shape.patches
            inside = normal is not None and not images.cut and segment.tiles == 1 and whole
            for _ in range(segment.grid[0]):
                owner = frame if segment.kind == "video" else number
                frame += 1
                if inside:
                    assert normal is not None
                    pixels = photograph(images.pixels[tile], *normal)
                    found.append(Image.fromarray((pixels * 255).round().astype("uint8")))
                elif owner not in owners:
                    if len(given) < count:
                        raise self._miscounted(len(given))
                    owners[owner] = len(found)
                    found.append(given[owner * apart])
                places.append(len(found) - 1 if inside else owners[owner])
            tile += segment.tiles
        return found, places

    def _steps(self) -> tuple[int, int]:
        """(images, or steps of videos, of the request; frames that the encoder merges into each)."""
        if self.layout[0].kind != "video":
            return len(self._images.layouts), 1
        vision = getattr(self.model.config, "vision_config", None)
        return sum(segment.grid[0] for segment in self.layout), getattr(vision, "temporal_patch_size", 1)

    def _miscounted(self, given: int) -> InputError:
        (count, merged), start = self._steps(), f"{given} pictures were given for a prompt of"
        if merged == 1:
            return InputError(f"{start} {count} images or frames: give one each")
        return InputError(
            f"{start} {count} steps of video, each of {merged} frames: give one for each of the {count * merged} frames, the "
            "last one twice where the processor repeats it, or one for each step"
        )

    def run(self, method: Method, name: str | None = None) -> Run:
        """What the method keeps, and what is answered. One that cannot be had on this model, or at its target, is left out
        with the reason. name: what errors call it. Raises InputError for scores or logits that are not finite: nothing that
        is chosen or compared by them would mean anything."""
        name = type(method).__name__ if name is None else name
        try:
            schedule = self._planned(method)
        except (ConfigError, UnsupportedError) as error:
            return Run(left_out=str(error))
        programs = dataclasses.replace(self._whole.programs, method=method)
        with watched(programs, self._images) as provider:
            pruned = CompiledModel(provider, self.model.config, self._generation())
            tokens, logits, cache = self._asked(pruned, f"the answer pruned by {name}")
        steps = steps_of(provider.looks, schedule)
        check_steps(steps, cache.selection)
        for step in steps:
            for what, scores in step.scores.items():
                self._require_finite(f"{what} {step.where}, read by {name}", torch.tensor(scores))
        first, other = (values.float().log_softmax(-1) for values in (self._logits, logits))
        distance = (first.exp() * (first - other)).sum()
        self._require_finite(f"the distance of the answer pruned by {name} to the dense one", distance)
        return Run(
            None,
            schedule.mean_visual_tokens(),
            steps,
            _clusters(schedule, cache.selection.labels),
            _saliency(steps),
            self._answer(tokens),
            first_difference(self.dense.tokens, tokens),
            max(0.0, float(distance)),  # below 0 by rounding alone
        )

    def runs(self, methods: Mapping[str, Sequence[Method]], steps: Steps) -> dict[str, tuple[Run, ...]]:
        """By name, one for each of `methods`. Raises ConfigError if none can be had, and InputError as `run`."""
        known: dict[Method, Run] = {}
        total = len({method for own in methods.values() for method in own})
        with steps.bar(f"{len(methods)} methods, {total} settings", total) as advance:
            for name, method in ((name, method) for name, own in methods.items() for method in own):
                if method not in known:
                    known[method] = self.run(method, name)
                    advance()
        found = {name: tuple(known[method] for method in own) for name, own in methods.items()}
        if all(run.left_out for run in known.values()):
            raise ConfigError(f"no method can be had: {next(iter(known.values())).left_out}")
        return found

    def _planned(self, method: Method) -> Schedule:
        if getattr(method, "clips", None) == "pooled":
            raise ConfigError("clips='pooled' is for the frames of videos, and this is a picture: leave it out")
        host = self._whole.host
        resolve(method, host.shape, host.layout)
        return resolve(method, host.shape, self.layout)

    def _generation(self) -> Any:
        assert self.model.generation_config is not None
        return self.model.generation_config

    @torch.no_grad()
    def _asked(self, model: Any, what: str) -> tuple[tuple[int, ...], Tensor, Any]:
        """(tokens, the first one's logits [vocab], the cache). what: what errors call the answer."""
        out = model.generate(**self.inputs, **self._settings, return_dict_in_generate=True, output_logits=True)
        self._require_finite(f"logits of {what}", torch.stack(out.logits))
        new = out.sequences[0, self.inputs["input_ids"].shape[1] :].tolist()
        return tuple(new), out.logits[0][0], out.get(CACHE_NAME)

    def _require_finite(self, what: str, values: Tensor) -> None:
        if wrong := int((~values.isfinite()).sum()):
            dtype = str(self._whole.dtype).removeprefix("torch.")
            raise InputError(
                f"{what}: {wrong} of {values.numel()} numbers are not finite, in {dtype}: use float32 (--dtype float32), "
                "which does not overflow so soon; if this is float32, look for NaN in the weights and the picture"
            )

    def _answer(self, tokens: tuple[int, ...]) -> Answer:
        if self.read is None:
            return Answer(tokens, tuple(map(str, tokens)), "")
        ends = self._generation().eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return Answer(tokens, pieces_of(self.read, tokens), self.read([t for t in tokens if t not in ends]).strip())


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """The place of the first token that differs, or that only one of both has; None where they are equal."""
    for place, pair in enumerate(itertools.zip_longest(one, other)):
        if pair[0] != pair[1]:
            return place
    return None


def pieces_of(read: Read, tokens: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text. A letter of several tokens comes with its last."""
    found, before = [], ""
    for count in range(1, len(tokens) + 1):
        text = read(list(tokens[:count]))
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        found.append(whole[len(before) :] if whole.startswith(before) else read([tokens[count - 1]]))
        before = whole
    return tuple(found)


def _clusters(schedule: Schedule, labels: Tensor | None) -> tuple[int, ...] | None:
    """The first state of the encoder's stages, where that is clusters: a policy that merges says sizes."""
    adding = [stage for stage in schedule.vision_stages if policy_of(stage.policy).adds]
    if labels is None or not adding or policy_of(adding[0].policy).merges:
        return None
    return tuple(labels[0].tolist())


def _saliency(steps: Sequence[Step]) -> float | None:
    """The share of the attention, as the last stage before the decoder read it, of what it kept."""
    before = [step for step in steps if step.side != "decoder"]
    if len(before) != 1 or "attention" not in before[0].scores:
        return None
    scores = before[0].scores["attention"]
    return sum(scores[token] for token in before[0].kept) / sum(scores)
