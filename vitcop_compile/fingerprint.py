"""What a compiled program depends on, as a hash: the model but for the values of its weights, the settings, code and machine.

Whatever cannot be told apart by its text (a function of the user's, a hook, a tensor subclass other than torchao's) raises
`NotKept`: its programs are compiled anew in every process.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import os
import platform
import sys
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .policies import policy_of
from .quantised import parts_of, settings_of
from .schedule import Method, Schedule

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, Fraction)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of every module, or what says how the weights came to be.
_NO_MATTER = {
    "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "config", "generation_config",
    "_is_hf_initialized", "_is_full_backward_hook", "name_or_path", "warnings_issued",
}  # fmt: skip
# Of a config: where it comes from, and the type that weights have by themselves.
_OF_LOADING = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
_PACKAGES = ("torch", "transformers", "onnxruntime", "onnxscript", "onnx", "openvino", "torchao", "triton")


class NotKept(Exception):
    """Why a program is not kept for the next process."""


def of_text(*parts: Any) -> str:
    """A short hash of parts that JSON can say."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def of_model(model: nn.Module) -> str:
    """The classes, plain attributes and code of all modules, and shapes, types, layouts and sharing of all weights."""
    rows: list[Any] = [_config(getattr(model, "config", None))]
    kinds = set()
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        kinds.add(type(module))
        if "forward" in vars(module) or any(_foreign(hook) for name in _HOOKS for hook in vars(module).get(name, {}).values()):
            raise NotKept(f"module {path or 'of the model'} has a hook, or a forward of its own")
        rows.append([path, _name(type(module)), _attributes(module)])
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None:
                continue
            place, parts = first.setdefault(id(value), f"{path}.{name}"), {"": value}
            if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
                told = settings_of(value)
                if told is None:
                    raise NotKept(f"{path}.{name} is a {type(value).__name__}, which is more than its values")
                rows.append([path, name, _name(type(value)), _code(type(value)), _plain(told)])
                parts = parts_of(value)
            for part, held in parts.items():
                layout = [str(held.dtype), list(held.shape), list(held.stride()), str(held.device)]
                rows.append([path, name, part, *layout, place])
    return of_text(rows, sorted(filter(None, (_code(kind) for kind in kinds))))


def _foreign(hook: Any) -> bool:
    """Whether a hook is other than those by which transformers notes hidden states, from a model's first call on."""
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def of_method(method: Method) -> str:
    """The settings of a method."""
    return of_text(_plain(method))


def of_schedule(schedule: Schedule) -> str:
    """Its stages and layout, and the code of policies from elsewhere."""
    code = [_code(policy_of(stage.policy).choose) for stage in schedule.stages]
    return of_text(_plain(schedule), code)


def of_key(key: tuple) -> str:
    """A key of `program_cache`."""
    return of_text(_plain(key))


def of_surroundings(device: torch.device) -> str:
    """Versions, this package's code, the processor, threads and the settings of torch that reach compiled code."""
    from torch._inductor import config

    settings = config.save_config_portable()
    return of_text(
        [_version(name) for name in _PACKAGES],
        [platform.python_version(), platform.system(), platform.libc_ver(), torch.version.git_version, _own_code()],
        [_processor(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()],
        [torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        [torch.backends.mkldnn.is_available(), torch.backends.mkldnn.enabled, torch.backends.mkl.is_available()],
        _accelerator(device),
        sorted((name, repr(value)) for name, value in settings.items()),
        [os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CPATH")],
    )


def _plain(value: Any) -> Any:
    """`value` for JSON, dataclasses as their fields. Raises NotKept for what has no text of its own."""
    if isinstance(value, _PLAIN):
        return value if isinstance(value, (bool, int, str, type(None))) else f"{type(value).__name__} {value!r}"
    if isinstance(value, enum.Enum):
        return [_name(type(value)), value.name]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [_name(type(value)), _code(type(value)), held]
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *map(_plain, value)]
    if isinstance(value, dict):
        return [type(value).__name__, *([_plain(name), _plain(held)] for name, held in value.items())]
    raise NotKept(f"{type(value).__name__} in the settings has no text that tells it from others")


def _attributes(module: nn.Module) -> list[Any]:
    """What a module holds beside tensors and modules, as far as it is plain or names code."""
    found = []
    for name, value in sorted(vars(module).items()):
        if name in _NO_MATTER or isinstance(value, (Tensor, nn.Module)) or (name.startswith("_") and name.endswith("_hooks")):
            continue
        if name.startswith("_") and isinstance(module, PreTrainedModel):  # how it was loaded, and would be spread
            continue
        if isinstance(value, type) or inspect.isroutine(value):
            found.append([name, _name(value), _code(value)])
        elif isinstance(value, _PLAIN) or (isinstance(value, (tuple, list, dict)) and value):
            try:
                found.append([name, _plain(value)])
            except NotKept:
                found.append([name, type(value).__name__])
    return found


def _config(config: Any) -> Any:
    """A transformers config as JSON."""
    if config is None:
        return None
    return json.dumps(_settings(config.to_dict()), sort_keys=True, default=repr)


def _settings(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {name: _settings(value) for name, value in config.items() if name not in _OF_LOADING}


def _name(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', type(kind).__name__)}"


def _code(kind: Any) -> str | None:
    """A hash of the file that a class or function comes from; None for this package's and torch's, which have versions."""
    while isinstance(kind, functools.partial):
        kind = kind.func
    module = getattr(kind, "__module__", None) or "builtins"
    if module.split(".")[0] in ("torch", "builtins", __package__.split(".")[0]):
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        name = getattr(kind, "__name__", type(kind).__name__)
        raise NotKept(f"{name} was defined in {module}, which has no file to tell its versions apart")
    return _digest(file)


@functools.cache
def _digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


@functools.cache
def _own_code() -> str:
    """Of all modules of this package, whatever folders they lie in."""
    package = sys.modules[__package__.split(".")[0]]
    files = {
        file.resolve()
        for root in (*package.__path__, *_subpackages())
        for file in Path(root).rglob("*")
        if file.suffix in (".py", ".cpp", ".h")
    }
    digests = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    return of_text(digests)


def _subpackages() -> list[str]:
    """passes/ and export/ lie elsewhere in a checkout."""
    from importlib.util import find_spec

    specs = (find_spec(f"{__package__}.{name}") for name in ("passes", "export"))
    return [place for spec in specs if spec is not None for place in spec.submodule_search_locations or ()]


def _version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return name


@functools.cache
def _processor() -> str:
    """The processor and what it can do: inductor compiles for this one alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "cpu family", "model\t")
    return platform.machine() + "".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _accelerator(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)} {torch.version.cuda}"
