"""A model lies on one device; several take a process each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DeviceMesh, Replicate, distribute_tensor

import vitcop_compile
from vitcop_compile import UnsupportedError

EXAMPLE = Path(__file__).parents[1] / "examples" / "data_parallel.py"


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_that_a_plan_has_sharded_is_refused(group: None) -> None:
    model = models.llava(3)
    head = model.lm_head
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), DeviceMesh("cpu", [0]), [Replicate()]))
    with pytest.raises(
        UnsupportedError, match=r"sharded over several devices by a tensor-parallel plan \(tp_plan\).*a process"
    ):
        vitcop_compile.optimize(model)


def test_a_model_on_several_devices_is_refused() -> None:
    model = models.llava(3)
    model.lm_head.to("meta")
    with pytest.raises(UnsupportedError, match=r"weights are on cpu, meta: .*without device_map.*a process for each"):
        vitcop_compile.optimize(model)


@pytest.mark.slow
def test_processes_answer_what_one_answers() -> None:
    said = []
    for processes in (1, 2):
        command = [sys.executable, str(EXAMPLE), "--processes", str(processes), "--requests", "4", "--backend", "eager"]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        answers = [line.split() for line in done.stdout.splitlines()]
        assert len(answers) == 4 and len({process for process, *_ in answers}) <= processes
        said.append([tokens for _, *tokens in answers])
    assert said[0] == said[1] and len({tuple(tokens) for tokens in said[0]}) > 1
