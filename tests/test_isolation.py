"""Threads that need programs at the same time, traces that fail, and surroundings that must not reach a program."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn

import vitcop_compile
from vitcop_compile import OptimizedModel, ViTCoPConfig, isolation
from vitcop_compile.families import family_of
from vitcop_compile.programs import Programs
from vitcop_compile.worker import Worker

THIRD = ViTCoPConfig.preset("1/3")
LAYERS = 3


@pytest.fixture
def model():
    """One that nothing has been traced of."""
    return models.llava(LAYERS)


def undisturbed() -> OptimizedModel:
    """The same weights, served from programs that other tests share."""
    return models.optimize(models.shared(LAYERS), THIRD)


def request_of(which: int) -> dict[str, Tensor]:
    """One of four prompts: with an image in two buckets, without one, and a batch of two."""
    if which == 2:
        return {"input_ids": torch.tensor([models.text(12, seed=which)])}
    batch, after = (2, 9) if which == 3 else (1, 9 + 30 * which)
    return {"input_ids": models.prompt(5, after, seed=which).repeat(batch, 1), "pixel_values": models.pixels(batch, which)}


def tokens(fast: OptimizedModel, which: int) -> list[list[int]]:
    return fast.generate(**request_of(which), max_new_tokens=3, do_sample=False).tolist()


@functools.cache
def expected_tokens(which: int) -> list[list[int]]:
    """What `model` says where nothing is in its way."""
    return tokens(undisturbed(), which)


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of all calls, each in a thread of its own, begun at the same time; an exception stands for itself."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def run(at: int) -> None:
        barrier.wait()
        try:
            found[at] = calls[at]()
        except BaseException as error:
            found[at] = error

    threads = [threading.Thread(target=run, args=(at,)) for at in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def state(model: nn.Module) -> list[tuple]:
    """Every module, parameter and buffer of a model by identity, where it lies, and every module's mode."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [(name, id(module), module.training) for name, module in model.named_modules()] + [
        (name, id(tensor), tensor.device.type, tensor.dtype, tensor.data_ptr()) for name, tensor in tensors
    ]


@pytest.mark.parametrize("backend", ["eager", models.slow("inductor"), models.exhaustive("onnxruntime")])
def test_eight_cold_threads(backend: str, model) -> None:
    before = state(model)
    kinds = (0, 2, 3) if backend == "eager" else (0, 2)
    expected = {which: expected_tokens(which) for which in kinds}
    fast = vitcop_compile.optimize(model, THIRD, backend=backend)
    asked = [kinds[at % len(kinds)] for at in range(8)]
    found = together([lambda which=which: tokens(fast, which) for which in asked])
    assert found == [expected[which] for which in asked]
    assert state(model) == before
    assert len(fast.compiled) == len(set(fast.compiled)) == {"eager": 7}.get(backend, 4)


@pytest.mark.slow
def test_models_are_optimized_in_threads(model) -> None:
    """Capture is a trace as well."""
    before = state(model)
    expected = expected_tokens(0)

    def make() -> list[list[int]]:
        return tokens(vitcop_compile.optimize(model, THIRD, backend="eager"), 0)

    assert together([make] * 3) == [expected] * 3
    assert state(model) == before


def test_threads_share_a_capture(model) -> None:
    """Each rewrites graphs of its own: what one does to them, no other meets."""
    before = state(model)
    fast = vitcop_compile.optimize(model, THIRD, backend="eager")

    def make() -> list[list[int]]:
        return tokens(vitcop_compile.optimize(model, THIRD, backend="eager", like=fast), 0)

    assert together([make] * 4) == [expected_tokens(0)] * 4
    assert tokens(fast, 0) == expected_tokens(0)
    assert state(model) == before


def test_a_program_is_made_once(monkeypatch) -> None:
    fast, made = undisturbed(), []

    def counted(self: Any, *given: Any) -> Any:
        made.append(given)
        return Programs.export_vision(self, *given)

    monkeypatch.setattr(type(fast.programs), "export_vision", counted)
    programs = together([lambda: fast.on_demand.vision(1)] * 8)
    assert len(made) == 1 and len({id(program) for program in programs}) == 1


class Broken(RuntimeError):
    pass


@pytest.fixture
def failing() -> Iterator[Callable[[], contextlib.AbstractContextManager]]:
    """A context in which traces fail half way: with parameters swapped for fake ones."""

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        def fail(*_: Any) -> None:
            raise Broken

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "embedding", fail)
            patch.setattr(nn.functional, "linear", fail)
            yield

    yield context


def test_a_trace_that_fails_harms_nothing(model, failing) -> None:
    before = state(model)
    with failing(), pytest.raises(Broken):
        vitcop_compile.optimize(model, THIRD, backend="eager")
    assert state(model) == before

    fast = vitcop_compile.optimize(model, THIRD, backend="eager")
    with failing(), pytest.raises(Broken):
        tokens(fast, 0)
    assert state(model) == before
    assert tokens(fast, 0) == expected_tokens(0)


def test_a_trace_that_is_cut_off_leaves_its_own_modules_whole() -> None:
    """torch restores what it swapped in most cases; here nothing does but `tracing`."""
    inner, weight = nn.Linear(2, 2), nn.Linear(2, 2).weight
    module = nn.Sequential(inner)
    before = state(module)
    with pytest.raises(Broken), isolation.tracing(module):
        inner._parameters["weight"] = weight
        inner.register_buffer("added", torch.zeros(1))
        module._modules["0"] = nn.Identity()
        raise Broken
    assert state(module) == before


def test_what_is_traced_is_a_shell_of_the_model() -> None:
    model, fast = models.shared(LAYERS), undisturbed()
    own = {id(module) for module in model.modules()}
    traced = fast.programs.family
    for part in (traced.patches, traced.encoder, traced.projector, traced.embedding, traced.decoder, traced.head):
        assert not own & {id(module) for module in part.modules()}
        assert {id(p) for p in part.parameters()} <= {id(p) for p in model.parameters()}
    assert model.config._attn_implementation != "vitcop"


# Surroundings


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("eager", torch.bfloat16),
        models.slow("inductor", torch.bfloat16),
        models.exhaustive("eager", torch.float16),
        models.exhaustive("inductor", torch.float16),
    ],
)
def test_autocast_around_the_first_call_reaches_no_program(backend: str, dtype: torch.dtype, model) -> None:
    expected = expected_tokens(0)
    with torch.autocast("cpu", dtype=dtype):
        fast = vitcop_compile.optimize(model, THIRD, backend=backend)
        assert tokens(fast, 0) == expected
        inside = fast(**request_of(0)).logits
    outside = fast(**request_of(0)).logits
    assert outside.dtype == torch.float32 and torch.equal(inside, outside)
    assert tokens(fast, 0) == expected
    with torch.autocast("cpu", dtype=dtype):
        assert tokens(fast, 0) == expected


def test_autocast_reaches_no_export() -> None:
    model, plainly = models.shared(LAYERS), undisturbed().programs
    inside = Programs(family_of(model), models.captured(model), THIRD)
    for export in (
        lambda programs: programs.export_vision(1),
        lambda programs: programs.export_prefill(1, 32, 1, (128, 123, 101)),
        lambda programs: programs.export_extend(1, 1, (128, 123, 101)),
    ):
        plain = [str(node.target) for node in export(plainly).graph.nodes]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert [str(node.target) for node in export(inside).graph.nodes] == plain


def test_inference_mode_compiles_nothing_anew() -> None:
    fast, modes = undisturbed(), []
    program = fast.on_demand.vision(1)
    fast.on_demand.compiled[("vision", 1)] = lambda pixels: (
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), pixels.is_inference())) or program(pixels)
    )
    expected = tokens(fast, 0)
    with torch.inference_mode():
        given = {name: value.clone() for name, value in request_of(0).items()}
        assert all(value.is_inference() for value in given.values())
        assert fast.generate(**given, max_new_tokens=3, do_sample=False).tolist() == expected
    with torch.enable_grad():
        fast(**request_of(0))
    assert modes == [(False, False, False)] * 3


# The thread that owns CUDA graphs


def test_a_worker_calls_everything_in_one_thread() -> None:
    worker, threads = Worker(), []

    def program(value: int) -> tuple[int, bool, bool]:
        threads.append(threading.get_ident())
        return value + 1, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    call = worker.calling(program)
    found = together([lambda at=at: call(at) for at in range(8)])
    assert found == [(at + 1, False, False) for at in range(8)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(1) == (2, False, False)
    assert len(set(threads)) == 1 and threading.get_ident() not in threads


def test_a_worker_hands_errors_on_and_calls_itself_directly() -> None:
    worker = Worker()

    def fail() -> None:
        raise Broken

    with pytest.raises(Broken):
        worker.calling(fail)()
    inner = worker.calling(threading.get_ident)
    outer = worker.calling(lambda: (threading.get_ident(), inner()))
    assert len(set(outer())) == 1


def test_programs_on_cuda_belong_to_a_worker(monkeypatch) -> None:
    fast, expected = undisturbed(), expected_tokens(0)
    provider, threads = fast.on_demand, set()
    monkeypatch.setattr(provider, "device", torch.device("cuda"))
    owned = vitcop_compile.backends.Backend(
        lambda program: lambda *inputs: (threads.add(threading.get_ident()), program.module()(*inputs))[1], graphs=True
    )
    monkeypatch.setattr(provider, "backend", owned)
    monkeypatch.setattr(type(fast), "device", torch.device("cpu"))
    found = together([lambda: tokens(fast, 0)] * 4)
    assert found == [expected] * 4 and len(threads) == 1 and threading.get_ident() not in threads
