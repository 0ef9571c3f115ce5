"""Qwen3-VL: dense as the stock model, pruned by its schedule, and what it refuses."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import frames
import pytest
import torch
from frames import LAYERS, TEXT, VISION, Tokens, assert_same, batch, generate, then
from models import captured, optimize
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLMoeConfig
from vitcop_compile.passes import clean, drop_features, lower_attention, prune, rewrite

from vitcop_compile import ConfigError, RewriteError, UnsupportedError, ViTCoPConfig
from vitcop_compile.families import family_of
from vitcop_compile.families.registry import host_of, shape_of
from vitcop_compile.schedule import Stage

request = partial(frames.request, Tokens())


def configuration(text: dict[str, Any] | None = None, **vision: Any) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    return Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 16, "rope_parameters": rope, **(text or {})},
        # 6 x 6 learned positions, so that every image is resampled; the taps are not in order.
        vision_config={**VISION, "depth": 4, "num_position_embeddings": 36, "deepstack_visual_indexes": [2, 0, 1]} | vision,
        image_token_id=95, video_token_id=94, vision_start_token_id=93, vision_end_token_id=92,
    )  # fmt: skip


@cache
def model() -> Any:
    return frames.made(Qwen3VLForConditionalGeneration(configuration()))


@cache
def dense() -> Any:
    return optimize(model(), ViTCoPConfig.dense())


def case() -> list[tuple[Any, dict[str, Tensor]]]:
    """Models with requests that have images."""
    return [(model(), given) for name, given in REQUESTS.items() if name != "text"]


REQUESTS = {
    "image": request(3, ("image", 6, 10), 4),
    "images": request(3, ("image", 6, 10), 2, ("image", 4, 4), 5, seed=1),
    "video": request(2, ("video", 3, 4, 6), 4, seed=2),
    "both": request(2, ("video", 2, 4, 6), 1, ("image", 4, 8), 2, ("video", 1, 6, 4), 3, seed=3),
    "text": request(12, seed=4),
}


@pytest.mark.covers("image", "several", "video", family="qwen3_vl")
@pytest.mark.parametrize("name", REQUESTS)
def test_dense_is_the_stock_model(name: str) -> None:
    assert_same(generate(dense(), REQUESTS[name]), generate(model(), REQUESTS[name]), 2e-5)


@pytest.mark.covers("batch", family="qwen3_vl")
def test_a_batch_is_its_samples_alone() -> None:
    given = [REQUESTS[name] for name in ("images", "text", "video")]
    found = generate(dense(), batch(*given))
    for row, alone in enumerate(given):
        wanted = generate(model(), alone)
        assert found.sequences[row, -16:].tolist() == wanted.sequences[0, -16:].tolist()
        assert (torch.stack(found.logits)[:, row] - torch.stack(wanted.logits)[:, 0]).abs().max() < 2e-5


@pytest.mark.covers("turns", family="qwen3_vl")
@pytest.mark.parametrize("parts", [(6,), (2, ("image", 4, 6), 3), (2, ("video", 2, 4, 4), 3)], ids=["text", "image", "video"])
def test_a_conversation_goes_on(parts: tuple[Any, ...]) -> None:
    before = REQUESTS["images"]
    first = generate(dense(), before, 5)
    given = then(first.sequences, before, request(*parts, seed=7))
    found = generate(dense(), given, past_key_values=first.past_key_values)
    assert_same(found, generate(model(), given), 2e-5)


def test_pruned_to_nothing_less_is_the_stock_model() -> None:
    given = request(3, ("image", 6, 8), 4, ("image", 8, 6), 2, seed=5)
    fast = optimize(model(), frames.everything(12))
    assert_same(generate(fast, given), generate(model(), given), 2e-5)


def test_pruned_by_its_schedule() -> None:
    fast = optimize(model(), ViTCoPConfig.preset("1/3"))
    given = REQUESTS["both"]
    out = generate(fast, given, 3)
    host = family_of(model()).host
    layout = host.read(given, given["input_ids"], torch.device("cpu"), torch.float32).layouts
    assert [segment.grid for images in layout for segment in images] == [(1, 2, 3), (1, 2, 3), (1, 2, 4), (1, 3, 2)]
    schedule = fast.schedule_of(tuple(segment for images in layout for segment in images))
    # Two thirds of the way to layer 2 of 32, but not before the decoder has all that it adds.
    assert [stage.layer for stage in schedule.decoder_stages] == [3, 4]
    assert [stage.keys for stage in schedule.decoder_stages] == ["raw", "raw"]
    chosen = out.past_key_values.selection
    assert chosen.kept.shape == (1, schedule.image_tokens)
    assert [stage.shape[1] for stage in chosen.stages] == list(schedule.group_tokens()[1:])


@pytest.mark.slow
def test_a_batch_that_is_pruned_is_its_samples_alone() -> None:
    fast = optimize(model(), ViTCoPConfig.preset("1/3"))
    given = [REQUESTS[name] for name in ("image", "text")]
    found = generate(fast, batch(*given), 4)
    for row, alone in enumerate(given):
        assert found.sequences[row, -4:].tolist() == generate(fast, alone, 4).sequences[0, -4:].tolist()


def test_keys_of_a_decoder_with_biases_are_centered() -> None:
    assert (shape_of(configuration()).keys, shape_of(configuration({"attention_bias": True})).keys) == ("raw", "centered")


def test_features_are_pruned_as_the_hidden_state_is() -> None:
    """Before the decoder has added all of them: single tokens may be dropped there."""
    stages = (Stage("decoder", 1, "keep_lowest", (5,), keys="raw"), Stage("decoder", 2, "keep_lowest", (2,), keys="raw"))
    passes = (
        ("clean", clean), ("prune", partial(prune, stages=stages, incoming=(9,))),
        ("lower_attention", partial(lower_attention, name="sdpa")),
    )  # fmt: skip
    graph = rewrite(captured(model()).decoder, passes)
    generator = torch.Generator().manual_seed(0)
    x, *features = (torch.randn(1, 14, 64, generator=generator) for _ in range(4))
    positions = torch.randint(0, 20, (3, 1, 14), generator=generator)
    with torch.no_grad():
        found, *chosen = graph(x, positions, *features, torch.arange(3, 12)[None])
        language, rows, visual = model().model.language_model, torch.arange(14), torch.arange(3, 12)
        for layer, block in enumerate(language.layers):
            if 1 <= layer <= 2:
                visual = visual[chosen[layer - 1][0]]
                keep = torch.tensor([i for i, row in enumerate(rows.tolist()) if not 3 <= row < 12 or row in visual.tolist()])
                x, rows = x[:, keep], rows[keep]
            x = block(x, position_embeddings=language.rotary_emb(x, positions[:, :, rows]))
            x = x + features[layer][:, rows] if layer < 3 else x
        assert (found - language.norm(x)).abs().max() < 1e-5


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_tokens_are_not_merged_before_all_is_added(layer: int) -> None:
    stage = Stage("decoder", layer, "merge_by_cluster", (5,), keys="raw")
    passes = (("clean", clean), ("prune", partial(prune, stages=(stage,), incoming=(9,), states=1)))
    if layer == 3:
        rewrite(captured(model()).decoder, passes)
        return
    with pytest.raises(RewriteError, match="cross beside"):
        rewrite(captured(model()).decoder, passes)


def test_a_layer_that_is_too_early_is_refused_before_anything_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitcop_compile.pipeline.capture", None)
    config = ViTCoPConfig.preset("1/3", shallow_layer=2, deep_layer=4)
    with pytest.raises(ConfigError, match=r"shallow_layer=2 merges .* first 3 layers: choose at least 3"):
        optimize(model(), config)
    with pytest.raises(ConfigError, match="choose at least 3"):
        optimize(model(), ViTCoPConfig.preset("1/3", shallow_layer=1, deep_layer=4))


@pytest.mark.parametrize("layers, expected", [(5, (3, 4)), (6, (3, 4)), (32, (3, 22)), (36, (3, 25)), (64, (4, 44))])
def test_default_layers_move_behind_what_is_added(layers: int, expected: tuple[int, int]) -> None:
    assert ViTCoPConfig.preset("1/3").layers(layers, first=3) == expected


def test_a_decoder_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="4 layers has no room for two stages: 5 are needed"):
        ViTCoPConfig.preset("1/3").layers(4, first=3)


def test_features_that_are_not_just_added_are_not_dropped() -> None:
    class Other(torch.nn.Module):
        def forward(self, x: Tensor, positions: Tensor, features: Tensor) -> Tensor:
            return x * features

    graph = torch.export.export(Other(), (torch.ones(1), torch.ones(1), torch.ones(1))).module(check_guards=False)
    with pytest.raises(RewriteError, match="does more with features"):
        drop_features(graph, 1)


def test_other_parts_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Qwen3VLMoeForConditionalGeneration is not a supported model"):
        host_of(Qwen3VLMoeConfig(architectures=["Qwen3VLMoeForConditionalGeneration"]))
    config = configuration()
    config.text_config = Qwen3VLMoeConfig().text_config
    with pytest.raises(UnsupportedError, match="Qwen3VL with a qwen3_vl_moe_text language model is not supported"):
        host_of(config)


def test_layers_of_the_encoder_are_tapped_in_their_order() -> None:
    assert shape_of(configuration()).deepstack == 3
    assert shape_of(configuration(deepstack_visual_indexes=[])).deepstack == 0
    assert LAYERS > 3
