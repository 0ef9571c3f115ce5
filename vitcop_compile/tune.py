"""The budget search: methods and presets on a user's own pictures, against a target, with the evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from .backends import backend_of
from .bench.timing import interleave
from .cache import PrunedCache
from .config import ViTCoPConfig
from .errors import ConfigError, InputError, UnsupportedError
from .layout import Layout
from .optimized import OptimizedModel
from .pipeline import optimize
from .progress import Steps
from .quality import Answer, answer, distance
from .schedule import Method, Schedule

# What a target bounds -> its unit. All are to be small.
TARGETS = {"ttft": "ms", "kv": "MiB", "kl": "nats"}
_DENSE = "dense"


@dataclass(frozen=True)
class Candidate:
    """One method as it did. Of a request, mean over the pictures: ttft in ms (median of interleaved rounds, on one of them),
    kv in MiB, kl in nats as `quality.distance` has it, agreed as a share of the first tokens that the dense model says; ttft,
    kl and agreed are None where that was not measured, as the candidate had failed the target by then; flops: dense over
    pruned, vision and prefill together."""

    name: str
    tokens: float
    flops: float
    kv: float
    kl: float | None = None
    agreed: float | None = None
    ttft: float | None = None


@dataclass(frozen=True)
class Found:
    """chosen: the name of the best candidate that meets the target; candidates: all, dense first; left_out: names and reasons
    of methods that cannot be had on this model, or not through `backend`; device, dtype: those of the weights."""

    chosen: str
    method: Method
    target: str
    candidates: tuple[Candidate, ...]
    left_out: Mapping[str, str]
    backend: str
    device: str
    dtype: str

    def save(self, path: str | Path) -> None:
        """Writes the method's settings, which `load_method`, `optimize` and `--config` take, with the evidence beside them;
        aside first, and moved into place. Raises InputError for a path that cannot be written."""
        target = Path(path)
        where = {"backend": self.backend, "device": self.device, "dtype": self.dtype}
        candidates = [asdict(candidate) for candidate in self.candidates]
        found = {"target": self.target, "chosen": self.chosen, "left_out": dict(self.left_out), "candidates": candidates}
        text = json.dumps(json.loads(self.method.to_json()) | {"evidence": where | found}, indent=2) + "\n"
        aside = target.with_name(target.name + ".partial")
        try:
            aside.write_text(text, "utf-8")
            aside.replace(target)
        except OSError as error:
            with suppress(OSError):
                aside.unlink()
            raise InputError(
                f"{target} cannot be written: {error.strerror or error}; name a file in an existing folder"
            ) from None


def target_of(text: str) -> tuple[str, float]:
    """("kl", 0.1) of "kl=0.1". Raises ConfigError."""
    name, equals, number = text.partition("=")
    try:
        bound = float(number)
    except ValueError:
        bound = -1.0
    if name not in TARGETS or not equals or not 0 < bound < float("inf"):
        known = ", ".join(f"{known}=NUMBER ({unit})" for known, unit in TARGETS.items())
        raise ConfigError(f"target {text!r} is none: use one of {known}")
    return name, bound


def check(target: str, backend: str, tokens: int, rounds: int) -> tuple[str, float]:
    """`target_of` a search's target, with its other arguments looked at too: before a model is loaded for nothing. Raises
    ConfigError for the target, UnsupportedError for the backend, InputError for counts below 1."""
    found = target_of(target)
    backend_of(backend)
    for name, value in (("tokens", tokens), ("rounds", rounds)):
        if value < 1:
            raise InputError(f"{name}={value} is below 1: ask for 1 or more")
    return found


def tune(
    model: PreTrainedModel,
    requests: Sequence[Mapping[str, Any]],
    methods: Mapping[str, Method],
    target: str,
    *,
    backend: str = "inductor",
    tokens: int = 8,
    rounds: int = 7,
    steps: Steps,
) -> Found:
    """The best of `methods` by name on `requests`, what a processor makes of one picture each.

    target: "kl=0.1" asks for the least time to the first token among those that stay so near to the dense model; "ttft=200"
    and "kv=8" for the nearest to it among those that are so fast, or so small. Distances are measured operator by operator,
    times through `backend`, in interleaved rounds, on the first request. A method that the model cannot have, or that
    `backend` cannot compile, which is found out where times are measured, is left out with the reason.

    Raises ConfigError for a target that none meets, saying what the best was, InputError without requests, and as `check`.
    """
    name, bound = check(target, backend, tokens, rounds)
    if not requests:
        raise InputError("there is no picture to tune on: give one or more")
    dense = optimize(model, ViTCoPConfig.dense(), backend="eager")
    layouts = [dense.layouts_of(**request)[0] for request in requests]
    whole = [tuple(segment for image in layout for segment in image) for layout in layouts]
    texts = [
        int(request["input_ids"].shape[1]) - sum(segment.candidates for segment in layout)
        for request, layout in zip(requests, whole, strict=True)
    ]
    found, left_out = {_DENSE: _planned(_DENSE, dense, whole, texts)}, dict[str, str]()
    chosen: dict[str, tuple[Method, OptimizedModel]] = {}
    for label, method in methods.items():
        try:
            pruned = optimize(model, method, backend="eager", like=dense)
            found[label] = _planned(label, pruned, whole, texts)
        except (ConfigError, UnsupportedError) as error:
            left_out[label] = str(error)
            continue
        if name != "kv" or found[label].kv <= bound:
            chosen[label] = method, pruned
    answers: list[Answer] = []
    if chosen:
        with steps.step(f"{_DENSE}: answers to {len(requests)} pictures"):
            answers = [answer(dense, request, tokens) for request in requests]
    for label, (_, pruned) in chosen.items():
        try:
            with steps.step(f"{label}: distance on {len(requests)} pictures"):
                found[label] = _compared(found[label], answers, [answer(pruned, request, tokens) for request in requests])
        except UnsupportedError as error:
            left_out[label] = str(error)
    near = [label for label in chosen if label not in left_out and (name != "kl" or (found[label].kl or 0.0) <= bound)]
    if near and name != "kv":
        timed = {label: chosen[label][0] for label in near}
        times, failed = _times(dense, timed, requests[0], backend, rounds, steps)
        found |= {label: _with(found[label], ttft=value) for label, value in times.items()}
        left_out |= failed
    found = {label: own for label, own in found.items() if label not in left_out}
    best = _best(name, bound, found, [label for label in near if label in found], left_out)
    where = backend, str(dense.device), str(dense.dtype).removeprefix("torch.")
    return Found(best, chosen[best][0], target, tuple(found.values()), left_out, *where)


def _best(name: str, bound: float, found: Mapping[str, Candidate], left: list[str], left_out: Mapping[str, str]) -> str:
    by: dict[str, Callable[[Candidate], float]] = {key: (lambda own, key=key: getattr(own, key)) for key in TARGETS}  # type: ignore[misc]
    meets = [label for label in left if getattr(found[label], name) is not None and by[name](found[label]) <= bound]
    if meets:
        return min(meets, key=lambda label: by["ttft" if name == "kl" else "kl"](found[label]))
    measured = [own for own in found.values() if getattr(own, name) is not None and own.name != _DENSE]
    if not measured:
        why = "".join(f"; {label}: {reason}" for label, reason in left_out.items())
        raise ConfigError(f"no method can be had on this model: {name}={bound} {TARGETS[name]} cannot be looked for{why}")
    near = min(measured, key=by[name])
    raise ConfigError(
        f"no method meets {name}={bound} {TARGETS[name]}: the best was {near.name} with {by[name](near):.4g}; raise the "
        "target, or try other methods and retentions"
    )


def _planned(label: str, model: OptimizedModel, layouts: Sequence[Layout], texts: Sequence[int]) -> Candidate:
    schedules: list[Schedule] = [model.schedule_of(layout) for layout in layouts]
    ratios = [
        (s.dense_vision_flops() + sum(s.dense_prefill_flops(text))) / (s.vision_flops() + sum(s.prefill_flops(text)))
        for s, text in zip(schedules, texts, strict=True)
    ]
    tokens = fmean(s.mean_visual_tokens() for s in schedules)
    kv = fmean(s.kv_bytes(text) for s, text in zip(schedules, texts, strict=True))
    return Candidate(label, tokens, fmean(ratios), kv / 2**20)


def _compared(own: Candidate, dense: Sequence[Answer], pruned: Sequence[Answer]) -> Candidate:
    apart = [distance(*pair) for pair in zip(dense, pruned, strict=True)]
    shares = [float((agreed / one.said.cpu()).mean()) for (_, agreed), one in zip(apart, dense, strict=True)]
    return _with(own, kl=fmean(float(kl.mean()) for kl, _ in apart), agreed=fmean(shares))


def _with(own: Candidate, **values: float) -> Candidate:
    return Candidate(**(asdict(own) | values))


def _times(
    dense: OptimizedModel, methods: Mapping[str, Method], request: Mapping[str, Any], backend: str, rounds: int, steps: Steps
) -> tuple[dict[str, float], dict[str, str]]:
    """(median milliseconds from ids and pixels to the first logits, dense first; why methods could not be compiled). Raises
    UnsupportedError where `backend` cannot compile the dense model itself."""
    calls, failed = dict[str, Callable[[], Any]](), dict[str, str]()
    for label, method in {_DENSE: ViTCoPConfig.dense(), **methods}.items():
        try:
            fast = optimize(dense.model, method, backend=backend, like=dense)

            def call(fast: OptimizedModel = fast) -> Any:
                return fast(**request, past_key_values=PrunedCache())

            with steps.step(f"{label}: compiling"), torch.no_grad():
                call()
        except UnsupportedError as error:
            if label == _DENSE:
                raise
            failed[label] = str(error)
            continue
        calls[label] = call
    if len(calls) == 1:  # dense alone, and nothing to choose from
        return {}, failed
    with steps.bar("time to the first token", rounds + 3) as advance, torch.no_grad():
        times = interleave(calls, rounds, 3, tick=advance)
    return {label: median(values) for label, values in times.items()}, failed
