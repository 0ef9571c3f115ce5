"""The command that serves: what it opens, and what it refuses before anything is loaded."""

from __future__ import annotations

import builtins
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import doors
import families
import folders
import pytest
import test_cli
from doors import Spoken
from transformers import GenerationConfig
from vitcop_compile.export.engine import EngineModel

from vitcop_compile import ConfigError, UnsupportedError, ViTCoPConfig
from vitcop_compile.cli.serving_options import named_sources
from vitcop_compile.serve import prompts as serve_prompts
from vitcop_compile.serve.opening import Opening, ends_of
from vitcop_compile.serve.server import Server

checkpoint = test_cli.checkpoint
invoke, error_of = test_cli.invoke, test_cli.error_of


@pytest.fixture(scope="module")
def spoken_for(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with processor files."""
    folder = tmp_path_factory.mktemp("processor")
    doors.processor().save_pretrained(folder)
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What the command makes: slots as they were asked for, and doors, which are opened and shut again."""
    seen = SimpleNamespace(slots=[], schedulers=[], doors=[])

    def slots(model: Any, count: int, **more: Any) -> Any:
        seen.slots.append((model, count, more))
        return seen.slots[-1]

    def scheduler(slots: Any, **more: Any) -> Spoken:
        seen.schedulers.append((slots, more))
        return Spoken()

    def run(server: Any, sockets: Any) -> None:
        seen.doors.append(server._door)
        server._ready()

    monkeypatch.setitem(sys.modules, "vitcop_compile.serve.slots", SimpleNamespace(Slots=slots))  # type: ignore[arg-type]
    monkeypatch.setitem(
        sys.modules,
        "vitcop_compile.serve.scheduler",
        SimpleNamespace(SlotScheduler=scheduler),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(Server, "run", run)
    yield seen


def test_folders_are_served_by_their_names(asked: SimpleNamespace, spoken_for: Path) -> None:
    folder = folders.folder("pair")
    result = invoke(
        "serve", folder, "--model-name", f"again={folder}", "--processor", spoken_for, "--port", 0, "--queue", 5,
        "--max-new-tokens", 9, "--image-hosts", "a.org", "--image-hosts", "b.org:81", "--max-body-mib", 2,
        "--max-megapixels", 3, "--stalled-seconds", 7,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (line,) = result.output.splitlines()
    assert line.startswith("http://127.0.0.1:") and "/v1: pair (answers to 9 tokens), again (answers to 9 tokens)" in line
    assert "5 prompts waiting, bodies to 2 MiB, pictures to 3 megapixels" in line
    (door,) = asked.doors
    assert list(door.models) == ["pair", "again"] and door.limits.body == 2 << 20 and door.limits.stalled == 7
    assert door.limits.pictures.hosts == ("a.org", "b.org:81") and door.limits.pictures.pixels == 3_000_000
    # Slots as many as the folder decodes together; what it has room for is its own.
    assert [(type(model), count, more) for model, count, more in asked.slots] == [(EngineModel, 2, {"text_tokens": None})] * 2
    assert [more for _, more in asked.schedulers] == [{"most_queued": 5}] * 2
    served = door.models["pair"]
    assert (served.max_new_tokens, served.queue, served.ends) == (9, 5, frozenset())
    assert served.prompts._inputs == ("input_ids", "pixel_values")


def test_a_model_is_compiled_as_it_is_asked_for(asked: SimpleNamespace, checkpoint: Path, spoken_for: Path) -> None:
    options = ("--processor", spoken_for, "--port", 0, "--backend", "eager", "--retention", "1/3", "--slots", 3)
    result = invoke("serve", "--model-name", f"a={checkpoint}", *options, "--max-text-len", 40, "--images", 1, "--images", 2)
    assert result.exit_code == 0, result.output
    ((model, count, more),) = asked.slots
    assert model.backend == "eager" and model.pruning_config == ViTCoPConfig.preset("1/3")
    layouts = [[model.host.layout] * number for number in (1, 2)]
    assert count == 3 and more == {"text_tokens": 40, "max_new_tokens": 256, "layouts": layouts}
    assert asked.doors[0].models["a"].max_new_tokens == 256


def test_what_cannot_be_served_is_refused_in_a_line(asked: SimpleNamespace, spoken_for: Path, tmp_path: Path) -> None:
    folder = folders.folder("pair")
    good = (folder, "--processor", spoken_for, "--port", 0)
    assert "nothing to serve: name a folder or a model" in error_of("serve")
    said = error_of("serve", folder)
    assert f"{folder} has no processor files" in said and "--processor FOLDER" in said
    assert "is not a folder: give one" in error_of("serve", "./nowhere")
    assert "cannot be loaded" in error_of("serve", tmp_path)
    assert "queue=0 is below 1" in error_of("serve", *good, "--queue", 0)
    assert "slots=-1 is below 1" in error_of("serve", *good, "--slots", -1)
    assert "body=0 is not above 0" in error_of("serve", *good, "--max-body-mib", 0)
    for name in ("--max-body-mib", "--max-megapixels"):
        for value in ("nan", "inf"):
            assert f"{name} {value}: Input should be a finite number" in error_of("serve", *good, name, value)
    assert "hosts='http://a' is not a name" in error_of("serve", *good, "--image-hosts", "http://a")
    assert "--drain-seconds -1.0 is below 0" in error_of("serve", *good, "--drain-seconds", -1)
    assert "--image-size big is not WIDTHxHEIGHT" in error_of("serve", *good, "--image-size", "big")
    assert "dtype='int3' is unknown" in error_of("serve", *good, "--dtype", "int3")
    assert "images=(0,): text needs none" in error_of("serve", *good, "--images", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be served at" in error_of("serve", folder, "--processor", spoken_for, "--port", port)
    assert not asked.slots and not asked.doors
    # Known once the folder is open.
    assert f"max_new_tokens=99 exceeds {folders.NEW}" in error_of("serve", *good, "--max-new-tokens", 99)


def test_names_of_models() -> None:
    assert named_sources("a/llava", ["x=b", "y=org/model"]) == {"llava": "a/llava", "x": "b", "y": "org/model"}
    assert list(named_sources(".", [])) == [Path.cwd().name]
    for wrong in ("x", "=b", "x=", ""):
        with pytest.raises(ConfigError, match="is not NAME=FOLDER"):
            named_sources(None, [wrong])
    with pytest.raises(ConfigError, match="two models are named x"):
        named_sources("a/x", ["x=b"])


def test_without_the_extra_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *more: Any, **named: Any) -> Any:
        if name == "prometheus_client":
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *more, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    said = error_of("serve", "anything")
    assert "serving needs prometheus_client, which is missing: pip install 'vitcop-compile[serve]'" in said


def test_processors_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(UnsupportedError, match=r"cannot be loaded .*torchvision.*--processor FOLDER"):
        serve_prompts.load_processor(tmp_path)
    monkeypatch.setattr(serve_prompts.AutoProcessor, "from_pretrained", lambda *_, **__: doors.tokenizer())
    with pytest.raises(UnsupportedError, match="which reads no pictures"):
        serve_prompts.load_processor(tmp_path)


def test_pictures_of_any_size_have_to_be_said(tmp_path: Path) -> None:
    families.model("qwen2_5_vl").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"pictures of any size, .* --image-size WIDTHxHEIGHT"):
        Opening().check(str(tmp_path))
    Opening(image_sizes=[(56, 56)]).check(str(tmp_path))


def test_ends_of_answers() -> None:
    assert ends_of(GenerationConfig()) == ()
    assert ends_of(GenerationConfig(eos_token_id=2)) == (2,)
    assert ends_of(GenerationConfig(eos_token_id=[2, 7])) == (2, 7)
