"""The README's tables as data: `python benchmarks/suite.py [NAME ...]` measures them, `--tables` prints what was measured.

Every table is written to benchmarks/results/NAME.json.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import by_the_book  # noqa: F401  registers the arm
import kernel_times
import parts
import precisions
import typer
from parts import Rows
from rich.console import Console

from vitcop_compile import ViTCoPConfig, bench
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines, without_future_warnings
from vitcop_compile.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
TINY = "tiny"
Case, Shape = bench.Case, bench.Shape
# Small, so that 128 frames of it take seconds; its frames are of 224 pixels, 64 tokens each.
VIDEO = Shape(hidden=256, layers=4, vision_hidden=256, vision_layers=4, image_size=224, family="qwen2_5_vl")
# As `bench` has it by default: of all types, backends and budgets there are dozens of arms to compile.
QUICK = Shape(layers=4, vision_layers=3)
NARROW = Shape(hidden=512, layers=4, vision_hidden=512, vision_layers=3)


class Table(NamedTuple):
    """columns: what is printed, None for the usual ones; cases: what is measured, or else `measure(rounds)` -> rows without
    arms, whose fields are the columns, or ever more of them."""

    columns: tuple[str, ...] | None
    rounds: int
    cases: list[bench.Case]
    memory: bool = False
    measure: Callable[[int], Rows | Iterator[Rows]] | None = None

    def results(self, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """What is found, given to `save` as it comes."""
        if self.measure is None:
            return bench.run(self.cases, rounds=self.rounds, memory=self.memory, save=save)
        conditions = bench.environment() | {"device": "cpu", "rounds": self.rounds, "memory": False}
        measured = self.measure(self.rounds)
        results: dict[str, Any] = {}
        for rows in [measured] if isinstance(measured, list) else measured:
            types = dict.fromkeys(row.get("precision") or row.get("dtype") or "float32" for row in rows)
            results = {"environment": conditions | {"dtype": ", ".join(types)}, "rows": rows}
            save(results)
        return results

    def read(self, path: Path) -> dict[str, Any]:
        """What was measured before."""
        return bench.read(path) if self.measure is None else bench.read(path, self.columns or ())


def cpu() -> list[bench.Case]:
    """Every backend with every preset at batch 1, beside what a user could run instead."""
    against = {
        "inductor": ("stock_eager", "stock_compile"),
        "aotinductor": ("stock_compile",),
        "onnxruntime": ("stock_compile",),
        "eager": ("by_the_book",),
    }
    return [Case(Shape(), backend, against=others) for backend, others in against.items()]


def memory() -> list[bench.Case]:
    """Peak memory of a process that serves one arm."""
    against = {"inductor": ("stock_eager", "stock_compile"), "aotinductor": (), "onnxruntime": ()}
    return [Case(Shape(), backend, ("1/9",), against=others, stages=("ttft",)) for backend, others in against.items()]


def decode() -> list[bench.Case]:
    """The decode step, where the weights bound it (batch 1) and where the cache does (batch 16)."""
    shape = Shape(vision_hidden=256, vision_layers=3, name="1024x12, encoder 256x3")
    backends = ("inductor", "aotinductor", "onnxruntime")
    alone = [Case(shape, backend, against=("stock_compile",), stages=("decode",)) for backend in backends]
    return alone + [Case(shape, backend, ("1/9",), batch=16, against=(), stages=("decode",)) for backend in backends]


def vision_layer() -> list[bench.Case]:
    """The vision program alone as pruning moves into an encoder of CLIP-L's shape; the decoder beside it is small."""
    shape = Shape(hidden=256, layers=4, vision_hidden=1024, vision_layers=24, name="CLIP-L")
    configs = {f"vision_layer={layer}": ViTCoPConfig.preset("1/9", vision_layer=layer) for layer in (-2, 18, 14, 10, 6, 2)}
    return [Case(shape, "inductor", (), configs=configs, against=(), stages=("vision",))]


def families() -> list[bench.Case]:
    """Families whose tokens are put together behind the encoder: two images, or tiles, of 256 tokens each."""
    named = ("qwen2_5_vl", "qwen2_vl", "internvl")
    shapes = [Shape(vision_layers=4, image_size=bench.IMAGE_SIZES[name], family=name, name=name) for name in named]
    stages = ("vision", "tower", "select", "prefill", "ttft")
    return [Case(shape, "inductor", ("1/3", "1/9"), stages=stages, images=2) for shape in shapes]


def tiny() -> list[bench.Case]:
    """Toy sizes, for a look at the whole in seconds; compiled for one stage only, which takes longer than all the rest."""
    shape = Shape(hidden=32, layers=4, vision_hidden=32, vision_layers=3, vocab=300, image_size=112, name="tiny")
    configs = {"vision_layer=0": ViTCoPConfig.preset("1/9", vision_layer=0)}
    return [
        Case(shape, "eager", ("1/9",), text_tokens=8, new_tokens=4, against=("stock_eager", "by_the_book")),
        Case(shape, "inductor", (), text_tokens=8, new_tokens=4, against=(), configs=configs, stages=("vision",)),
    ]


ARM = ("backend", "arm", "preset")
TABLES = {
    "cpu": Table(("arm", "preset", "vision", "prefill", "prefill ratio / FLOPs", "selection", "TTFT", "TTFT to stock_compile",
                  "TTFT to dense", "KV"), 11, cpu()),
    "memory": Table((*ARM, "peak memory", "before the request", "KV"), 3, memory(), memory=True),
    "decode": Table((*ARM, "batch", "decode", "decode to stock_compile", "decode to dense", "decode ratio / bytes"), 21,
                    decode()),
    "vision_layer": Table(("settings", "vision", "vision to dense", "vision ratio / FLOPs"), 7, vision_layer()),
    "selection": Table(("backend", "images", "prompts", "selection_ms", "ms_per_image", "per_image_to_one", "linear"), 15, [],
                       measure=functools.partial(parts.selection, Shape(), ("inductor", "onnxruntime"), (1, 8, 32))),
    "families": Table(("shape", "arm", "preset", "vision", "vision ratio / FLOPs", "tower", "select", "prefill",
                       "prefill ratio / FLOPs", "selection", "TTFT", "TTFT to stock_compile", "TTFT to dense"), 7, families()),
    "frames": Table(("frames", "tokens", "kept", *(f"{stage}_{what}" for stage in parts.VIDEO
                     for what in ("ms", "ms_to_first", "mib", "mib_to_first"))), 9, [],
                    measure=functools.partial(parts.frames, VIDEO, (8, 32, 128))),
    "overhead": Table(("shape", "preset", "batch", "prefill_ms", "prefill_alone_ms", "decode_ms", "decode_alone_ms"), 21, [],
                      measure=parts.overhead),
    "matmul_rate": Table(("kernel", "rows", "ms", "gflops", "to_dense"), 15, [],
                         measure=functools.partial(parts.matmul_rate, Shape())),
    "products": Table(("dtype", "rows", "kernel", "chosen", "ms", "to_torch", "to_float32"), 21, [],
                      measure=functools.partial(kernel_times.products, Shape())),
    "attention": Table(("dtype", "caches", "kernel", "ms", "to_read"), 21, [], measure=kernel_times.attention),
    "precisions": Table(precisions.COLUMNS, 7, [],
                        measure=functools.partial(precisions.precisions, QUICK, 1, ("1/3", "1/9"))),
    "precisions_16": Table(precisions.COLUMNS, 3, [],
                           measure=functools.partial(precisions.by_backend, NARROW, 16, ("1/3", "1/9"))),
    TINY: Table(None, 1, tiny()),
}  # fmt: skip


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(TABLES)}; default: all but {TINY}.")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Measure nothing, print what the JSON files hold.")] = False,
    output_dir: Annotated[Path, typer.Option(help="Where the JSON files are.")] = RESULTS,
) -> None:
    """Measure the README's tables, or print them."""
    with errors_as_lines(), without_future_warnings():
        chosen = {name: output_dir / f"{name}.json" for name in names or [name for name in TABLES if name != TINY]}
        for name, path in chosen.items():
            if name not in TABLES:
                raise ConfigError(f"table {name!r} is unknown: use some of {', '.join(TABLES)}")
            bench.check_target(path)
            if not tables:
                bench.check_cases(TABLES[name].cases, TABLES[name].rounds)
        for name, path in chosen.items():
            table = TABLES[name]
            if tables:
                print(f"### {name}\n\n{bench.markdown(table.read(path), table.columns)}")
                continue
            results = table.results(functools.partial(bench.write, path=path))
            results["environment"]["command"] = f"python benchmarks/suite.py {name}"
            bench.write(results, path)
            Console(width=WIDE_TABLE_WIDTH).print(bench.table(results, table.columns))


if __name__ == "__main__":
    typer.run(main)
