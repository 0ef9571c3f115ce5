"""Prefill and decode of the rewritten decoder against the published code: logits, KV of every layer, selections, tokens."""

import dataclasses
import functools
from typing import Any

import golden
import naive
import pytest
import torch
from golden import TOLERANCE, largest_error, runs
from torch import Tensor
from vitcop_compile.passes import extend_passes, rewrite

from vitcop_compile import Budgets, ConfigError, ViTCoPConfig
from vitcop_compile.capture import Capture, capture
from vitcop_compile.families import Family, family_of
from vitcop_compile.program_modules import Extend
from vitcop_compile.programs import Programs

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def visual_tokens(case: dict[str, Any]) -> int:
    return sum(length for kind, length in case["parts"] if kind == "v")


def pruned(case: dict[str, Any]) -> bool:
    return case["env"]["USE_VITCOP"] == "True"


def budget(case: dict[str, Any]) -> tuple[int, int]:
    """(R, RD) of the published code, whose formula fixes 32 layers whatever the model."""
    if "budget" in case:
        return tuple(case["budget"])
    env, names = case["env"], ("VITCOP_PRUNED_RARIO", "VISION_PRUNE_RARIO")
    return naive.budgets(*(float(env[name]) for name in names), *layers(case), 32, visual_tokens(case))


def layers(case: dict[str, Any]) -> tuple[int, int]:
    return int(case["env"]["SHALLOW_PRUNED_LAYER"]), int(case["env"]["DEEP_PRUNED_LAYER"])


def possible(case: dict[str, Any]) -> bool:
    return not pruned(case) or visual_tokens(case) >= budget(case)[0] >= budget(case)[1] >= 1


CASES = golden.cases("llm")
FAITHFUL = [c for c in CASES if "file" in c and possible(c) and len(runs(c["parts"])) == 1 and c.get("robust", True)]
# The published code prunes a contiguous slice, and with it the text between two images: not an output to match.
GAPS = [c for c in CASES if "file" in c and pruned(c) and possible(c) and len(runs(c["parts"])) > 1]
IMPOSSIBLE = [c for c in CASES if not possible(c)]


@functools.cache
def decoder(name: str) -> tuple[Family, Capture]:
    entry = golden.index("llm")["models"][name]
    model = golden.tiny_llava(VISION, entry["config"], image_token_id=5)
    state = golden.load("llm", entry["file"])
    # The published model is a language model alone.
    llm = {key.removeprefix("model."): t for key, t in state.items() if key.startswith("model.")}
    model.model.language_model.load_state_dict(llm)
    model.lm_head.load_state_dict({"weight": state["lm_head.weight"]})
    family = family_of(model)
    return family, capture(family, model)


def programs(case: dict[str, Any]) -> Programs:
    family, captured = decoder(case["model"])
    shape = dataclasses.replace(family.shape, grid=(1, visual_tokens(case)))
    return Programs(dataclasses.replace(family, host=dataclasses.replace(family.host, shape=shape)), captured, config(case))


def config(case: dict[str, Any]) -> ViTCoPConfig:
    if not pruned(case):
        return ViTCoPConfig.dense()
    shallow, deep = layers(case)
    budgets = Budgets(visual_tokens(case), *budget(case))
    return ViTCoPConfig(shallow_layer=shallow, deep_layer=deep, scale_layers=False, budgets=budgets)


def prefill(made: Programs, case: dict[str, Any], data: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """(logits of every row, index of each stage, k0, v0, k1, v1, ...)."""
    embeddings = data["inputs_embeds"]
    visual = torch.tensor([[i for start, stop in runs(case["parts"]) for i in range(start, stop)]])
    labels = (data["cluster_labels"][None],) if pruned(case) else ()
    tokens = embeddings.shape[1]
    positions = torch.arange(tokens).reshape(1, 1, tokens)
    with torch.no_grad():
        module = made.prefill_module(in_place=False, all_logits=True)
        logits, *rest = module.prefill(embeddings, torch.tensor([tokens - 1]), positions, visual, *labels)
    stages = len(made.schedule.decoder_stages)
    return logits, rest[:stages], rest[stages:]


def stored_layers(case: dict[str, Any], data: dict[str, Tensor]) -> list[int]:
    """Layers whose keys and values the data holds."""
    return [layer for layer in range(len(case["kv_len_prefill"])) if f"sdpa/kv/key_{layer}" in data]


@pytest.mark.parametrize("case", golden.params(FAITHFUL))
def test_prefill_and_decode(case: dict[str, Any]) -> None:
    data, made = golden.load("llm", case["file"]), programs(case)
    logits, stages, caches = prefill(made, case, data)
    rows = case["kv_len_prefill"]
    found = stored_layers(case, data)
    assert largest_error(logits, data["sdpa/prefill/logits"]) < TOLERANCE
    assert [key.shape[2] for key in caches[::2]] == [value.shape[2] for value in caches[1::2]] == rows
    assert found
    for layer in found:
        for cache, name in zip(caches[2 * layer :], ("key", "value")):
            assert largest_error(cache, data[f"sdpa/kv/{name}_{layer}"][:, :, : rows[layer]]) < TOLERANCE

    if pruned(case):
        ((start, _),) = runs(case["parts"])
        survivors = torch.cat((data["sdpa/shallow/selected_abs"], data["sdpa/shallow/merged_positions"])) - start
        assert stages[0][0].tolist() == sorted(survivors.tolist())
        assert stages[1][0].tolist() == sorted(data["sdpa/deep/topk"].tolist())

    tokens, positions = case["tokens"][1:], case["decode_position_ids"]  # the first is a bos that is never fed
    schedule = made.schedule
    step = Extend(made.family, rewrite(made.captured.decoder, extend_passes(schedule)))
    held = [rows[0] - schedule.image_tokens + tokens_ + len(positions) for tokens_ in schedule.group_tokens()]
    _, last, _, _, removed, *buffers = made.extend_inputs(1, 1, held)
    for buffer, cache in zip(buffers, caches, strict=True):
        buffer[:, :, : cache.shape[2]] = cache
    assert logits[0, -1].argmax() == tokens[0]
    for t, position in enumerate(positions):
        with torch.no_grad():
            at = torch.tensor([position])
            logits, *_ = step(torch.tensor([[tokens[t]]]), last, at, at, removed, *buffers)
        assert largest_error(logits[:, 0], data["sdpa/decode/logits"][:, t]) < TOLERANCE
        assert logits.argmax() == tokens[t + 1]
    for layer in found:
        for buffer, name in zip(buffers[2 * layer :], ("key", "value")):
            assert largest_error(buffer, data[f"sdpa/kv/{name}_{layer}"]) < TOLERANCE


@pytest.mark.parametrize("case", golden.params(GAPS))
def test_text_between_images_is_kept(case: dict[str, Any]) -> None:
    data, made = golden.load("llm", case["file"]), programs(case)
    _, (shallow, deep), caches = prefill(made, case, data)
    assert [key.shape[2] for key in caches[::2]] == case["kv_len_prefill"]
    # Up to the shallow stage nothing is pruned, and nothing can differ.
    before = [layer for layer in stored_layers(case, data) if layer < layers(case)[0]]
    for layer in before:
        for cache, name in zip(caches[2 * layer :], ("key", "value")):
            assert largest_error(cache, data[f"sdpa/kv/{name}_{layer}"][:, :, : cache.shape[2]]) < TOLERANCE

    # Saliencies of the true visual rows, from those keys, give the selection.
    key = caches[2 * (layers(case)[0] - 1)][0]
    visual = [i for start, stop in runs(case["parts"]) for i in range(start, stop)]
    saliency = torch.tensor(naive.key_norm(key[:, visual].numpy())).float().tolist()
    hidden = torch.zeros(len(visual), 1).numpy()
    _, expected = naive.merge_by_cluster(hidden, saliency, data["cluster_labels"].tolist(), budget(case)[0])
    assert shallow[0].tolist() == expected
    # The deep stage ranks what stands where those tokens went; the text around them has moved up.
    rows = [row for row in range(data["inputs_embeds"].shape[1]) if row not in visual or visual.index(row) in expected]
    places = [rows.index(visual[i]) for i in expected]
    key = caches[2 * (layers(case)[1] - 1)][0]
    saliency = torch.tensor(naive.key_norm(key[:, places].numpy())).float().tolist()
    assert deep[0].tolist() == naive.keep_lowest(saliency, budget(case)[1])


@pytest.mark.parametrize("case", golden.params(IMPOSSIBLE))
def test_a_budget_beyond_the_tokens_is_refused(case: dict[str, Any]) -> None:
    merged, kept = budget(case)
    with pytest.raises(ConfigError, match=rf"budgets.*\b({merged}|{kept})\b"):
        config(case)
