"""The process that measures one architecture: `python -m vitcop_compile.regress.cuda out.json`, what is asked for on stdin."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

from transformers import LlavaForConditionalGeneration

from ...errors import RewriteError
from . import generated
from .subject import Asked, See, config_of, pass_through, presets


def measure(asked: Asked) -> dict[str, Any]:
    """{preset: {program: facts}}. Raises RewriteError for a kernel that was not built."""
    generated.install(asked.architecture)
    found: dict[str, dict[str, Any]] = {}

    def see(preset: str) -> See:
        facts = found.setdefault(preset, {})

        def seeing(name: str, program: Any, given: Any) -> None:
            made = generated.generate(program, given)
            left = generated.unbuilt(made, asked.architecture)
            if left:
                raise RewriteError(f"{name}: {', '.join(left)} were not built for {asked.architecture}")
            facts[name] = generated.facts_of(made) | generated.graph_facts(program, given)

        return seeing

    config = config_of(asked.model, asked.sizes)
    pass_through(LlavaForConditionalGeneration, config, presets(asked.presets), asked.request, see)
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    asked = json.load(sys.stdin)
    found = measure(Asked(**asked | {"presets": tuple(asked["presets"])}))
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
