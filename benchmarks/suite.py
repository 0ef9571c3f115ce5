"""The README's tables as data: `python benchmarks/suite.py [NAME ...]` measures them, `--tables` prints what was measured.

Every table is written to benchmarks/results/NAME.json.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import by_the_book  # noqa: F401  registers the arm
import matmul_rate
import selection_cost
import typer
from rich.console import Console

from vitcop_compile import ViTCoPConfig, bench, optimize
from vitcop_compile.bench.overhead import overhead as bench_overhead
from vitcop_compile.bench.report import Columns, against_ideal, milliseconds, ratio
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines, without_future_warnings
from vitcop_compile.errors import ConfigError

RESULTS = Path(__file__).parent / "results"
TINY = "tiny"


Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Table:
    """measure(save): the results, given to `save` as they come; fields: what every row has; columns: what is printed, None
    for the usual ones."""

    measure: Callable[[Save], dict[str, Any]]
    cases: tuple[bench.Case, ...] = ()
    columns: Columns | None = None
    fields: tuple[str, ...] = ("backend", "arm", "preset", "ratio_to")


def of_cases(cases: list[bench.Case], rounds: int, columns: Columns | None = None, memory: bool = False) -> Table:
    """A table of `bench.run`."""
    return Table(lambda save: bench.run(cases, rounds=rounds, memory=memory, save=save), tuple(cases), columns)


def cpu() -> list[bench.Case]:
    """Every backend with every preset at batch 1, beside what a user could run instead."""
    against = {
        "inductor": ("stock_eager", "stock_compile"),
        "aotinductor": ("stock_compile",),
        "onnxruntime": ("stock_compile",),
        "eager": ("by_the_book",),
    }
    return [bench.Case(bench.Shape(), backend, against=others) for backend, others in against.items()]


def memory() -> list[bench.Case]:
    """Peak memory of a process that serves one arm."""
    against = {"inductor": ("stock_eager", "stock_compile"), "aotinductor": (), "onnxruntime": ()}
    return [
        bench.Case(bench.Shape(), backend, ("1/9",), against=others, stages=("ttft",)) for backend, others in against.items()
    ]


def decode() -> list[bench.Case]:
    """The decode step, where the weights bound it (batch 1) and where the cache does (batch 16)."""
    shape = bench.Shape(vision_hidden=256, vision_layers=3, name="1024x12, encoder 256x3")
    backends = ("inductor", "aotinductor", "onnxruntime")
    alone = [bench.Case(shape, backend, against=("stock_compile",), stages=("decode",)) for backend in backends]
    return alone + [bench.Case(shape, backend, ("1/9",), batch=16, against=(), stages=("decode",)) for backend in backends]


def vision_layer() -> list[bench.Case]:
    """The vision program alone as pruning moves into an encoder of CLIP-L's shape; the decoder beside it is small."""
    shape = bench.Shape(hidden=256, layers=4, vision_hidden=1024, vision_layers=24, name="CLIP-L")
    configs = {f"vision_layer={layer}": ViTCoPConfig.preset("1/9", vision_layer=layer) for layer in (-2, 18, 14, 10, 6, 2)}
    return [bench.Case(shape, "inductor", (), configs=configs, against=(), stages=("vision",))]


def overhead(save: Save) -> dict[str, Any]:
    """`forward` outside of its programs: 32 narrow layers, where the copy of keys and values hardly counts, and the table
    `cpu`'s model, where it does."""
    shapes = bench.Shape(hidden=64, layers=32, vision_hidden=64, vision_layers=3, name="64x32"), bench.Shape()
    rows = []
    for shape in shapes:
        model = shape.model()
        for preset in ("1/3", "1/9"):
            optimized = optimize(model, ViTCoPConfig.preset(preset), backend="eager")
            for batch in (1, 8) if shape.hidden == 64 else (1,):
                found = bench_overhead(optimized, bench.Request(batch), rounds=21)
                row = {"shape": shape.name, "preset": preset, "batch": batch}
                rows.append(row | {f"{name}_ms": value for name, value in found.items()})
    conditions = {"device": shapes[0].device, "dtype": shapes[0].dtype, "rounds": 21, "memory": False}
    return {"environment": bench.environment() | conditions, "rows": rows}


def tiny() -> list[bench.Case]:
    """Toy sizes, for a look at the whole in seconds; compiled for one stage only, which takes longer than all the rest."""
    shape = bench.Shape(hidden=32, layers=4, vision_hidden=32, vision_layers=3, vocab=300, image_size=112, name="tiny")
    configs = {"vision_layer=0": ViTCoPConfig.preset("1/9", vision_layer=0)}
    return [
        bench.Case(shape, "eager", ("1/9",), text_tokens=8, new_tokens=4, against=("stock_eager", "by_the_book")),
        bench.Case(shape, "inductor", (), text_tokens=8, new_tokens=4, against=(), configs=configs, stages=("vision",)),
    ]


CPU_COLUMNS: Mapping[str, Callable] = {
    "arm": lambda row: row["arm"],
    "preset": lambda row: row["preset"],
    "vision": milliseconds("vision"),
    "prefill": milliseconds("prefill"),
    "prefill ratio / FLOPs": against_ideal("prefill", "flop_ratio", "realized_over_ideal"),
    "selection": lambda row: (
        "-" if row["selection_ms"] is None else f"{row['selection_ms']:.2f} ({row['selection_share']:.1%} of prefill)"
    ),
    "TTFT": milliseconds("ttft"),
    "TTFT to stock_compile": ratio("ttft", "stock_compile"),
    "TTFT to dense": ratio("ttft"),
    "KV, MiB": lambda row: f"{row['kv_bytes'] / 2**20:.0f}",
}
DECODE_COLUMNS: Mapping[str, Callable] = {
    "backend": lambda row: row["backend"],
    "arm": lambda row: row["arm"],
    "preset": lambda row: row["preset"],
    "batch": lambda row: str(row["batch"]),
    "decode": milliseconds("decode"),
    "to stock_compile": ratio("decode", "stock_compile"),
    "to dense": ratio("decode"),
    "ratio / bytes": against_ideal("decode", "decode_byte_ratio", "decode_realized_over_ideal"),
}
MEMORY_COLUMNS: Mapping[str, Callable] = {
    "backend": lambda row: row["backend"],
    "arm": lambda row: row["arm"],
    "preset": lambda row: row["preset"],
    "peak, MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:.0f}",
    "before the request, MiB": lambda row: f"{row['resident_memory_bytes'] / 2**20:.0f}",
    "KV cache, MiB": lambda row: f"{row['kv_bytes'] / 2**20:.1f}",
}
VISION_COLUMNS: Mapping[str, Callable] = {
    "settings": lambda row: row["preset"],
    "vision": milliseconds("vision"),
    "ratio to dense": ratio("vision"),
    "ratio / FLOPs": against_ideal("vision", "vision_flop_ratio", "vision_realized_over_ideal"),
}
SELECTION_COLUMNS: Mapping[str, Callable] = {
    "backend": lambda row: row["backend"],
    "images": lambda row: str(row["images"]),
    "prompts": lambda row: str(row["prompts"]),
    "selection": lambda row: f"{row['selection_ms']:.2f}",
    "ms per image": lambda row: f"{row['ms_per_image']:.2f}",
    "per image to one": lambda row: f"{row['per_image_to_one']['median']:.2f}",
    "linear": lambda row: "yes" if row["linear"] else "no",
}
OVERHEAD_COLUMNS: Mapping[str, Callable] = {
    "model": lambda row: row["shape"],
    "preset": lambda row: row["preset"],
    "batch": lambda row: str(row["batch"]),
    **{
        f"{stage}, {where}": lambda row, key=f"{stage}{suffix}_ms": f"{row[key]:.3f}"
        for stage in ("prefill", "decode")
        for where, suffix in (("in a request", ""), ("alone", "_alone"))
    },
}
RATE_COLUMNS: Mapping[str, Callable] = {
    "kernel": lambda row: row["kernel"],
    "rows": lambda row: str(row["rows"]),
    "ms": lambda row: f"{row['ms']:.1f}",
    "GFLOP/s": lambda row: f"{row['gflops']:.0f}",
    "to the dense rows": lambda row: f"{row['to_dense']:.2f}",
}
TABLES = {
    "cpu": of_cases(cpu(), rounds=11, columns=CPU_COLUMNS),
    "memory": of_cases(memory(), rounds=3, columns=MEMORY_COLUMNS, memory=True),
    "decode": of_cases(decode(), rounds=21, columns=DECODE_COLUMNS),
    "vision_layer": of_cases(vision_layer(), rounds=7, columns=VISION_COLUMNS),
    "selection": Table(
        lambda save: selection_cost.measure(bench.Shape(), ("inductor", "onnxruntime"), (1, 8, 32), rounds=15),
        columns=SELECTION_COLUMNS,
        fields=selection_cost.FIELDS,
    ),
    "overhead": Table(overhead, columns=OVERHEAD_COLUMNS, fields=("shape", "preset", "batch", "prefill_ms", "decode_ms")),
    "matmul_rate": Table(
        lambda save: matmul_rate.measure(bench.Shape(), rounds=15), columns=RATE_COLUMNS, fields=matmul_rate.FIELDS
    ),
    TINY: of_cases(tiny(), rounds=1),
}


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(TABLES)}; default: all but {TINY}.")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Measure nothing, print what the JSON files hold.")] = False,
    output_dir: Annotated[Path, typer.Option(help="Where the JSON files are.")] = RESULTS,
) -> None:
    """Measure the README's tables, or print them."""
    with errors_as_lines(), without_future_warnings():
        chosen = names or [name for name in TABLES if name != TINY]
        for name in chosen:
            if name not in TABLES:
                raise ConfigError(f"table {name!r} is unknown: use some of {', '.join(TABLES)}")
            bench.check_target(output_dir / f"{name}.json")
            for case in () if tables else TABLES[name].cases:
                case.check()
        for name in chosen:
            path = output_dir / f"{name}.json"
            if tables:
                print(f"### {name}\n\n{bench.markdown(bench.read(path, TABLES[name].fields), TABLES[name].columns)}")
                continue
            results = TABLES[name].measure(functools.partial(bench.write, path=path))
            bench.write(results, path)
            Console(width=WIDE_TABLE_WIDTH).print(bench.table(results, TABLES[name].columns))


if __name__ == "__main__":
    typer.run(main)
