"""Quantised weights: torchao's tensor subclasses are taken apart for tracing, other libraries' modules are refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch._aot_autograd.subclass_parametrization import UnwrapTensorSubclass
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .errors import UnsupportedError

_Module = TypeVar("_Module", bound=nn.Module)
_REMEDY = (
    "load the model without quantization and quantize it by torchao.quantization.quantize_, or load it with transformers' "
    "TorchAoConfig (docs/quantised.md)"
)
_PORTABLE = "quantize it by torchao's Int8WeightOnlyConfig()"
# Packages whose modules multiply by kernels of their own, which no exported program has. In transformers' integrations are
# those of its own quantizers.
_FOREIGN = {
    "aqlm": "AQLM",
    "auto_gptq": "GPTQ",
    "auto_round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fp_quant": "FP-Quant",
    "gptqmodel": "GPTQ or AWQ",
    "hqq": "HQQ",
    "optimum.gptq": "GPTQ",
    "optimum.quanto": "quanto",
    "quark": "Quark",
    "torch.ao.nn": "torch.ao.quantization",
    "transformers.integrations": "a quantizer of transformers",
    "vptq": "VPTQ",
}


def check_quantised(model: PreTrainedModel) -> None:
    """Raises UnsupportedError, naming what and the remedy, for weights that are quantised in a way that programs cannot take.

    torchao's subclasses are taken where this device multiplies by them: of each kind one weight is tried with one row. Reads
    no value beyond that.
    """
    for name, module in model.named_modules():
        if library := _library(type(module)):
            raise UnsupportedError(
                f"{name} is a {type(module).__name__} of {library}, whose kernels cannot be compiled into a program: {_REMEDY}"
            )
    method = _method(model)
    if method is not None and method != "torchao":
        raise UnsupportedError(f"the model is quantized by {method}, which programs cannot take: {_REMEDY}")
    tried: set[tuple] = set()
    for name, tensor in _subclasses(model):
        kind = type(tensor)
        if not kind.__module__.startswith("torchao.") or any(map(is_traceable_wrapper_subclass, parts_of(tensor).values())):
            raise UnsupportedError(f"{name} is a {kind.__module__}.{kind.__name__}, which programs cannot take: {_REMEDY}")
        if tensor.device.type != "meta" and tensor.dim() == 2 and (key := _scheme(tensor)) not in tried:
            tried.add(key)
            _try(name, tensor)


def check_portable(model: nn.Module, where: str, remedy: str, int8: bool = True) -> None:
    """Raises UnsupportedError, naming it, for a quantised weight whose values `where` cannot keep as they are.

    remedy: what to do about it; int8: whether `where` takes torchao's int8 weights, those with one scale for each output
    channel and products in floats.
    """
    remedy = f"{remedy}, or {_PORTABLE}" if int8 else remedy
    for name, tensor in _subclasses(model):
        kind = type(tensor).__name__
        if not int8 or kind != "Int8Tensor":
            raise UnsupportedError(f"{name} is a {kind} of torchao, which {where} cannot keep as it is: {remedy}")
        if tensor.act_quant_kwargs is not None or tensor.act_pre_scale is not None:  # type: ignore[attr-defined]
            what = "its inputs are rounded or scaled, too"
        elif tuple(tensor.block_size) != (1, tensor.shape[1]):  # type: ignore[attr-defined]
            what = f"its scales are for blocks of {tuple(tensor.block_size)}"  # type: ignore[attr-defined]
        elif tensor.zero_point is not None and tensor.zero_point.any():  # type: ignore[attr-defined]
            what = "it has zero points"
        else:
            continue
        raise UnsupportedError(f"{name} is an {kind} of torchao that {where} cannot keep as it is, as {what}: {remedy}")


def plain_weights(model: _Module) -> _Module:
    """`model`, whose parameters that are tensor subclasses become plain tensors, the same memory, from which they are put
    together where they are used: what traces it sees tensors that every backend can hold, and their products as operators.

    Changes `model`, which is therefore a `shell`.
    """
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_traceable_wrapper_subclass(parameter):
                parametrize.register_parametrization(module, name, UnwrapTensorSubclass(), unsafe=True)
    return model


def parts_of(tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that `tensor` consists of, by attribute; of a plain one, itself under ""."""
    if not is_traceable_wrapper_subclass(tensor):
        return {"": tensor}
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}  # type: ignore[attr-defined]


def settings_of(tensor: Tensor) -> dict | None:
    """How torchao reads the parts of `tensor`, a quantised weight; None for other subclasses."""
    if not type(tensor).__module__.startswith("torchao.") or not is_traceable_wrapper_subclass(tensor):
        return None
    return tensor.__tensor_flatten__()[1]  # type: ignore[attr-defined]


def _subclasses(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        # tensor-parallel plans have a refusal of their own
        if is_traceable_wrapper_subclass(parameter) and not hasattr(parameter, "device_mesh"):
            yield name, parameter


def _library(kind: type) -> str | None:
    """Whose quantised module `kind`, or what it is derived from, is."""
    for base in kind.__mro__:
        for package, library in _FOREIGN.items():
            if f"{base.__module__}.".startswith(f"{package}.") and issubclass(base, nn.Module):
                return library
    return None


def _method(model: PreTrainedModel) -> str | None:
    """How transformers quantised `model`."""
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(quantizer, "quantization_config", None)
    if config is None and getattr(model, "is_quantized", False):
        config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method))


def _scheme(tensor: Tensor) -> tuple:
    return type(tensor), tuple((name, part.dtype) for name, part in parts_of(tensor).items())


def _try(name: str, weight: Tensor) -> None:
    try:
        with torch.no_grad():
            F.linear(torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device), weight)
    except Exception as error:  # whatever a kernel that is not there raises
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedError(
            f"{name} is a {type(weight).__name__} of torchao, by which nothing can be multiplied on {weight.device}: {told}; "
            "quantize with another of torchao's configs, such as Int8WeightOnlyConfig()"
        ) from None
