"""The linear layer against F.linear: output, gradients, dtypes and what it keeps.

Shapes: K inputs, N outputs; leading dimensions are free.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moetrain.ops.linear import linear, linears, wide_linear


def operands(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    *lead, inputs, outputs = shape
    shapes = [(*lead, inputs), (outputs, inputs)] + [(outputs,)] * bias
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes
    ]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(2, 5, 7, 11), (0, 3, 7, 11), (13, 7, 11), (7, 11), (2, 97, 251, 211)])
def test_equals_f_linear(shape: tuple[int, ...], dtype: torch.dtype, bound: float, bias: bool) -> None:
    tensors = operands(shape, bias, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    found, expected = linear(*tensors), F.linear(*wide)
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound * shape[-2])
    dy = torch.randn(expected.shape, dtype=torch.float64)
    ours = torch.autograd.grad(found, tensors, dy.to(dtype))
    for grad, right in zip(ours, torch.autograd.grad(expected, wide, dy), strict=True):
        assert grad.dtype is dtype
        torch.testing.assert_close(grad.double(), right, rtol=bound, atol=bound * 40)


@pytest.mark.parametrize("shape", [(2, 5, 7), (0, 3, 7), (13, 7)])
def test_several_weights_share_an_input_and_its_gradient(shape: tuple[int, ...]) -> None:
    """Of outputs of other widths, each with or without a bias."""
    draw = torch.Generator().manual_seed(1)
    sizes = [shape, (11, 7), (5, 7), (3, 7), (11,), (3,)]
    x, a, b, c, a_bias, c_bias = tensors = [
        torch.randn(size, generator=draw, dtype=torch.float64).requires_grad_() for size in sizes
    ]
    found = linears(x, [a, b, c], [a_bias, None, c_bias])
    expected = [F.linear(x, a, a_bias), F.linear(x, b), F.linear(x, c, c_bias)]
    grads = [torch.randn(y.shape, generator=draw, dtype=torch.float64) for y in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    ours, theirs = (torch.autograd.grad(ys, tensors, grads) for ys in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bias", [False, True])
def test_autocast_is_f_linears(bias: bool) -> None:
    tensors = operands((64, 48, 32), bias, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = linear(*tensors), F.linear(*tensors)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, expected)


def test_it_keeps_its_input_and_weight_and_nothing_else() -> None:
    x, weight, bias = operands((97, 251, 211), True, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        linear(x, weight, bias)
    assert sorted(kept) == sorted([x.data_ptr(), weight.data_ptr()])


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_operand_costs_no_product(frozen: int) -> None:
    tensors = operands((13, 7, 11), False, torch.float64)
    tensors[frozen].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        linear(*tensors).sum().backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad is not None
    assert counter.get_total_flops() == 2 * (2 * 13 * 7 * 11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 5, 7, 11), (13, 7, 11), (7, 11), (2, 97, 251, 211)])
def test_a_wide_product_has_its_rows_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    *_, outputs = shape
    x, weight_NK = operands(shape, bias=False, dtype=dtype)
    weight_NK = weight_NK.detach().float().requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, weight_NK)]
    found, expected = wide_linear(x, weight_NK), F.linear(*wide)
    assert found.dtype is torch.float32
    atol = 2**-22  # a summand: its product's and its addition's rounding, of terms up to 4
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=atol * shape[-2])
    dy = torch.randn(*expected.shape[:-1], outputs)
    ours = torch.autograd.grad(found, (x, weight_NK), dy)
    theirs = torch.autograd.grad(expected, wide, dy.double())
    rows = dy.numel() // outputs
    torch.testing.assert_close(ours[1].double(), theirs[1], rtol=1e-6, atol=atol * rows)
    torch.testing.assert_close(ours[0].double(), theirs[0], rtol=2**-8, atol=2**-8)
