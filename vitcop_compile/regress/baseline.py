"""The file a check compares with: settings, environment, and the facts and timed measures of every subject."""

from __future__ import annotations

import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bench import environment
from ..errors import ConfigError
from .compare import MEASURES, Timing, check_timing, flatten
from .subject import Settings, check_settings

FORMAT = 1
_KEYS = {"format", "settings", "environment", "shape", "subjects"}
_ENVIRONMENT = ("processor", "threads", "device", "torch", "transformers")


@dataclass(frozen=True)
class Record:
    """Facts and timed measures of one subject; no timed measures where only facts were stored."""

    facts: dict[str, Any]
    timed: dict[str, Timing]


@dataclass(frozen=True)
class Baseline:
    """environment: processor, threads, device, torch, transformers; shape: `ModelShape` as a dict; subjects: by preset."""

    settings: Settings
    environment: dict[str, Any]
    shape: dict[str, Any]
    subjects: dict[str, Record]


def here(device: torch.device) -> dict[str, Any]:
    """The environment that facts and timings of a model on `device` depend on."""
    found = environment()
    name = platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {key: found[key] for key in _ENVIRONMENT if key in found} | {"device": f"{device.type} {name}"}


def versions(environment: dict[str, Any]) -> str:
    """Torch and transformers; builds of one torch version trace alike."""
    return f"torch {str(environment['torch']).split('+')[0]}, transformers {environment['transformers']}"


def machine(environment: dict[str, Any]) -> str:
    """What timings depend on."""
    return f"{environment['processor']}, {environment['threads']} threads, {environment['device']}"


def save(baseline: Baseline, path: Path) -> None:
    """Writes the file, aside first and then moved into place."""
    content = {"format": FORMAT} | dataclasses.asdict(baseline)
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(json.dumps(content, indent=2) + "\n")
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise ConfigError(f"the baseline {path} cannot be written: {error.strerror or error}") from None


def load(path: Path) -> Baseline:
    """Reads what `save` wrote. Raises ConfigError for a missing file, another format, or numbers out of range."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"the baseline {path} does not exist: measure one with --update") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"the baseline {path} cannot be read: {error}") from None
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise ConfigError(f"the baseline {path} has format {version!r}, this package reads {FORMAT}: remove it, then --update")
    if content.keys() != _KEYS:
        raise ConfigError(f"the baseline {path} holds {', '.join(sorted(content))}, not {', '.join(sorted(_KEYS))}")
    settings = _settings(path, content["settings"])
    if not isinstance(content["environment"], dict) or content["environment"].keys() != set(_ENVIRONMENT):
        raise ConfigError(f"the baseline {path}: its environment does not name {', '.join(_ENVIRONMENT)}")
    if not isinstance(content["subjects"], dict) or content["subjects"].keys() != set(settings.presets):
        raise ConfigError(f"the baseline {path}: its subjects are not its presets, {', '.join(settings.presets)}")
    if not isinstance(content["shape"], dict):
        raise ConfigError(f"the baseline {path}: its shape is {content['shape']!r}, not a model's")
    subjects = {name: _record(path, name, entry) for name, entry in content["subjects"].items()}
    return Baseline(settings, content["environment"], content["shape"], subjects)


def _settings(path: Path, entry: Any) -> Settings:
    names = {field.name for field in dataclasses.fields(Settings)}
    if not isinstance(entry, dict) or entry.keys() != names or not isinstance(entry["presets"], list):
        raise ConfigError(f"the baseline {path}: its settings do not name {', '.join(sorted(names))}")
    settings = Settings(**entry | {"presets": tuple(entry["presets"])})
    check_settings(settings)
    return settings


def _record(path: Path, name: str, entry: Any) -> Record:
    if not isinstance(entry, dict) or entry.keys() != {"facts", "timed"} or not isinstance(entry["timed"], dict):
        raise ConfigError(f"the baseline {path}: the subject {name} does not hold facts and timed measures")
    flatten(entry["facts"])
    unknown = entry["timed"].keys() - set(MEASURES)
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ConfigError(f"the baseline {path}: {name} times {names}: known are {', '.join(MEASURES)}")
    timed = {what: check_timing(f"the baseline {path}: {name} {what}", value) for what, value in entry["timed"].items()}
    return Record(entry["facts"], timed)
