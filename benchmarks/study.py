"""Accuracy of every method on the trained models: `python benchmarks/study.py examples/models/llava`.

For each method and budget the questions of `examples/see` that no model has learned from, by kind, with 95 % intervals; the
same questions everywhere. What is done is kept in benchmarks/results/study_NAME.json after every setting, and not done again.
`--tables` prints it."""

from __future__ import annotations

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
from examples.see.evaluate import Example, answers, held_out, interval
from examples.see.models import load_processor
from examples.see.questions import KINDS
from vitcop_compile import ConfigError, ViTCoPConfig, optimize
from vitcop_compile.methods import METHODS
from vitcop_compile.methods.named import method_from
from vitcop_compile.progress import Steps
from vitcop_compile.schedule import Method

RESULTS = Path(__file__).parent / "results"
# Mean visual tokens over the decoder's layers, as a share of all: the field's 192, 128, 64, 32 and 16 of 576.
SHARES = {"192": 1 / 3, "128": 2 / 9, "64": 1 / 9, "32": 1 / 18, "16": 1 / 36}
# In proportion to a decoder of a quarter of 32 layers, and earlier where a budget asks for that, as others have done.
LAYERS = {
    "fastv": (":layer=1",),
    "dart": (":layer=1",),
    "pyramiddrop": ("", ":layers=4:8:16"),
    "sparsevlm": ("",),
    "v2drop": ("", ":layers=4:8:16"),
    "vscan": ("", ":middle=8"),
}


def settings(name: str, share: float) -> Iterator[tuple[str, Method]]:
    """(text, method) in the order in which they are to be tried: the first that a model can have is taken."""
    if name == "vitcop":
        preset = min((0.5, 0.3333), (0.4, 0.2222), (0.3, 0.1111), key=lambda known: abs(known[1] - share))
        # Below the published budgets the vision stage keeps the published multiple of what is left on average.
        for ratio in (preset[0], 2.7 * share):
            if ratio <= preset[0]:
                text = f"vitcop:retention={share},vision_ratio={ratio:.4f}"
                yield text, method_from(text)
        return
    for more in LAYERS.get(name, ("",)):
        text = f"{name}{more}{',' if more else ':'}retention={share}"
        yield text, method_from(text)


def ablations(share: float) -> dict[str, Method]:
    """ViTCoP at one budget with one thing changed."""
    base: dict[str, Any] = {"vision_ratio": 0.3, "center_ratio": 0.12, "retention": share}
    found = {
        "published": {},
        "positions kept": {"positions": "original"},
        "keys raw": {"keys": "raw"},
        "keys centered": {"keys": "centered"},
        "vision stage half as many": {"vision_ratio": 0.2},
        "vision stage twice as many": {"vision_ratio": 0.6},
        "few clusters": {"center_ratio": 0.03},
        "many clusters": {"center_ratio": 0.4},
        "deep stage later": {"deep_divisor": 2},
        "deep stage off": {"deep_divisor": 1},
        "earlier vision layer": {"vision_layer": -3},
    }
    return {name: ViTCoPConfig(**(base | changed)) for name, changed in found.items()}


def examples_of(model: Any, number: int) -> dict[str, list[Example]]:
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


def measured(fast: Any, processor: Any, name: str, asked: Mapping[str, list[Example]], batch: int) -> dict[str, Any]:
    """One row."""
    (layout, *_) = [fast.host.layout] if fast.host.fixed else fast.layouts_of(**_request(fast, processor, name, asked))[0]
    schedule = fast.schedule_of(layout)
    right = accuracy(fast, processor, name, asked, batch)
    return {
        "accuracy": summary(right),
        "right": {kind: "".join("01"[one] for one in own) for kind, own in right.items()},
        "mean_tokens": schedule.mean_visual_tokens(),
        "of": schedule.patches,
        "kv_bytes": schedule.kv_bytes(16),
        "flop_ratio": schedule.flop_ratio(16),
        "method": json.loads(fast.pruning_config.to_json()),
    }


def _request(fast: Any, processor: Any, name: str, asked: Mapping[str, list[Example]]) -> dict[str, Any]:
    from examples.see.models import prompt

    example = asked[KINDS[0]][0]
    given = processor(images=[[example.image]], text=[prompt(name, example.question)], return_tensors="pt")
    names = ("input_ids", *fast.host.inputs)
    return {key: given[key] for key in names if key in given}


def wanted(shares: list[str], methods: list[str]) -> Iterator[tuple[str, str, Iterator[tuple[str, Method]]]]:
    """(row, budget, what to try)."""
    for share in shares:
        for name in methods:
            yield name, share, settings(name, SHARES[share])


def run(
    folder: Path, output: Path, number: int, shares: list[str], methods: list[str], batch: int, ablate: bool, steps: Steps
) -> dict[str, Any]:
    """Everything that is missing in `output`."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    name, processor = model.config.model_type, load_processor(folder)
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {"model": name, "asked": number, "rows": {}}
    if found["asked"] != number:
        raise ConfigError(
            f"{output} holds {found['asked']} questions of each kind, {number} are asked for: give another --output"
        )
    asked = examples_of(model, number)

    def add(row: str, tries: Iterator[tuple[str, Method]]) -> None:
        if row in found["rows"]:
            return
        why = "nothing was tried"
        for _, method in tries:
            try:
                fast = optimize(model, method, backend="eager")
                with steps.step(row):
                    found["rows"][row] = measured(fast, processor, name, asked, batch)
                break
            except ConfigError as error:
                why = str(error)
        else:
            found["rows"][row] = {"left_out": why}
        aside = output.with_suffix(".partial")
        aside.write_text(json.dumps(found, indent=1) + "\n")
        aside.replace(output)

    add("dense", iter([("dense", ViTCoPConfig.dense())]))
    for method, share, tries in wanted(shares, methods):
        add(f"{method} {share}", tries)
    if ablate:
        for label, config in ablations(SHARES["64"]).items():
            add(f"ablation 64: {label}", iter([(label, config)]))
    return found


def table(found: Mapping[str, Any]) -> str:
    """Markdown: a row a method and budget, a column a kind; intervals of all."""
    kinds = [*KINDS, "all"]
    lines = ["| | tokens | " + " | ".join(kinds) + " | 95 % | KV |", "|---|---:|" + "---:|" * (len(kinds) + 2)]
    for row, values in found["rows"].items():
        if "left_out" in values:
            continue
        own = values["accuracy"]
        cells = [f"{100 * own[kind]['share']:.0f}" for kind in kinds]
        span = f"{100 * own['all']['low']:.0f} to {100 * own['all']['high']:.0f}"
        kv = f"{values['kv_bytes'] / 2**20:.2f} MiB"
        lines.append(f"| {row} | {values['mean_tokens']:.0f} of {values['of']} | {' | '.join(cells)} | {span} | {kv} |")
    return "\n".join(lines)


def main(
    folder: Annotated[Path, typer.Argument(help="A trained model of examples/see.")],
    questions: Annotated[int, typer.Option(help="Of each kind.")] = 100,
    share: Annotated[list[str] | None, typer.Option(help=f"Budgets, of {', '.join(SHARES)}; default: all.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods; default: all.")] = None,
    batch: Annotated[int, typer.Option(help="Questions at a time.")] = 10,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also ViTCoP with one thing changed.")] = False,
    threads: Annotated[int, typer.Option(help="Threads; 0: torch's choice.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Default: benchmarks/results/study_MODEL.json.")] = None,
    tables: Annotated[bool, typer.Option("--tables", help="Print what was measured, measure nothing.")] = False,
) -> None:
    """Measure what is missing, and print the table."""
    if threads:
        torch.set_num_threads(threads)
    path = output or RESULTS / f"study_{folder.name}.json"
    if not tables:
        every = ["vitcop", *(name for name in METHODS if name != "custom")]
        with torch.no_grad():
            run(folder, path, questions, share or list(SHARES), method or every, batch, ablate, Steps(Console(stderr=True)))
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    typer.run(main)
