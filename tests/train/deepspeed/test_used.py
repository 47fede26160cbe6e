"""A loss that every parameter takes part in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moetrain.train.deepspeed.used import with_all_used


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_used_has_a_gradient_of_zeros(dtype):
    used, unused, frozen = (nn.Parameter(torch.full((3, 5), value, dtype=dtype)) for value in (2.0, 3.0, 4.0))
    hooked = []
    for parameter in (used, unused):
        parameter.register_post_accumulate_grad_hook(lambda p: hooked.append(id(p)))
    loss = (used * used).sum() / 7
    for times in (1, 2):  # micro-batches add up
        with_all_used(loss, [used, unused]).backward(retain_graph=True)
        assert torch.equal(used.grad, times * (4 * torch.ones_like(used) / 7))
        assert torch.equal(unused.grad, torch.zeros_like(unused))
        assert unused.grad.is_contiguous()
    assert sorted(hooked) == sorted([id(used), id(unused)] * 2)  # once a backward pass each
    assert frozen.grad is None


def test_the_loss_is_the_same():
    weight = nn.Parameter(torch.tensor([1.5]))
    assert with_all_used((weight * 3).sum(), [weight]).item() == 4.5
