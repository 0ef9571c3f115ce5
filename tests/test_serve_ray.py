"""Serving by Ray: without it what can be; with it, where it is installed, replicas that die, hang and are full."""

from __future__ import annotations

import ast
import builtins
import concurrent.futures
import importlib.util
import json
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import doors
import httpx
import models
import pytest
import spoken
import test_cli
import yaml
from doors import events_of
from folders import CONFIG
from vitcop_compile.export import export

from vitcop_compile.serve.cluster import Cluster
from vitcop_compile.serve.server import bound

ROOT = Path(__file__).parent.parent
invoke, error_of = test_cli.invoke, test_cli.error_of
with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")


def test_nothing_else_imports_ray() -> None:
    importing = set()
    for source in ("vitcop_compile", "passes", "export"):
        for path in (ROOT / source).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                if any(name.split(".")[0] == "ray" for name in names):
                    importing.add(path.name)
    assert importing == {"ray_app.py"}


@pytest.mark.parametrize("command", ["serve", "batch"])
def test_without_the_extra_the_remedy_is_said(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *more: Any, **named: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *more, **named)

    monkeypatch.delitem(sys.modules, "vitcop_compile.serve.ray_app", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    models.shared(3).config.save_pretrained(tmp_path / "tiny")
    doors.processor().save_pretrained(tmp_path / "tiny")
    (tmp_path / "in").write_text('{"custom_id": "a"}\n')
    files = (tmp_path / "in", tmp_path / "out") if command == "batch" else ("--port", 0)
    said = error_of(command, tmp_path / "tiny", *files, "--ray")
    assert "serving by Ray needs ray, which is missing: pip install 'vitcop-compile[ray]'" in said


def test_what_is_of_a_cluster_is_refused_without_one(tmp_path: Path) -> None:
    for option, value in (("--replicas", 2), ("--fronts", 2), ("--cpus", 2), ("--gpus", 1), ("--ray-address", "auto")):
        assert f"{option} is of a cluster: add --ray" in error_of("serve", tmp_path, option, value)
    assert "--access-log is uvicorn's" in error_of("serve", tmp_path, "--ray", "--access-log")
    assert "--cpus 0.0: Input should be greater than 0" in error_of("serve", tmp_path, "--ray", "--cpus", 0)
    assert "cannot be loaded" in error_of("serve", tmp_path, "--ray")


def test_files_of_the_documentation() -> None:
    """The RayService parses, what it imports is there, and its arguments are those of a cluster."""
    text = (ROOT / "docs" / "ray.md").read_text()
    (found,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    service = yaml.safe_load(found)
    assert service["kind"] == "RayService" and service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["replicas"] == 2
    (app,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    module, _, name = app["import_path"].partition(":")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    # Serve takes a builder of one argument; of one that is no class, it hands over what stands in the file.
    assert [ast.unparse(arg) for arg in functions[name].args.args] == ["args: dict[str, Any]"]
    cluster = Cluster(**app["args"])
    assert (cluster.replicas, cluster.fronts, cluster.cpus) == (4, 2, 4) and list(cluster.models) == [
        "llava-dense",
        "llava-1_9",
    ]
    assert set(re.findall(r"^\| the step thread.*?--(\S+)`", text, re.MULTILINE)) == {"stalled-seconds"}
    (line,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert json.loads(line).keys() == {"custom_id", "method", "url", "body"}


# With Ray.


@with_ray
@pytest.mark.exhaustive
def test_the_file_of_the_documentation_is_one_of_serve(engine: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    from vitcop_compile.serve.ray_app import build

    text = (ROOT / "docs" / "ray.md").read_text()
    (found,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    config = ServeDeploySchema.model_validate(yaml.safe_load(yaml.safe_load(found)["spec"]["serveConfigV2"]))
    (app,) = config.applications
    assert build(app.args | {"models": {"tiny": str(engine)}})._bound_deployment.name == "front"
    with pytest.raises(ValueError, match="replica"):
        build(app.args | {"replica": 4})


LONG = 400  # tokens of an answer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny model, which decodes four answers at once, with its processor."""
    folder = tmp_path_factory.mktemp("ray") / "tiny"
    export(models.optimize(models.shared(3), CONFIG), folder, batch_size=(1, 4), max_text_len=48, max_new_tokens=LONG)
    spoken.processor().save_pretrained(folder)
    return folder


class Cluster2:
    """Two slow replicas behind Serve, at `url`."""

    def __init__(self, folder: Path):
        import ray
        from ray import serve
        from replicas import Slow

        from vitcop_compile.serve import ray_app

        self.ray, self.app = ray, ray_app
        with bound("127.0.0.1", 0) as held:
            port = held.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.cluster = Cluster(
            models={"tiny": str(folder)}, replicas=2, cpus=0.5, queue=3, stalled_seconds=3, health_seconds=1, drain_seconds=5
        )
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(ray_app.application(self.cluster, Slow), name=ray_app.APP)
        self.engines = serve.get_deployment_handle("engine", ray_app.APP)

    def counts(self) -> list[dict[str, float]]:
        return [one["tiny"] for one in self.engines.broadcast("counts").results(timeout_s=30)]

    def pids(self) -> set[int]:
        """Of the replicas that answer."""
        try:
            return set(self.engines.broadcast("pid").results(timeout_s=10))
        except Exception:  # one of them has just gone
            return set()

    def until(self, true: Callable[[], bool], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < end, self.counts()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(engine: Path) -> Iterator[Cluster2]:
    token = engine.parent / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    own = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])),
        "RAY_AUTH_TOKEN_PATH": str(token),  # Ray would leave one in the home folder
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with mock.patch.dict(os.environ, own):
        found = Cluster2(engine)
        yield found
        if found.ray.is_initialized():
            found.app.stop()


def asked(number: int, tokens: int = 12, **more: Any) -> dict[str, Any]:
    content: Any = [{"type": "text", "text": f"What is {number}?"}]
    return {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": tokens,
        "messages": [{"role": "user", "content": content}],
        **more,
    }


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120, trust_env=False)


class Client(threading.Thread):
    """Reads a stream, and may go away."""

    def __init__(self, url: str, number: int, tokens: int = LONG):
        super().__init__(daemon=True)
        self._url, self._body = url, asked(number, tokens, stream=True)
        self.lines: list[str] = []
        self.going = threading.Event()
        self.status = 0
        self.start()

    def run(self) -> None:
        with (
            httpx.Client(timeout=120, trust_env=False) as client,
            client.stream("POST", f"{self._url}/v1/chat/completions", json=self._body) as answer,
        ):
            self.status = answer.status_code
            for line in answer.iter_lines():
                if self.going.is_set():
                    return
                self.lines.append(line)

    def events(self) -> list[Any]:
        self.join(120)
        assert not self.is_alive()
        return events_of("\n".join(self.lines) + "\n")

    def text(self) -> str:
        events = [event for event in self.events() if isinstance(event, dict) and "choices" in event]
        return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


@with_ray
@pytest.mark.exhaustive
def test_answers_are_those_without_ray(cluster: Cluster2, engine: Path) -> None:
    from vitcop_compile.serve.door import Door

    picture = engine.parent / "picture.png"
    bodies = []
    for number in range(12):
        body = asked(number, 10 + number)
        if number % 3:
            spoken.picture(number).save(picture)
            body["messages"][0]["content"].insert(0, doors.shown(picture.read_bytes()))
        bodies.append(body)
    served = cluster.cluster.opening().open("tiny", str(engine), spoken.processor())
    here = [doors.post(_kept(Door([served])), body=body).json() for body in bodies]
    served.scheduler.close()
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        there = [answer.json() for answer in pool.map(lambda body: post(cluster.url, body), bodies)]
    for mine, other in zip(here, there, strict=True):
        assert mine["choices"] == other["choices"] and mine["usage"] == other["usage"]
    used = [counts["submitted"] for counts in cluster.counts()]
    assert len(used) == 2 and all(used), "a replica was idle"
    refused = post(cluster.url, asked(0, LONG + 1))
    assert refused.status_code == 400 and f"exceeds {LONG}" in refused.json()["error"]["message"]
    health = httpx.get(f"{cluster.url}/health", trust_env=False)
    assert health.status_code == 200, health.text
    metrics = f"http://127.0.0.1:{cluster.ray.nodes()[0]['MetricsExportPort']}/metrics"
    cluster.until(lambda: "ray_vitcop_slots{" in httpx.get(metrics, trust_env=False).text, 40)
    cluster.until(lambda: 'vitcop_slots{model="tiny"} 8.0' in httpx.get(f"{cluster.url}/metrics", trust_env=False).text, 20)


def _kept(door: Any) -> Any:
    door.close = lambda: None
    return door


@with_ray
@pytest.mark.exhaustive
def test_weights_are_shared(cluster: Cluster2) -> None:
    """Every replica maps the one file of weights, and has no copy of what it read of it."""
    for pid in cluster.pids():
        found, shared, private = False, 0, 0
        inside = False
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = line.endswith("weights.bin")
                found |= inside
            elif inside and line.startswith(("Shared_Clean", "Private_Dirty")):
                kilobytes = int(line.split()[1])
                shared, private = (shared + kilobytes, private) if line.startswith("S") else (shared, private + kilobytes)
        assert found and shared > 0 and private == 0, (pid, found, shared, private)


@with_ray
@pytest.mark.exhaustive
def test_four_cancels_at_once(cluster: Cluster2) -> None:
    before = sum(counts["cancelled"] for counts in cluster.counts())
    clients = [Client(cluster.url, number) for number in range(4)]
    cluster.until(lambda: all(len(client.lines) > 6 for client in clients))
    for client in clients:
        client.going.set()
    cluster.until(lambda: sum(counts["cancelled"] for counts in cluster.counts()) == before + 4, 15)
    cluster.until(lambda: all(not counts["occupied"] for counts in cluster.counts()), 5)
    assert post(cluster.url, asked(1)).status_code == 200


@with_ray
@pytest.mark.exhaustive
def test_more_than_all_can_hold(cluster: Cluster2) -> None:
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda number: post(cluster.url, asked(number, 60)), range(40)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 8, statuses
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
    cluster.until(lambda: all(not counts["occupied"] and not counts["queued"] for counts in cluster.counts()), 15)


@with_ray
@pytest.mark.exhaustive
def test_a_replica_that_is_killed(cluster: Cluster2) -> None:
    """Others go on to their end, what it had begun ends with an error event, and another takes its place."""
    cluster.until(lambda: len(cluster.pids()) == 2)
    clients = [Client(cluster.url, number) for number in range(6)]
    cluster.until(lambda: all(len(client.lines) > 6 for client in clients))
    held = cluster.pids()
    os.kill(min(held), signal.SIGKILL)
    ends = [client.events()[-1] for client in clients]
    broken = [end for end in ends if end != "[DONE]"]
    assert 0 < len(broken) < 6 and all(end["error"]["code"] == "replica_lost" for end in broken), ends
    cluster.until(lambda: len(cluster.pids()) == 2)
    assert max(held) in cluster.pids() and min(held) not in cluster.pids()
    whole = next(client for client, end in zip(clients, ends) if end == "[DONE]")
    again = Client(cluster.url, clients.index(whole))
    assert whole.text() == again.text() and again.status == 200


@with_ray
@pytest.mark.exhaustive
def test_a_replica_whose_step_hangs_is_replaced(cluster: Cluster2) -> None:
    """What waited there for its first token is answered by another, as if nothing had been."""
    cluster.until(lambda: len(cluster.pids()) == 2)
    hung = cluster.engines.hang.remote().result(timeout_s=30)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda number: post(cluster.url, asked(number)), range(6)))
    assert [answer.status_code for answer in answers] == [200] * 6, [answer.text for answer in answers]
    cluster.until(lambda: hung not in cluster.pids() and len(cluster.pids()) == 2)


@with_ray
@pytest.mark.exhaustive
def test_batches_by_ray_data(engine: Path, cluster: Cluster2, tmp_path: Path) -> None:
    """By the cluster of the other tests, which it takes away."""
    lines = [{"custom_id": f"n{number}", "body": asked(number, 5 + number % 7)} for number in range(80)]
    (tmp_path / "in").write_text("".join(json.dumps(line) + "\n" for line in lines) + "{\n")
    result = invoke("batch", engine, tmp_path / "in", tmp_path / "here")
    assert result.exit_code == 1, result.output
    result = invoke("batch", engine, tmp_path / "in", tmp_path / "there", "--ray", "--replicas", 2, "--cpus", 0.5)
    assert result.exit_code == 1 and "81 of 81 lines answered, 0 were there, 1 of the new ones" in result.output, result.output

    def said(path: Path) -> dict[Any, Any]:
        answers = [json.loads(line) for line in path.read_text().splitlines()]
        return {one["custom_id"]: one["response"] and one["response"]["body"]["choices"] for one in answers}

    assert said(tmp_path / "here") == said(tmp_path / "there") and len(said(tmp_path / "here")) == 81
    result = invoke("batch", engine, tmp_path / "in", tmp_path / "there", "--ray")
    assert result.exit_code == 0 and "0 of 81 lines answered, 81 were there" in result.output
