"""What an exported program becomes: a callable over tensors. A backend is one function in a registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .bindings import Bindings
from .errors import ConfigError, UnsupportedError
from .kept import Keeper
from .passes.attach_cache import cache_rows, write_rows
from .passes.lower_int8 import lower_int8
from .passes.lower_linear import lower_linear
from .passes.unroll_loops import unroll_loops

Program = Callable[..., Any]
Compile = Callable[[ExportedProgram], Program]


@dataclass(frozen=True)
class Backend:
    """How programs compile.

    in_place: whether a decode program may update its caches. Where not, it is exported with `in_place=False`, and
    `writing_rows` updates them after it. exact: whether the backend has float64, as `ops.density_peaks` wants it.
    copies_weights: whether programs hold copies of the weights, which do not follow them. graphs: whether programs run as
    CUDA graphs on CUDA, which belong to the thread that recorded them. kernels: whether decode programs on a CPU may hold
    operators of `kernels`, which are C++. quantised: the weights of torchao that it takes, "all" that the device has kernels
    for, "int8" alone, as ONNX has them, or "none". check: raises UnsupportedError where the backend cannot work. keeper: how
    programs are kept between processes, None where they are not. lacks: types of models that it has no kernels for. at: how
    it compiles for a precision, None for the default, of a model of some dtype; itself None where there is no choice.
    """

    compile: Compile
    in_place: bool = True
    exact: bool = True
    copies_weights: bool = False
    graphs: bool = False
    kernels: bool = False
    quantised: str = "all"
    check: Callable[[], None] = lambda: None
    keeper: Keeper | None = None
    lacks: tuple[torch.dtype, ...] = ()
    at: Callable[[str | None, torch.dtype], Compile] | None = None

    def __call__(self, program: ExportedProgram) -> Program:
        return self.compile(program)


BACKENDS: dict[str, Backend] = {}


def register(name: str, **properties: Any) -> Callable[[Compile], Compile]:
    """Adds a backend under `name`; `properties` are those of `Backend`."""

    def add(compile: Compile) -> Compile:
        BACKENDS[name] = Backend(compile, **properties)
        return compile

    return add


def backend_of(name: str, precision: str | None = None, dtype: torch.dtype | None = None) -> Backend:
    """The backend `name`, computing a model of `dtype` in `precision`, by default in what each program is in.

    Raises UnsupportedError, listing the known ones, or naming what this one lacks here or for `dtype`, ConfigError for a
    precision where it has no choice of them.
    """
    if name not in BACKENDS:
        raise UnsupportedError(f"backend={name!r} is unknown: use one of {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    backend.check()
    if backend.at is None and precision is not None:
        raise ConfigError(
            f"precision={precision!r}: backend={name!r} computes in the dtype of the model; load that in another (dtype=), "
            f"or use {' or '.join(f'backend={other!r}' for other, known in BACKENDS.items() if known.at)}"
        )
    if dtype in backend.lacks:
        raise UnsupportedError(
            f"backend={name!r} has no kernels for {dtype} on a CPU: load the model with dtype=torch.float32, or use one of "
            f"{', '.join(other for other, known in BACKENDS.items() if dtype not in known.lacks)}"
        )
    if backend.at is None or dtype is None:
        return backend
    return replace(backend, compile=backend.at(precision, dtype))


def writing_rows(program: Program, groups: tuple[int, ...], *, filled: bool, told: tuple[int, ...] = ()) -> Program:
    """A program that returns its new keys and values behind its results, as one that writes them into its caches.

    groups: that of every layer; filled: the caches hold tokens, and the program gets `length` and `removed` to say how many:
    third and fifth of an extend program, the last two before the caches of a prefill program. Otherwise it takes no caches.
    told: groups of which a number of each row, such as its position, comes before keys and values, among caches and results.
    """
    owners = [*told, *(group for group in groups for _ in "kv")]
    count = len(owners)

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        caches = inputs[-count:]
        outputs = program(*(inputs if filled else inputs[:-count]))
        results, rows = outputs[:-count], outputs[-count:]
        if not filled:
            numbers, caches, rows = rows[: len(told)], caches[len(told) :], rows[len(told) :]
            for held, new in zip(inputs[-count:], numbers):
                held[:, : new.shape[1]].copy_(new)
            heads = [cache[:, :, : row.shape[2]] for cache, row in zip(caches, rows, strict=True)]
            torch._foreach_copy_(heads, list(rows))
            torch._foreach_zero_([cache[:, :, row.shape[2] :] for cache, row in zip(caches, rows, strict=True)])
            return tuple(results)
        extends = inputs[2].dim() == 1
        length, removed = (inputs[2], inputs[4]) if extends else inputs[-count - 2 : -count]
        places: dict[int, Tensor] = {}
        for group, cache, row in zip(owners, caches, rows, strict=True):
            if row.dim() == 2:
                cache, row = cache[:, None, :, None], row[:, None, :, None]
            if group not in places:
                places[group] = cache_rows(length, removed, group, row)
                if row.shape[2] > 1:
                    # Pads behind a turn may reach beyond the caches; the last row then belongs to a token to come.
                    places[group] = places[group].clamp_max(cache.shape[2] - 1)
            write_rows(cache, row, places[group])
        return tuple(results)

    return run


@register("eager")
def eager(program: ExportedProgram) -> Program:
    """The rewritten graph as it is, operator by operator."""
    return program.module(check_guards=False)


def _for_inductor(program: ExportedProgram) -> fx.GraphModule:
    _check_loaded(program, "inductor")
    module = lower_int8(lower_linear(program.module(check_guards=False)))
    # Without torch.export's hooks, which go through all inputs in Python before every call.
    return fx.GraphModule(module, module.graph)


def _compile_inductor(program: ExportedProgram, folder: Path, bindings: Bindings) -> Program:
    from .inductor_backend import compile_kept

    return compile_kept(_for_inductor(program), program, folder, bindings)


def _load_inductor(folder: Path, bindings: Bindings, device: torch.device) -> Program:
    from .inductor_backend import load

    return load(folder, bindings, device)


@register("inductor", graphs=True, kernels=True, keeper=Keeper(_compile_inductor, _load_inductor))
def inductor(program: ExportedProgram) -> Program:
    """torch.compile of the whole graph at static shapes; with CUDA graphs on CUDA. Compiles at the first call."""
    from .inductor_backend import ON_CPU, UNCHECKED

    module = _for_inductor(program)
    on_cuda = any(parameter.is_cuda for parameter in module.parameters())
    options: dict[str, Any] = _cuda_options(decode=_single_rows(program)) | UNCHECKED if on_cuda else ON_CPU
    return torch.compile(module, fullgraph=True, dynamic=False, options=options)


def _check_aotinductor() -> None:
    from .aoti_backend import check

    check()


def _compile_aotinductor(program: ExportedProgram, folder: Path, bindings: Bindings) -> Program:
    from .aoti_backend import compile_kept

    _check_loaded(program, "aotinductor")
    return compile_kept(unroll_loops(program), folder, bindings)


def _load_aotinductor(folder: Path, bindings: Bindings, device: torch.device) -> Program:
    from .aoti_backend import load_kept

    return load_kept(folder, bindings, device)


@register("aotinductor", kernels=True, check=_check_aotinductor, keeper=Keeper(_compile_aotinductor, _load_aotinductor))
def aotinductor(program: ExportedProgram) -> Program:
    """The program compiled by AOTInductor before its first call, on the model's own weights; without CUDA graphs."""
    from .aoti_backend import compile_ahead

    _check_loaded(program, "aotinductor")
    on_cuda = any(tensor.is_cuda for tensor in program.state_dict.values())
    return compile_ahead(unroll_loops(program), _known(_EXACT_DIVISION) if on_cuda else {})


def _check_tensorrt() -> None:
    from .tensorrt_backend import check

    check()


@register("tensorrt", in_place=False, exact=False, copies_weights=True, quantised="none", check=_check_tensorrt)
def tensorrt(program: ExportedProgram) -> Program:
    """One TensorRT engine per program through torch-tensorrt, without a fallback to PyTorch; needs CUDA."""
    from .tensorrt_backend import compile_whole

    return compile_whole(unroll_loops(program))


def _compile_onnxruntime(program: ExportedProgram, folder: Path, bindings: Bindings) -> Program:
    from .export.ort_backend import compile_kept

    _check_loaded(program, "onnxruntime")
    return compile_kept(program, folder, bindings)


def _load_onnxruntime(folder: Path, bindings: Bindings, device: torch.device) -> Program:
    from .export.ort_backend import load_kept

    return load_kept(folder, bindings, device)


def _values_onnxruntime(model: nn.Module) -> str:
    from .export.ort_backend import small_values

    return small_values(model)


_ORT_KEEPER = Keeper(_compile_onnxruntime, _load_onnxruntime, _values_onnxruntime)


@register("onnxruntime", in_place=False, copies_weights=True, quantised="int8", keeper=_ORT_KEEPER, lacks=(torch.bfloat16,))
def onnxruntime(program: ExportedProgram) -> Program:
    """The program as an ONNX file in a temporary folder, run by onnxruntime on the CPU; weights are held twice."""
    from .export.ort_backend import load

    _check_loaded(program, "onnxruntime")
    return load(program)


def _check_openvino() -> None:
    from .export.openvino import package

    package()


def _openvino_at(precision: str | None, dtype: torch.dtype) -> Compile:
    from .export.openvino import precision_of

    chosen = precision_of(dtype, precision)
    return lambda program: _openvino(program, chosen)


@register(
    "openvino", in_place=False, exact=False, copies_weights=True, quantised="int8", check=_check_openvino, at=_openvino_at
)
def openvino(program: ExportedProgram) -> Program:
    """The program as an ONNX file in a temporary folder, run by OpenVINO on the CPU; weights are held twice."""
    return _openvino(program, None)


def _openvino(program: ExportedProgram, precision: str | None) -> Program:
    from .export.openvino_backend import load

    _check_loaded(program, "openvino")
    return load(program, precision)


def _check_loaded(program: ExportedProgram, name: str) -> None:
    if any(tensor.is_meta for tensor in program.state_dict.values()):
        raise UnsupportedError(
            f"backend={name!r} compiles for weights, and these are on meta, which holds none: load the model, or use "
            "backend='eager', which computes shapes there"
        )


# Quotas are rounded in fp32: a division that is off by an ulp could move a token. The option's name has changed.
_EXACT_DIVISION = ("eager_numerics.division_rounding", "emulate_division_rounding")


def _single_rows(program: ExportedProgram) -> bool:
    """Whether all products are of one token a sample, as in a decode program."""
    products = (node for node in program.graph.nodes if node.target is torch.ops.aten.linear.default)
    rows = [node.args[0].meta["val"].shape[-2] for node in products]
    return bool(rows) and max(rows) == 1


def _cuda_options(decode: bool) -> dict[str, Any]:
    """Inductor's options on CUDA: a program runs as a CUDA graph, or fails and says why.

    decode: products of a single row, whose kernels are worth a search.
    """
    options = {"triton.cudagraphs": True} | _known(("triton.cudagraph_or_error",)) | _known(_EXACT_DIVISION)
    return options | {"coordinate_descent_tuning": True} if decode else options


def _known(names: tuple[str, ...]) -> dict[str, bool]:
    """{name: True} for the first of inductor's options among `names`. Raises UnsupportedError where it has none of them."""
    options = torch._inductor.list_options()
    for name in names:
        if name in options:
            return {name: True}
    raise UnsupportedError(
        f"inductor of torch {torch.__version__} has no option {' or '.join(names)}, without which results would not be what "
        "they are elsewhere: use torch 2.11 to 2.13, or backend='eager'"
    )
