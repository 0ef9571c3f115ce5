"""The demo: one photograph through a dense and a pruned compiled model, measured there and then."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from . import kernels, picture, toy
from .backends import backend_of
from .cache import CACHE_NAME, PrunedCache, Selection
from .config import DEFAULT_PRESET, ViTCoPConfig
from .errors import ConfigError, InputError, UnsupportedError
from .explain import table
from .optimized import OptimizedModel
from .pipeline import optimize
from .progress import Steps

# Sizes of the stand-in for LLaVA-1.5: the image and its 576 patches are the real ones.
SMALL: dict[str, int] = {"vision_hidden": 256, "vision_layers": 4, "hidden": 512, "layers": 6, "vocab": 2048}
NOTE = "random weights: tokens mean nothing, times and shapes are real"
# A small model that was trained, with a picture and questions about it; there in a checkout, not in an installed package.
TRAINED = Path(__file__).parents[1] / "examples" / "models" / "llava"
_ASKED = "demo.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_TEXT = "USER: <image>\n{} ASSISTANT:"
_QUESTION = "Who is this, and what is the person wearing?"


@dataclass(frozen=True)
class Options:
    """What `vitcop-compile demo` was asked for. image None: a sample of what the model was made for; model None: the trained
    one, or where it is not there, or `random`, random weights.

    dtype None: float32 on the CPU, float16 on CUDA. max_new_tokens >= 1; rounds >= 1.
    """

    image: Path | None = None
    model: str | None = None
    preset: str = DEFAULT_PRESET
    backend: str = "inductor"
    prompt: str | None = None
    max_new_tokens: int = 32
    output: Path = Path("vitcop-demo.png")
    seed: int = 0
    dtype: str | None = None
    rounds: int = 5
    random: bool = False

    @property
    def trained(self) -> bool:
        """Whether the model is the trained one."""
        return self.model is None and not self.random and (TRAINED / "model.safetensors").is_file()


@dataclass
class Subject:
    """A model and a request for it. photo: as the model sees it; read: ids to text, None where text means nothing; more:
    further requests by question, with the right answer to each."""

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    photo: picture.Picture
    read: Callable[[list[int]], str] | None = None
    more: dict[str, tuple[dict[str, Tensor], str]] = field(default_factory=dict)

    @property
    def text_tokens(self) -> int:
        """Tokens of the prompt that are not image placeholders."""
        return int((self.inputs["input_ids"] != self.model.config.image_token_id).sum())


@dataclass
class Arm:
    """One compiled model and what was measured on it. Times in seconds, one per round; kv_bytes: as allocated."""

    name: str
    model: OptimizedModel
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    kv_bytes: int = 0
    selection: Selection = field(default_factory=Selection)


@dataclass(frozen=True)
class Report:
    """What the demo found."""

    dense: Arm
    pruned: Arm
    peak_bytes: int
    picture: Path


def run(options: Options, console: Console) -> Report:
    """The whole demo, printed to `console`. Raises VitcopError for options that cannot work, before anything slow."""
    config = ViTCoPConfig.preset(options.preset)
    backend_of(options.backend)
    _check(options)
    image = picture.load_image(options.image or (TRAINED / _asked()["picture"] if options.trained else None))
    steps = Steps(console)
    if options.trained:
        console.print(Text("A small LLaVA that was trained on pictures like this one (examples/README.md)."))
    elif options.model is None:
        console.print(Text(f"A LLaVA-1.5 architecture at small size, {NOTE}.", style="bold yellow"))
    if options.backend == "inductor" and not torch.cuda.is_available():
        kernels.begin()
    elsewhere = _elsewhere(options)
    try:
        return _run(options, config, image, elsewhere, steps, console)
    finally:
        if elsewhere is not None:
            elsewhere.kill()


def _run(
    options: Options,
    config: ViTCoPConfig,
    image: Image.Image,
    elsewhere: subprocess.Popen | None,
    steps: Steps,
    console: Console,
) -> Report:
    with steps.step("loading the model" if options.model or options.trained else "building the model"):
        subject = _subject(options, image)
    with steps.step("capturing and rewriting the graphs, dense and pruned"):
        pruned = optimize(subject.model, config, backend=options.backend)
        dense = optimize(subject.model, ViTCoPConfig.dense(), backend=options.backend, like=pruned)
        arms = [Arm("dense", dense), Arm("pruned", pruned)]
    console.print(table(config.schedule(arms[1].model.schedule.shape), subject.text_tokens))
    for arm in arms[::-1]:
        cache = _compile_prompt(arm, subject, options.max_new_tokens, steps)
        if elsewhere is not None and arm.name == "pruned":
            _join(elsewhere, steps, console)
        _compile_decode(arm, subject, options.max_new_tokens, cache, steps)
    measure(arms, subject, options, steps)
    report = Report(arms[0], arms[1], _peak_bytes(subject.model.device), options.output)
    console.print(_results(report, options, subject.model))
    _print_tokens(report, subject, console)
    if subject.more:
        console.print(_answers(arms, subject, options.max_new_tokens))
    with steps.step("drawing"):
        title = f"ViTCoP, preset {options.preset}" + ("" if subject.read else ", random weights")
        grid = report.pruned.model.schedule.shape.grid
        picture.save(picture.figure(subject.photo, report.pruned.selection, grid, title), options.output)
    console.print(f"picture: {options.output}", soft_wrap=True, markup=False)
    return report


def measure(arms: list[Arm], subject: Subject, options: Options, steps: Steps) -> None:
    """Fills in the arms. They take turns, so that a slow spell of the machine meets both; a first round is not counted."""
    rounds = options.rounds + 1
    with steps.bar(f"measuring {options.rounds} rounds", rounds * len(arms)) as advance:
        for at in range(rounds):
            for arm in arms if at % 2 else arms[::-1]:
                _measure_once(arm, subject, options.max_new_tokens, counts=at > 0)
                advance()


def _measure_once(arm: Arm, subject: Subject, new_tokens: int, counts: bool) -> None:
    # The prompt comes first, then every token, each on the host: the device has finished it.
    stamps = [time.perf_counter()]
    clock = SimpleNamespace(put=lambda _: stamps.append(time.perf_counter()), end=lambda: None)
    arguments: dict[str, Any] = subject.inputs | {"streamer": clock, "max_new_tokens": new_tokens, "do_sample": False}
    out: Any = arm.model.generate(**arguments, return_dict_in_generate=True)  # type: ignore[misc]
    if not counts:
        return
    start, _, first, *later = stamps
    arm.ttft.append(first - start)
    arm.tpot += [(later[-1] - first) / len(later)] if later else []
    arm.tokens = out.sequences[0, subject.inputs["input_ids"].shape[1] :].tolist()
    cache: PrunedCache = out[CACHE_NAME]
    arm.kv_bytes = sum(buffer.nbytes for buffer in cache.buffers)
    arm.selection = cache.selection


def _check(options: Options) -> None:
    picture.require_matplotlib()
    place(options.dtype)
    for name in ("max_new_tokens", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"{name}={getattr(options, name)} is below 1: ask for 1 or more")
    folder = options.output.absolute().parent
    if not folder.is_dir() or options.output.is_dir():
        raise InputError(f"{options.output} cannot be written: name a file in an existing folder")


def place(dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where a command's model goes, and in what: CUDA if there is one; `dtype`, by default float32 on the CPU and float16 on
    CUDA. Raises ConfigError for a dtype that is not among `DTYPES`."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device, DTYPES[dtype or ("float16" if device.type == "cuda" else "float32")]


def _subject(options: Options, image: Image.Image) -> Subject:
    if options.model:
        return _pretrained(options, options.model, image)
    return _trained(options, image) if options.trained else _random(options, image)


def _asked() -> dict[str, Any]:
    """The trained model's picture, and questions about it with the right answers: {"picture": name, "questions": {...}}."""
    return json.loads((TRAINED / _ASKED).read_text())


def _trained(options: Options, image: Image.Image) -> Subject:
    """The trained model; asked about its own picture, all questions that come with that."""
    known = {} if options.image else _asked()["questions"]
    questions = {options.prompt: ""} if options.prompt else known or {"what is at the center?": ""}
    first, *others = questions
    subject = _pretrained(dataclasses.replace(options, prompt=first), str(TRAINED), image)
    if len(questions) > 1:
        processor = AutoProcessor.from_pretrained(TRAINED)
        for question in (first, *others):
            batch = processor(images=image, text=_TEXT.format(question), return_tensors="pt").to(subject.model.device)
            subject.more[question] = {name: batch[name] for name in subject.inputs}, questions[question]
    return subject


def _random(options: Options, image: Image.Image) -> Subject:
    device, dtype = place(options.dtype)
    model = toy.small_llava(**SMALL, seed=options.seed, dtype=dtype).to(device)  # type: ignore[arg-type]
    inputs = toy.request(_TEXT.format(options.prompt or _QUESTION), image, model.config)
    processor = toy.processor(model.config)
    photo = picture.photograph(inputs["pixel_values"][0], processor.image_mean, processor.image_std)
    return Subject(model, {name: value.to(device) for name, value in inputs.items()}, photo)


def _pretrained(options: Options, name: str, image: Image.Image) -> Subject:
    device, dtype = place(options.dtype)
    try:
        processor = AutoProcessor.from_pretrained(name)
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise UnsupportedError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from error
    prompt = options.prompt or _QUESTION
    text = _TEXT.format(prompt)
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(images=image, text=text, return_tensors="pt").to(device)
    names = ("input_ids", "attention_mask", "pixel_values")
    how = processor.image_processor
    photo = picture.photograph(batch["pixel_values"][0], how.image_mean, how.image_std)
    return Subject(model.to(device).eval(), {name: batch[name] for name in names}, photo, processor.decode)


def _compile_prompt(arm: Arm, subject: Subject, new_tokens: int, steps: Steps) -> PrunedCache:
    """Makes the programs that `generate` will ask for first, by the same call."""
    with steps.step(f"{arm.name}: compiling vision, prefill", lambda: _made(arm)):
        cache = PrunedCache(max_length=subject.inputs["input_ids"].shape[1] + new_tokens)
        arm.model(**subject.inputs, past_key_values=cache)
    return cache


def _compile_decode(arm: Arm, subject: Subject, new_tokens: int, cache: PrunedCache, steps: Steps) -> None:
    """Makes the one that it will ask for then."""
    if new_tokens > 1:
        with steps.step(f"{arm.name}: compiling decode", lambda: _made(arm)):
            arm.model(input_ids=subject.inputs["input_ids"][:, :1], past_key_values=cache)


def _made(arm: Arm) -> str:
    return f"[{', '.join(key[0] for key in arm.model.compiled) or 'nothing'} made]"


def _elsewhere(options: Options) -> subprocess.Popen | None:
    """A process that compiles the dense programs, and the pruned decode, meanwhile: this one finds them where they are kept.

    One thread of Python compiles one program at a time, whatever cores there are. None where nothing is compiled, where there
    is one core, on a GPU, and for a model that would have to be loaded twice.
    """
    if options.backend != "inductor" or options.model or (os.cpu_count() or 1) < 2 or torch.cuda.is_available():
        return None
    names = ("backend", "preset", "prompt", "seed", "dtype", "max_new_tokens", "random")
    asked = json.dumps({name: getattr(options, name) for name in names})
    command = [sys.executable, "-m", "vitcop_compile.demo", asked]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _join(process: subprocess.Popen, steps: Steps, console: Console) -> None:
    with steps.step("all else: compiled by a second process meanwhile"):
        errors = process.communicate()[1]
    if process.returncode:
        said = (errors.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        console.print(Text(f"the second process failed, all is compiled here: {said}", style="yellow"))


def _compile_elsewhere(asked: dict[str, Any]) -> None:
    """What the second process does: everything of a demo that these programs depend on."""
    options = Options(**asked)
    kernels.begin()
    subject = _subject(options, picture.load_image(TRAINED / _asked()["picture"] if options.trained else None))
    dense = optimize(subject.model, ViTCoPConfig.dense(), backend=options.backend)
    arm, steps = Arm("dense", dense), Steps(Console(quiet=True))
    _compile_decode(arm, subject, options.max_new_tokens, _compile_prompt(arm, subject, options.max_new_tokens, steps), steps)
    pruned = optimize(subject.model, ViTCoPConfig.preset(options.preset), backend=options.backend, like=dense)
    if pruned.on_demand.kept is not None and options.max_new_tokens > 1:
        request = (1, subject.text_tokens, [pruned.host.layout])
        pruned.keep([request], options.max_new_tokens, processes=1, kinds=("extend",))


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # no such thing on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _results(report: Report, options: Options, model: PreTrainedModel) -> Table:
    on = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"measured on {on}: {options.backend}, {str(model.dtype)[6:]}"
    out = Table(title=title)
    out.add_column("")
    for name in ("dense", "pruned", "ratio"):
        out.add_column(name, justify="right")
    arms = (report.dense, report.pruned)
    visual = [arm.model.schedule.mean_visual_tokens() for arm in arms]
    out.add_row("visual tokens / layer", *(f"{v:.1f}" for v in visual), f"{visual[0] / visual[1]:.2f}")
    for text, times in (
        ("TTFT: vision + prefill", [arm.ttft for arm in arms]),
        ("TPOT: decode", [arm.tpot for arm in arms]),
    ):
        if all(times):
            out.add_row(text, *map(_milliseconds, times), f"{median(times[0]) / median(times[1]):.2f}")
    kv = [arm.kv_bytes for arm in arms]
    out.add_row("KV cache, allocated", *(f"{v / 2**20:.2f} MiB" for v in kv), f"{kv[0] / kv[1]:.2f}")
    out.caption = (
        f"TTFT: time to first token; TPOT: time per token after it; median of {options.rounds} rounds (min-max). "
        f"Peak memory of the whole run, both arms: {report.peak_bytes / 2**20:,.0f} MiB"
    )
    return out


def _milliseconds(times: list[float]) -> str:
    middle, least, most = (1e3 * value for value in (median(times), min(times), max(times)))
    digits = 0 if middle >= 100 else 1
    return f"{middle:.{digits}f} ms ({least:.{digits}f}-{most:.{digits}f})"


def _answers(arms: list[Arm], subject: Subject, new_tokens: int) -> Table:
    """Every question of the picture to both, with the right answer: where they differ, pruning changed what is seen."""
    assert subject.read is not None
    out = Table(title="the same picture, dense and pruned")
    for name in ("question", "right", "dense", "pruned", ""):
        out.add_column(name)
    for question, (inputs, right) in subject.more.items():
        said = []
        for arm in arms:
            out_ids: Any = arm.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[misc]
            said.append(_text_of(subject, out_ids[0, inputs["input_ids"].shape[1] :].tolist()))
        out.add_row(question, right, *said, Text("differ", style="bold red") if said[0] != said[1] else "")
    return out


def _text_of(subject: Subject, tokens: list[int]) -> str:
    """The answer without what ends it."""
    assert subject.read is not None
    ends = subject.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return subject.read([token for token in tokens if token not in ends]).strip()


def _print_tokens(report: Report, subject: Subject, console: Console) -> None:
    for arm in (report.dense, report.pruned):
        console.print(Text(f"{arm.name} tokens: {arm.tokens}"))
        if subject.read:
            console.print(Text(f"{arm.name} text: {_text_of(subject, arm.tokens)}"))
    if subject.read is None:
        console.print(Text(f"({NOTE})", style="dim"))


if __name__ == "__main__":
    _compile_elsewhere(json.loads(sys.argv[1]))
