"""Whole answers beside other runtimes: `python benchmarks/peers.py --genai-python genai/bin/python` measures transformers,
OpenVINO GenAI with and without its own pruning, and this package, on one model and in one run; `--tables` prints what was
measured.

Arms are served by processes that sleep while another is measured; those of one model in one dtype share one. OpenVINO GenAI
lives in an environment of its own, since its converter wants another transformers:

    python -m venv genai
    genai/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    genai/bin/pip install openvino-genai==2026.4.1 optimum-intel==2.2.0 transformers==5.0.0
    genai/bin/pip uninstall -y torchvision

Weights are floats, or bytes (int8), for which peers are converted anew; either are compared with their like. OpenVINO rounds
what int8 weights multiply to int8 as well; of this package's arms those do that are called "int8 dynamic".

Results: benchmarks/results/peers.json, written after every round.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from peers_run import Group, agree, measure, rows, started
from rich.console import Console

from vitcop_compile import ViTCoPConfig, bench
from vitcop_compile.backends import BACKENDS, backend_of
from vitcop_compile.bench.cases import DENSE, Case, Shape
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines, without_future_warnings
from vitcop_compile.errors import ConfigError, UnsupportedError

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
PIP = (
    "python -m venv genai && genai/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu && "
    "genai/bin/pip install openvino-genai==2026.4.1 optimum-intel==2.2.0 transformers==5.0.0 && "
    "genai/bin/pip uninstall -y torchvision"
)
FULL = Shape(family="qwen2_5_vl", image_size=448, name="1024x12, encoder 1024x8")
TINY = Shape(
    hidden=64,
    layers=4,
    vision_hidden=64,
    vision_layers=3,
    vocab=300,
    image_size=112,
    head=32,
    family="qwen2_5_vl",
    name="tiny",
)
PRESET = "1/9"
PRUNING_RATIO = 89  # what is closest to 8/9 in whole percents: 28 of 256 tokens stay
PEER_ARMS = ("transformers", "transformers, compiled", "OpenVINO GenAI", "onnxruntime")
COLUMNS = ("arm", "precision", "weights", "preset", "visual_tokens", "ttft_ms", "ttft_to_best_peer", "tpot_ms",
           "tpot_to_best_peer", "answer_ms", "peak memory")  # fmt: skip
# How weights are held, and what OpenVINO's converter calls that.
FLOAT = "float"
CONVERTED = {FLOAT: "fp16", "int8": "int8"}
# Seconds.
_CONVERT = 900.0


def groups(shape: Shape, genai: str | None) -> list[Group]:
    """Everything that is compared. genai: the interpreter of OpenVINO GenAI's environment, None to leave it out."""
    own = (sys.executable, str(HERE / "peers_own.py"))
    stock = {"transformers": {"kind": "stock_eager"}, "transformers, compiled": {"kind": "stock_compile"}}
    rows = {name: _row(name, "bfloat16", DENSE, shape) | {"make": make} for name, make in stock.items()}
    found = [Group("transformers", own, {"dtype": "bfloat16"}, rows)]
    for weights in CONVERTED if genai is not None else ():
        percents = {DENSE: 0, f"CDPruner {PRUNING_RATIO} %": PRUNING_RATIO}
        name = " ".join(["OpenVINO GenAI", weights]).removesuffix(f" {FLOAT}")
        rows = {
            f"{name} {label}": _row("OpenVINO GenAI", "default", label, shape, weights) | {"make": percent}
            for label, percent in percents.items()
        }
        found.append(Group(name, (str(genai), str(HERE / "peers_genai.py")), {}, rows, reads=weights))
    # By backend: the dtype of the model, how its weights are held, and what `optimize` is told of precision.
    ours: dict[str, list[tuple[str, str, dict[str, str]]]] = {
        "inductor": [
            ("float32", FLOAT, {}),
            ("bfloat16", FLOAT, {}),
            ("float32", "int8", {}),
            ("float32", "int8 dynamic", {}),
            ("bfloat16", "int8 dynamic", {}),
        ],
        "aotinductor": [("bfloat16", FLOAT, {}), ("bfloat16", "int8 dynamic", {})],
        "onnxruntime": [("float32", FLOAT, {})],
        "openvino": [
            ("float32", FLOAT, {"precision": "f32"}),
            ("float32", FLOAT, {"precision": "bf16"}),
            ("float32", "int8", {"precision": "f32"}),
        ],
    }
    for backend in [name for name in ours if name in BACKENDS]:
        for dtype, weights, precision in ours[backend]:
            computed = "bfloat16" if precision.get("precision") == "bf16" else dtype
            make = {"kind": "ours", "backend": backend} | precision
            name = " ".join([backend, computed, weights]).removesuffix(f" {FLOAT}")
            rows = {
                f"{name} {label}": _row(backend, computed, label, shape, weights) | {"make": make | {"preset": label}}
                for label in (DENSE, PRESET)
            }
            build = {"dtype": dtype, "weights": weights}
            found.append(Group(name, own, build, rows, available=lambda name=backend: backend_of(name)))
    return found


def _row(arm: str, precision: str, preset: str, shape: Shape, weights: str = FLOAT) -> dict[str, Any]:
    pruned = preset == PRESET
    row = {"arm": arm, "precision": precision, "weights": weights, "preset": preset}
    return row | {"peer": arm in PEER_ARMS and not pruned, "visual_tokens": _visual_tokens(shape)[pruned]}


@functools.cache
def _visual_tokens(shape: Shape) -> tuple[float, float]:
    """Of the picture, dense and pruned, mean over the decoder's layers."""
    numbers, layout = shape.model_shape(), Case(shape).layout()
    both = ViTCoPConfig.dense(), ViTCoPConfig.preset(PRESET)
    dense, pruned = (config.schedule(numbers, layout).mean_visual_tokens() for config in both)
    return dense, pruned


def chosen(found: list[Group], only: list[str]) -> list[Group]:
    """The groups with their arms that are named, all without names. Raises ConfigError for a name of none."""
    known = [name for group in found for name in group.arms]
    for name in only:
        if name not in known:
            raise ConfigError(f"arm {name!r} is unknown: use some of {'; '.join(known)}")
    kept = {group.name: {name: row for name, row in group.arms.items() if not only or name in only} for group in found}
    return [dataclasses.replace(group, arms=kept[group.name]) for group in found if kept[group.name]]


def check_genai(python: str | None, without: bool) -> str | None:
    """The interpreter of OpenVINO GenAI's environment. Raises UnsupportedError, with the lines that make one, where it has not
    what is needed, and ConfigError if it is neither given nor left out."""
    if without:
        if python is not None:
            raise ConfigError("--genai-python and --without-genai exclude each other: choose either")
        return None
    remedy = f"make an environment of its own: {PIP}; or leave it out: --without-genai"
    if python is None:
        raise ConfigError(f"--genai-python is missing: {remedy}")
    wanted = (
        "import importlib.util as u, sys; wanted = 'openvino_genai', 'optimum', 'torch'; "
        "sys.exit(', '.join(name for name in wanted if not u.find_spec(name)) or 0)"
    )
    try:
        done = subprocess.run([python, "-c", wanted], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise UnsupportedError(f"--genai-python {python} cannot be run ({reason}): {remedy}") from None
    if done.returncode:
        lacking = done.stderr.strip().splitlines()[-1:] or ["something"]
        raise UnsupportedError(f"--genai-python {python} lacks {lacking[0]}: {remedy}")
    return python


def prepare(
    shape: Shape, seed: int, genai: str | None, folder: Path, console: Console, reads: Iterable[str] = ("model", *CONVERTED)
) -> dict[str, Path]:
    """Folders of the model, and of its conversions by how these hold weights, of those that are read; made where they are not
    there yet. Raises UnsupportedError, with its last line, if the converter fails."""
    key = hashlib.sha256(repr((dataclasses.asdict(shape), seed)).encode()).hexdigest()[:12]
    model = folder / key / "model"
    folders = {"model": model}
    makes: dict[str, Callable[[], None]] = {"model": lambda: _aside(model, lambda aside: _write(shape, seed, aside))}

    def convert(converted: Path, format: str) -> None:
        def run(aside: Path) -> None:
            command = [str(genai), str(HERE / "peers_genai.py"), "convert", str(model), str(aside), format]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT, check=False)
            except subprocess.TimeoutExpired:
                raise UnsupportedError(f"the conversion for OpenVINO GenAI took more than {_CONVERT:.0f} s") from None
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
                raise UnsupportedError(f"the conversion for OpenVINO GenAI failed: {last[0]}: the versions that work: {PIP}")

        _aside(converted, run)

    for weights, format in CONVERTED.items() if genai is not None else ():
        if weights in reads:
            folders[weights] = folder / key / f"openvino-{format}"
            makes[weights] = functools.partial(convert, folders[weights], format)
    for name, made in folders.items():
        if not made.exists():
            with console.status(f"writing {made}"):
                makes[name]()
    return folders


def _write(shape: Shape, seed: int, folder: Path) -> None:
    from peers_own import write_model

    write_model(shape, seed, folder)


def _aside(path: Path, make: Callable[[Path], None]) -> None:
    """`path` as `make` fills it, or not at all."""
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    make(aside)
    aside.rename(path)


def run(
    shape: Shape, genai: str | None, only: list[str], rounds: int, minutes: float, threads: int, text: int, tokens: int,
    folder: Path, console: Console, save: Callable[[dict[str, Any]], None] = lambda results: None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """{"environment", "rows", "failed"}: what `rows` says, given to `save` after every round, and the reason of each arm that
    could not be measured."""
    picked = chosen(groups(shape, genai), only)
    failed: dict[str, str] = {}
    facts: dict[str, Any] = {}
    folders = prepare(shape, seed, genai, folder, console, [group.reads for group in picked])
    given = {"threads": threads, "side": shape.image_size, "text": text, "tokens": tokens}
    results: dict[str, Any] = {}
    conditions = bench.environment() | {
        "device": "cpu", "dtype": "precision by row", "threads": threads, "rounds": 0, "seed": seed, "memory": True,
        "load_before": os.getloadavg()[0], "shape": dataclasses.asdict(shape), "request": given,
    }  # fmt: skip

    def gather() -> None:
        found, best = rows(arms)
        agree(found)
        conditions.update(rounds=min((len(arm.answers) for arm in arms.values()), default=0), best_peer=best)
        conditions.update(workers=facts, load_after=os.getloadavg()[0])
        lost = [{"arm": name, "reason": reason} for name, reason in failed.items()]
        results.update(environment=conditions, rows=found, failed=lost)
        save(results)

    with console.status("starting") as status:
        with started(picked, given, folders, failed, facts) as arms:
            if not arms:
                raise UnsupportedError("no arm can run: " + "; ".join(failed.values()))
            measure(arms, rounds, 60 * minutes, failed, status.update, gather)
        gather()
    return results


def notes(results: Mapping[str, Any]) -> list[str]:
    """What stands below the table: versions and flags of the other runtime, the fastest peers, and arms that failed."""
    given = results["environment"]
    lines = []
    for weights, best in given["best_peer"].items():
        fastest = ", ".join(f"{what.upper()} {name}" for what, name in best.items())
        lines.append(f"The fastest peer with {weights} weights: {fastest}.")
    genai = given["workers"].get("OpenVINO GenAI")
    if genai:
        said = {**genai["versions"], **genai["flags"]}
        lines.append("OpenVINO GenAI: " + ", ".join(f"{name} {value}" for name, value in said.items()) + ".")
    busy = max((row["others_busy"] for row in results["rows"]), default=0.0)
    load = f"{given['load_before']:.1f} before, {given['load_after']:.1f} after"
    lines.append(f"Load {load}; arms that should sleep used {100 * busy:.0f} % of a core at most.")
    return lines + [f"Not measured: {lost['arm']}: {lost['reason']}" for lost in results["failed"]]


def main(
    genai_python: Annotated[str | None, typer.Option(help="The interpreter of OpenVINO GenAI's environment.")] = None,
    without_genai: Annotated[bool, typer.Option("--without-genai", help="Leave OpenVINO GenAI out.")] = False,
    arms: Annotated[
        list[str] | None, typer.Option("--arm", help="Measure this arm; repeat for several. Default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 5,
    minutes: Annotated[float, typer.Option(help="After so many of measuring no further round is begun.")] = 8.0,
    threads: Annotated[int, typer.Option(min=1, help="Of every arm.")] = 2,
    folder: Annotated[Path, typer.Option(help="Where model and conversion are kept.")] = Path(".cache/peers"),
    output: Annotated[
        Path | None, typer.Option(help="The JSON file; default: peers.json, or peers_tiny.json, of results.")
    ] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy size, short answers: shows that it works.")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="Measure nothing, print what the JSON file holds.")] = False,
) -> None:
    """Measure whole answers beside other runtimes, or print them."""
    with errors_as_lines(), without_future_warnings():
        output = output or (RESULTS.with_stem("peers_tiny") if tiny else RESULTS)
        if tables:
            results = bench.read(output, COLUMNS[:-1])
            print(bench.markdown(results, COLUMNS) + "\n" + "\n".join(notes(results)))
            return
        bench.check_target(output)
        genai = check_genai(genai_python, without_genai)
        shape, text, tokens = (TINY, 16, 8) if tiny else (FULL, 64, 64)
        results = run(
            shape, genai, arms or [], rounds, minutes, threads, text, tokens, folder, Console(stderr=True),
            save=lambda found: bench.write(found, output),
        )  # fmt: skip
    console = Console(width=WIDE_TABLE_WIDTH)
    console.print(bench.table(results, COLUMNS))
    for line in notes(results):
        console.print(line, markup=False, highlight=False)
    if results["failed"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
