"""Accuracy of every method on the trained models: `python benchmarks/study.py examples/models/llava`.

For each method and budget the questions of `examples/see` that no model has learned from, by kind, with 95 % intervals; the
same questions everywhere. What is done is kept in benchmarks/results/study_NAME.json after every setting, and not done again.
`--ablate` adds ViTCoP with one thing changed, `--time` the time to the first token of compiled models, `--tables` and `--plot`
show what was found."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.study_ablations import Make, ablations, no_shallow_stage, scored, shuffled
from benchmarks.study_report import save_plot, save_time_plot, tables
from benchmarks.study_time import first_that_fits, times_of
from examples.see.evaluate import Example, answers, held_out, interval
from examples.see.models import load_processor, prompt
from examples.see.questions import KINDS
from vitcop_compile import ConfigError, ViTCoPConfig, optimize
from vitcop_compile.config import PRESETS
from vitcop_compile.methods import METHODS, Calibrated
from vitcop_compile.methods.named import method_from
from vitcop_compile.progress import Steps

RESULTS = Path(__file__).parent / "results"
# Mean visual tokens over the decoder's layers, as a share of all: the field's 192, 128, 64, 32 and 16 of 576.
SHARES = {"192": 1 / 3, "128": 2 / 9, "64": 1 / 9, "32": 1 / 18, "16": 1 / 36}
# Where a budget cannot be had at a method's own layers, of 32, it prunes earlier, as others have run it.
LAYERS = {
    "fastv": (":layer=1",),
    "dart": (":layer=1",),
    "pyramiddrop": ("", ":layers=4:8:16"),
    "sparsevlm": ("",),
    "v2drop": ("", ":layers=4:8:16"),
    "vscan": ("", ":middle=8"),
}
MERGING = ("vitcop", "vitcop-wide", "visionzip", "vscan", "tome", "downsample")


def settings(name: str, share: float) -> Iterator[Make]:
    """In the order in which they are to be tried: the first that a model can have is taken."""
    name, _, calibrated = name.partition("+")
    wrap = Calibrated if calibrated else (lambda method: method)
    if name in ("vitcop", "vitcop-wide"):
        widened = 1.6 if name == "vitcop-wide" else 1.0
        vision, *_ = min(PRESETS.values(), key=lambda known: abs(known[2] - share))
        # Below the published budgets the vision stage keeps the published multiple of what is left on average.
        for ratio in (vision, 2.7 * share):
            if ratio <= vision:
                ratio = min(1.0, widened * ratio)
                yield lambda ratio=ratio: wrap(method_from(f"vitcop:retention={share},vision_ratio={ratio:.4f}"))
        return
    for more in LAYERS.get(name, ("",)):
        text = f"{name}{more}{',' if more else ':'}retention={share}"
        yield lambda text=text: wrap(method_from(text))


def examples_of(number: int) -> dict[str, list[Example]]:
    """Questions by kind."""
    return {kind: list(held_out(kind, number)) for kind in KINDS}


def accuracy(fast: Any, processor: Any, name: str, asked: Mapping[str, list[Example]], batch: int) -> dict[str, list[bool]]:
    """Whether each answer is right, by kind."""
    found: dict[str, list[bool]] = {}
    for kind, examples in asked.items():
        said = [
            text for at in range(0, len(examples), batch) for text in answers(fast, processor, name, examples[at : at + batch])
        ]
        found[kind] = [answer == example.answer for answer, example in zip(said, examples, strict=True)]
    return found


def summary(right: Mapping[str, list[bool]]) -> dict[str, Any]:
    """Shares with intervals, by kind and of all."""
    every = [one for own in right.values() for one in own]
    found = {}
    for kind, own in (*right.items(), ("all", every)):
        low, high = interval(sum(own), len(own))
        found[kind] = {"share": sum(own) / len(own), "low": low, "high": high, "asked": len(own)}
    return found


def request_of(fast: Any, processor: Any, name: str, example: Example) -> dict[str, Any]:
    """What a processor makes of one question."""
    given = processor(images=[[example.image]], text=[prompt(name, example.question)], return_tensors="pt")
    names = ("input_ids", "attention_mask", *fast.host.inputs)
    return {key: given[key] for key in names if key in given}


def measured(fast: Any, processor: Any, name: str, asked: Mapping[str, list[Example]], batch: int) -> dict[str, Any]:
    """One row."""
    images = fast.layouts_of(**request_of(fast, processor, name, asked[KINDS[0]][0]))[0]
    schedule = fast.schedule_of(tuple(segment for image in images for segment in image))
    right = accuracy(fast, processor, name, asked, batch)
    return {
        "accuracy": summary(right),
        "right": {kind: "".join("01"[one] for one in own) for kind, own in right.items()},
        "mean_tokens": schedule.mean_visual_tokens(),
        "of": schedule.patches,
        "kv_bytes": schedule.kv_bytes(16),
        "flop_ratio": schedule.flop_ratio(16),
    }


class Study:
    """What was found, kept in a file after every row."""

    def __init__(self, folder: Path, output: Path, number: int, batch: int, steps: Steps):
        self.folder, self.output, self.batch, self.steps = folder, output, batch, steps
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.name, self.processor = self.model.config.model_type, load_processor(folder)
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        new = {"model": self.name, "weights": weights, "asked": number}
        self.found: dict[str, Any] = new | {"rows": {}, "times": {}}
        if output.exists():
            self.found = json.loads(output.read_text())
        for key, value in new.items():
            if self.found.get(key) != value:
                raise ConfigError(
                    f"{output} is of {key}={self.found.get(key)}, not {value}: give another --output, or remove it"
                )
        self.asked = examples_of(number)
        self.dense = optimize(self.model, ViTCoPConfig.dense(), backend="eager")

    def save(self) -> None:
        """Aside, and moved into place."""
        aside = self.output.with_suffix(".partial")
        aside.write_text(json.dumps(self.found, indent=1) + "\n")
        aside.replace(self.output)

    def add(self, row: str, tries: Iterator[Make], dtype: torch.dtype = torch.float32) -> None:
        """The row, if it is not there; one that the model cannot have is left out with the reason."""
        if row in self.found["rows"]:
            return
        why = "nothing was tried"
        for make in tries:
            try:
                plain = dtype == torch.float32
                # Loaded anew: a model that is converted has its tables of positions converted, too.
                model = self.model if plain else AutoModelForImageTextToText.from_pretrained(self.folder, dtype=dtype).eval()
                fast = optimize(model, make(), backend="eager", like=self.dense if plain else None)
                with self.steps.step(row):
                    self.found["rows"][row] = measured(fast, self.processor, self.name, self.asked, self.batch)
                break
            except ConfigError as error:
                why = str(error)
        else:
            self.found["rows"][row] = {"left_out": why}
        self.save()

    def ablate(self, label: str) -> None:
        """One thing changed, at the budget `label`."""
        share, layers = SHARES[label], self.dense.schedule.shape.layers
        candidates = self.found["rows"]["dense"]["of"]
        for name, make in ablations(share).items():
            self.add(f"ablation {label}: {name}", iter([make]))
        self.add(f"ablation {label}: no shallow stage", iter([lambda: no_shallow_stage(layers, candidates, share)]))
        self.add(f"ablation {label}: in bfloat16", settings("vitcop", share), torch.bfloat16)
        self.add("dense in bfloat16", iter([ViTCoPConfig.dense]), torch.bfloat16)
        self.add(f"saliency {label}", iter([scored(lambda site: site.score, share)]))
        self.add(f"saliency shuffled {label}", iter([scored(shuffled, share)]))

    def time(self, label: str, names: list[str], backend: str, rounds: int) -> None:
        """Time to the first token of one question, every method beside dense in interleaved rounds, compiled."""
        if label in self.found["times"]:
            raise ConfigError(
                f"{self.output} has times at {label}, and others would not be of the same rounds: remove those, or give "
                "another --output"
            )
        found = {name: first_that_fits(self.dense, name, settings(name, SHARES[label])) for name in names}
        methods = {name: method for name, method in found.items() if method is not None}
        request = request_of(self.dense, self.processor, self.name, self.asked["what"][0])
        rows = times_of(self.dense, methods, request, backend, rounds, self.steps)
        self.found["times"][label] = {"backend": backend, "rows": rows}
        self.save()


def main(
    folder: Annotated[Path, typer.Argument(help="A trained model of examples/see.")],
    questions: Annotated[int, typer.Option(help="Of each kind.")] = 100,
    share: Annotated[list[str] | None, typer.Option(help=f"Budgets, of {', '.join(SHARES)}; default: all.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods; NAME+calibrated calibrates; default: all.")] = None,
    batch: Annotated[int, typer.Option(help="Questions at a time.")] = 10,
    ablate: Annotated[list[str] | None, typer.Option(help="Budgets at which ViTCoP has one thing changed.")] = None,
    time: Annotated[list[str] | None, typer.Option(help="Budgets at which times are measured, and nothing else.")] = None,
    backend: Annotated[str, typer.Option(help="Of times.")] = "inductor",
    rounds: Annotated[int, typer.Option(help="Of times.")] = 15,
    threads: Annotated[int, typer.Option(help="Threads; 0: torch's choice.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/study_MODEL.json.")] = None,
    show: Annotated[bool, typer.Option("--tables", help="Print what was measured, measure nothing.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw accuracy against tokens, measure nothing.")] = None,
    plot_times: Annotated[Path | None, typer.Option(help="Draw accuracy against time, measure nothing.")] = None,
) -> None:
    """Measure what is missing, and print the tables."""
    if threads:
        torch.set_num_threads(threads)
    path = output or RESULTS / f"study_{folder.name}.json"
    for target, draw in ((plot, save_plot), (plot_times, save_time_plot)):
        if target:
            draw(json.loads(path.read_text()), target)
    if not (show or plot or plot_times):
        every = [
            "vitcop",
            "vitcop-wide",
            *(name for name in METHODS if name != "custom"),
            *(f"{name}+calibrated" for name in MERGING),
        ]
        study = Study(folder, path, questions, batch, Steps(Console(stderr=True)))
        with torch.no_grad():
            for label in time or ():
                study.time(label, method or every, backend, rounds)
            if not time:
                study.add("dense", iter([ViTCoPConfig.dense]))
                for label in share or list(SHARES):
                    for name in method or every:
                        study.add(f"{name} {label}", settings(name, SHARES[label]))
                for label in ablate or ():
                    study.ablate(label)
    print(tables(json.loads(path.read_text())))


if __name__ == "__main__":
    typer.run(main)
