"""A tiny LLaVA from pixels to tokens, through the public API, against the published code."""

from collections.abc import Iterator
from typing import Any

import golden
import pytest
import torch
from golden import TOLERANCE, largest_error, partition
from models import Remembered
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import vitcop_compile as vc
from vitcop_compile import ViTCoPConfig, pipeline
from vitcop_compile.capture import capture

_IMAGE = -200  # the published placeholder: one for a whole image


@pytest.fixture(scope="module")
def model() -> Iterator[LlavaForConditionalGeneration]:
    index = golden.index("e2e")
    # An id outside the vocabulary cannot be mistaken for text.
    made = golden.tiny_llava(index["vision_config"], index["config"], image_token_id=index["config"]["vocab_size"])
    made.load_state_dict({_renamed(key): t for key, t in golden.load("e2e", "weights.safetensors").items()})
    # One capture serves every schedule: none of them may change it.
    captures: list = []

    def once(*args: Any) -> Any:
        captures.append(captures[0] if captures else capture(*args))
        return captures[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "capture", once)
        patch.setattr(pipeline, "Programs", Remembered)
        yield made


def _renamed(key: str) -> str:
    for old, new in (
        ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ):
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key.replace("model.", "model.language_model.", 1)


def _config(env: dict[str, str]) -> ViTCoPConfig:
    if env["USE_VITCOP"] == "False":
        return ViTCoPConfig.dense()
    return ViTCoPConfig(
        float(env["VISION_PRUNE_RARIO"]),
        float(env["CLUSTER_PERCENTAGE"]),
        float(env["VITCOP_PRUNED_RARIO"]),
        shallow_layer=int(env["SHALLOW_PRUNED_LAYER"]),
        deep_layer=int(env["DEEP_PRUNED_LAYER"]),
    )


def _expanded(ids: Tensor, image_token: int, patches: int) -> Tensor:
    """The published prompt [1, t] with its placeholder spelled out, as transformers' processor does."""
    row: list[int] = []
    for token in ids[0].tolist():
        row.extend([image_token] * patches if token == _IMAGE else [token])
    return torch.tensor([row])


def _one_image(case: dict[str, Any]) -> bool:
    return len(case["image_seeds"]) == 1 and not case.get("mid")


def _params() -> list:
    """A minute in all, of 32 layers each: one by default."""
    made = golden.params(filter(_one_image, golden.cases("e2e")))
    return [p if p.id == "1_9" else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow) for p in made]


@pytest.mark.parametrize("case", _params())
def test_generate(case: dict[str, Any], model: LlavaForConditionalGeneration) -> None:
    data, config = golden.load("e2e", case["file"]), _config(case["env"])
    fast = vc.optimize(model, config, backend="eager")
    shape = fast.schedule.shape
    ids = _expanded(data["input_ids"], model.config.image_token_id, shape.patches)
    out = fast.generate(
        input_ids=ids,
        pixel_values=data["pixel_values_int8"].float() / 64,
        max_new_tokens=len(case["tokens"]) - 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.sequences[0, ids.shape[1] :].tolist() == case["tokens"][1:]
    assert largest_error(torch.cat(out.logits), data["sdpa/scores"]) < TOLERANCE

    schedule, words = config.schedule(shape), ids.shape[1] - shape.patches
    assert list(schedule.kv_rows(words)) == case["kv_len_prefill"]
    assert schedule.prompt_tokens(words) == case["prefill_len"]
    # The last token of all is never fed back.
    assert out.past_key_values.length.tolist() == [case["decode_position_ids"][-1] + 1]

    selection = out.past_key_values.selection
    if not config.prune:
        assert selection.kept is None and selection.stages == ()
        return
    assert [stage.total for stage in schedule.decoder_stages] == case["budget"]
    assert partition(selection.labels[0]) == partition(data["vision/labels"][0])
    start = case["pre"]
    merged = torch.cat((data["sdpa/shallow/selected_abs"], data["sdpa/shallow/merged_positions"])).sort().values - start
    survivors = selection.kept[0][merged]
    assert selection.stages[0][0].tolist() == survivors.tolist()
    assert selection.stages[1][0].tolist() == survivors[data["sdpa/deep/topk"].sort().values].tolist()
