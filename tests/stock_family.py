"""What every family is held to: its dense model against the stock one, and the sizes of what a pruned one keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import models
import torch
from torch import Tensor

from vitcop_compile import ViTCoPConfig

NEAR, STEPS = 1e-4, 16
CONFIG = ViTCoPConfig.preset("1/3", shallow_layer=1, deep_layer=3)
# (ids of a prompt, what the processor gives beside them).
Request = tuple[list[int], dict[str, Any]]


def scatter(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights with which greedy tokens vary."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
            if weight.dim() == 1:
                weight.add_(1)


def generate(
    model: Any,
    ids: Sequence[Sequence[int]],
    given: dict[str, Any],
    mask: Tensor | None = None,
    steps: int = STEPS,
    **more: Any,
) -> Any:
    """Greedy tokens, and their logits."""
    prompt = torch.tensor(ids)
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt) if mask is None else mask, **given, max_new_tokens=steps,
        do_sample=False, return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


def said(out: Any) -> list[int]:
    """The new tokens of one sample."""
    return out.sequences[0, -len(out.logits) :].tolist()


def check_same(ours: Any, theirs: Any) -> None:
    """Tokens and logits."""
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(torch.cat(ours.logits), torch.cat(theirs.logits), atol=NEAR, rtol=0)
    assert len(set(said(theirs))) > 4


def check_dense(stock: Any, *requests: Request) -> None:
    """The stock model's tokens and logits."""
    dense = models.optimize(stock, ViTCoPConfig.dense())
    for ids, given in requests:
        check_same(generate(dense, [ids], given), generate(stock, [ids], given))


def check_batch(stock: Any, requests: Sequence[Request], joined: dict[str, Any], config: ViTCoPConfig) -> None:
    """Prompts of unequal lengths, padded on the left, say what they say alone."""
    fast = models.optimize(stock, config)
    longest = max(len(ids) for ids, _ in requests)
    rows = [[0] * (longest - len(ids)) + ids for ids, _ in requests]
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids, _ in requests])
    out = generate(fast, rows, joined, mask, steps=4)
    for row, (ids, given) in enumerate(requests):
        alone = generate(fast, [ids], given, steps=4)
        assert out.sequences[row, -4:].tolist() == said(alone)
        torch.testing.assert_close(torch.stack(out.logits, 1)[row], torch.cat(alone.logits), atol=NEAR, rtol=0)


def check_turns(stock: Any, first: Request, *later: Callable[[list[int]], Request]) -> None:
    """Later turns on the dense model's cache are the stock model's whole conversations.

    later: from all ids so far to those of the conversation with a turn more, and what the processor gives for all of it.
    """
    dense = models.optimize(stock, ViTCoPConfig.dense())
    ids, given = first
    out = generate(dense, [ids], given)
    for turn in later:
        ids, given = turn(out.sequences[0].tolist())
        whole = generate(stock, [ids], given)
        out = generate(dense, [ids], given, past_key_values=out.past_key_values)
        check_same(out, whole)


def check_pruned(stock: Any, request: Request, kept: Sequence[int]) -> Any:
    """What the vision stage keeps of each segment, and the stages after it, is what the schedule says; returns that."""
    fast = models.optimize(stock, CONFIG)
    ids, given = request
    out = generate(fast, [ids], given)
    images = fast.host.read(given, torch.tensor([ids]), torch.device("cpu"), torch.float32)
    schedule = fast.schedule_of(tuple(segment for layout in images.layouts for segment in layout))
    assert schedule.segment_tokens == tuple(kept)
    selection = out.past_key_values.selection
    assert selection.kept.shape == (1, sum(kept))
    assert [stage.shape[1] for stage in selection.stages] == [stage.total for stage in schedule.decoder_stages]
    assert len(selection.kept[0].unique()) == sum(kept)
    assert all(logits.isfinite().all() for logits in out.logits)
    return schedule
