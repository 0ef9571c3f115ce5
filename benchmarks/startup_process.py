"""One fresh process of `startup.py`: what a first request waits for, step by step. Takes a JSON text, prints one."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

# Counters of torch.compile's two caches, and what of them is reported.
CACHES = {
    "fxgraph": ("inductor", "fxgraph_cache_"),
    "autograd": ("aot_autograd", "autograd_cache_"),
}
EVENTS = ("hit", "miss", "bypass")


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every step. asked: `model`, arguments of `toy.small_llava`, and its `dtype` by name; `meta`, whether to
    build it there and only export; `backend`, `preset`, `text_tokens`, `new_tokens`.
    """
    imported, _ = timed(load)
    import torch

    from vitcop_compile import ViTCoPConfig, optimize
    from vitcop_compile.backends import backend_of
    from vitcop_compile.toy import small_llava

    with torch.device("meta" if asked["meta"] else "cpu"):
        model = small_llava(**asked["model"], dtype=getattr(torch, asked["dtype"]))
    processor = time.process_time()
    captured, fast = timed(lambda: optimize(model, ViTCoPConfig.preset(asked["preset"]), backend=asked["backend"]))
    result = {"import_s": imported, "optimize_s": captured, "optimize_cpu_s": time.process_time() - processor, "programs": []}

    programs, rows = fast.programs, fast.schedule.image_tokens + asked["text_tokens"]
    exports = {
        "vision": lambda: programs.export_vision(1),
        "prefill": lambda: programs.export_prefill(1, rows),
        "decode": lambda: programs.export_decode(1, rows + asked["new_tokens"], backend_of(asked["backend"]).in_place),
    }
    for name, export in exports.items():
        exported, program = timed(export)
        row = {"program": name, "nodes": len(program.graph.nodes), "export_s": exported}
        result["programs"].append(row if asked["meta"] else row | compiled(program, asked["backend"]))
    return result


def compiled(program: Any, backend: str) -> dict[str, Any]:
    """Seconds of compiling `program` and of its first call, and what the caches did meanwhile."""
    import torch
    from torch._dynamo.utils import counters

    from vitcop_compile.backends import backend_of

    counters.clear()
    inputs, _ = program.example_inputs
    with torch.no_grad():
        made, call = timed(lambda: backend_of(backend)(program))
        called, _ = timed(lambda: call(*inputs))
    found = {
        f"{cache}_{event}": counters[group][prefix + event] for cache, (group, prefix) in CACHES.items() for event in EVENTS
    }
    return {"compile_s": made, "first_call_s": called} | found


def load() -> None:
    """The imports that every user of the package makes."""
    import torch  # noqa: F401

    import vitcop_compile  # noqa: F401


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that `call` takes, and what it returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
