"""LLaVA-1.5 with "full" features: the CLS token becomes a token of the language model, and is never pruned."""

from __future__ import annotations

from functools import cache
from typing import Any

import models
import pytest
import reference_llava as book
import torch
from models import IMAGE, PATCHES, slow
from reference_turns import Conversation
from torch import Tensor

from vitcop_compile import ViTCoPConfig

CONFIG = ViTCoPConfig(budgets=(30, 18, 7, 5), shallow_layer=1, deep_layer=3, scale_layers=False)
SETTINGS = book.Settings(30, 5, 18, 7, 2, 1, 3)


@cache
def stock() -> Any:
    return models.llava(4, vision_feature_select_strategy="full")


class FullConversation(Conversation):
    """Before the patches of every image comes its CLS token; nothing is pruned before the features are read, so that it is the
    one of the whole image."""

    def _embed(self, ids: list[int], pixels: Tensor | None) -> tuple[Tensor, list[list[int]], list[list[int]]]:
        embed, parts, spans, labels = self.model.get_input_embeddings(), [], [], []
        self.kept, at, rows, image = [], 0, 0, 0
        while at < len(ids):
            if ids[at] != IMAGE:
                parts.append(embed(torch.tensor([[ids[at]]])))
                at, rows = at + 1, rows + 1
                continue
            assert pixels is not None
            found = book.Result()
            one = pixels[image : image + 1]
            whole = self.model.model.get_image_features(pixel_values=one).pooler_output[0]
            parts += [whole[None, :1], book._see(self.model, one, self.settings, found)]
            spans.append(list(range(rows + 1, rows + 1 + len(found.kept))))
            labels.append(found.labels)
            self.kept.append(found.kept)
            at, rows, image = at + PATCHES + 1, rows + 1 + len(found.kept), image + 1
        self.own = [self.settings] * len(spans)
        return torch.cat(parts, 1), spans, labels


def request(images: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    words, ids = models.text(3 + 4 * images, seed), []
    for i in range(images):
        ids += [*words[4 * i : 4 * i + 3], *[IMAGE] * (PATCHES + 1)]
    return torch.tensor([[*ids, *words[-3:]]]), {"pixel_values": models.pixels(images, seed)} if images else {}


@pytest.mark.parametrize("images", [0, 1, 2])
def test_dense_is_the_stock_model(images: int) -> None:
    ids, given = request(images, images)
    common: dict[str, Any] = {
        "max_new_tokens": 16, "do_sample": False, "return_dict_in_generate": True, "output_logits": True,
        "attention_mask": torch.ones_like(ids),
    }  # fmt: skip
    fast = models.optimize(stock(), ViTCoPConfig.dense())
    ours, theirs = (model.generate(ids, **given, **common) for model in (fast, stock()))
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["eager", slow("onnxruntime")])
def test_pruned_is_what_stock_layers_give_when_pruned_by_hand(backend: str) -> None:
    fast = models.optimize(stock(), CONFIG, backend=backend)
    for images in (1, 2):
        ids, given = request(images, images)
        out = fast.generate(
            ids, **given, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
        )  # fmt: skip
        told = FullConversation(stock(), SETTINGS)
        said = out.sequences[0, ids.shape[1] :].tolist()
        near = 1e-5 if backend == "eager" else 1e-4
        torch.testing.assert_close(
            torch.cat(out.logits), told.turn(ids[0].tolist(), given["pixel_values"], said), atol=near, rtol=near
        )
        through = [[PATCHES * i + at for i, of in enumerate(stage) for at in of] for stage in (told.kept, *told.stages)]
        selection = out["past_key_values"].selection
        assert [selection.kept[0].tolist(), *(stage[0].tolist() for stage in selection.stages)] == through


def test_the_schedule_counts_the_cls_token_as_one_that_stays() -> None:
    schedule = models.optimize(stock(), CONFIG).schedule_of(2)
    assert (schedule.patches, schedule.protected, schedule.image_tokens) == (2 * PATCHES, 2, 60)
    assert [segment.tokens for segment in schedule.layout] == [PATCHES + 1] * 2
