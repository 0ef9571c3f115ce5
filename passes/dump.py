"""Graphs as text that people can read, with the shapes that are true after a pass."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..attention import ANCHOR


def dump_graph(module: fx.GraphModule, folder: Path, number: int, name: str, inputs: Sequence[torch.Tensor]) -> Path:
    """Writes `module` to `folder`/NN_name.txt, a line a node: its name, the type and shape of its value, what it calls and on
    what.

    Shapes are those that `inputs` lead to, computed on fake tensors; a graph takes as many of them as it has inputs so far.
    """
    shapes = Shapes(module)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        shapes.run(*(mode.from_tensor(value) for value in inputs[: len(module.graph.find_nodes(op="placeholder"))]))
    lines = []
    for node in module.graph.nodes:
        called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        given = ", ".join([*(str(arg) for arg in node.args), *(f"{key}={value}" for key, value in node.kwargs.items())])
        lines.append(f"{node.name}{_text(shapes.found[node])} = {node.op} {called}({given})")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:02}_{name}.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


class Shapes(fx.Interpreter):
    """Runs a graph and keeps what every node makes."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ANCHOR or getattr(target, "is_mark", False):  # attention that has no kernel yet
            return torch.empty_like(args[0])
        return super().call_function(target, args, kwargs)


def _text(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f": {str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    return f": {value}" if isinstance(value, int) else ""
