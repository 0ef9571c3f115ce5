"""The backend "inductor" where programs are kept: a whole graph with its weights as inputs, without torch.compile's tracing.

The graph comes from torch.export and has nothing left to trace. What inductor makes of it is one artifact and the libraries
that it calls; a later process loads both and calls neither torch.export nor a compiler.
"""

from __future__ import annotations

import atexit
import contextlib
import inspect
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from . import kernels
from .bindings import Bindings, Signature
from .fingerprint import NotKept

# Inductor checks every tensor that a program takes or makes, in Python, in every call: of a decoding step they are hundreds.
UNCHECKED = {"size_asserts": False, "alignment_asserts": False}
# On a CPU a program is two C++ sources, what calls and what is called: two calls of the compiler instead of one a kernel, and
# no Python between kernels. As one source, all of it would be optimized as kernels are, and the time grows with the layers.
ON_CPU = UNCHECKED | {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
_ARTIFACT, _LIBRARIES, _KERNELS = "program.bin", "libraries", "kernels"


def compile_kept(
    module: fx.GraphModule, program: ExportedProgram, folder: Path, bindings: Bindings
) -> Callable[..., tuple[Tensor, ...]]:
    """`module`, lowered from `program`, compiled; in `folder` what `load` needs.

    Raises NotKept, before anything is compiled, for weights that are none of the model's, or a torch that keeps none.
    """
    from torch._inductor import config, standalone_compile

    if "aot" not in inspect.signature(standalone_compile).parameters:
        raise NotKept(f"inductor of torch {torch.__version__} makes no artifacts of one file")
    examples: tuple[Tensor, ...] = (program.example_inputs or ((), {}))[0]
    note_kernels(module, folder)
    lifted, weights = lift(module)
    bindings.write(folder, weights)
    signature = Signature.of(examples)
    signature.write(folder)
    values = [weight.detach() for weight in weights.values()]
    with torch.no_grad(), _scratch() as cache, config.patch(ON_CPU):
        artifact = standalone_compile(lifted, [*values, *examples], dynamic_shapes="from_example_inputs", aot=True)
        artifact.save(path=str(folder / _ARTIFACT), format="binary")
        for built in (*cache.glob("*/*.so"), *cache.glob("*/*.o")):
            place = folder / _LIBRARIES / built.parent.name / built.name
            place.parent.mkdir(parents=True, exist_ok=True)
            if built.suffix == ".so":
                shutil.copyfile(built, place)
            else:
                place.touch()  # inductor compiles what is not there, and links nothing where the library is
    return _calling(artifact, values, signature)


def load(folder: Path, bindings: Bindings, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """The program that `compile_kept` left in `folder`, on the weights of the model in `bindings`."""
    from torch._inductor import CompiledArtifact, config

    load_kernels(folder)
    values = list(bindings.read(folder, device).values())
    # That this processor runs what was compiled for it is part of the key: it is not tried again.
    known = {} if config.cpp.vec_isa_ok is not None else {"cpp.vec_isa_ok": True}
    with _scratch(folder / _LIBRARIES), config.patch(ON_CPU | known), _without_headers():
        artifact = CompiledArtifact.load(path=str(folder / _ARTIFACT), format="binary")
    return _calling(artifact, values, Signature.read(folder, device))


def note_kernels(module: fx.GraphModule, folder: Path) -> None:
    """Says in `folder` whether the graph calls operators of `kernels`, which a later process must load first."""
    called = {getattr(node.target, "namespace", "") for node in module.graph.nodes if node.op == "call_function"}
    if "vitcop_cpu" in called:
        (folder / _KERNELS).write_text("")


def load_kernels(folder: Path) -> None:
    """Loads them where `note_kernels` said so."""
    if (folder / _KERNELS).exists():
        kernels.load()


def _calling(artifact: Any, weights: list[Tensor], signature: Signature) -> Callable[..., tuple[Tensor, ...]]:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        signature.check(inputs)
        return tuple(artifact(*weights, *inputs))

    return run


def lift(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The graph of `module` with all tensors that it holds as first inputs, and those tensors by name, each once."""
    graph, weights, places = module.graph, dict[str, Tensor](), dict[int, fx.Node]()
    first = next(iter(graph.nodes))
    for node in graph.find_nodes(op="get_attr"):
        value = _attribute(module, node.target)
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
            raise NotKept(f"{node.target} is a {type(value).__name__}, which is more than its values")
        if id(value) not in places:
            with graph.inserting_before(first):
                places[id(value)] = graph.placeholder(f"weight_{len(weights)}")
            places[id(value)].meta = dict(node.meta)
            weights[node.target] = value
        node.replace_all_uses_with(places[id(value)])
    for node in graph.find_nodes(op="get_attr"):
        graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())  # the inputs are a list now, and no tree of the exported module's
    return fx.GraphModule(nn.Module(), graph), weights


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


@contextlib.contextmanager
def _scratch(libraries: Path | None = None) -> Iterator[Path]:
    """A cache folder of inductor's for one program, with these `libraries` in it; gone when the process ends.

    The environment, which names the folder, belongs to all threads: what others compile meanwhile lies there, too, and must
    not vanish under them.
    """
    from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir

    if libraries is None:
        kernels.instructions()  # once, in the common folder
    folder = tempfile.mkdtemp(prefix="vitcop-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if libraries is not None and libraries.is_dir():
        shutil.copytree(libraries, folder, dirs_exist_ok=True)
    with temporary_cache_dir(folder):
        yield Path(folder)


@contextlib.contextmanager
def _without_headers() -> Iterator[None]:
    """Inductor precompiles headers even for libraries that are there: seconds, on a machine that has compiled nothing yet."""
    from torch._inductor import codecache

    if not hasattr(codecache, "_precompile_header"):
        yield
        return
    # A compiler that runs after all includes the header itself.
    with mock.patch.object(codecache, "_precompile_header", lambda header, *_, **__: header):
        yield
