"""GLM-4V: dense as the stock model, pruned by its schedule, and what it refuses."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import frames
import pytest
import torch
from frames import TEXT, VISION, Tokens, assert_same, batch, generate, then
from models import optimize
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeTextConfig,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
)

from vitcop_compile import InputError, UnsupportedError, ViTCoPConfig
from vitcop_compile.families import family_of
from vitcop_compile.families.registry import host_of, shape_of

# Frames of videos have the placeholders of images.
request = partial(frames.request, Tokens(video=95, clip=(91, 90)))


def settings() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    return {
        "text_config": TEXT | {"rope_parameters": rope},
        # 6 x 6 learned positions, so that every image is resampled.
        "vision_config": VISION | {"depth": 3, "image_size": 6 * frames.PATCH},
        "image_token_id": 95, "video_token_id": 94, "image_start_token_id": 93, "image_end_token_id": 92,
        "video_start_token_id": 91, "video_end_token_id": 90,
    }  # fmt: skip


@cache
def model(name: str = "4v") -> Any:
    if name == "4v":
        return frames.made(Glm4vForConditionalGeneration(Glm4vConfig(**settings())))
    own = settings()
    own["text_config"] |= {"model_type": "glm4v_text"}
    own["vision_config"] |= {"model_type": "glm4v_vision"}
    return frames.made(Glm46VForConditionalGeneration(Glm46VConfig(**own)))


@cache
def dense(name: str = "4v") -> Any:
    return optimize(model(name), ViTCoPConfig.dense())


def case() -> list[tuple[Any, dict[str, Tensor]]]:
    """Models with requests that have images."""
    return [(model(), given) for name, given in REQUESTS.items() if name != "text"]


REQUESTS = {
    "image": request(3, ("image", 6, 10), 4),
    "images": request(3, ("image", 6, 10), 2, ("image", 4, 4), 5, seed=1),
    "video": request(2, ("video", 3, 4, 6), 4, seed=2),
    "text": request(12, seed=4),
}
BOTH = request(2, ("video", 2, 4, 6), 1, ("image", 4, 8), 2, ("video", 1, 6, 4), 3, seed=3)


# Logits of the stock model in fp32 are up to 6e-5 from those in fp64: of positions that are sampled, most of all.
@pytest.mark.covers("image", "several", "video", family="glm4v")
@pytest.mark.parametrize("name", REQUESTS)
def test_dense_is_the_stock_model(name: str) -> None:
    assert_same(generate(dense(), REQUESTS[name]), generate(model(), REQUESTS[name]))


@pytest.mark.slow
def test_its_newer_class_is_the_same() -> None:
    assert_same(generate(dense("46v"), REQUESTS["video"]), generate(model("46v"), REQUESTS["video"]))


def as_images(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with the frames of its videos as images, which the stock model takes together with others."""
    side = {"video": given["video_grid_thw"].tolist(), "image": given["image_grid_thw"].tolist()}
    rows = {"video": given["pixel_values_videos"], "image": given["pixel_values"]}
    parts, grids = [], []
    for kind in ("video", "image", "video"):
        time, high, wide = side[kind].pop(0)
        parts.append(rows[kind][: time * high * wide])
        rows[kind] = rows[kind][time * high * wide :]
        grids += [(1, high, wide)] * time
    return {
        "input_ids": given["input_ids"], "attention_mask": given["attention_mask"], "pixel_values": torch.cat(parts),
        "image_grid_thw": torch.tensor(grids), "mm_token_type_ids": given["mm_token_type_ids"].clamp(max=1),
    }  # fmt: skip


def test_images_and_videos_together_are_told_apart() -> None:
    assert_same(generate(dense(), BOTH), generate(model(), as_images(BOTH)))
    alone = {name: value for name, value in BOTH.items() if name != "mm_token_type_ids"}
    with pytest.raises(InputError, match="mm_token_type_ids is NoneType: images and videos have the same placeholders"):
        dense()(**alone)


@pytest.mark.covers("batch", family="glm4v")
def test_a_batch_is_its_samples_alone() -> None:
    given = [REQUESTS[name] for name in ("images", "text")]
    found = generate(dense(), batch(*given))
    for row, alone in enumerate(given):
        wanted = generate(model(), alone)
        assert found.sequences[row, -16:].tolist() == wanted.sequences[0, -16:].tolist()
        assert (torch.stack(found.logits)[:, row] - torch.stack(wanted.logits)[:, 0]).abs().max() < 1e-4


@pytest.mark.covers("turns", family="glm4v")
@pytest.mark.parametrize("parts", [(6,), (2, ("image", 4, 6), 3)], ids=["text", "image"])
def test_a_conversation_goes_on(parts: tuple[Any, ...]) -> None:
    before = REQUESTS["images"]
    first = generate(dense(), before, 5)
    given = then(first.sequences, before, request(*parts, seed=7))
    found = generate(dense(), given, past_key_values=first.past_key_values)
    assert_same(found, generate(model(), given))


@pytest.mark.slow
def test_a_conversation_about_an_image_goes_on_with_a_video() -> None:
    before = request(2, ("video", 2, 4, 6), 1, ("image", 4, 8), 2, seed=3)
    first = generate(dense(), before, 5)
    given = then(first.sequences, before, request(2, ("video", 1, 6, 4), 3, seed=8))
    found = generate(dense(), given, past_key_values=first.past_key_values)
    assert_same(found, generate(model(), as_images(given)))


@pytest.mark.slow
def test_pruned_to_nothing_less_is_the_stock_model() -> None:
    given = request(3, ("image", 6, 8), 4, ("image", 8, 6), 2, seed=5)
    assert_same(generate(optimize(model(), frames.everything(12)), given), generate(model(), given))


def test_pruned_by_its_schedule() -> None:
    fast = optimize(model(), ViTCoPConfig.preset("1/3"))
    out = generate(fast, BOTH, 3)
    host = family_of(model()).host
    layout = host.read(BOTH, BOTH["input_ids"], torch.device("cpu"), torch.float32).layouts
    segments = tuple(segment for images in layout for segment in images)
    assert [(s.kind, s.grid) for s in segments] == [
        ("video", (1, 2, 3)), ("video", (1, 2, 3)), ("image", (1, 2, 4)), ("video", (1, 3, 2)),
    ]  # fmt: skip
    schedule = fast.schedule_of(segments)
    assert [stage.layer for stage in schedule.decoder_stages] == [1, 3]
    assert [stage.keys for stage in schedule.decoder_stages] == ["centered", "centered"]
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


def test_sizes_are_those_of_the_processor() -> None:
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

    processor = Glm4vImageProcessorPil()
    for height, width in ((100, 150), (30, 700), (640, 480)):
        found = processor(torch.zeros(3, height, width, dtype=torch.uint8).numpy(), return_tensors="pt")["image_grid_thw"]
        _, rows, columns = found[0].tolist()
        assert dense().layout_of(height, width)[0].grid == (1, rows // 2, columns // 2)


def test_other_parts_are_refused() -> None:
    assert shape_of(Glm4vConfig(**settings())).keys == "centered"
    config = Glm46VConfig(text_config=Glm4vMoeTextConfig(), architectures=["Glm46VForConditionalGeneration"])
    with pytest.raises(UnsupportedError, match="Glm46V with a glm4v_moe_text language model is not supported: glm4v_text is"):
        host_of(config)
