"""What both parts of the training share: optimizers, a rate that rises and falls, a state that goes on where it stopped."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn


def digest(module: nn.Module) -> str:
    """Of all weights, eight letters."""
    found = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        found.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:8]


class Learner:
    """Steps of one part. Matrices inside layers learn by Muon (Jordan et al., 2024), everything else by AdamW, both at the
    same rate: a rise over a twentieth of the steps, then half a cosine to a hundredth.

    Every step draws from a generator seeded by (seed, step), so that a training that was stopped and goes on from its file
    gives the weights of one that was not. of: what else these depend on, in words: a state of something else is refused.
    keep: steps after which the state is written."""

    def __init__(self, name: str, parts: nn.ModuleDict, steps: int, rate: float, seed: int, of: str = "", keep: int = 200):
        self.name, self.parts, self.steps, self.rate, self.seed, self.keep = name, parts, steps, rate, seed, keep
        self.of = f"{steps} steps at {rate:g}, seed {seed}{', ' if of else ''}{of}"
        matrices, others = [], []
        for key, weight in parts.named_parameters():
            if weight.requires_grad:
                inner = weight.dim() == 2 and not any(part in key for part in ("embed", "head"))
                (matrices if inner else others).append(weight)
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def run(self, loss_of: Callable[[random.Random], tuple[Tensor, dict[str, float]]], file: Path, console: Console) -> None:
        """All steps that `file` does not have yet; what is measured is printed every hundred steps."""
        start = self._load(file)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        means: dict[str, float] = {}
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(self.name, total=self.steps, completed=start)
            for step in range(start, self.steps):
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = self.rate * self._share(step)
                loss, seen = loss_of(random.Random(f"{self.seed} {self.name} {step}"))
                loss.backward()
                nn.utils.clip_grad_norm_(self._weights(), 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                for key, value in seen.items():
                    means[key] = 0.95 * means.get(key, value) + 0.05 * value
                progress.advance(task)
                if (step + 1) % 100 == 0 or step + 1 == self.steps:
                    told = " ".join(f"{key} {value:.3f}" for key, value in means.items())
                    console.print(f"{self.name} {step + 1}/{self.steps} {told}", soft_wrap=True)
                if (step + 1) % self.keep == 0 or step + 1 == self.steps:
                    self._save(file, step + 1)

    def _share(self, step: int) -> float:
        warm = max(1, self.steps // 20)
        if step < warm:
            return (step + 1) / warm
        return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2

    def _weights(self) -> Iterable[Tensor]:
        return (weight for optimizer in self.optimizers for group in optimizer.param_groups for weight in group["params"])

    def _save(self, file: Path, step: int) -> None:
        aside = file.with_suffix(".partial")
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        torch.save({"step": step, "of": self.of, "parts": self.parts.state_dict(), "optimizers": states}, aside)
        aside.replace(file)

    def _load(self, file: Path) -> int:
        if not file.exists():
            return 0
        known: dict[str, Any] = torch.load(file)
        if known["of"] != self.of:
            raise SystemExit(f"{file} is of a training of {known['of']}, not of {self.of}: name another folder, or remove it")
        self.parts.load_state_dict(known["parts"])
        for optimizer, state in zip(self.optimizers, known["optimizers"]):
            optimizer.load_state_dict(state)
        return known["step"]
