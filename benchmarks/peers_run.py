"""The run of benchmarks/peers.py: workers started, answers interleaved, and rows made of them."""

from __future__ import annotations

import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers_protocol import Worker, WorkerError

from vitcop_compile.bench.timing import ratios, summary
from vitcop_compile.errors import UnsupportedError

QUANTITIES = ("ttft", "tpot")
# Seconds. Building loads; the first answer compiles, up to some ten programs.
_BUILD, _FIRST, _ANSWER = 300.0, 900.0, 120.0
# Idle threads of OpenMP spin for milliseconds before they sleep.
_SETTLE = 0.2
_WARMUP = 2


@dataclass(frozen=True)
class Group:
    """Arms in one process, which share a model. command: of its process; build: fields of its first command; arms: rows of the
    table by name, with what the worker makes of each under "make"; reads: which of the folders; available: raises
    UnsupportedError where it cannot run."""

    name: str
    command: tuple[str, ...]
    build: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    reads: str = "model"
    available: Callable[[], Any] = lambda: None


@dataclass
class Arm:
    """An arm that runs: its worker, its row, and what it answered, a dictionary per measured round."""

    worker: Worker
    row: dict[str, Any]
    answers: list[dict[str, Any]] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)


@contextlib.contextmanager
def started(
    found: list[Group], given: Mapping[str, Any], folders: Mapping[str, Path], failed: dict[str, str], facts: dict[str, Any]
) -> Iterator[dict[str, Arm]]:
    """The arms of all groups, built; `failed` gets those that cannot be, with the reason, `facts` what workers say of
    themselves."""
    arms: dict[str, Arm] = {}
    workers: list[Worker] = []
    try:
        for group in found:
            try:
                group.available()
                workers.append(worker := Worker(group.name, group.command, given["threads"]))
                folder, make = str(folders[group.reads]), {name: row["make"] for name, row in group.arms.items()}
                facts[group.name] = worker.ask("build", _BUILD, folder=folder, arms=make, **given, **group.build)
            except (UnsupportedError, WorkerError) as reason:
                failed.update(dict.fromkeys(group.arms, str(reason)))
                continue
            for name, row in group.arms.items():
                known = {key: facts[group.name].get(key, value) for key, value in row.items() if key != "make"}
                arms[name] = Arm(worker, known)
        yield arms
    finally:
        for worker in workers:
            worker.stop()


def asked(arms: dict[str, Arm], name: str, failed: dict[str, str], seconds: float, seed: int, **more: Any) -> Any:
    """One answer of the arm `name`; None if it fails, for which it, and all whose worker is gone, move to `failed`."""
    arm = arms[name]
    try:
        return arm.worker.ask("answer", seconds, arm=name, seed=seed, **more)
    except WorkerError as reason:
        gone = [name] if reason.alive else [other for other, held in arms.items() if held.worker is arm.worker]
        for other in gone:
            failed[other] = str(reason)
            del arms[other]
        return None


def measure(
    arms: dict[str, Arm],
    rounds: int,
    seconds: float,
    failed: dict[str, str],
    note: Callable[[str], Any],
    save: Callable[[], Any],
) -> None:
    """Fills `answers` of every arm, round by round, in an order drawn anew and turned around in the next round. Every answer
    of an arm is about another picture and prompt, which are the same for all arms: a cache of prefixes would serve a repeated
    one. After `seconds` of measuring no further round is begun.

    Raises UnsupportedError if no arm is left.
    """
    draw, order, begun = random.Random(0), list(arms), 0.0
    for turn in range(-_WARMUP, rounds):
        if turn == 0:
            begun = time.monotonic()
        elif turn > 0 and time.monotonic() - begun > seconds:
            break
        if turn % 2:
            order.reverse()
        else:
            draw.shuffle(order)
        for name in order:
            if name not in arms:
                continue
            note(f"{'warming up' if turn < 0 else f'round {turn + 1} of {rounds}'}: {name}")
            arm, others = arms[name], {id(other.worker): other.worker for other in arms.values()}
            time.sleep(_SETTLE)
            before = {key: worker.cpu_seconds() for key, worker in others.items() if worker is not arm.worker}
            first = turn == -_WARMUP
            answer = asked(arms, name, failed, _FIRST if first else _ANSWER, turn + _WARMUP, ids=first)
            if answer is None:
                continue
            if first:
                arm.row["first_tokens"] = answer["ids"]
            if turn >= 0:
                arm.answers.append({key: value for key, value in answer.items() if key != "ids"})
                used = sum(others[key].cpu_seconds() - spent for key, spent in before.items())
                arm.disturbed.append(1e3 * used / answer["answer_ms"])
        if not arms:
            raise UnsupportedError("no arm is left: " + "; ".join(failed.values()))
        if turn >= 0:
            save()


def held(row: Mapping[str, Any]) -> str:
    """How an arm's weights are held, whatever they multiply: "float" or "int8"."""
    return row["weights"].split()[0]


def rows(arms: Mapping[str, Arm]) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """A row per arm, medians over the rounds, and the name of the fastest peer by how weights are held and quantity. A ratio
    is the median of the ratios of the rounds: how many times as long the fastest peer with such weights takes."""
    count = min((len(arm.answers) for arm in arms.values()), default=0)
    times = {
        what: {name: [answer[f"{what}_ms"] for answer in arm.answers[:count]] for name, arm in arms.items()}
        for what in (*QUANTITIES, "answer")
    }
    peers: dict[str, list[str]] = {}
    for name, arm in arms.items() if count else ():
        if arm.row["peer"]:
            peers.setdefault(held(arm.row), []).append(name)
    best = {
        weights: {what: min(names, key=lambda name: statistics.median(times[what][name])) for what in QUANTITIES}
        for weights, names in peers.items()
    }
    found = []
    for name, arm in arms.items() if count else ():
        row = arm.row | {"name": name, "tokens": arm.answers[0]["tokens"], "ratio_to": {}}
        row["visual_tokens"] = arm.answers[0].get("visual_tokens", row["visual_tokens"])
        for what, values in times.items():
            row[f"{what}_ms"], row[f"{what}_quartiles_ms"] = summary(values[name]).values()
        for what in QUANTITIES:
            fastest = best.get(held(arm.row))
            row[f"{what}_to_best_peer"] = fastest and summary(ratios(times[what][fastest[what]], times[what][name]))
        for part in ("preprocessing_ms", "before_language_model_ms"):
            values = [answer[part] for answer in arm.answers[:count] if part in answer]
            row[part] = statistics.median(values) if values else None
        peaks = [answer["peak_bytes"] for answer in arm.answers if answer["peak_bytes"] is not None]
        row["peak_memory_bytes"] = max(peaks, default=None)
        # Of one core: above a few percent another arm did not sleep.
        row["others_busy"] = max(arm.disturbed[:count])
        found.append(row)
    return found, best


def agree(found: list[dict[str, Any]], reference: str = "inductor float32 dense") -> None:
    """Adds to every row how many of the tokens of its first answer, from the first on, are those of the reference, None if
    that was not measured: dense arms run one model. Random weights part soon once rounding differs."""
    (tokens,) = [row["first_tokens"] for row in found if row["name"] == reference] or [None]
    for row in found:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(row["first_tokens"], tokens or ()))
        row["tokens_as_float32"] = None if tokens is None else len(list(same))
