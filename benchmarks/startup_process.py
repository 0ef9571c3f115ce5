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
    from torch._dynamo.utils import counters

    from vitcop_compile import ViTCoPConfig, optimize
    from vitcop_compile.backends import backend_of
    from vitcop_compile.bench import Request, bind
    from vitcop_compile.toy import small_llava

    with torch.device("meta" if asked["meta"] else "cpu"):
        model = small_llava(**asked["model"], dtype=getattr(torch, asked["dtype"]))
    processor = time.process_time()
    captured, fast = timed(lambda: optimize(model, ViTCoPConfig.preset(asked["preset"]), backend=asked["backend"]))
    result = {"import_s": imported, "optimize_s": captured, "optimize_cpu_s": time.process_time() - processor, "programs": []}

    def compiled(program: Any) -> Callable[..., Any]:
        row["nodes"] = len(program.graph.nodes)
        if asked["meta"]:
            return program.module(check_guards=False)
        counters.clear()
        row["compile_s"], call = timed(lambda: backend_of(asked["backend"])(program))
        return call

    def steps(name: str, make: Callable[[], Any]) -> Callable[..., Any]:
        row.clear()
        took, program = timed(make)
        row["export_s"] = took - row.get("compile_s", 0.0)

        def first(*given: Any) -> Any:
            seconds, found = timed(lambda: program(*given))
            made = {"program": name, **row}
            if not asked["meta"]:
                made["first_call_s"] = seconds
                for cache, (group, prefix) in CACHES.items():
                    made |= {f"{cache}_{event}": counters[group][prefix + event] for event in EVENTS}
            result["programs"].append(made)
            return found

        return first

    row: dict[str, Any] = {}
    served = bind.Served(fast, Request(1, asked["text_tokens"], asked["new_tokens"]))
    served.decode(bind.with_programs(bind.compiled_by(fast, compiled), steps))
    return result


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
