"""OpenVINO GenAI's side of benchmarks/peers.py, in an environment of its own: `python peers_genai.py convert MODEL FOLDER
FORMAT` writes what GenAI loads, `python peers_genai.py` serves it. Nothing of this package is imported: the environment has
other versions of what it needs.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from peers_protocol import peak_around, question, serve

PACKAGES = ("openvino", "openvino-genai", "optimum-intel", "transformers", "torch", "nncf")
_PRECISIONS = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # two tokens and the placeholders


def convert(model: str, folder: str, format: str) -> None:
    """Writes the Hugging Face model in the folder `model` as OpenVINO IR with weights in `format`, "fp16" or "int8", its
    tokenizer included: what `optimum-cli export openvino --task image-text-to-text --weight-format FORMAT` does."""
    from optimum.commands.optimum_cli import main

    asked = ["export", "openvino", "--model", model, "--task", "image-text-to-text", "--weight-format", format, folder]
    sys.argv = ["optimum-cli", *asked]
    main()
    if not (Path(folder) / "openvino_vision_embeddings_merger_model.xml").exists():
        sys.exit("the conversion left no vision encoder")


class Pipeline:
    """VLMPipeline under the commands of a worker."""

    def __init__(self) -> None:
        self._pipe: Any = None
        self._given: dict[str, Any] = {}

    def build(self, folder: str, threads: int, side: int, text: int, tokens: int, arms: dict[str, int]) -> dict[str, Any]:
        """Loads the folder. side: pixels of a side of the picture; text, tokens: lengths of prompt and answer; arms: the
        `pruning_ratio` of each, in percent."""
        import openvino
        import openvino_genai

        self._given = {"side": side, "text": text, "tokens": tokens, "arms": arms}
        # As a user would: its defaults, but for the number of threads.
        self._pipe = openvino_genai.VLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
        core = openvino.Core()
        flags = {
            name: _words(core.get_property("CPU", name))
            for name in ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "OPTIMIZATION_CAPABILITIES")
        }
        versions = {name: _version(name) for name in PACKAGES}
        computed = _PRECISIONS.get(flags["INFERENCE_PRECISION_HINT"], flags["INFERENCE_PRECISION_HINT"])
        return {"versions": versions, "precision": computed, "flags": flags | {"INFERENCE_NUM_THREADS": threads}}

    def answer(self, arm: str, seed: int, ids: bool = False) -> dict[str, Any]:
        """One answer about picture and prompt number `seed`, as GenAI's own metrics have it. ids: also the tokens, from a
        streamer, which costs time. Raises RuntimeError where it is not of the length asked for."""
        import numpy as np
        import openvino
        import openvino_genai

        given = self._given
        config = self._pipe.get_generation_config()
        config.max_new_tokens = config.min_new_tokens = given["tokens"]
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        config.pruning_ratio = given["arms"][arm]
        picture = np.random.default_rng(seed).integers(0, 256, (1, given["side"], given["side"], 3), dtype=np.uint8)
        prompt, found = IMAGE + question(seed, given["text"] - 2), list[int]()

        class Streamer(openvino_genai.StreamerBase):
            def write(self, token: Any) -> Any:
                found.extend([token] if isinstance(token, int) else token)
                return openvino_genai.StreamingStatus.RUNNING

            def end(self) -> None: ...

        more = {"streamer": Streamer()} if ids else {}

        def call() -> Any:
            start = time.perf_counter()
            result = self._pipe.generate(prompt, images=[openvino.Tensor(picture)], generation_config=config, **more)
            return result.perf_metrics, 1e3 * (time.perf_counter() - start)

        (metrics, whole), peak = peak_around(call)
        tokens = metrics.get_num_generated_tokens()
        if tokens != given["tokens"] or len(metrics.raw_metrics.m_new_token_times) != tokens:
            raise RuntimeError(f"generated {tokens} tokens, not {given['tokens']}")
        return {
            "ttft_ms": metrics.get_ttft().mean,
            "tpot_ms": metrics.get_tpot().mean,
            "answer_ms": whole,
            "tokens": tokens,
            "visual_tokens": metrics.get_num_input_tokens() - given["text"],
            "before_language_model_ms": metrics.get_prepare_embeddings_duration().mean,
            "peak_bytes": peak,
            "ids": found,
        }


def _words(value: Any) -> str:
    """A property: types by their names, lists without brackets."""
    if isinstance(value, list):
        return " ".join(value)
    return value.get_type_name() if hasattr(value, "get_type_name") else str(value)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["convert"]:
        convert(*sys.argv[2:])
    else:
        pipeline = Pipeline()
        serve({"build": pipeline.build, "answer": pipeline.answer})
