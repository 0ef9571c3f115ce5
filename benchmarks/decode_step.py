"""The decode step alone, dense against pruned, at any batch: `python benchmarks/decode_step.py onnxruntime 16`."""

import statistics
import sys

import torch

from vitcop_compile import ViTCoPConfig, optimize
from vitcop_compile.bench import interleave
from vitcop_compile.bench.timing import Call as Arm
from vitcop_compile.toy import small_llava

TEXT, NEW, ROUNDS = 64, 64, 21


def arm(model: torch.nn.Module, config: ViTCoPConfig, backend: str, batch: int) -> Arm:
    """One step of `batch` sequences at the end of their prompts."""
    made = optimize(model, config, backend=backend)
    schedule = made.schedule
    rows = schedule.image_tokens + TEXT
    decode = made.on_demand.decode(batch, rows + NEW)
    caches = [torch.randn(shape) for shape in schedule.cache_shapes(batch, rows + NEW) for _ in "kv"]
    token, length, offsets = torch.zeros(batch, 1, dtype=torch.int64), torch.full((batch,), rows), made.programs.offsets()
    return lambda: decode(token, length, offsets, *caches)


def main(backend: str, batch: int) -> None:
    """Prints medians, their ratio and the ratio of bytes a step must read."""
    model = small_llava(hidden=1024, layers=12, heads=16, intermediate=2752, vision_layers=3, seed=0)
    config = ViTCoPConfig.preset("1/9")
    with torch.no_grad():
        arms = {"dense": arm(model, ViTCoPConfig.dense(), backend, batch), "pruned": arm(model, config, backend, batch)}
        times = interleave(arms, ROUNDS)
    dense, pruned = statistics.median(times["dense"]), statistics.median(times["pruned"])
    ratio = statistics.median(a / b for a, b in zip(times["dense"], times["pruned"], strict=True))
    shape = optimize(model, config, backend="eager").schedule.shape
    ideal = config.schedule(shape, text_tokens=TEXT).decode_ratio(NEW, batch)
    print(f"{backend} batch {batch}: {dense:.1f} / {pruned:.1f} ms, ratio {ratio:.2f}, bytes {ideal:.2f}, {ratio / ideal:.2f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
