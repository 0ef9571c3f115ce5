"""The table of what is supported, made of the tests that say so."""

from __future__ import annotations

from pathlib import Path

import pytest

COLUMNS = (
    "image",
    "several",
    "video",
    "batch",
    "turns",
    "beams",
    "pruned by hand",
    "inductor",
    "onnxruntime",
    "openvino",
    "folder",
    "RTX build",
)
FAMILIES = {
    "llava": "LLaVA-1.5", "next": "LLaVA-NeXT", "onevision": "LLaVA-OneVision", "next_video": "LLaVA-NeXT-Video",
    "video_llava": "Video-LLaVA", "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL",
    "glm4v": "GLM-4V", "internvl": "InternVL", "idefics3": "Idefics3", "smolvlm": "SmolVLM", "mistral3": "Mistral3",
    "gemma3": "Gemma3",
}  # fmt: skip
_HEAD = """# What is supported

Made of the tests that are marked with what they cover, by

```
pytest --collect-only -q -o addopts= --support-table=docs/support.md
```

and compared with them by `pytest tests/test_support.py`. A cell counts the tests behind it, which the list below names; an
empty one has none, whether or not it works. Where nothing is pruned, tests compare with the stock model; in the column "pruned
by hand" with stock layers that are; in the columns of other backends with either, or with eager; "onnxruntime" and
"openvino" are the backend of that name, or a folder that it runs.

"""


def covered(items: list[pytest.Item]) -> dict[tuple[str, str], set[str]]:
    """(family, column) -> names of tests. Raises for a mark that names no family or no column."""
    found: dict[tuple[str, str], set[str]] = {}
    for item in items:
        for mark in item.iter_markers("covers"):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            family = mark.kwargs.get("family") or params.get("name")
            columns = [params["backend"] if column == "backend" else column for column in mark.args]
            for column in columns:
                if column == "eager":
                    continue
                if family not in FAMILIES or column not in COLUMNS:
                    raise pytest.UsageError(f"{item.nodeid} covers {column!r} of {family!r}: no such cell")
                found.setdefault((family, column), set()).add(item.nodeid.split("[")[0])
    return found


def table(items: list[pytest.Item]) -> str:
    """The page."""
    found = covered(items)
    lines = [_HEAD + "| model | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for family, title in FAMILIES.items():
        cells = [str(len(found[family, column])) if (family, column) in found else "" for column in COLUMNS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    for family, title in FAMILIES.items():
        lines += ["", f"**{title}**", ""]
        lines += [
            f"- {column}: {', '.join(f'`{name}`' for name in sorted(found[family, column]))}"
            for column in COLUMNS
            if (family, column) in found
        ]
    return "\n".join(lines) + "\n"


def write(items: list[pytest.Item], path: Path) -> None:
    """The page, aside first and then moved into place."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(table(items))
    aside.replace(path)
