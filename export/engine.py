"""`EngineModel`: an engine folder with transformers' `generate()`."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ..backends import writing_rows
from ..errors import ConfigError, InputError, UnsupportedError
from ..families import FAMILIES
from ..host import Host, with_clips
from ..layout import Layout
from ..provider import Ask, Plan
from ..runtime import CompiledModel
from ..schedule import Schedule, Stage
from .contract import LEAST_TEXT, Wanted, are_of, check_programs
from .manifest import NAME, FolderError, Manifest, ProgramSpec
from .ort import OrtProgram

Runner = Callable[..., Sequence[Tensor]]
# What runs ONNX files; engines run in what they were built for.
RUNTIMES = ("onnxruntime", "openvino")


# Inputs whose axis of sequences is not the first, and those that have none: what a tower says of all its tiles.
_AXES: dict[str, int | None] = {"positions": 1, "removed": 1, "hidden": None, "score": None, "keys": None}


class EngineFolder:
    """Provides the programs of a folder, loaded when first used and kept.

    A program serves fewer images, segments or sequences than it takes as well, filled up with copies of the last; a decoding
    step takes as many as it was made for.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        host: Host,
        programs: Sequence[Wanted],
        load: Callable[[Path, ProgramSpec], Runner],
        device: torch.device,
    ):
        self._folder, self.manifest, self.host, self._load = folder, manifest, host, load
        # The smallest that is large enough is the first that is found.
        self._programs = sorted(programs, key=lambda program: program.size)
        self.position_dims = manifest.position_dims
        self.device, self.dtype = device, getattr(torch, manifest.dtype)
        self.schedule = manifest.schedule
        self._rows = manifest.cache_rows
        self._keys = {schedule.key for schedule in manifest.schedules}
        self._known: dict[tuple[Any, ...], Wanted] = {}
        self._schedules = {self.schedule.layout: self.schedule}
        self._loaded: dict[str, Runner] = {}
        self._around: dict[tuple[str, int], Runner] = {}
        self._loading = threading.Lock()

    def schedule_of(self, layout: Layout) -> Schedule:
        """That of a prompt with the images of `layout`."""
        if layout not in self._schedules:
            self._schedules[layout] = self.manifest.schedule_of(layout)
        return self._schedules[layout]

    def plan(self, ask: Ask) -> Plan:
        """Text rows of the exported profile, and the caches of the folder. Raises InputError for a request beyond it."""
        folder = self.manifest
        self._check_kind(ask)
        if ask.text > folder.max_text_len:
            raise InputError(f"{ask.text} text tokens in a prompt exceed max_text_len={folder.max_text_len} of the engine")
        if ask.held:
            self._check_room(ask)
        elif ask.new is not None and ask.new > folder.max_new_tokens:
            raise InputError(f"max_new_tokens={ask.new} exceeds max_new_tokens={folder.max_new_tokens} of the engine")
        if folder.prompt_buckets is None:
            return Plan(max(LEAST_TEXT, ask.text), self._rows)
        return Plan(next(size for size in folder.prompt_buckets if ask.text <= size), self._rows)

    def vision(self, images: int) -> Runner:
        """The vision program for so many images."""
        program = self._find("vision", (), images)
        return _filled_up(self._get(program.spec), program, images)

    def frames(self, frames: int) -> Runner:
        """The vision program for so many frames of videos that have an encoder of their own."""
        program = self._find("frames", (), frames)
        return _filled_up(self._get(program.spec), program, frames)

    def tower(self, tiles: int, slots: int) -> Runner:
        """The tower program for so many tiles or more: it says something of all that it takes."""
        program = self._find("tower", (slots,), tiles)
        return _filled_up(self._get(program.spec), program, program.size)

    def select(
        self, tiles: int, slots: int, segments: int, candidates: int, taps: int, stage: Stage | None, axes: int = 2
    ) -> Runner:
        """The program that selects from segments that are alike; axes: coordinates of a candidate's place."""
        program = self._find("select", (tiles, slots, candidates, taps, stage, axes), segments)
        return _filled_up(self._get(program.spec), program, segments)

    def prefill(self, batch: int, text: int, schedule: Schedule, rows: tuple[int, ...], filled: bool = False) -> Runner:
        """The prefill program for `text` text rows; its keys and values are written into the caches here."""
        return self._writing(self._find("prefill", (schedule.key, filled), batch, text), batch, filled)

    def extend(self, batch: int, tokens: int, rows: tuple[int, ...]) -> Runner:
        """The program for so many more tokens, 1 a decoding step; its new keys and values are written into the caches here."""
        kind = "decode" if tokens == 1 else "extend"
        return self._writing(self._find(kind, (), batch, tokens), batch, filled=True)

    def bytes_per_step(self) -> int:
        """Bytes of keys and values that a decode step hands to the host and the host writes into the caches, for the smallest
        batch."""
        outputs = self._find("decode", (), 1).spec.outputs[1:]
        return sum(torch.Size(spec.shape).numel() for spec in outputs) * self.dtype.itemsize  # type: ignore[arg-type, misc]

    def _find(self, kind: str, key: tuple[Any, ...], count: int, text: int | None = None) -> Wanted:
        """The smallest program that takes so many, and so much text. Every decoding step asks. Raises InputError."""
        asked = (kind, key, count, text)
        if asked in self._known:
            return self._known[asked]
        for program in self._programs:
            same = (program.kind, program.key) == (kind, key) and program.size >= count
            if same and (text is None or program.text[0] <= text <= program.text[1]):
                return self._known.setdefault(asked, program)
        most = {"vision": "images", "frames": "frames", "tower": "tiles", "select": "segments"}.get(kind, "sequences")
        raise InputError(
            f"the engine has no {kind} program for {count} {most} {f'of {key} ' if key else ''}: it was exported for "
            f"{self._prompts()} in batches of {self._batches()}; ask for those, or export again with layouts= and batch_size= "
            "of these"
        )

    def _check_kind(self, ask: Ask) -> None:
        """Raises InputError for what no program of a folder takes, whatever the numbers."""
        if ask.batch not in self.manifest.batch_sizes:
            raise InputError(
                f"{ask.batch} sequences (prompts times beams), the engine was built for {self._batches()}: export again"
            )
        for layout in ask.layouts:
            if layout and self.schedule_of(layout).key not in self._keys:
                raise InputError(
                    f"a prompt with images of {_tokens(layout)} tokens, the engine takes {self._prompts()}: resize or leave "
                    "out images, export again with layouts= of these, or call optimize(), whose model takes any"
                )
        if ask.held and ask.images and not self.manifest.later_images:
            raise InputError(
                "a later turn holds an image, the engine takes some in the first prompt alone: if these are the first of the "
                "conversation, pass all of that without a cache, export again with later_images=True, or call optimize()"
            )
        if ask.rows and ask.rows != self._rows:
            raise InputError(
                f"the cache has {ask.rows} rows by group of layers, the engine's have {self._rows}: a cache goes back to the "
                "model that returned it"
            )

    def _prompts(self) -> str:
        """What prompts may hold, in words."""
        return " or ".join(_tokens(schedule.layout) for schedule in self.manifest.schedules) + " tokens of images"

    def _batches(self) -> str:
        return " or ".join(map(str, self.manifest.batch_sizes))

    def _check_room(self, ask: Ask) -> None:
        """Raises InputError if a later turn and its new tokens do not fit behind what the caches hold."""
        visual = ask.visual or (0,) * len(ask.rows)
        free = min(rows - held - tokens for rows, held, tokens in zip(ask.rows, ask.held, visual, strict=True))
        new = ask.new or 1
        if ask.text + new > free:
            folder = self.manifest
            raise InputError(
                f"{ask.text} text tokens and {new} new ones do not fit into the {free} rows that are left of the engine's "
                f"max_text_len={folder.max_text_len} and max_new_tokens={folder.max_new_tokens}: ask for fewer, or export "
                "with more"
            )

    def _writing(self, program: Wanted, batch: int, filled: bool) -> Runner:
        name = (program.spec.file, batch)
        if name not in self._around:
            loaded = self._get(program.spec)
            around = _filled_up(loaded, program, batch)
            step = writing_rows(around, self.schedule.groups, filled=filled, told=self.schedule.told)
            # A runner that can replay a whole decoding step, the writes included, brings its own wrapper.
            graphed = getattr(loaded, "graphed", None) if program.kind == "decode" else None
            self._around.setdefault(name, step if graphed is None else graphed(step))
        return self._around[name]

    def _get(self, spec: ProgramSpec) -> Runner:
        if spec.file not in self._loaded:
            with self._loading:
                if spec.file not in self._loaded:
                    self._loaded[spec.file] = self._load(self._folder / spec.file, spec)
        return self._loaded[spec.file]


def _filled_up(program: Runner, wanted: Wanted, count: int) -> Runner:
    """A program for `count` of what it takes as many as `wanted` says, or more, of which so many results are given."""
    axes = [_AXES.get(spec.name, 0) for spec in wanted.spec.inputs]

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        filled = [
            tensor if axis is None or tensor.shape[axis] == wanted.size else _repeated(tensor, axis, wanted.size)
            for tensor, axis in zip(inputs, axes, strict=True)
        ]
        found = program(*filled)
        return found if count == wanted.size else [tensor[:count] for tensor in found]

    same = count == wanted.size and wanted.kind != "tower"
    return program if same else run


def _repeated(tensor: Tensor, axis: int, count: int) -> Tensor:
    """So many along an axis, by copies of the last."""
    last = tensor.narrow(axis, tensor.shape[axis] - 1, 1)
    shape = list(tensor.shape)
    shape[axis] = count - shape[axis]
    return torch.cat((tensor, last.expand(shape)), axis)


def _tokens(layout: Layout) -> str:
    """Tokens of the segments of a prompt, in words."""
    counts = [segment.tokens for segment in layout]
    return " + ".join(f"{len(list(run))} x {count}" for count, run in itertools.groupby(counts))


class EngineModel(CompiledModel):
    """Programs loaded from a folder that `vitcop_compile.export.export` wrote, with transformers' `generate()`.

    Batch sizes, what prompts may hold beside text, the longest turn and the room for new tokens are those of the export.
    """

    def __init__(self, engines: EngineFolder, config: Any, generation_config: GenerationConfig):
        super().__init__(engines, config, generation_config)
        self.engines = engines

    @property
    def manifest(self) -> Manifest:
        """What `vitcop.json` says."""
        return self.engines.manifest

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        verify: bool = True,
        threads: int | None = None,
        prepack: bool | None = None,
        exact: bool | None = None,
        runtime: str | None = None,
        device: str | None = None,
        precision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> EngineModel:
        """Opens an engine folder.

        verify: read every file once and compare SHA-256, not the sizes alone; runtime: of RUNTIMES, what runs ONNX files,
        onnxruntime by default; engines run in what they were built for; threads: of that runtime on a CPU, torch's number by
        default; exact: multiply int8 weights as floats, which every program of onnxruntime's then holds, and not by kernels
        that round the other factor to int8, too: slower, and what the graphs say to the last digits. onnxruntime's own is
        prepack: packed weights, faster, at the cost of a copy of the weights in every program, off by default, but for int8
        weights, which always are. OpenVINO's are device, by its own name, "CPU" by default; precision, "f32", "bf16" or
        "f16", what it computes in, by default the folder's dtype; cache_dir: where it keeps what it compiled, outside the
        folder, and to be trusted as code is. No pickle is read and no path outside the folder is followed.

        Raises FolderError for a folder that is not exactly as exported, UnsupportedError where its runtime, device or
        precision is missing, or the runtime has no kernels for its dtype, ConfigError for an option that the runtime does not
        have.
        """
        root = Path(folder)
        if not root.is_dir():
            raise FolderError(f"{root} is not a folder: pass what export() wrote")
        own: dict[str, Any] = {"device": device, "precision": precision, "cache_dir": cache_dir}
        check_runtime(runtime, {"prepack": prepack}, own)
        manifest = Manifest.read(root)
        if runtime is not None and manifest.product != "onnx":
            raise FolderError(
                f"the folder holds engines of {manifest.product}, which no other product runs: leave out "
                f"runtime={runtime!r}, or export(format='onnx')"
            )
        if manifest.product == "onnx" and runtime != "openvino" and manifest.dtype == "bfloat16":
            raise UnsupportedError(
                "the folder is of a model in bfloat16, for which onnxruntime has no kernels on a CPU: pass "
                "runtime='openvino', or export a model that was loaded with dtype=torch.float32"
            )
        manifest.verify(root, digests=verify)
        try:
            config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
            generation = GenerationConfig.from_pretrained(root, local_files_only=True)
        except Exception as error:  # with verify=False the files may hold anything
            raise FolderError(f"config.json or generation_config.json of {root} cannot be read: {error}") from None
        host = _host(manifest, config)
        programs = check_programs(manifest, host)
        load: Callable[[Path, ProgramSpec], Runner]
        where = torch.device("cpu")
        if runtime == "openvino":
            from .openvino import opener

            load = opener(root, manifest, threads=threads, exact=bool(exact), **own)
        elif manifest.product == "onnx":
            # Kernels for int8 weights want them packed: of others they take fifty times as long.
            packed = bool(manifest.quantised) and not exact
            load = partial(OrtProgram, threads=threads, prepack=bool(prepack) or packed, exact=bool(exact))
        else:
            from .tensorrt_runtime import loader

            where, load = loader(manifest)
        return cls(EngineFolder(root, manifest, host, programs, load, where), config, generation)


def check_runtime(runtime: str | None, onnxruntimes: dict[str, Any], openvinos: dict[str, Any]) -> None:
    """Raises UnsupportedError for an unknown runtime, ConfigError for an option, None where it is not given, of another."""
    if runtime is not None and runtime not in RUNTIMES:
        raise UnsupportedError(f"runtime={runtime!r} is unknown: use one of {', '.join(RUNTIMES)}")
    others, owner = (onnxruntimes, "onnxruntime") if runtime == "openvino" else (openvinos, "openvino")
    if given := [f"{name}={value!r}" for name, value in others.items() if value is not None]:
        raise ConfigError(f"{', '.join(given)}: an option of runtime={owner!r}, choose that or leave it out")


def _host(manifest: Manifest, config: Any) -> Host:
    """What the runtime knows of the images of a folder. Raises FolderError where config.json is not that of `vitcop.json`."""
    entry = FAMILIES.get(manifest.architecture)
    if entry is None:
        raise FolderError(f"{NAME}: architecture {manifest.architecture!r} is none of {', '.join(sorted(FAMILIES))}")
    try:
        host = entry.host(config, getattr(torch, manifest.dtype).itemsize)
        host = with_clips(host) if getattr(manifest.config, "clips", None) == "pooled" else host
    except Exception as error:  # a config of another model lacks whatever the family reads
        raise FolderError(f"config.json is not that of {manifest.architecture}: {error}") from None
    if host.shape != manifest.shape:
        raise FolderError(f"{NAME}: shape {manifest.shape} is not that of config.json, {host.shape}: export again")
    if not are_of(host, manifest.layouts):
        raise FolderError(f"{NAME}: layouts are none of {manifest.architecture}: export again")
    return host
