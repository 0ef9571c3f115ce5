"""The operations, the vision side and the budgets against the published code's own numbers."""

import dataclasses
import functools
import itertools
from typing import Any

import golden
import naive
import pytest
import torch
from golden import TOLERANCE, largest_error, of_case, partition
from vitcop_compile.passes import encoder_passes, rewrite

from vitcop_compile import Budgets, ConfigError, ModelShape, ViTCoPConfig, ops
from vitcop_compile.capture import Capture, capture
from vitcop_compile.config import published_budgets
from vitcop_compile.families import Family, family_of
from vitcop_compile.policies import patch_positions
from vitcop_compile.schedule import Schedule

# vic


def clustering_inputs(case: dict[str, Any]) -> tuple[dict, torch.Tensor, torch.Tensor | None]:
    data = of_case("vic", case["name"])
    positions = data["pos"][None] if case["has_pos"] else None
    return data, data["X"][None], positions


def decided(case: dict[str, Any]) -> bool:
    """Whether the rules decide a case. Else the order of a sum did, or fp16, or features that are not finite."""
    return bool(case["order_robust"]) and bool(of_case("vic", case["name"])["X"].isfinite().all())


@pytest.mark.parametrize("case", golden.params(golden.cases("vic")))
def test_clustering(case: dict[str, Any]) -> None:
    data, features, positions = clustering_inputs(case)
    labels = ops.density_peaks(features, positions, case["n_centers"], case["dc"], case["k"])[0]
    # Holds whatever the rounding: every center heads a cluster, and there is nothing but them and -1.
    assert set(labels.tolist()) - {-1} == set(range(case["n_centers"]))
    if not decided(case):
        return
    if case["compare"].startswith("labels"):
        assert labels.tolist() == data["labels"].tolist()
    else:
        assert partition(labels) == partition(data["labels"])


@pytest.mark.parametrize("case", golden.params(filter(decided, golden.cases("vic"))))
def test_naive_clustering(case: dict[str, Any]) -> None:
    data, features, positions = clustering_inputs(case)
    found = naive.density_peaks(
        features[0].numpy(), None if positions is None else positions[0].numpy(), case["n_centers"], case["dc"], case["k"]
    )
    assert partition(torch.tensor(found.labels)) == partition(data["labels"])
    if "rho" in data:
        assert torch.allclose(torch.tensor(found.rho), data["rho"].float(), rtol=1e-4)
        # Distances below the rounding of the features' own differences come out of fp32 as they like.
        assert torch.allclose(torch.tensor(found.delta), data["delta"].float(), rtol=1e-3, atol=1e-3)


# select

SELECT = [case for case in golden.cases("select") if 1 <= case["R"] <= case["n"]]
REFUSED = [case for case in golden.cases("select") if not 1 <= case["R"] <= case["n"]]


def ragged(data: dict[str, torch.Tensor], start: int) -> tuple[list[int], list[list[int]], list[int]]:
    """(kept tokens, merged groups, where each merged token sits), counted from the first visual token."""
    bounds = data["merged_groups_offsets"].tolist()
    flat = (data["merged_groups_flat"] - start).tolist()
    groups = [flat[a:b] for a, b in itertools.pairwise(bounds)]
    return (data["selected_abs"] - start).tolist(), groups, (data["merged_positions"] - start).tolist()


@pytest.mark.parametrize("case", golden.params(SELECT))
def test_selection(case: dict[str, Any]) -> None:
    data = of_case("select", case["name"])
    kept, groups, places = ragged(data, case["visual_start"])
    hidden = torch.randn(1, case["n"], 8)
    rows, index = ops.merge_by_cluster(hidden, data["norms"][None], data["labels"][None], case["R"])
    expected = {i: hidden[0, i] for i in kept} | {m: hidden[0, m] + hidden[0, g].mean(0) for m, g in zip(places, groups)}
    assert index[0].tolist() == sorted(expected) and len(expected) == case["R"]
    assert torch.allclose(rows[0], torch.stack([expected[i] for i in sorted(expected)]), atol=1e-5)


@pytest.mark.parametrize("case", golden.params(SELECT))
def test_naive_selection(case: dict[str, Any]) -> None:
    data = of_case("select", case["name"])
    kept, _, places = ragged(data, case["visual_start"])
    norms, labels = data["norms"].tolist(), data["labels"].tolist()
    _, index = naive.merge_by_cluster(torch.eye(case["n"]).numpy(), norms, labels, case["R"])
    assert index == sorted(kept + places)
    if case["branch"] == "K<=R" and "quotas" in data and case["K"] < case["n"]:
        assert sorted(naive.quotas(norms, labels, case["R"]).quotas) == sorted(data["quotas"].tolist())


@pytest.mark.parametrize("case", golden.params(REFUSED))
def test_selection_refuses_a_budget_out_of_range(case: dict[str, Any]) -> None:
    n = case["n"]
    with pytest.raises(ValueError, match=f"budget={case['R']} is out of range for {n} tokens"):
        ops.merge_by_cluster(torch.zeros(1, n, 2), torch.zeros(1, n), torch.zeros(1, n, dtype=torch.int64), case["R"])


# budget

needs_budget = pytest.mark.skipif(not golden.has("budget", "budget.safetensors"), reason="the golden data lacks budgets")


@needs_budget
def test_budgets() -> None:
    names = (
        "vision_ratio",
        "pruned_ratio",
        "shallow_layer",
        "deep_layer",
        "v_token_num",
        "shallow_token_num",
        "deep_token_num",
    )
    data = golden.load("budget", "budget.safetensors")
    resolved = refused = several = 0
    for v, r, s, d, n, merged, kept in zip(*(data[name].tolist() for name in names)):
        assert published_budgets(r, v, s, d, 32, n) == naive.budgets(r, v, s, d, 32, n) == (merged, kept)
        images, rest = divmod(n, int(v * 576))
        if rest or not images:
            continue
        several += images > 1
        possible = 1 <= s < d < 32 and kept >= 1 and merged <= n
        try:
            config = ViTCoPConfig(v, 0.1, r, shallow_layer=s, deep_layer=d, scale_layers=False, scope="pooled")
            schedule = config.schedule(layout=(ModelShape().image,) * images)
        except ConfigError as error:
            assert not possible, error
            refused += 1
            continue
        assert possible
        assert schedule.group_tokens() == (n, merged, kept)
        assert tuple(stage.layer for stage in schedule.decoder_stages) == (s, d)
        resolved += 1
    assert resolved and refused and several


@needs_budget
def test_truncation() -> None:
    data = golden.load("budget", "budget.safetensors")
    for v, n in zip(data["trunc/vision_ratio"].tolist(), data["trunc/n_of_576"].tolist()):
        half = v * (20 / 2 + 2 / 2 + 2) / 32  # a target of about n / 2 after the shallow stage
        assert ViTCoPConfig(v, 0.1, half).schedule().image_tokens == n
    expected = data["trunc/n_centers"].tolist()
    for i, p in enumerate(data["trunc/percentage"].tolist()):
        for j, n in enumerate(data["trunc/n"].tolist()):
            vision = ViTCoPConfig(center_ratio=p, budgets=Budgets(n, 1, 1)).schedule(ModelShape(grid=(1, n))).vision
            assert vision is not None and vision.option("centers") == (expected[i][j],)


@pytest.mark.parametrize("name", golden.index("budget").get("official", {}))
def test_published_settings(name: str) -> None:
    official = golden.index("budget")["official"][name]
    schedule = ViTCoPConfig.preset(name.replace("_", "/")).schedule()
    assert schedule.vision is not None
    assert schedule.vision.tokens == (official["n"],)
    assert schedule.vision.option("centers") == (official["centers"],)
    assert [stage.total for stage in schedule.decoder_stages] == official["shallow_deep"]


# vision


@functools.cache
def encoder() -> tuple[Family, Capture]:
    weights = golden.load("vision", "vision.safetensors")
    prefix = "weights/vision_model."
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 8}
    model = golden.tiny_llava(golden.index("vision")["model"], text, image_token_id=5)
    state = {key.removeprefix(prefix): t for key, t in weights.items() if key.startswith(prefix)}
    missing, unexpected = model.model.vision_tower.load_state_dict(state, strict=False)
    family = family_of(model)
    # What follows the feature layer is never read, and a subset may lack it.
    unread = tuple(f"encoder.layers.{i}." for i in range(family.shape.feature_layer + 1, family.shape.vision_layers))
    assert not unexpected and all(key.startswith((*unread, "post_layernorm.")) for key in missing)
    return family, capture(family, model)


def encode(schedule: Schedule, images: list[int]) -> tuple[torch.Tensor, ...]:
    family, captured = encoder()
    pixels = golden.load("vision", "vision.safetensors")["pixel_values_int8"]
    if max(images) >= len(pixels):
        pytest.skip("the golden data lacks an image of this case")
    with torch.no_grad():
        return rewrite(captured.encoder, encoder_passes(schedule))(family.patches(pixels[images].float() / 64))


@pytest.mark.parametrize("case", golden.params(golden.cases("vision")))
def test_vision(case: dict[str, Any]) -> None:
    env, data = case["env"], of_case("vision", case["name"])
    config = ViTCoPConfig(
        float(env["VISION_PRUNE_RARIO"]), float(env["CLUSTER_PERCENTAGE"]), float(env["VITCOP_PRUNED_RARIO"])
    )
    # The published budgets are those of 32 decoder layers; the encoder does not know how many there are.
    schedule = config.schedule(dataclasses.replace(encoder()[0].shape, layers=32))
    assert schedule.vision is not None
    assert schedule.vision.tokens == (case["n"],) and schedule.vision.option("centers") == (case["n_centers"],)

    features, kept, labels = encode(schedule, case["images"])
    assert kept.tolist() == data["kept"].tolist()
    assert largest_error(features, data["hidden_states_filtered"]) < TOLERANCE
    shifted = labels + torch.arange(len(labels)).unsqueeze(1) * case["n"]
    assert partition(shifted.flatten()) == partition(data["labels"].flatten())
    for found, expected in zip(shifted, data["labels"].reshape(shifted.shape)):
        assert partition(found) == partition(expected)


@pytest.mark.parametrize("case", golden.params(golden.cases("vision")))
def test_clustering_of_patches(case: dict[str, Any]) -> None:
    data = of_case("vision", case["name"])
    grid = (golden.index("vision")["model"]["image_size"] // golden.index("vision")["model"]["patch_size"],) * 2
    positions = patch_positions(data["kept"], grid)
    assert torch.equal(positions, data["pos_filtered"])
    labels = ops.density_peaks(data["k_filtered"], positions, case["n_centers"])
    for i, (found, expected) in enumerate(zip(labels, data["labels"].reshape(labels.shape))):
        assert partition(found) == partition(expected - i * case["n"])


def test_dense_vision() -> None:
    data = golden.load("vision", "vision.safetensors")
    if "dense/features" not in data:
        pytest.skip("the golden data lacks dense features")
    schedule = ViTCoPConfig.dense().schedule(encoder()[0].shape)
    (features,) = encode(schedule, list(range(len(data["dense/features"]))))
    assert largest_error(features, data["dense/features"]) < TOLERANCE
