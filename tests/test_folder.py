"""Engine folders in bad hands: whatever was done to one, it is refused by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import models
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vitcop_compile.export import EngineModel, FolderError

from vitcop_compile.errors import VitcopError

FILES = ("vision.onnx", "prefill.onnx", "extend.onnx", "decode.onnx", "weights.bin", "config.json", "generation_config.json")
NAME = "vitcop.json"
WRONG: list[Any] = [None, True, -1, 0, 1.5, "x", "", [], {}, ["x"], {"x": 1}, [[]], 10**40, [None]]


@pytest.fixture(scope="module")
def good() -> Path:
    """A folder as exported. Nobody writes into it."""
    return folders.folder("dynamic")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "f")


def refused(folder: Path, match: str | None = None, **options: Any) -> None:
    """The folder is not opened; if it were, the test would fail rather than run it."""
    with pytest.raises(FolderError, match=match) as caught:
        EngineModel.from_pretrained(folder, **options)
    assert str(caught.value) and isinstance(caught.value, VitcopError)


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / NAME).read_text())


def write(folder: Path, values: Any, seal: bool = True) -> None:
    """Writes `vitcop.json`; `seal` gives it the digest of its new content, as a careful forger would."""
    if seal and isinstance(values, dict):
        values = {key: value for key, value in values.items() if key != "digest"}
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        values |= {"digest": hashlib.sha256(text.encode()).hexdigest()}
    (folder / NAME).write_text(json.dumps(values))


def reseal(folder: Path, name: str) -> None:
    """Enters a changed file with its new size and digest."""
    values, data = manifest_of(folder), (folder / name).read_bytes()
    values["files"][name] = [hashlib.sha256(data).hexdigest(), len(data)]
    write(folder, values)


def test_a_good_folder_opens_and_runs(copy: Path) -> None:
    write(copy, manifest_of(copy))  # sealing here is the sealing there
    for verify in (True, False):
        model = EngineModel.from_pretrained(copy, verify=verify)
        assert model.generate(models.prompt(2, 3), pixel_values=models.pixels(), max_new_tokens=2).shape == (1, 71)
    assert manifest_of(copy) == manifest_of(folders.folder("dynamic"))


# Files


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 0.5, -1])
def test_a_flipped_byte(name: str, where: float, copy: Path) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(where * len(data)) if where >= 0 else -1] ^= 1
    (copy / name).write_bytes(data)
    refused(copy, f"{name} does not have the SHA-256")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 0.5, -1])
def test_a_truncated_file(name: str, kept: float, copy: Path) -> None:
    size = (copy / name).stat().st_size
    os.truncate(copy / name, int(kept * size) if kept >= 0 else size - 1)
    refused(copy, rf"{name} has \d+ bytes, {size} were written")
    refused(copy, rf"{name} has \d+ bytes, {size} were written", verify=False)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_or_longer_file(name: str, copy: Path) -> None:
    with (copy / name).open("ab") as stream:
        stream.write(b"\0")
    refused(copy, f"{name} has .* the file is truncated or replaced")
    (copy / name).unlink()
    refused(copy, f"{name} is missing")
    (copy / name).mkdir()
    refused(copy, f"{name} is missing")


@pytest.mark.parametrize("name", [*FILES, NAME])
def test_a_link(name: str, copy: Path, good: Path) -> None:
    """A link is refused even where it leads to the very same bytes."""
    (copy / name).unlink()
    (copy / name).symlink_to(good / name)
    refused(copy, f"{name} is a symbolic link")
    refused(copy, f"{name} is a symbolic link", verify=False)


@pytest.mark.parametrize("pair", [(a, b) for i, a in enumerate(FILES[:4]) for b in FILES[:i]])
def test_swapped_files(pair: tuple[str, str], copy: Path) -> None:
    first, second = ((copy / name).read_bytes() for name in pair)
    (copy / pair[0]).write_bytes(second)
    (copy / pair[1]).write_bytes(first)
    refused(copy, "the file is truncated or replaced|the file was changed or swapped")
    # With their digests made right the files still do not fit their places.
    for name in pair:
        reseal(copy, name)
    model = EngineModel.from_pretrained(copy)
    with pytest.raises(FolderError, match=r"has .* vitcop\.json says"):
        for spec in model.manifest.programs:
            model.engines._get(spec)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/passwd", "sub/../../weights.bin", "missing.bin"])
def test_weights_elsewhere(location: str, copy: Path, good: Path) -> None:
    """A graph whose weights lie outside the folder, well sealed: onnxruntime must not follow it."""
    (copy.parent / "weights.bin").write_bytes((good / "weights.bin").read_bytes())
    graph = onnx.load(copy / "decode.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (copy / "decode.onnx").write_bytes(graph.SerializeToString())
    reseal(copy, "decode.onnx")
    model = EngineModel.from_pretrained(copy)
    with pytest.raises(FolderError, match=r"decode.onnx cannot be loaded by onnxruntime"):
        model.engines._get(model.manifest.program("decode"))


def test_a_broken_graph_that_nobody_hashed(copy: Path) -> None:
    size = (copy / "vision.onnx").stat().st_size
    (copy / "vision.onnx").write_bytes(b"\xff" * size)
    refused(copy, "SHA-256")
    model = EngineModel.from_pretrained(copy, verify=False)
    with pytest.raises(FolderError, match=r"vision\.onnx cannot be loaded"):
        model.generate(models.prompt(2, 3), pixel_values=models.pixels(), max_new_tokens=2)
    (copy / "config.json").write_bytes(b"[" * (copy / "config.json").stat().st_size)
    refused(copy, "config.json or generation_config.json .* cannot be read", verify=False)


# vitcop.json


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"format_version": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b"[]", "holds a list: an object is expected"),
        (b"null", "holds a NoneType"),
        (b"{}", "format_version None cannot be read, this package reads 2 and 3"),
        (b'{"format_version": true}', "format_version True cannot be read"),
        (b'{"format_version": 1, "old": 1}', "format_version 1 cannot be read, this package reads 2 and 3: export again"),
        (b'{"format_version": 4, "new": 1}', "format_version 4 cannot be read, this package reads 2 and 3"),
        (b'{"format_version": [2]}', r"format_version \[2\] cannot be read"),
        (b'{"format_version": 2}', "fields .* are missing"),
        (b'{"format_version": 2, "novelty": 1, "b": 2}', r"unknown fields \['b', 'novelty'\]; the folder may need a newer"),
    ],
)
def test_other_manifests(data: bytes, message: str, copy: Path) -> None:
    (copy / NAME).write_bytes(data)
    refused(copy, message)


def test_no_manifest(copy: Path, tmp_path: Path) -> None:
    (copy / NAME).unlink()
    refused(copy, f"holds no {NAME}")
    os.mkfifo(copy / NAME)  # reading it would wait for ever
    refused(copy, f"holds no {NAME}")
    refused(tmp_path / "nowhere", "is not a folder")
    refused(copy / "weights.bin", "is not a folder")


FIELDS = [
    "product", "architecture", "config", "shape", "layouts", "later_images", "position_dims", "dtype", "batch_sizes",
    "max_text_len", "prompt_buckets", "max_new_tokens", "opset", "kv_rows", "programs", "quantised", "versions", "files",
    "schedules", "format_version", "digest",
]  # fmt: skip


def test_all_fields_are_damaged_below(good: Path) -> None:
    assert set(FIELDS) == manifest_of(good).keys()


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_removed_changed_or_retyped(field: str, copy: Path) -> None:
    values = manifest_of(copy)
    write(copy, {key: value for key, value in values.items() if key != field}, seal=field != "digest")
    refused(copy)
    for wrong in WRONG:
        if (field, wrong) in (("versions", {}), ("prompt_buckets", None), ("quantised", [])):
            continue  # what a folder may say
        write(copy, values | {field: wrong}, seal=field != "digest")
        refused(copy)
        write(copy, values | {field: wrong}, seal=False)
        refused(copy)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inner for place in ((*path, key), *places(part, (*path, key)))]


def replaced(value: Any, path: tuple, new: Callable[[Any], Any]) -> Any:
    """A copy of a JSON value with another value at `path`; `new` gets the old one, and `...` removes it."""
    if not path:
        return new(value)
    copied = value.copy()
    copied[path[0]] = replaced(value[path[0]], path[1:], new)
    if copied[path[0]] is ...:
        del copied[path[0]]
    return copied


def may_say(path: tuple, wrong: Any) -> bool:
    """Whether a well-sealed value is one that a folder may hold: versions, and settings that no shape depends on."""
    if path[0] == "versions":
        return isinstance(wrong, str) or wrong == {} or (wrong is ... and len(path) == 2)
    return path[0] == "config"


@given(data=st.data())
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_value_anywhere(data: st.DataObject, good: Path, copy: Path) -> None:
    """Another type at any depth, sealed or not, is refused: as a FolderError, and before any program is loaded."""
    values = manifest_of(good)
    path = data.draw(st.sampled_from(places(values)))
    wrong = data.draw(st.sampled_from([..., *WRONG]))
    damaged = replaced(values, path, lambda _: wrong)
    if json.dumps(damaged) == json.dumps(values):
        return
    write(copy, damaged, seal=False)
    refused(copy)
    if path[0] == "digest":
        return
    write(copy, damaged)
    if may_say(path, wrong):
        with contextlib.suppress(FolderError):
            EngineModel.from_pretrained(copy)
    else:
        refused(copy)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_byte_of_the_manifest(data: st.DataObject, good: Path, copy: Path) -> None:
    text = bytearray((good / NAME).read_bytes())
    at = data.draw(st.integers(0, len(text) - 1))
    text[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != text[at]))
    (copy / NAME).write_bytes(text)
    try:
        same = json.loads(text) == manifest_of(good)  # white space means nothing
    except (ValueError, RecursionError):
        same = False
    if not same:
        refused(copy)


@pytest.mark.parametrize(
    "name", ["../f/weights.bin", "/etc/passwd", "a/../../b", "", "a\\b", "C:x", "a\0b", "./../x", "nowhere.bin", "\ud800"]
)
def test_names_stay_inside(name: str, copy: Path) -> None:
    values = manifest_of(copy)
    values["files"][name] = [hashlib.sha256(b"").hexdigest(), 0]
    write(copy, values)
    refused(copy)
    values = manifest_of(copy)
    values["programs"][0]["file"] = name
    write(copy, values)
    refused(copy)


def test_unlisted_files_are_named(copy: Path) -> None:
    for name in ("decode.onnx", "config.json"):
        values = manifest_of(copy)
        del values["files"][name]
        write(copy, values)
        refused(copy, rf"files \['{name}'\] have no checksum")
        reseal(copy, name)
