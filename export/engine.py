"""`EngineModel`: an engine folder with transformers' `generate()`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from ..backends import writing_rows
from ..errors import InputError
from ..host import FixedImages
from ..layout import Layout
from ..provider import Ask, Plan
from ..runtime import CompiledModel
from ..schedule import Schedule, Stage
from .contract import LEAST_TEXT, check_programs
from .manifest import FolderError, Manifest, ProgramSpec
from .ort import OrtProgram

Runner = Callable[..., Sequence[Tensor]]


class EngineFolder:
    """Provides the programs of a folder, loaded when first used and kept.

    Every program takes a whole batch: all of its prompts hold one image, or none does.
    """

    def __init__(self, folder: Path, manifest: Manifest, load: Callable[[Path, ProgramSpec], Runner], device: torch.device):
        self._folder, self.manifest, self._load = folder, manifest, load
        self.host = FixedImages(manifest.shape, manifest.image.token_id, manifest.image.pixel_shape)
        self.position_dims = manifest.position_dims
        self.device, self.dtype = device, getattr(torch, manifest.dtype)
        self.schedule = manifest.schedule
        self._schedules = {self.schedule.layout: self.schedule}
        self._loaded: dict[str, Runner] = {}
        self._around: dict[str, Runner] = {}
        self._loading = threading.Lock()

    def schedule_of(self, layout: Layout) -> Schedule:
        """That of a prompt with the images of `layout`, of which programs take one at most."""
        if layout not in self._schedules:
            self._schedules[layout] = self.manifest.config.schedule(self.manifest.shape, layout)
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
            return Plan(max(LEAST_TEXT, ask.text), folder.cache_rows)
        return Plan(next(size for size in folder.prompt_buckets if ask.text <= size), folder.cache_rows)

    def vision(self, images: int) -> Runner:
        """The vision program, for fewer images than it takes as well: beams see those of their prompt once."""
        size, program = self.manifest.batch_size, self._get(self.manifest.program("vision"))
        if images > size:
            self._check_batch(images)
        if images == size:
            return program

        def padded(pixels: Tensor) -> Sequence[Tensor]:
            filled = torch.cat((pixels, pixels[-1:].expand(size - images, *pixels.shape[1:])))
            return [found[:images] for found in program(filled)]

        return padded

    def tower(self, tiles: int, slots: int) -> Runner:
        """None: an image is one input of the encoder, whose tokens are its own."""
        raise InputError("the engine has no program for images that are put together behind the encoder")

    def select(self, tiles: int, slots: int, segments: int, candidates: int, taps: int, stage: Stage | None) -> Runner:
        """None, as `tower`."""
        return self.tower(tiles, slots)

    def prefill(self, batch: int, text: int, schedule: Schedule, rows: tuple[int, ...], filled: bool = False) -> Runner:
        """The prefill program for `text` text rows; its keys and values are written into the caches here."""
        self._check_batch(batch)
        spec = self.manifest.program("prefill", text + schedule.image_tokens)
        return self._writing(spec, filled=False)

    def extend(self, batch: int, tokens: int, rows: tuple[int, ...]) -> Runner:
        """The program for so many more tokens, 1 a decoding step; its new keys and values are written into the caches here."""
        self._check_batch(batch)
        spec = self.manifest.program("decode") if tokens == 1 else self.manifest.program("extend", tokens)
        return self._writing(spec, filled=True)

    def bytes_per_step(self) -> int:
        """Bytes of keys and values that a decode step hands to the host and the host writes into the caches."""
        outputs = self.manifest.program("decode").outputs[1:]
        return sum(torch.Size(spec.shape).numel() for spec in outputs) * self.dtype.itemsize  # type: ignore[arg-type, misc]

    def _check_kind(self, ask: Ask) -> None:
        """Raises InputError for what no program of a folder takes, whatever the numbers."""
        self._check_batch(ask.batch)
        if ask.images > 1:
            raise InputError(
                f"{ask.images} images in a prompt, the engine takes one: ask about each alone, or call optimize(), whose "
                "model takes several"
            )
        if not ask.alike:
            raise InputError(
                "some prompts of the batch hold an image and others none, the engine takes a batch of one kind: ask in a "
                "request for each kind, or call optimize(), whose model takes both at once"
            )
        if ask.held and ask.images:
            raise InputError(
                "a later turn holds an image, the engine takes one in the first prompt alone: if it is the first of the "
                "conversation, pass all of that without a cache, or call optimize(), whose model takes images in every turn"
            )
        if ask.rows and ask.rows != self.manifest.cache_rows:
            raise InputError(
                f"the cache has {ask.rows} rows by group of layers, the engine's have {self.manifest.cache_rows}: a cache "
                "goes back to the model that returned it"
            )

    def _check_batch(self, batch: int) -> None:
        size = self.manifest.batch_size
        if batch != size:
            raise InputError(f"{batch} sequences (prompts times beams), the engine was built for {size}: export again")

    def _check_room(self, ask: Ask) -> None:
        """Raises InputError if a later turn and its new tokens do not fit behind what the caches hold."""
        free = min(rows - held for rows, held in zip(ask.rows, ask.held, strict=True))
        new = ask.new or 1
        if ask.text + new > free:
            folder = self.manifest
            raise InputError(
                f"{ask.text} text tokens and {new} new ones do not fit into the {free} rows that are left of the engine's "
                f"max_text_len={folder.max_text_len} and max_new_tokens={folder.max_new_tokens}: ask for fewer, or export "
                "with more"
            )

    def _writing(self, spec: ProgramSpec, filled: bool) -> Runner:
        if spec.file not in self._around:
            program = self._get(spec)
            step = writing_rows(program, self.schedule.groups, filled=filled)
            # A runner that can replay a whole decoding step, the writes included, brings its own wrapper.
            graphed = getattr(program, "graphed", None) if spec.kind == "decode" else None
            self._around.setdefault(spec.file, step if graphed is None else graphed(step))
        return self._around[spec.file]

    def _get(self, spec: ProgramSpec) -> Runner:
        if spec.file not in self._loaded:
            with self._loading:
                if spec.file not in self._loaded:
                    self._loaded[spec.file] = self._load(self._folder / spec.file, spec)
        return self._loaded[spec.file]


class EngineModel(CompiledModel):
    """Programs loaded from a folder that `vitcop_compile.export.export` wrote, with transformers' `generate()`.

    The batch size, the longest turn and the room for new tokens are those of the export. Prompts of a batch hold one image
    each, or none; turns after the first are text.
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
        cls, folder: str | Path, *, verify: bool = True, threads: int | None = None, prepack: bool = False
    ) -> EngineModel:
        """Opens an engine folder; the runtime is the one the folder was built for.

        verify: read every file once and compare SHA-256, not the sizes alone; threads: of onnxruntime, torch's number by
        default; prepack: onnxruntime's packed weights, faster, at the cost of a copy of the weights in every program. No
        pickle is read and no path outside the folder is followed. Raises FolderError for a folder that is not exactly as
        exported, UnsupportedError where its runtime or device is missing.
        """
        root = Path(folder)
        if not root.is_dir():
            raise FolderError(f"{root} is not a folder: pass what export() wrote")
        manifest = Manifest.read(root)
        manifest.verify(root, digests=verify)
        try:
            config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
            generation = GenerationConfig.from_pretrained(root, local_files_only=True)
        except Exception as error:  # with verify=False the files may hold anything
            raise FolderError(f"config.json or generation_config.json of {root} cannot be read: {error}") from None
        load: Callable[[Path, ProgramSpec], Runner]
        if manifest.product == "onnx":
            check_programs(manifest)
            device = torch.device("cpu")
            load = partial(OrtProgram, threads=threads, prepack=prepack)
        else:
            from .tensorrt_runtime import loader

            device, load = loader(manifest)
        return cls(EngineFolder(root, manifest, load, device), config, generation)
