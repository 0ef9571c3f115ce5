"""What the numbers depend on: code, versions, hardware."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers


def environment() -> dict[str, Any]:
    """Commit, date (UTC), versions, processor, cores, threads, GPU and its power limit in watts (None without one)."""
    on_gpu = torch.cuda.is_available()
    return {
        "commit": commit(Path(__file__).parent.parent / "__init__.py"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": _version("onnxruntime"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "gpu_power_limit_w": _power_limit() if on_gpu else None,
    }


def hardware(environment: dict[str, Any]) -> str:
    """The device of the results' environment in a few words, for a title."""
    if environment.get("device") == "cuda":
        limit = environment.get("gpu_power_limit_w")
        return environment["gpu"] + (f", {limit:.0f} W" if limit is not None else "")
    threads = environment["threads"]
    return f"{environment['processor']}, {threads} thread{'s' * (threads > 1)}"


def commit(file: Path) -> str | None:
    """The commit of the checkout that tracks `file`, with "-dirty" where its Python files differ; None outside of one.

    Files that are no code do not count: results written by one benchmark would mark those of the next.
    """
    # An installed package may lie inside a checkout of something else, which says nothing about it.
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    found = _git(file.parent, "rev-parse", "HEAD")
    changes = _git(file.parent, "status", "--porcelain", "--", ":(top)*.py")
    return found if not found or not changes else f"{found}-dirty"


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _power_limit() -> float | None:
    """Of the GPU that torch uses, which need not be the driver's first. None where nvidia-smi cannot say."""
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = ["nvidia-smi", "-i", gpu, "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
