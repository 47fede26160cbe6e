"""The linear layer equals torch's, values and gradients, wherever its products run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moetrain.ops.linear import linear


@pytest.mark.parametrize("shape", [(2, 97, 211, 251), (3, 5, 7, 11), (0, 5, 7, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_equals_torch(shape, dtype, autocast):
    batch, seq, inner, outer = shape
    torch.manual_seed(0)
    found, wanted = [], []
    for function, results in ((linear, found), (F.linear, wanted)):
        torch.manual_seed(1)
        x = torch.randn(batch, seq, inner, dtype=dtype).requires_grad_()
        weight = torch.randn(outer, inner, dtype=dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = function(x, weight)
        y.float().square().sum().backward()
        results += [y, x.grad, weight.grad]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-3)


def test_gradients_that_nobody_wants_are_not_made():
    x, weight = torch.randn(3, 5), torch.randn(7, 5).requires_grad_()
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert torch.allclose(weight.grad, x.sum(0).expand(7, 5))
    y = linear(x.requires_grad_(), weight.detach())
    y.sum().backward()
    assert torch.allclose(x.grad, weight.detach().sum(0).expand(3, 5), atol=1e-6)
