"""The whole of it, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from .attention import check_lowering
from .backends import backend_of
from .capture import Capture, LaterCapture, capture
from .config import DEFAULT_PRESET, ViTCoPConfig
from .errors import ConfigError, UnsupportedError
from .families import family_of
from .host import with_clips
from .kept import kept
from .optimized import PROGRAM_BYTES, PROMPT_BUCKETS, CompiledOnDemand, OptimizedModel
from .programs import Programs
from .quantised import check_portable, check_quantised
from .schedule import Method, check_ready, resolve


def optimize(
    model: PreTrainedModel,
    config: Method | None = None,
    *,
    backend: str = "inductor",
    precision: str | None = None,
    attn_implementation: str = "sdpa",
    prompt_buckets: Sequence[int] = PROMPT_BUCKETS,
    program_bytes: int = PROGRAM_BYTES,
    dump: str | Path | None = None,
    like: OptimizedModel | None = None,
) -> OptimizedModel:
    """Compiles visual-token pruning into `model`, a stock transformers LVLM with its weights loaded, or wholly on "meta".

    config: what to prune, a `ViTCoPConfig` or another of `methods`, `DEFAULT_PRESET` by default; backend: a name in
    `backends.BACKENDS`; precision: "f32", "bf16" or "f16", what a backend computes in that has a choice ("openvino"), by
    default the dtype of the model; attn_implementation: "sdpa" or "flash_attention_2", the kernels that attention lowers to;
    prompt_buckets: ascending numbers of text tokens that prompts are padded to. The model is not changed and shares its
    weights with the result. Programs compile on first use, or through `warmup`. program_bytes: what programs may hold
    together; beyond that the one used longest ago is let go. dump: a folder that gets every graph after every pass, as text;
    of programs that differ in their batch or rows alone, the latest. like: what another call returned for this model, whose
    graphs as they were captured are used again: methods can be compared without tracing the model for each. A model on the
    meta device is for planning: it has a schedule and its programs can be exported.

    Raises UnsupportedError for a model, quantised weights, a backend, precision or attention that is not supported, and
    ConfigError for a configuration that the model's shape cannot meet, and for a precision where the backend has no choice;
    both before anything is traced.
    """
    config = config or ViTCoPConfig.preset(DEFAULT_PRESET)
    check_ready(config)
    check_quantised(model)
    family = family_of(model)
    if getattr(config, "clips", None) == "pooled":
        family = replace(family, host=with_clips(family.host))
    _check_weights(model)
    if (taken := backend_of(backend, precision, model.dtype).quantised) != "all":
        check_portable(model, f"backend={backend!r}", "use backend='inductor'", int8=taken == "int8")
    check_lowering(attn_implementation, model.device, model.dtype)
    schedule = resolve(config, family.shape, family.host.layout)
    if schedule.sized and attn_implementation != "sdpa":
        raise UnsupportedError(
            f"attn_implementation={attn_implementation!r} adds nothing to logits, and a calibrated method adds log sizes: use "
            "'sdpa'"
        )
    clips = getattr(config, "clips", None)
    held = None if dump is not None else kept(model, config, backend, backend_of(backend).keeper, attn_implementation, clips)
    captured: Capture | LaterCapture
    if like is not None:
        captured = _captured(like, model)
    elif held is not None and held.known:
        captured = LaterCapture(lambda: capture(family, model))
    else:
        captured = capture(family, model)
    programs = Programs(family, captured, config, attn_implementation, None if dump is None else Path(dump))
    on_demand = CompiledOnDemand(programs, backend, prompt_buckets, program_bytes, held, precision)
    return OptimizedModel(model, on_demand, config, backend)


def _captured(like: OptimizedModel, model: PreTrainedModel) -> Capture | LaterCapture:
    if like.model is not model:
        raise ConfigError("like was made of another model: pass one that optimize returned for this model, or none")
    like.check_weights()
    return like.programs.captured


def _check_weights(model: PreTrainedModel) -> None:
    if any(hasattr(parameter, "device_mesh") for parameter in model.parameters()):
        raise UnsupportedError(
            "the weights are sharded over several devices by a tensor-parallel plan (tp_plan), and a program runs on one: "
            "load the model without the plan, and for more devices start a process for each (docs/parallel.md)"
        )
    devices = {str(parameter.device) for parameter in model.parameters()}
    if "meta" in devices:
        # Some ways to build a model without weights make its buffers for real: its graphs would copy between devices.
        devices |= {str(buffer.device) for buffer in model.buffers()}
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedError(
            f"the weights are on {', '.join(sorted(devices))}: load the whole model on one device (without device_map, or "
            "with that device alone) and for more devices start a process for each (docs/parallel.md), or to plan without "
            "weights build all of it on 'meta'"
        )
    allowed = (torch.float32, torch.float16, torch.bfloat16)
    if len(dtypes) != 1 or not dtypes <= set(allowed):
        names = ", ".join(sorted(map(str, dtypes)))
        raise UnsupportedError(f"the weights are {names}: load the model in one of float32, float16, bfloat16")
