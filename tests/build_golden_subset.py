"""Writes `tests/golden`: the part of the full golden data that is small enough to be committed.

python tests/build_golden_subset.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from golden import FULL, SUBSET
from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT, E2E_LIMIT = 11_000_000, 8_000_000  # bytes
VIC = (
    "rand_n64_p12", "rand_n33_p15", "rand_n9_p12", "rand_n1_p18", "all_equal_n64", "inf_index0_labelled",
    "inf_index0_cycle", "dup_block_n172", "nopos_n230",
)  # fmt: skip
LLM = {"l8_neg": (5,), "l8_pre1_txt1": (2, 5)}  # cases, and the layers whose keys and values they keep
VISION = "single_1_9"


def main() -> None:
    if not FULL.is_dir():
        raise SystemExit(f"the full golden data is not at {FULL}")
    shutil.rmtree(SUBSET, ignore_errors=True)
    vic()
    select()
    budget()
    vision()
    llm()
    e2e()
    if (whole := size_of(SUBSET / "e2e")) >= E2E_LIMIT:
        raise SystemExit(f"the cases from pixels to tokens take {whole} bytes and must stay below {E2E_LIMIT}")
    size = size_of(SUBSET)
    print(f"{SUBSET}: {size} bytes")
    if size >= LIMIT:
        raise SystemExit(f"the subset must stay below {LIMIT} bytes")


def vic() -> None:
    index, data = read("vic")
    index["cases"] = [case for case in index["cases"] if case["name"] in VIC]
    write("vic", index, {"vic": of_cases(index, data)})


def select() -> None:
    """Every special case, and every third of the rest, among the small ones."""
    index, data = read("select")
    small = [case for case in index["cases"] if case["n"] <= 60]
    plain = [case for case in small if case["note"].startswith(("sweep", "fix-up"))]
    special = {case["note"].split(" seed")[0]: case for case in small if case not in plain}
    chosen = [*plain[::3], *special.values()]
    index["cases"] = [case for case in index["cases"] if case in chosen]
    write("select", index, {"select": of_cases(index, data)})


def budget() -> None:
    index, data = read("budget")
    # 41 shares no factor with the strides of the settings.
    thin = {key: tensor if key.startswith("trunc/") else tensor[::41] for key, tensor in data.items()}
    index["rows"] = len(thin["v_token_num"])
    write("budget", index, {"budget": thin})


def vision() -> None:
    index, data = read("vision")
    index["cases"] = [case for case in index["cases"] if case["name"] == VISION]
    images = 1 + max(image for case in index["cases"] for image in case["images"])
    last = index["model"]["num_hidden_layers"] - 1  # features leave the layer before it
    kept = of_cases(index, data) | {key: tensor for key, tensor in data.items() if key.startswith("weights/")}
    kept = {key: t for key, t in kept.items() if f".layers.{last}." not in key and "post_layernorm" not in key}
    write("vision", index, {"vision": kept | {"pixel_values_int8": data["pixel_values_int8"][:images]}})


def llm() -> None:
    """Cases without the eager attention's copy, and those that are refused from their numbers alone."""
    index, _ = read("llm", None)
    index["cases"] = [case for case in index["cases"] if case["name"] in LLM or "file" not in case]
    used = {case["model"] for case in index["cases"] if "model" in case}
    index["models"] = {name: model for name, model in index["models"].items() if name in used}
    files = {Path(model["file"]).stem: load_file(FULL / "llm" / model["file"]) for model in index["models"].values()}
    for name, layers in LLM.items():
        data = load_file(FULL / "llm" / f"{name}.safetensors")
        unwanted = ("eager/", "sdpa/kv/", "sdpa/layer_input/")
        kept = {key: tensor for key, tensor in data.items() if not key.startswith(unwanted)}
        caches = [f"sdpa/kv/{side}_{layer}" for layer in layers for side in ("key", "value")]
        files[name] = kept | {key: data[key] for key in caches}
    write("llm", index, files)


def e2e() -> None:
    """Every case and the whole model: the one oracle that goes from pixels to tokens."""
    index, _ = read("e2e", None)
    names = [case["file"] for case in index["cases"] if "file" in case]
    files = {Path(name).stem: load_file(FULL / "e2e" / name) for name in [*names, "weights.safetensors"]}
    write("e2e", index, files)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def read(part: str, name: str | None = "") -> tuple[dict, dict[str, Tensor]]:
    index = json.loads((FULL / part / "index.json").read_text())
    return index, {} if name is None else load_file(FULL / part / f"{part}.safetensors")


def of_cases(index: dict, data: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {case["name"] for case in index["cases"]}
    return {key: tensor for key, tensor in data.items() if key.split("/")[0] in names}


def write(part: str, index: dict, files: dict[str, dict[str, Tensor]]) -> None:
    folder = SUBSET / part
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    for name, data in files.items():
        save_file({key: tensor.contiguous() for key, tensor in data.items()}, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
