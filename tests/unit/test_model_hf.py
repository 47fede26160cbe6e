"""The same weights in transformers' models: logits, loss and every gradient.

transformers' own norms and attention weights are fp32 even in an fp64 model, so that fp64 agrees to their
rounding only. Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hf_families import BATCH, FAMILIES
from hf_weights import from_hf
from torch import Tensor

from moetrain.models import Decoder, cross_entropy_sum


def assert_alike(theirs: Any, ours: Decoder, ids: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
    """Logits of what ``mask`` [B, S] says is no padding, the loss, and the gradient of every parameter."""
    dtype = ours.embed_VD.dtype
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 5e-6, "atol": 5e-6}
    reference = theirs(ids, attention_mask=mask, labels=labels, use_cache=False)
    hidden = ours(ids).hidden_BSD
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert reference.logits.abs().max() > 1
    torch.testing.assert_close(ours.logits(hidden)[real], reference.logits[real], **close)
    total, count = cross_entropy_sum(hidden[:, :-1], ours.head_weight, labels[:, 1:])
    torch.testing.assert_close(total / count, reference.loss.to(dtype), **close)
    reference.loss.backward()
    (total / count).backward()
    expected = from_hf({name: p.grad for name, p in theirs.named_parameters()})
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.any(), key
        torch.testing.assert_close(
            parameters[key].grad, gradient, **close, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_logits_loss_and_every_gradient(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    assert_alike(*family.build(dtype), *family.batch())


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral", "qwen2_moe"])
def test_padding_asks_for_nothing_and_changes_nothing(name: str) -> None:
    """Theirs is told by a mask, ours by labels alone: nothing before the padding sees it."""
    family = FAMILIES[name]
    ids, labels = family.batch()
    lengths = torch.tensor([family.seq, 5, 8])
    mask = torch.arange(family.seq) < lengths[:BATCH, None]
    assert_alike(*family.build(torch.float32), ids, labels.where(mask, -100), mask.long())


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_logits_by_the_default_backend(name: str) -> None:
    family = FAMILIES[name]
    theirs, ours = family.build(torch.float32, "auto")
    ids, _ = family.batch()
    torch.testing.assert_close(ours.logits(ours(ids).hidden_BSD), theirs(ids).logits, rtol=1e-5, atol=1e-5)
