"""The commands `export` and `run`: a folder of engines written, and asked."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from rich.text import Text
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, TextStreamer
from transformers.generation.streamers import BaseStreamer

from .. import picture, toy
from ..config import DEFAULT_PRESET
from ..errors import ConfigError, InputError
from ..export import EngineModel, FolderError, export
from ..export.engine import RUNTIMES
from ..export.manifest import DTYPES
from ..export.staging import check_target
from ..export.writer import FORMATS, check_layouts, check_options, check_weights_option
from ..host import Host
from ..layout import Layout
from ..methods.named import settings_from
from ..pipeline import optimize
from ..schedule import Method, resolve
from .shared import (
    ONE_METHOD_HELP,
    PRESET_NAMES,
    cannot_load,
    console,
    errors_as_lines,
    image_size_of,
    model_host,
    question_of,
    without_future_warnings,
)

# onnxruntime computes in float32 on a CPU; engines are built in half precision.
_DEFAULT_DTYPES = {"onnx": "float32", "tensorrt": "float16"}


@dataclass(frozen=True)
class _Asked:
    """What `export` was asked for."""

    model: str
    config: Method
    output_dir: Path
    format: str
    dtype: str
    batch_size: list[int]
    max_text_len: int
    max_new_tokens: int
    prompt_buckets: list[int] | None
    image_sizes: list[tuple[int, int]]
    images: list[int]
    later_images: bool
    opset: int
    weights: str | None


def export_command(
    model: Annotated[str, typer.Option(help="A folder or a model on the hub, of a supported family.")],
    output_dir: Annotated[Path, typer.Option(help="The folder to write; it appears whole or not at all.")],
    retention: Annotated[
        str, typer.Option(help=f"A published setting ({PRESET_NAMES}), or the share of the visual tokens to keep.")
    ] = DEFAULT_PRESET,
    method: Annotated[str | None, typer.Option(help=ONE_METHOD_HELP)] = None,
    format: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")] = "onnx",
    dtype: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DTYPES)}; default: float32 for onnx, float16 for tensorrt.")
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Sequences per call: prompts times beams, default 1; repeat, ascending.")
    ] = None,
    max_text_len: Annotated[int, typer.Option(help="Text tokens of the longest prompt.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(help="Cache rows for generated tokens.")] = 256,
    prompt_bucket: Annotated[
        list[int] | None, typer.Option(help="A static prompt length in place of a dynamic axis; repeat, ascending.")
    ] = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(help="WIDTHxHEIGHT of the images that prompts hold, where a model takes any size; repeat for several."),
    ] = None,
    images: Annotated[
        list[int] | None, typer.Option(help="Images of a prompt, all of one size, default 1; repeat for several counts.")
    ] = None,
    later_images: Annotated[bool, typer.Option(help="Whether turns after the first may hold images too.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 to 24.")] = 18,
    weights: Annotated[
        str | None,
        typer.Option(help="int8 rounds weights of linear layers, a scale for each output channel; default: as they are."),
    ] = None,
) -> None:
    """Write a pruned model as a folder of ONNX graphs or TensorRT engines."""
    with errors_as_lines(), without_future_warnings():
        asked = _Asked(
            model=model,
            config=settings_from(retention, method),
            output_dir=output_dir,
            format=format,
            dtype=_dtype(dtype, format),
            batch_size=batch_size or [1],
            max_text_len=max_text_len,
            max_new_tokens=max_new_tokens,
            prompt_buckets=prompt_bucket,
            image_sizes=[image_size_of(text) for text in image_size or ()],
            images=images or [1],
            later_images=later_images,
            opset=opset,
            weights=weights,
        )
        _check_before_loading(asked)
        start = time.perf_counter()
        folder, processor = _export(asked)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        console().print(Text(f"{folder}: {size / 2**20:,.1f} MiB, {time.perf_counter() - start:.0f} s"), soft_wrap=True)
        if processor is None:
            console().print(Text(f"{model} has no processor files: the folder answers in token ids", style="yellow"))


def run_command(
    folder: Annotated[Path, typer.Argument(help="What `export` wrote.")],
    prompt: Annotated[str, typer.Option(help="The question.")],
    image: Annotated[Path | None, typer.Option(help="A photograph; none for a question about nothing but text.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate; default: as many as the folder can.")] = None,
    verify: Annotated[bool, typer.Option(help="Compare the SHA-256 of every file first.")] = True,
    runtime: Annotated[
        str | None, typer.Option(help=f"What runs ONNX files: one of {', '.join(RUNTIMES)}; default: {RUNTIMES[0]}.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="OpenVINO's: CPU, GPU, NPU, ...; default: CPU.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="What OpenVINO computes in: f32, bf16 or f16; default: the folder's dtype.")
    ] = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Where OpenVINO keeps what it compiled, for the next start; default: nowhere.")
    ] = None,
) -> None:
    """Ask a folder of engines, and print the answer as it comes."""
    with errors_as_lines():
        if max_new_tokens is not None and max_new_tokens < 1:
            raise InputError(f"--max-new-tokens {max_new_tokens} is below 1: ask for 1 or more")
        photo = None if image is None else picture.load_image(image)
        chosen: dict[str, Any] = {"runtime": runtime, "device": device, "precision": precision, "cache_dir": cache_dir}
        engine = EngineModel.from_pretrained(folder, verify=verify, **chosen)
        inputs, streamer = _request(engine, folder, prompt, photo)
        names = ("input_ids", "attention_mask", *engine.engines.host.inputs)
        asked: dict[str, Any] = {name: inputs[name].to(engine.device) for name in names if name in inputs}
        new = engine.manifest.max_new_tokens if max_new_tokens is None else max_new_tokens
        engine.generate(**asked, max_new_tokens=new, do_sample=False, streamer=streamer)


class IdStreamer(BaseStreamer):
    """Prints token ids as they come, the prompt left out."""

    def __init__(self) -> None:
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then every token."""
        if self._prompt_seen:
            print(*value.flatten().tolist(), end=" ", flush=True)
        self._prompt_seen = True

    def end(self) -> None:
        """Ends the line."""
        print(flush=True)


def _dtype(name: str | None, format: str) -> str:
    chosen = name or _DEFAULT_DTYPES.get(format, "float32")
    if chosen not in DTYPES:
        raise ConfigError(f"--dtype {chosen!r} is unknown: use one of {', '.join(DTYPES)}")
    return chosen


def _check_before_loading(asked: _Asked) -> None:
    """Everything that can be refused before gigabytes of weights are loaded for nothing."""
    check_target(asked.output_dir)
    host = model_host(asked.model)
    prompts = check_layouts(host, _layouts(asked, host), f"--model {asked.model}")
    schedules = [resolve(asked.config, host.shape, tuple(itertools.chain(*images))) for images in prompts]
    numbers = (asked.batch_size, asked.max_text_len, asked.max_new_tokens)
    check_options(schedules, asked.format, *numbers, asked.prompt_buckets, asked.opset)
    check_weights_option(asked.weights, asked.format, getattr(torch, asked.dtype), asked.opset)
    if asked.format == "tensorrt":
        from ..export.tensorrt import finisher  # not above: an ONNX export needs none of it

        finisher(getattr(torch, asked.dtype))


def _layouts(asked: _Asked, host: Host) -> list[list[Layout]] | None:
    """What prompts may hold: so many images of each size; None if nothing is said of sizes, and one image is meant."""
    for count in asked.images:
        if count < 1:
            raise ConfigError(f"--images {count} is below 1: text needs none of them, ask for 1 or more")
    if not asked.image_sizes and not host.fixed:
        return None
    sizes = asked.image_sizes or [(1, 1)]  # of an image that any size is made to be
    return [[host.layout_of(*size, images=count)] * count for size in sizes for count in asked.images]


def _export(asked: _Asked) -> tuple[Path, Any]:
    """(folder, processor): the processor goes into the folder, None where the model has none."""
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(asked.model, dtype=getattr(torch, asked.dtype))
    except (OSError, ValueError, ImportError) as error:
        raise cannot_load(asked.model, error) from None
    try:
        processor = AutoProcessor.from_pretrained(asked.model)
    except (OSError, ValueError):
        processor = None
    # Programs are exported, never run here: the backend does not matter.
    optimized = optimize(model.eval(), asked.config, backend="eager")
    folder = export(
        optimized,
        asked.output_dir,
        format=asked.format,
        batch_size=asked.batch_size,
        max_text_len=asked.max_text_len,
        max_new_tokens=asked.max_new_tokens,
        prompt_buckets=asked.prompt_buckets,
        layouts=_layouts(asked, optimized.host),
        later_images=asked.later_images,
        opset=asked.opset,
        weights=asked.weights,
        processor=processor,
    )
    return folder, processor


def _request(engine: Any, folder: Path, prompt: str, photo: Image.Image | None) -> tuple[Any, BaseStreamer]:
    """What `generate` takes, and what prints its answer."""
    listed = engine.manifest.files
    if not {"processor_config.json", "preprocessor_config.json", "tokenizer_config.json"} & listed.keys():
        if engine.manifest.architecture != LlavaForConditionalGeneration.__name__:
            raise InputError(f"{folder} has no processor files: export with the processor of {engine.manifest.architecture}")
        # The bytes of the prompt stand in for a tokenizer, as in the demo.
        inputs = toy.request(question_of(None, prompt), photo or _blank(), engine.config)
        if photo is None:
            inputs = {"input_ids": inputs["input_ids"][inputs["input_ids"] != engine.engines.host.token_id][None]}
        return inputs, IdStreamer()
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise FolderError(f"the processor files of {folder} cannot be read: {str(error).splitlines()[0]}") from None
    question = question_of(processor, prompt, photo is not None)
    inputs = processor(images=photo, text=question, return_tensors="pt")
    return inputs, TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _blank() -> Image.Image:
    return Image.new("RGB", (8, 8))
