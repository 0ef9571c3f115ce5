"""The file a check compares with: settings, environment, and the facts and timed measures of every subject."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import AfterValidator, model_validator, with_config
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from ..bench import environment
from ..bench.stored import STRICT
from ..bench.stored import load as load_as
from ..bench.stored import save as save_text
from ..errors import ConfigError
from .compare import Measure, Timing, flatten
from .subject import Settings

FORMAT: Final = 1


@with_config(STRICT)
class Environment(TypedDict):
    """What facts and timings depend on."""

    processor: str
    threads: int
    torch: str
    transformers: str
    device: str


def _integers(facts: dict[str, Any]) -> dict[str, Any]:
    flatten(facts)
    return facts


@dataclass(frozen=True, config=STRICT)
class Record:
    """Facts and timed measures of one subject; no timed measures where only facts were stored."""

    facts: Annotated[dict[str, Any], AfterValidator(_integers)]
    timed: dict[Measure, Timing]


@dataclass(frozen=True, config=STRICT)
class Baseline:
    """shape: `ModelShape` as JSON has it; subjects: by preset."""

    format: Literal[1]
    settings: Settings
    environment: Environment
    shape: dict[str, Any]
    subjects: dict[str, Record]

    @model_validator(mode="after")
    def _check(self) -> Baseline:
        if self.subjects.keys() != set(self.settings.presets):
            raise ValueError(f"its subjects are not its presets, {', '.join(self.settings.presets)}")
        return self


def here(device: torch.device) -> Environment:
    """The environment that facts and timings of a model on `device` depend on."""
    found = environment()
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    found["device"] = f"{device.type} {name}"
    return {key: found[key] for key in Environment.__annotations__}  # type: ignore[return-value]


def versions(environment: Environment) -> str:
    """Torch and transformers; builds of one torch version trace alike."""
    return f"torch {str(environment['torch']).split('+')[0]}, transformers {environment['transformers']}"


def machine(environment: Environment) -> str:
    """What timings depend on."""
    return f"{environment['processor']}, {environment['threads']} threads, {environment['device']}"


def save(baseline: Baseline, path: Path) -> None:
    """Writes the file, aside first and then moved into place. Raises ConfigError."""
    save_text(json.dumps(dataclasses.asdict(baseline), indent=2) + "\n", path, ConfigError)


def load(path: Path) -> Baseline:
    """Reads what `save` wrote. Raises ConfigError for a missing file, another format, or numbers out of range."""
    if not path.exists():
        raise ConfigError(f"the baseline {path} does not exist: measure one with --update")
    return load_as(path, Baseline, ConfigError, "remove it and measure one anew with --update")
