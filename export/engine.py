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
from ..runtime import CompiledModel, Plan
from .contract import check_programs
from .manifest import FolderError, Manifest, ProgramSpec
from .ort import OrtProgram

Runner = Callable[..., Sequence[Tensor]]


class EngineFolder:
    """Provides the programs of a folder, loaded when first used and kept."""

    def __init__(self, folder: Path, manifest: Manifest, load: Callable[[Path, ProgramSpec], Runner], device: torch.device):
        self._folder, self.manifest, self._load = folder, manifest, load
        self.schedule, self.image = manifest.schedule, manifest.image
        self.device, self.dtype = device, getattr(torch, manifest.dtype)
        self._loaded: dict[str, Runner] = {}
        self._loading = threading.Lock()
        self._step: Runner | None = None

    def plan(self, batch: int, text: int, new_tokens: int, image: bool) -> Plan:
        """Rows of the exported profile. Raises InputError for a request beyond it."""
        held = self.manifest
        if batch != held.batch_size:
            raise InputError(
                f"{batch} sequences (prompts times beams), the engine was built for {held.batch_size}: export again"
            )
        if text > held.max_text_len:
            raise InputError(f"{text} text tokens in a prompt exceed max_text_len={held.max_text_len} of the engine")
        if new_tokens > held.max_new_tokens:
            raise InputError(f"max_new_tokens={new_tokens} exceeds max_new_tokens={held.max_new_tokens} of the engine")
        kept = self.schedule.image_tokens if image else 0
        if held.prompt_buckets is not None:
            rows = next(size for size in held.prompt_buckets if text <= size) + kept
        else:
            spans = sorted(spec.rows for spec in held.programs if spec.kind == _prefill_kind(image) and spec.rows)
            rows = next(max(least, text + kept) for least, most in spans if text + kept <= most)
        return Plan(rows, held.cache_rows, held.max_new_tokens)

    def default_new_tokens(self) -> int:
        """Room of a cache made by `forward`."""
        return self.manifest.max_new_tokens

    def vision(self, batch: int) -> Runner:
        """The vision program."""
        return self._get(self.manifest.program("vision"))

    def prefill(self, batch: int, rows: int, image: bool) -> Runner:
        """The prefill program for `rows` rows, or the text-only one."""
        return self._get(self.manifest.program(_prefill_kind(image), rows))

    def decode(self, batch: int, cache_rows: int) -> Runner:
        """The decode program; its new keys and values are written into the caches here, one row per layer and step."""
        if self._step is None:
            program = self._get(self.manifest.program("decode"))
            step = writing_rows(program, self.schedule.removed_rows())
            # A runner that can replay a whole step, the writes included, brings its own wrapper.
            graphed = getattr(program, "graphed", None)
            self._step = step if graphed is None else graphed(step)
        return self._step

    def bytes_per_step(self) -> int:
        """Bytes of keys and values that a decode step hands to the host and the host writes into the caches."""
        outputs = self.manifest.program("decode").outputs[1:]
        return sum(torch.Size(spec.shape).numel() for spec in outputs) * self.dtype.itemsize  # type: ignore[arg-type, misc]

    def _get(self, spec: ProgramSpec) -> Runner:
        if spec.file not in self._loaded:
            with self._loading:
                if spec.file not in self._loaded:
                    self._loaded[spec.file] = self._load(self._folder / spec.file, spec)
        return self._loaded[spec.file]


class EngineModel(CompiledModel):
    """Programs loaded from a folder that `vitcop_compile.export.export` wrote, with transformers' `generate()`.

    The batch size, the longest prompt and the number of new tokens are those of the export.
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


def _prefill_kind(image: bool) -> str:
    return "prefill" if image else "text"
