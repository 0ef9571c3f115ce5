"""Whole answers beside other runtimes: `python benchmarks/peers.py --genai-python genai/bin/python` measures transformers, OpenVINO
GenAI with and without its own pruning, and this package, on one model and in one run; `--tables` prints what was measured.

Every arm is served by a process of its own, which sleeps while another is measured; arms of one model share one. OpenVINO GenAI
lives in an environment of its own, since its converter wants another transformers:

    python -m venv genai
    genai/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    genai/bin/pip install openvino-genai==2026.4.1 optimum-intel==2.2.0 transformers==5.0.0
    genai/bin/pip uninstall -y torchvision

Results: benchmarks/results/peers.json, written after every round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from peers_protocol import Worker, WorkerError
from rich.console import Console

from vitcop_compile import ViTCoPConfig, bench
from vitcop_compile.backends import BACKENDS, backend_of
from vitcop_compile.bench.cases import DENSE, Case, Shape
from vitcop_compile.bench.timing import ratios, summary
from vitcop_compile.cli.shared import WIDE_TABLE_WIDTH, errors_as_lines, without_future_warnings
from vitcop_compile.errors import ConfigError, InputError, UnsupportedError

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
PIP = (
    "python -m venv genai && genai/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu && "
    "genai/bin/pip install openvino-genai==2026.4.1 optimum-intel==2.2.0 transformers==5.0.0 && "
    "genai/bin/pip uninstall -y torchvision"
)
FULL = Shape(family="qwen2_5_vl", image_size=448, name="1024x12, encoder 1024x8")
TINY = Shape(
    hidden=64, layers=4, vision_hidden=64, vision_layers=3, vocab=300, image_size=112, head=32, family="qwen2_5_vl", name="tiny"
)
PRESET = "1/9"
PRUNING_RATIO = 89  # GenAI takes whole percents: an eighth of an image less than a ninth stays
PEER_ARMS = ("transformers", "transformers, compiled", "OpenVINO GenAI", "onnxruntime")
COLUMNS = ("arm", "precision", "preset", "visual_tokens", "ttft_ms", "ttft_to_best_peer", "tpot_ms", "tpot_to_best_peer",
           "answer_ms", "peak memory")  # fmt: skip
QUANTITIES = ("ttft", "tpot")
# Seconds. Building loads; the first answer compiles, up to some ten programs.
_CONVERT, _BUILD, _FIRST, _ANSWER = 900.0, 300.0, 900.0, 120.0
# Idle threads of OpenMP spin for milliseconds before they sleep.
_SETTLE = 0.2
_WARMUP = 2


@dataclass(frozen=True)
class Group:
    """Arms in one process, which share a model. command: of its process; build: fields of its first command; arms: rows of the
    table by name, with what the worker makes of each under "make"; available: raises UnsupportedError where it cannot run."""

    name: str
    command: tuple[str, ...]
    build: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    available: Callable[[], Any] = lambda: None


@dataclass
class Arm:
    """An arm that runs: its worker, its row, and what it answered, a dictionary per measured round."""

    worker: Worker
    row: dict[str, Any]
    answers: list[dict[str, Any]] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)


def groups(shape: Shape, genai: str | None) -> list[Group]:
    """Everything that is compared. genai: the interpreter of OpenVINO GenAI's environment, None to leave it out."""
    own = (sys.executable, str(HERE / "peers_own.py"))
    stock = {"transformers": {"kind": "stock_eager"}, "transformers, compiled": {"kind": "stock_compile"}}
    rows = {name: _row(name, "bfloat16", DENSE, shape) | {"make": make} for name, make in stock.items()}
    found = [Group("transformers", own, {"dtype": "bfloat16"}, rows)]
    if genai is not None:
        percents = {DENSE: 0, f"CDPruner {PRUNING_RATIO} %": PRUNING_RATIO}
        rows = {
            f"OpenVINO GenAI {label}": _row("OpenVINO GenAI", "default", label, shape) | {"make": percent}
            for label, percent in percents.items()
        }
        found.append(Group("OpenVINO GenAI", (genai, str(HERE / "peers_genai.py")), {}, rows))
    # By backend: the dtype of the model, and what `optimize` is told of precision.
    ours: dict[str, list[tuple[str, dict[str, str]]]] = {
        "inductor": [("float32", {}), ("bfloat16", {})],
        "onnxruntime": [("float32", {})],
        "openvino": [("float32", {"precision": "f32"}), ("float32", {"precision": "bf16"})],
    }
    for backend, variants in ours.items():
        for dtype, precision in variants:
            computed = "bfloat16" if precision.get("precision") == "bf16" else dtype
            make = {"kind": "ours", "backend": backend} | precision
            rows = {
                f"{backend} {computed} {label}": _row(backend, computed, label, shape) | {"make": make | {"preset": label}}
                for label in (DENSE, PRESET)
            }
            group = Group(f"{backend} {computed}", own, {"dtype": dtype}, rows, lambda name=backend: backend_of(name))
            found.append(group)
    return found


def _row(arm: str, precision: str, preset: str, shape: Shape) -> dict[str, Any]:
    pruned = preset if preset == PRESET else None
    config = ViTCoPConfig.dense() if pruned is None else ViTCoPConfig.preset(pruned)
    schedule = config.schedule(shape.model_shape(), Case(shape).layout())
    is_peer = arm in PEER_ARMS and pruned is None
    return {"arm": arm, "precision": precision, "preset": preset, "peer": is_peer, "visual_tokens": schedule.mean_visual_tokens()}


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
    wanted = "import importlib.util as u, sys; sys.exit(' '.join(n for n in ('openvino_genai', 'optimum', 'torch') if not u.find_spec(n)))"
    try:
        done = subprocess.run([python, "-c", wanted], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise UnsupportedError(f"--genai-python {python} cannot be run ({reason}): {remedy}") from None
    if done.returncode:
        lacking = done.stderr.strip().splitlines()[-1:] or ["something"]
        raise UnsupportedError(f"--genai-python {python} lacks {lacking[0]}: {remedy}")
    return python


def prepare(shape: Shape, seed: int, genai: str | None, folder: Path, console: Console) -> tuple[Path, Path]:
    """Folders of the model and of its conversion, made where they are not there yet. Raises UnsupportedError, with its last
    line, if the converter fails."""
    key = hashlib.sha256(repr((dataclasses.asdict(shape), seed)).encode()).hexdigest()[:12]
    model, converted = folder / key / "model", folder / key / "openvino"

    def write() -> None:
        from peers_own import write_model

        _aside(model, lambda aside: write_model(shape, seed, aside))

    def convert() -> None:
        def run(aside: Path) -> None:
            command = [str(genai), str(HERE / "peers_genai.py"), "convert", str(model), str(aside)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_CONVERT, check=False)
            except subprocess.TimeoutExpired:
                raise UnsupportedError(f"the conversion for OpenVINO GenAI took more than {_CONVERT:.0f} s") from None
            if done.returncode:
                last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
                raise UnsupportedError(f"the conversion for OpenVINO GenAI failed: {last[0]}: the versions that work: {PIP}")

        _aside(converted, run)

    for made, make, needed in ((model, write, True), (converted, convert, genai is not None)):
        if needed and not made.exists():
            with console.status(f"writing {made}"):
                make()
    return model, converted


def _aside(path: Path, make: Callable[[Path], None]) -> None:
    """`path` as `make` fills it, or not at all."""
    aside = path.with_name(path.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    make(aside)
    aside.rename(path)


@contextlib.contextmanager
def started(
    found: list[Group], given: Mapping[str, Any], folders: tuple[Path, Path], failed: dict[str, str], facts: dict[str, Any]
) -> Iterator[dict[str, Arm]]:
    """The arms of all groups, built; `failed` gets those that cannot be, with the reason, `facts` what workers say of
    themselves."""
    arms: dict[str, Arm] = {}
    workers: list[Worker] = []
    try:
        for group in found:
            try:
                group.available()
                workers.append(worker := Worker(group.name, group.command, given["threads"]))
                folder = folders["peers_genai.py" in group.command[-1]]
                make = {name: row["make"] for name, row in group.arms.items()}
                facts[group.name] = worker.ask("build", _BUILD, folder=str(folder), arms=make, **given, **group.build)
            except (UnsupportedError, WorkerError) as reason:
                failed.update(dict.fromkeys(group.arms, str(reason)))
                continue
            for name, row in group.arms.items():
                arms[name] = Arm(worker, {key: value for key, value in row.items() if key != "make"})
        yield arms
    finally:
        for worker in workers:
            worker.stop()


def asked(arms: dict[str, Arm], name: str, failed: dict[str, str], seconds: float, seed: int, **more: Any) -> Any:
    """One answer of the arm `name`; None if it fails, for which it, and all whose worker is gone, move to `failed`."""
    arm = arms[name]
    try:
        return arm.worker.ask("answer", seconds, arm=name, seed=seed, **more)
    except WorkerError as reason:
        gone = [name] if reason.alive else [other for other, held in arms.items() if held.worker is arm.worker]
        for other in gone:
            failed[other] = str(reason)
            del arms[other]
        return None


def measure(
    arms: dict[str, Arm], rounds: int, seconds: float, failed: dict[str, str], note: Callable[[str], Any], save: Callable[[], Any]
) -> None:
    """Fills `answers` of every arm, round by round, in an order drawn anew and turned around in the next round. Every answer is
    about another picture and prompt, the same for all arms. After `seconds` no further round is begun.

    Raises UnsupportedError if no arm is left.
    """
    draw, begun, order = random.Random(0), time.monotonic(), list(arms)
    for turn in range(-_WARMUP, rounds):
        if turn > 0 and time.monotonic() - begun > seconds:
            break
        if turn % 2:
            order.reverse()
        else:
            draw.shuffle(order)
        for name in [name for name in order if name in arms]:
            if name not in arms:  # gone with its worker meanwhile
                continue
            note(f"{'warming up' if turn < 0 else f'round {turn + 1} of {rounds}'}: {name}")
            arm, others = arms[name], {id(other.worker): other.worker for other in arms.values()}
            time.sleep(_SETTLE)
            before = {key: worker.cpu_seconds() for key, worker in others.items() if worker is not arm.worker}
            first = turn == -_WARMUP
            answer = asked(arms, name, failed, _FIRST if first else _ANSWER, turn + _WARMUP, ids=first)
            if answer is None:
                continue
            if first:
                arm.row["first_tokens"] = answer["ids"]
            if turn >= 0:
                arm.answers.append({key: value for key, value in answer.items() if key != "ids"})
                used = sum(others[key].cpu_seconds() - spent for key, spent in before.items())
                arm.disturbed.append(1e3 * used / answer["answer_ms"])
        if not arms:
            raise UnsupportedError("no arm is left: " + "; ".join(failed.values()))
        if turn >= 0:
            save()


def rows(arms: Mapping[str, Arm]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row per arm, medians over the rounds, and the name of the fastest peer by quantity. A ratio is the median of the ratios
    of the rounds: how many times as long the fastest peer takes."""
    count = min((len(arm.answers) for arm in arms.values()), default=0)
    times = {
        what: {name: [answer[f"{what}_ms"] for answer in arm.answers[:count]] for name, arm in arms.items()}
        for what in (*QUANTITIES, "answer")
    }
    peers = [name for name, arm in arms.items() if arm.row["peer"]]
    best = {what: min(peers, key=lambda name: statistics.median(times[what][name])) for what in QUANTITIES if peers and count}
    found = []
    for name, arm in arms.items() if count else ():
        row = arm.row | {"name": name, "tokens": arm.answers[0]["tokens"], "ratio_to": {}}
        row["visual_tokens"] = arm.answers[0].get("visual_tokens", row["visual_tokens"])
        for what, values in times.items():
            row[f"{what}_ms"], row[f"{what}_quartiles_ms"] = summary(values[name]).values()
        for what in QUANTITIES:
            ratio = summary(ratios(times[what][best[what]], times[what][name])) if best else None
            row[f"{what}_to_best_peer"] = ratio
        for part in ("preprocessing_ms", "before_language_model_ms"):
            values = [answer[part] for answer in arm.answers[:count] if part in answer]
            row[part] = statistics.median(values) if values else None
        peaks = [answer["peak_bytes"] for answer in arm.answers if answer["peak_bytes"] is not None]
        row["peak_memory_bytes"] = max(peaks, default=None)
        # Of one core: above a few percent another arm did not sleep.
        row["others_busy"] = max(arm.disturbed[:count])
        found.append(row)
    return found, best


def agree(found: list[dict[str, Any]], reference: str = "inductor float32 dense") -> None:
    """Adds to every row how many of the tokens of its first answer, from the first on, are those of the reference: a fact that
    says they run one model. Random weights part soon once rounding differs."""
    tokens = {row["name"]: row["first_tokens"] for row in found}
    for row in found:
        pairs = zip(row["first_tokens"], tokens.get(reference, ()))
        same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(map(len, (row["first_tokens"], tokens.get(reference, ())))))
        row["tokens_as_float32"] = same if reference in tokens else None


def run(
    shape: Shape, genai: str | None, only: list[str], rounds: int, minutes: float, threads: int, text: int, tokens: int, folder: Path,
    console: Console, save: Callable[[dict[str, Any]], None] = lambda results: None, seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """{"environment", "rows", "failed"}: what `rows` says, given to `save` after every round, and the reason of each arm that
    could not be measured."""
    picked = chosen(groups(shape, genai), only)
    failed: dict[str, str] = {}
    facts: dict[str, Any] = {}
    folders = prepare(shape, seed, genai, folder, console)
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
    lines = [f"The fastest peer: {', '.join(f'{what.upper()} {name}' for what, name in given['best_peer'].items())}."]
    genai = given["workers"].get("OpenVINO GenAI")
    if genai:
        said = {**genai["versions"], **genai["flags"]}
        lines.append("OpenVINO GenAI: " + ", ".join(f"{name} {value}" for name, value in said.items()) + ".")
    busy = max((row["others_busy"] for row in results["rows"]), default=0.0)
    lines.append(f"Load before {given['load_before']:.1f}, after {given['load_after']:.1f}; other arms used {100 * busy:.0f} % of a core at most.")
    return lines + [f"Not measured: {lost['arm']}: {lost['reason']}" for lost in results["failed"]]


def main(
    genai_python: Annotated[str | None, typer.Option(help="The interpreter of OpenVINO GenAI's environment.")] = None,
    without_genai: Annotated[bool, typer.Option("--without-genai", help="Leave OpenVINO GenAI out.")] = False,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="Measure this arm; repeat for several. Default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds.")] = 7,
    minutes: Annotated[float, typer.Option(help="When to begin no further round.")] = 12.0,
    threads: Annotated[int, typer.Option(min=1, help="Of every arm.")] = 2,
    folder: Annotated[Path, typer.Option(help="Where model and conversion are kept.")] = Path(".cache/peers"),
    output: Annotated[Path, typer.Option(help="The JSON file.")] = RESULTS,
    tiny: Annotated[bool, typer.Option("--tiny", help="Toy size, short answers: shows that it works.")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="Measure nothing, print what the JSON file holds.")] = False,
) -> None:
    """Measure whole answers beside other runtimes, or print them."""
    with errors_as_lines(), without_future_warnings():
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
