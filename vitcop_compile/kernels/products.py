"""Which kernel multiplies: measured once a machine and type, and kept."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .build import folder, load, machine, text

# Rows that `linear_few` takes.
MOST_ROWS = 64
# How much faster than torch's own another kernel must be: timings vary, and a choice should not.
_GAIN = 0.9
_WIDTH = 1024
_ROUNDS = 7


class Rule(NamedTuple):
    """few: rows up to which `linear_few` multiplies; many: what multiplies more: "aten", torch's own; "onednn", oneDNN's
    where torch would take another library; "wide", fp32's rule, of weights that are widened in every call; one: what
    multiplies one row in fp32, where torch's own is often at the rate of memory, too: "aten", "few" or "onednn"."""

    few: int
    many: str
    one: str = "aten"

    def kernel(self, dtype: torch.dtype, rows: int) -> str:
        """Which of them multiplies so many rows of `dtype`."""
        if rows == 1 and dtype == torch.float32:
            return self.one
        return "few" if rows <= self.few else self.many


def rule(dtype: torch.dtype) -> Rule:
    """The rule for products of float32, bfloat16, float16 or int8 on this CPU; of int8, `few` alone says something: up to so
    many rows `linear_int8` multiplies.

    Of 16, 32 and 64 rows of weights [1024, 1024] the kernel that is faster by a tenth is taken, and up to 8 rows `linear_few`,
    which reads the weights at the rate of memory. CPUs without instructions for half precision that are worth their while
    multiply many rows faster in fp32, weights widened in every call included. Kept beside the library, so that one machine has
    one rule for a number of threads. Random numbers and the default device of the caller are left alone.
    """
    return _rule(dtype, torch.get_num_threads())


@functools.cache
def _rule(dtype: torch.dtype, threads: int) -> Rule:
    load()
    key = sha256(repr((machine(), torch.__version__, text(), str(dtype), threads, _WIDTH)).encode()).hexdigest()[:32]
    path = folder() / f"rule-{key}.json"
    try:
        kept = json.loads(path.read_text())
        return Rule(int(kept["few"]), str(kept["many"]), str(kept["one"]))
    except (OSError, ValueError, KeyError, TypeError):
        found = _measured(dtype)
        # A machine that is busy just now may mislead one measurement: what a second one does not confirm is not kept.
        if _measured(dtype) == found:
            _keep(path, found)
        return found


def _measured(dtype: torch.dtype) -> Rule:
    with torch.inference_mode(False), torch.no_grad():
        weights = [_drawn(_WIDTH, dtype) for _ in range(2)]
        few = 8
        for rows in (16, 32, MOST_ROWS):
            times = _times({"few": _few, "aten": _aten}, rows, weights)
            if times["few"] > _GAIN * times["aten"]:
                break
            few = rows
        if dtype == torch.int8:
            return Rule(few, "aten")
        arms: dict[str, Callable[..., Tensor]] = {"aten": F.linear}
        if dtype != torch.float32:
            arms["wide"] = _wide
        elif torch.backends.mkldnn.is_available():
            arms["onednn"] = onednn
        many = _best(_times(arms, 256, weights))
        one = _best(_times({**arms, "few": _few}, 1, weights)) if dtype == torch.float32 else "aten"
    return Rule(few, many, one)


def _best(times: dict[str, float]) -> str:
    best = min(times, key=times.__getitem__)
    return best if times[best] < _GAIN * times["aten"] else "aten"


def _times(arms: dict[str, Callable[..., Tensor]], rows: int, weights: list[Tensor]) -> dict[str, float]:
    """Seconds of the fastest of several calls, in turns."""
    rows_of = _drawn(rows, weights[0].dtype)
    found = dict.fromkeys(arms, float("inf"))
    for _ in range(_ROUNDS):
        for name, arm in arms.items():
            start = time.perf_counter()
            for weight in weights:
                arm(rows_of, weight)
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def _drawn(rows: int, dtype: torch.dtype) -> Tensor:
    given = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    drawn = torch.randn(rows, _WIDTH, **given)  # type: ignore[call-overload]
    return (32 * drawn).clamp(-128, 127).to(dtype) if dtype == torch.int8 else drawn.to(dtype)


def _few(input: Tensor, weight: Tensor) -> Tensor:
    if input.dtype == torch.int8:
        return torch.ops.vitcop_cpu.linear_int8.default(input, weight)
    return torch.ops.vitcop_cpu.linear_few.default(input, weight, None)


def _aten(input: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(input, weight.t()) if input.dtype == torch.int8 else F.linear(input, weight)


def onednn(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """oneDNN's product on weights as they are."""
    return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")


def _wide(input: Tensor, weight: Tensor) -> Tensor:
    return F.linear(input.float(), weight.float()).to(input.dtype)


def _keep(path: Path, found: Rule) -> None:
    """Aside and moved; where another process was first, its rule stays for all that come later."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(found._asdict()))
        os.replace(aside, path)
    except OSError:
        pass  # a folder that cannot be written costs every process the measuring
