"""Ray: engine replicas and an HTTP front as an application of Ray Serve, and batches through Ray Data.

Nothing else imports Ray, and nothing here decides anything: who answers a prompt, again or not, is `remote`'s, how tokens
leave a replica is `replica`'s, and what is said to clients is `openai`'s.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import signal
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError
from .batch import Answerer, Line, blocks_of, open_door, run
from .cluster import Cluster
from .door import Door
from .openai import create_app
from .opening import Facts
from .prompts import load_processor
from .remote import RemoteScheduler, Reply
from .replica import Replica, Said
from .requests import Sampling

try:
    import ray
    import ray.data
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
    from ray.util.metrics import Gauge
except ImportError as error:
    raise UnsupportedError(f"serving by Ray needs {error.name}, which is missing: pip install 'vitcop-compile[ray]'") from None

APP = "vitcop-compile"
# Requests that Serve itself lets into a process: more than any queue here holds, which refuses first, and says why.
_ALL = 4096


class Engine:
    """A replica: a scheduler for each model, warmed up before the first request. Its process's threads are its CPUs."""

    def __init__(self, cluster: Cluster):
        opening = cluster.opening()
        opened = {name: opening.scheduler(source, warm=True) for name, source in cluster.models.items()}
        self._facts = {name: facts for name, (_, facts) in opened.items()}
        name = serve.get_replica_context().replica_id.unique_id
        self._replica = Replica(name, {model: scheduler for model, (scheduler, _) in opened.items()})
        self._stalled = cluster.stalled_seconds
        self._gauges: dict[str, Gauge] = {}

    async def facts(self) -> dict[str, Facts]:
        """Of each model."""
        return self._facts

    async def counts(self) -> dict[str, dict[str, float]]:
        """Of each model's scheduler."""
        return self._replica.counts()

    async def answer(
        self, model: str, inputs: Mapping[str, Any], sampling: Sampling, *, avoid: Collection[str] = ()
    ) -> AsyncGenerator[Said]:
        """As `Replica.answer`."""
        stream = self._replica.answer(model, inputs, sampling, avoid)
        try:
            async for said in stream:
                yield said
        finally:
            await stream.aclose()

    def check_health(self) -> None:
        """Serve asks; a replica that raises some times in a row is replaced. What is counted goes to Ray's metrics with it."""
        for model, counts in self._replica.counts().items():
            for name, value in counts.items():
                if name not in self._gauges:
                    self._gauges[name] = Gauge(f"vitcop_{name}", "As /metrics has it.", tag_keys=("model",))
                self._gauges[name].set(value, tags={"model": model})
        self._replica.check(self._stalled)


class Elsewhere(RequestRouter):
    """Chooses the less busy of two replicas, none of those that the request says to avoid if there are others."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Up to two, by chance."""
        avoid: Collection[str] = ()
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            avoid = pending_request.kwargs.get("avoid", ())
        left = [one for one in candidate_replicas if one.replica_id.unique_id not in avoid] or candidate_replicas
        return [random.sample(left, min(2, len(left)))] if left else []


class _Engines:
    """The replicas of a model, by a handle of Serve: `remote.Replicas`."""

    def __init__(self, handle: Any, model: str):
        self._handle, self._stream, self._model = handle, handle.options(stream=True), model

    def ask(self, inputs: Mapping[str, Any], sampling: Sampling, avoid: frozenset[str]) -> Reply:
        return self._stream.answer.remote(self._model, inputs, sampling, avoid=avoid)

    async def counts(self) -> Sequence[Mapping[str, float]]:
        found = await self._handle.broadcast("counts").results_async(timeout_s=5, return_exceptions=True)
        return [counts[self._model] for counts in found if not isinstance(counts, BaseException)]


class Front:
    """The ingress: HTTP, pictures and tokens, of `openai.create_app`, over schedulers that are the engine replicas."""

    async def __init__(self, engines: Any, cluster: Cluster):  # type: ignore[misc]
        facts: dict[str, Facts] = await engines.facts.remote()
        served = [
            known.served(
                name,
                RemoteScheduler(_Engines(engines, name), polled=min(5.0, cluster.stalled_seconds / 4)),
                load_processor(cluster.processor_of(name)),
                # What waits here for a first token is in a queue there, or just joining a slot.
                (cluster.queue + known.slots) * cluster.replicas,
            )
            for name, known in facts.items()
        ]
        self._door = Door(served, cluster.limits())

    def __serve_build_asgi_app__(self) -> Any:
        """What Serve's `ingress` asks for once the door stands."""
        return create_app(self._door)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of a file for `serve run`, or of a RayService: `import_path: vitcop_compile.serve.ray_app:build`, with
    the fields of `Cluster` as `args`. Raises pydantic's ValidationError for others, and as `application` does."""
    return application(Cluster(**args))


def application(cluster: Cluster, engine: type = Engine) -> serve.Application:
    """Front and replicas of a cluster; engine: the class of the replicas. Raises VitcopError for what can be refused before
    anything is loaded."""
    opening = cluster.opening()
    cluster.limits()
    for source in cluster.models.values():
        opening.check(source)
    drain = {"graceful_shutdown_timeout_s": cluster.drain_seconds, "graceful_shutdown_wait_loop_s": 0.5}
    engines = serve.deployment(engine).options(
        name="engine",
        num_replicas=cluster.replicas,
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        max_ongoing_requests=_ALL,
        health_check_period_s=cluster.health_seconds,
        health_check_timeout_s=max(10.0, 2 * cluster.health_seconds),
        request_router_config=RequestRouterConfig(request_router_class=Elsewhere),
        **drain,
    )
    front = serve.deployment(serve.ingress()(Front)).options(
        name="front",
        num_replicas=cluster.fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_ALL,
        **drain,
    )
    return front.bind(engines.bind(cluster), cluster)


def start(cluster: Cluster, host: str, port: int, address: str | None = None) -> None:
    """Deploys an application, in the cluster at `address` or in one of this machine alone; returns once it is ready.

    Raises ConfigError where this machine alone has not the CPUs or GPUs, UnsupportedError where a cluster
    cannot be joined or replicas cannot be started.
    """
    app = application(cluster)
    _connect(cluster, address)
    serve.start(http_options={"host": host, "port": port})
    try:
        serve.run(app, name=APP)
    except RuntimeError as error:
        stop(address)
        raise UnsupportedError(f"Ray Serve could not start the replicas: {error}") from None


def stop(address: str | None = None) -> None:
    """Takes the application away: what it holds is answered first. A cluster that was joined goes on, with what else it
    serves."""
    serve.delete(APP)
    if address is None:
        serve.shutdown()
    ray.shutdown()


def serve_until_signal(cluster: Cluster, host: str, port: int, address: str | None, ready: Callable[[], None]) -> None:
    """`start`, and `stop` at SIGTERM or SIGINT. ready: called once it is ready."""
    start(cluster, host, port, address)
    signalled = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set its own, by which the process would abort
        signal.signal(number, lambda *_: signalled.set())
    ready()
    signalled.wait()
    stop(address)


class Lines:
    """Answers lines of a batch as an actor of Ray Data: models behind a door in its own process, which lines reach by the
    file's path. Calls may come from several threads, so that slots are full between two blocks."""

    def __init__(self, cluster: Cluster, source: str):
        self._source = Path(source)
        door, self._at_once = open_door(cluster)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vitcop-batch", daemon=True).start()
        self._answerer = Answerer(door)

    def __call__(self, block: dict[str, Any]) -> dict[str, list[str]]:
        """A block of lines, as columns `number`, `offset` and `length`; column `answer`, JSON of each."""
        places = zip(block["number"], block["offset"], block["length"], strict=True)
        lines = [Line(int(number), int(offset), int(length), None) for number, offset, length in places]
        found: list[dict[str, Any]] = []
        work = run(self._answerer, self._source, lines, self._at_once, found.append)
        asyncio.run_coroutine_threadsafe(work, self._loop).result()
        return {"answer": [json.dumps(answer) for answer in found]}


def batch(
    cluster: Cluster, address: str | None, source: Path, lines: Sequence[Line], write: Callable[[dict[str, Any]], None]
) -> None:
    """Answers `lines` of the file `source` by `cluster.replicas` actors, and calls `write` with each answer. Every node
    reaches the file, and the models, at their paths. What an actor that dies was at is made again."""
    _connect(cluster, address)
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one already
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    blocks = blocks_of(len(lines))
    places = [{"number": line.number, "offset": line.offset, "length": line.length} for line in lines]
    try:
        answers = ray.data.from_items(places, override_num_blocks=blocks).map_batches(
            Lines,
            fn_constructor_args=(cluster, str(source.resolve())),
            batch_size=math.ceil(len(lines) / blocks),
            compute=ray.data.ActorPoolStrategy(
                size=cluster.replicas,
                max_tasks_in_flight_per_actor=4,
                max_concurrent_calls_per_actor=2,
                enable_true_multi_threading=True,
            ),
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
        )
        for row in answers.iter_rows():
            write(json.loads(row["answer"]))
    finally:
        ray.shutdown()


def _connect(cluster: Cluster, address: str | None) -> None:
    """Joins a cluster, or starts one. Raises UnsupportedError, ConfigError."""
    if ray.is_initialized():
        return
    if address is not None:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, RuntimeError):
            raise UnsupportedError(
                f"no cluster of Ray at {address} lets this process in: give --ray-address of one that runs, and its token, "
                "with RAY_AUTH_MODE=token (docs/ray.md)"
            ) from None
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody asked Ray to tell its makers
    # Without an address Ray would join whatever cluster runs here, or did.
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    there = ray.cluster_resources()
    for name, one in (("CPU", cluster.cpus), ("GPU", cluster.gpus)):
        needed, has = one * cluster.replicas, there.get(name, 0)
        if needed > has:
            ray.shutdown()
            raise ConfigError(
                f"{cluster.replicas} replicas of {one:g} {name}s each need {needed:g}, this machine has {has:g}: ask for "
                "fewer, or name a cluster by --ray-address"
            )
