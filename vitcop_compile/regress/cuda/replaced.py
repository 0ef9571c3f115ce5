"""Names of torch and triton that are replaced so that inductor generates and builds CUDA code where no GPU is.

All of them are here. Most are private, so that this holds for one pair of versions. `install` is for a process of its own: it
changes both libraries for good.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import types
from collections.abc import Callable
from typing import Any

import torch

from .fake import missing as no_fake_device

# The pair that the names below are of.
VERSIONS = {"torch": "2.13.0", "triton": "3.7.1"}
# What inductor and triton ask a device for: of an A100 and an H100, both with 80 GB.
_COMMON = {
    "total_memory": 80 << 30, "regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "warp_size": 32,
    "max_threads_per_block": 1024, "shared_memory_per_block": 48 << 10, "gcnArchName": None, "is_integrated": 0,
}  # fmt: skip
DEVICES: dict[str, dict[str, Any]] = {
    "sm_80": {"name": "NVIDIA A100-SXM4-80GB", "multi_processor_count": 108, "L2_cache_size": 40 << 20,
              "shared_memory_per_block_optin": 163 << 10, "shared_memory_per_multiprocessor": 164 << 10},
    "sm_90": {"name": "NVIDIA H100 80GB HBM3", "multi_processor_count": 132, "L2_cache_size": 50 << 20,
              "shared_memory_per_block_optin": 227 << 10, "shared_memory_per_multiprocessor": 228 << 10},
}  # fmt: skip


def missing() -> str | None:
    """Why no CUDA code can be generated here, None where it can."""
    found = {name: version(name) for name in VERSIONS}
    if found != VERSIONS:
        wanted, here = (" and ".join(f"{name} {version}" for name, version in pair.items()) for pair in (VERSIONS, found))
        return f"it takes {wanted}, here are {here}: pip install 'vitcop-compile[cuda-dry]'"
    return no_fake_device()


def version(name: str) -> str:
    """That of an installed package, without its build; "none" where it is not installed."""
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "none"


def install(architecture: str, compiled: Callable[[Any, Any], None], built: Callable[[Any], None] | None) -> None:
    """Makes this process one with a GPU of `architecture`, a name in DEVICES, that nothing can be launched on.

    compiled(graph, inputs): called in place of a graph that inductor has compiled, with its inputs, and has to raise; built:
    called with inductor's autotuner of every kernel, whose configurations are all built by then, None to build nothing.
    """
    properties = types.SimpleNamespace(
        major=int(architecture[3:-1]), minor=int(architecture[-1]), **_COMMON, **DEVICES[architecture]
    )
    _torch_cuda(properties)
    _inductor(compiled, built)
    _attention()
    _triton(properties)


def _torch_cuda(properties: Any) -> None:
    from torch._dynamo.device_interface import CudaInterface

    capability = (properties.major, properties.minor)
    shared: dict[str, Callable[..., Any]] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda *_: None,
        "set_device": lambda *_: None,
        "device": lambda *_: contextlib.nullcontext(),
        "current_stream": lambda *_: types.SimpleNamespace(cuda_stream=0),
        "memory_allocated": lambda *_: 0,
        "is_bf16_supported": lambda *_, **__: True,
    }
    alone: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: capability,
        "get_rng_state": lambda *_, **__: torch.zeros(1, dtype=torch.uint8, device="cpu"),
        "set_rng_state": lambda *_, **__: None,
    }
    exchanged: dict[str, Callable[..., Any]] = {"exchange_device": lambda *_: 0, "maybe_exchange_device": lambda *_: 0}
    for name, value in (shared | alone).items():
        setattr(torch.cuda, name, value)
    for name, value in exchanged.items():
        setattr(torch.cuda, f"_{name}", value)
    for name, value in (shared | exchanged | {"get_raw_stream": lambda *_: 0}).items():
        setattr(CudaInterface, name, staticmethod(value))
    inside: Any = torch._C
    inside._cuda_getCurrentRawStream = lambda *_: 0
    inside._cuda_cudaCachingAllocator_is_enabled = lambda: True


def _inductor(compiled: Callable[[Any, Any], None], built: Callable[[Any], None] | None) -> None:
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._subclasses.fake_tensor import FakeTensorMode

    inductor.compile_threads = 1  # workers would be processes of their own, without what is replaced here
    inductor.shape_padding = False  # whether it pays is measured on the device
    inductor.use_static_triton_launcher = False
    inductor.force_disable_caches = True
    functorch.enable_autograd_cache = False
    mode: Any = FakeTensorMode
    mode.avoid_device_init = property(lambda self: True)
    graph: Any = CompiledFxGraph
    graph.__call__ = compiled
    # It computes uniform values on the device, one element each; what it finds out is a number.
    folder: Any = UniformValueConstantFolder
    original = folder._deduce_value

    def deduce(self: Any, node: Any) -> Any:
        with _OnHost():
            return original(self, node)

    folder._deduce_value = deduce
    tuner: Any = CachingAutotuner
    if built is None:
        tuner.precompile = lambda self, *_, **__: None
        return

    def make_launchers(self: Any) -> None:
        built(self)
        self.launchers = []

    tuner._make_launchers = make_launchers


class _OnHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Makes tensors on the CPU, whatever device is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        return func(*args, **(kwargs | {"device": torch.device("cpu")} if "device" in kwargs else kwargs))


def _attention() -> None:
    """Which kernel attention becomes is asked of the device: here flash without a mask, and with one the memory-efficient one,
    whose mask is made of numbers in rows of a multiple of 8."""
    aten = torch.ops.aten
    operator: Any = aten.scaled_dot_product_attention.default
    composite: Any = torch._C.DispatchKey.CompositeImplicitAutograd

    def attend(
        query: Any, key: Any, value: Any, mask: Any = None, dropout: float = 0.0, causal: bool = False, *, scale: Any = None,
        enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        if query.device.type != "cuda":
            return operator._op_dk(composite, query, key, value, mask, dropout, causal, scale=scale, enable_gqa=enable_gqa)
        if mask is None:
            flash = aten._scaled_dot_product_flash_attention.default
            return flash(query, key, value, dropout, causal, False, scale=scale)[0]
        if enable_gqa:
            raise NotImplementedError("grouped queries with a mask are left with the math kernel: fold them before")
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        rows = key.shape[2]
        mask = torch.nn.functional.pad(mask, (0, -rows % 8))[..., :rows] if rows % 8 else mask
        mask = mask.expand(*query.shape[:3], rows)
        efficient = aten._scaled_dot_product_efficient_attention.default
        return efficient(query, key, value, mask, False, dropout, causal, scale=scale)[0]

    operator.py_impl(composite)(attend)


def _triton(properties: Any) -> None:
    import torch.utils._triton as _triton_found
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    capability = (properties.major, properties.minor)

    class Driver(CudaDriver):
        """One whose target is fixed, and which finds no library of CUDA."""

        def __init__(self) -> None:
            found = {
                "max_shared_mem": properties.shared_memory_per_block_optin,
                "multiprocessor_count": properties.multi_processor_count,
                "max_num_regs": properties.regs_per_multiprocessor,
                "warpSize": properties.warp_size,
            }
            self.utils = types.SimpleNamespace(get_device_properties=lambda *_: found)

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 10 * properties.major + properties.minor, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return capability

        def set_current_device(self, device: int) -> None:
            pass

        @staticmethod
        def is_active() -> bool:
            return True

    triton.runtime.driver.set_active(Driver())
    # Whoever was imported before may have asked whether Triton works here, and the answers are kept.
    for answer in vars(_triton_found).values():
        if hasattr(answer, "cache_clear"):
            answer.cache_clear()
