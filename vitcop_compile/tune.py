"""The budget search: methods and presets on a user's own pictures, against a target, with the evidence."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from transformers import PreTrainedModel

from .bench.timing import interleave
from .cache import PrunedCache
from .config import ViTCoPConfig
from .errors import ConfigError, InputError
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
    of methods that cannot be had on this model."""

    chosen: str
    method: Method
    target: str
    candidates: tuple[Candidate, ...]
    left_out: Mapping[str, str]

    def save(self, path: str | Path) -> None:
        """Writes the method's settings, which `load_method`, `optimize` and `--config` take, with the evidence beside them;
        aside first, and moved into place."""
        target = Path(path)
        candidates = [asdict(candidate) for candidate in self.candidates]
        evidence = {"target": self.target, "chosen": self.chosen, "left_out": dict(self.left_out), "candidates": candidates}
        aside = target.with_name(target.name + ".partial")
        aside.write_text(json.dumps(json.loads(self.method.to_json()) | {"evidence": evidence}, indent=2) + "\n")
        aside.replace(target)


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
    times through `backend`, in interleaved rounds, on the first request.

    Raises ConfigError for a target that none meets, saying what the best was, and InputError without requests.
    """
    name, bound = target_of(target)
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
        except ConfigError as error:
            left_out[label] = str(error)
            continue
        if name != "kv" or found[label].kv <= bound:
            chosen[label] = method, pruned
    answers: list[Answer] = []
    if chosen:
        with steps.step(f"{_DENSE}: answers to {len(requests)} pictures"):
            answers = [answer(dense, request, tokens) for request in requests]
    for label, (_, pruned) in chosen.items():
        with steps.step(f"{label}: distance on {len(requests)} pictures"):
            found[label] = _compared(found[label], answers, [answer(pruned, request, tokens) for request in requests])
    if name == "kl":
        chosen = {label: own for label, own in chosen.items() if (found[label].kl or 0.0) <= bound}
    timed = {_DENSE: ViTCoPConfig.dense()} | {label: method for label, (method, _) in chosen.items()}
    if chosen and name != "kv":
        times = _times(dense, timed, requests[0], backend, rounds, steps)
        found |= {label: _with(found[label], ttft=times[label]) for label in times}
    best = _best(name, bound, found, list(chosen))
    return Found(best, chosen[best][0], target, tuple(found.values()), left_out)


def _best(name: str, bound: float, found: Mapping[str, Candidate], left: list[str]) -> str:
    by: dict[str, Callable[[Candidate], float]] = {key: (lambda own, key=key: getattr(own, key)) for key in TARGETS}  # type: ignore[misc]
    meets = [label for label in left if getattr(found[label], name) is not None and by[name](found[label]) <= bound]
    if meets:
        return min(meets, key=lambda label: by["ttft" if name == "kl" else "kl"](found[label]))
    measured = [own for own in found.values() if getattr(own, name) is not None and own.name != _DENSE]
    if not measured:
        raise ConfigError(f"no method can be had on this model: {name}={bound} {TARGETS[name]} cannot be looked for")
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
) -> dict[str, float]:
    """Median milliseconds from ids and pixels to the first logits."""
    calls: dict[str, Callable[[], Any]] = {}
    for label, method in methods.items():
        fast = optimize(dense.model, method, backend=backend, like=dense)

        def call(fast: OptimizedModel = fast) -> Any:
            return fast(**request, past_key_values=PrunedCache())

        with steps.step(f"{label}: compiling"), torch.no_grad():
            call()
        calls[label] = call
    with steps.bar("time to the first token", rounds + 3) as advance, torch.no_grad():
        times = interleave(calls, rounds, 3, tick=advance)
    return {label: median(values) for label, values in times.items()}
