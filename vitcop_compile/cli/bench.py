"""The commands `bench` and `plot`: dense against pruned against what else could be run, measured and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..config import DEFAULT_PRESET, PRESETS
from ..errors import ConfigError
from ..methods.named import method_from
from .shared import (
    DEFAULT_RETENTION,
    METHOD_HELP,
    PRESET_NAMES,
    WIDE_TABLE_WIDTH,
    console,
    errors_as_lines,
    methods_asked,
    without_future_warnings,
)

_NONE = "none"
_FAMILIES = "llava, internvl, qwen2_vl, qwen2_5_vl"
# What is measured unless options say otherwise: in a few minutes on two cores, and as in the README.
_QUICK = {"presets": (DEFAULT_PRESET,), "layers": 4, "vision_layers": 3, "rounds": 5}
# Of a family whose vision side is two programs, which take longer to compile: decoding is the same step as LLaVA's.
_QUICK_STAGES = ("vision", "select", "prefill", "ttft")
_FULL = {"presets": tuple(PRESETS), "layers": 12, "vision_layers": 8, "rounds": 15}


def _or(name: str) -> str:
    return f"{_QUICK[name]}, with --full {_FULL[name]}"


def bench_command(
    preset: Annotated[
        list[str] | None,
        typer.Option(help=f"Published settings to measure: {PRESET_NAMES}; default: {DEFAULT_PRESET}, with --full all."),
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Backends to measure; default: inductor.")] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(help="Arms to compare with, in the same rounds; default: stock_compile; none: nothing but dense."),
    ] = None,
    family: Annotated[str, typer.Option(help=f"Family of the model: {_FAMILIES}.")] = "llava",
    hidden: Annotated[int, typer.Option(help="Width of the language model.")] = 1024,
    layers: Annotated[int | None, typer.Option(help=f"Layers of the language model; default: {_or('layers')}.")] = None,
    vision_hidden: Annotated[int, typer.Option(help="Width of the vision encoder.")] = 1024,
    vision_layers: Annotated[
        int | None, typer.Option(help=f"Layers of the vision encoder; default: {_or('vision_layers')}.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"Measured beside presets. {METHOD_HELP}")] = None,
    batch: Annotated[int, typer.Option(help="Prompts per call.")] = 1,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels of a side of an image, or frame; default: 336 for llava, 448 else.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images in a prompt.")] = 1,
    frames: Annotated[int, typer.Option(help="Frames of a video in a prompt, in place of images.")] = 0,
    text_tokens: Annotated[int, typer.Option(help="Text tokens of a prompt, beside those of its images.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Cache rows for new tokens.")] = 64,
    rounds: Annotated[int | None, typer.Option(help=f"Measured rounds; default: {_or('rounds')}.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    weights: Annotated[str, typer.Option(help="float, or int8: linear layers by torchao.")] = "float",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory: Annotated[
        bool, typer.Option("--memory", help="Also run each arm alone in a process, for its peak memory.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="All settings at the README's size: some ten minutes more.")] = False,
    json: Annotated[Path | None, typer.Option(help="Where to write environment and rows.")] = None,
) -> None:
    """Measure dense and pruned programs of a random LLaVA, stage by stage, in rounds interleaved with other arms."""
    with errors_as_lines(), without_future_warnings():
        from .. import bench  # not above: other commands start sooner without it

        given = {"presets": tuple(preset or ()) or None, "layers": layers, "vision_layers": vision_layers, "rounds": rounds}
        chosen: dict[str, Any] = (_FULL if full else _QUICK) | {k: value for k, value in given.items() if value is not None}
        presets, rounds = chosen.pop("presets"), chosen.pop("rounds")
        configs = {name: method_from(name, retention=DEFAULT_RETENTION) for name in methods_asked(method or ())}
        if method and not preset:
            presets = ()
        size = image_size or bench.IMAGE_SIZES.get(family, 336)  # an unknown family is refused with its case
        common: dict[str, Any] = {
            "vision_hidden": vision_hidden,
            "image_size": size,
            "dtype": dtype,
            "weights": weights,
            "device": device,
            "family": family,
        }
        shape = bench.Shape(hidden=hidden, **common, **chosen)
        asked = (presets, batch, text_tokens, new_tokens, _against(against), configs)
        stages = bench.STAGES if full or family == "llava" else _QUICK_STAGES
        cases = [
            bench.Case(shape, name, *asked, stages=stages, images=images, frames=frames) for name in backend or ["inductor"]
        ]
        if json is not None:
            bench.check_target(json)
        results = bench.run(cases, rounds=rounds, memory=memory)
        out = console(WIDE_TABLE_WIDTH)
        out.print(bench.table(results))
        if not full:
            out.print(Text("--full measures every setting on a larger model, as in the README", style="dim"))
        if json is not None:
            bench.write(results, json)


def plot_command(
    results: Annotated[Path, typer.Argument(help="What `bench --json` wrote.")],
    output_dir: Annotated[Path, typer.Option(help="Where the pictures go; made if it is missing.")],
    format: Annotated[str, typer.Option(help="png or svg.")] = "png",
) -> None:
    """Draw results: latency against retention, where the time goes, and the KV cache as it grows."""
    with errors_as_lines():
        from ..bench import plot, read

        for path in plot.draw_all(read(results), output_dir, format):
            console().print(Text(str(path)), soft_wrap=True)


def _against(arms: list[str] | None) -> tuple[str, ...]:
    if arms is None:
        return ("stock_compile",)
    if _NONE in arms and len(arms) > 1:
        raise ConfigError(f"--against {_NONE} was given with others: choose either")
    return () if arms == [_NONE] else tuple(arms)
