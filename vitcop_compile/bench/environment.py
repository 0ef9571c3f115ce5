"""What the numbers depend on: code, versions, hardware."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers


def environment() -> dict[str, Any]:
    """Commit, date (UTC), versions, processor, cores, threads, GPU and its power limit in watts (None without one)."""
    on_gpu, processors = torch.cuda.is_available(), Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.*)$", processors.read_text() if processors.exists() else "", re.MULTILINE)
    return {
        "commit": commit(Path(__file__).parent.parent / "__init__.py"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": version("onnxruntime") if importlib.util.find_spec("onnxruntime") else None,
        "openvino": version("openvino") if importlib.util.find_spec("openvino") else None,
        "platform": platform.platform(),
        "processor": named[1] if named else platform.processor() or platform.machine(),
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
    git = ["git", "-C", str(file.parent)]
    if _said([*git, "ls-files", "--error-unmatch", file.name]) is None:
        return None
    found = _said([*git, "rev-parse", "HEAD"])
    return f"{found}-dirty" if found and _said([*git, "status", "--porcelain", "--", ":(top)*.py"]) else found


def _power_limit() -> float | None:
    """Of the GPU that torch uses, which need not be the driver's first. None where nvidia-smi cannot say."""
    gpu = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    found = _said(["nvidia-smi", "-i", gpu, "--query-gpu=power.limit", "--format=csv,noheader,nounits"])
    return float(found) if found and found.replace(".", "").isdigit() else None


def _said(command: Sequence[str]) -> str | None:
    """What a program prints, None where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
