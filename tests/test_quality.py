"""What pruning changes, told without labels: against stock models and plain numpy."""

from __future__ import annotations

from unittest import mock

import models
import naive
import numpy as np
import pytest
import torch
from models import pixels, prompt

from vitcop_compile import InputError, ViTCoPConfig, methods
from vitcop_compile.quality import Answer, answer, compare, distance, kept_saliency

HALF = ViTCoPConfig(vision_ratio=0.5, retention=0.3)


def request(batch: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.cat([prompt(seed=seed) for seed in range(batch)])
    return {"input_ids": ids, "pixel_values": pixels(batch), "attention_mask": torch.ones_like(ids)}


def test_distance_and_agreement_are_those_of_the_stock_model() -> None:
    model, asked = models.shared(), request(2)
    found = compare(model, models.optimize(model, HALF), asked, tokens=3)
    same = compare(models.optimize(model, ViTCoPConfig.dense()), models.optimize(model, HALF), asked, tokens=3)
    fast = models.optimize(model, HALF)
    with torch.no_grad():
        logits = [model(**asked).logits[:, -1].double().numpy(), fast(**asked).logits[:, -1].double().numpy()]
        said = [own.generate(**asked, max_new_tokens=3, do_sample=False)[:, -3:] for own in (model, fast)]
    first, other = (values - np.log(np.exp(values).sum(1, keepdims=True)) for values in logits)
    assert np.allclose(found.kl.numpy(), (np.exp(first) * (first - other)).sum(1), atol=1e-5)
    assert torch.allclose(found.kl, same.kl, atol=1e-5)
    for row in range(2):
        equal = (said[0][row] == said[1][row]).tolist()
        assert found.agreed[row] == (equal.index(False) if False in equal else 3)
    assert (found.kl > 1e-4).all() and found.tokens == 3 and found.said.tolist() == [3, 3]


def test_the_same_model_is_no_distance_from_itself() -> None:
    model = models.shared()
    found = compare(model, models.optimize(model, ViTCoPConfig.dense()), request(), tokens=2)
    assert found.kl.item() < 1e-6 and found.agreed.tolist() == [2] and found.saliency is None


@torch.no_grad()
def test_kept_saliency_is_a_share_of_the_encoders_attention() -> None:
    model, asked = models.shared(), request(2)
    fast = models.optimize(model, HALF)
    layer, kept = fast.schedule.vision.layer, fast(**asked).past_key_values.selection.kept
    tower = model.model.vision_tower
    block = tower.encoder.layers[layer]
    states = tower(asked["pixel_values"], output_hidden_states=True).hidden_states[layer]
    normed = block.layer_norm1(states)
    query, key = (
        projection(normed).unflatten(2, (4, 8)).transpose(1, 2).numpy()
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    found = kept_saliency(fast, asked)
    for row in range(2):
        score = np.array(naive.cls_saliency(query[row], key[row], 8**-0.5))
        assert found[row].item() == pytest.approx(score[kept[row]].sum() / score.sum(), abs=1e-5)
    assert 0.5 < found.min().item() < 1


def test_answers_are_compared_up_to_their_ends() -> None:
    """The end is what the first prompt's answer has second: nothing is forced behind it."""
    model, asked = models.shared(), request(2)
    plain = answer(model, asked, 5).tokens
    assert plain[0, 1] not in plain[1]
    with mock.patch.object(model.generation_config, "eos_token_id", [plain[0, 1].item()]):
        ended, dense = answer(model, asked, 5), models.optimize(model, ViTCoPConfig.dense())
        assert ended.said.tolist() == [2, 5] and torch.equal(ended.tokens[1], plain[1])
        found = compare(model, dense, asked, tokens=5)
    assert found.agreed.tolist() == found.said.tolist() == [2, 5]


def test_an_answer_that_ends_early_agrees_up_to_there() -> None:
    first = torch.zeros(3, 4)
    dense = Answer(torch.tensor([[5, 6, 2, 0], [5, 2, 0, 0], [5, 6, 7, 8]]), torch.tensor([3, 2, 4]), first)
    pruned = Answer(torch.tensor([[5, 2], [5, 2], [5, 6]]), torch.tensor([2, 2, 2]), first)
    assert distance(dense, pruned)[1].tolist() == [1, 2, 2] and distance(pruned, dense)[1].tolist() == [1, 2, 2]


@torch.no_grad()
def test_kept_saliency_of_prompts_that_differ() -> None:
    """Two images, text alone, one image: each as it is alone."""
    fast, pictures = models.optimize(models.shared(), HALF), models.pixels(3)
    double = torch.cat((prompt(seed=1), prompt(seed=2)), 1)
    ids, mask = models.pad([double, torch.tensor([models.text(6)]), prompt(seed=3)], "left")
    found = kept_saliency(fast, {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures})
    both = kept_saliency(fast, {"input_ids": double, "pixel_values": pictures[:2]})
    single = kept_saliency(fast, {"input_ids": prompt(seed=3), "pixel_values": pictures[2:]})
    assert torch.allclose(found[[0, 2]], torch.cat((both, single)), atol=1e-6) and found[1].isnan()
    assert kept_saliency(fast, {"input_ids": torch.tensor([models.text(6)])}).isnan().tolist() == [True]


def test_methods_that_score_nothing_in_the_encoder_keep_no_saliency() -> None:
    fast = models.optimize(models.shared(), methods.FastV(layer=1, tokens=20))
    assert kept_saliency(fast, request()) is None


def test_a_comparison_of_nothing_is_refused() -> None:
    model = models.shared()
    with pytest.raises(InputError, match="tokens=0 is below 1: compare 1 or more"):
        compare(model, models.optimize(model, HALF), request(), tokens=0)
