"""Requests answered by several processes, each with a model of its own: `python examples/data_parallel.py --processes 2`.

A model is compiled for one device. To use several, load it once in a process for each; on GPUs, let every process see its own
(`CUDA_VISIBLE_DEVICES`) before it imports torch. Requests go to whoever is free.
"""

from __future__ import annotations

import multiprocessing
import os
from typing import Annotated, Any

import torch
import typer

import vitcop_compile
from vitcop_compile.toy import IMAGE_TOKEN, small_llava

_SERVED: list[Any] = []


def start(backend: str, threads: int) -> None:
    """Runs once in every process: loads the model, and makes its programs before the first request."""
    torch.set_num_threads(threads)
    model = small_llava(hidden=128, layers=4, heads=2, intermediate=256, vision_hidden=64, vision_layers=3, image_size=112)
    fast = vitcop_compile.optimize(model, backend=backend)
    fast.warmup(text_tokens=8, max_new_tokens=8)
    _SERVED.append(fast)


def answer(request: int) -> tuple[int, list[int]]:
    """(process, tokens) of the request of that number: a random image and a question of its own."""
    generator = torch.Generator().manual_seed(request)
    words = torch.randint(3, 200, (1, 8), generator=generator)
    ids = torch.cat((words[:, :1], torch.full((1, 64), IMAGE_TOKEN), words[:, 1:]), 1)
    pixels = torch.randn(1, 3, 112, 112, generator=generator)
    said = _SERVED[0].generate(ids, pixel_values=pixels, max_new_tokens=8, do_sample=False)
    return os.getpid(), said[0, ids.shape[1] :].tolist()


def main(
    processes: Annotated[int, typer.Option(help="Processes, a model each.")] = 2,
    requests: Annotated[int, typer.Option(help="Requests to answer.")] = 6,
    backend: Annotated[str, typer.Option(help="Backend of the programs.")] = "inductor",
) -> None:
    """Answer random requests and print what was said, in their order."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    # A fork would share the locks and threads of a torch that has already run.
    with multiprocessing.get_context("spawn").Pool(processes, start, (backend, threads)) as pool:
        for process, tokens in pool.imap(answer, range(requests)):
            print(process, *tokens)


if __name__ == "__main__":
    typer.run(main)
