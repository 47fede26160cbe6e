"""The dense feed-forward network against autograd through its formula, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moetrain.ops.activations import ACTIVATIONS, activate, is_gated
from moetrain.ops.dense_mlp import dense_mlp


def operands(activation: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Any]:
    torch.manual_seed(0)
    *lead, width, hidden = shape
    gates = [torch.randn(hidden, width)] if is_gated(activation) else []
    made = [torch.randn(*lead, width), *gates, torch.randn(hidden, width), torch.randn(width, hidden)]
    x, *matrices = (t.to(dtype).requires_grad_() for t in made)
    return [x, *([] if gates else [None]), *matrices]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 5, 7, 11), (0, 3, 7, 11), (13, 7, 11)])
def test_equals_autograd(activation, shape):
    results = []
    for ours in (True, False):
        x, gate, up, down = operands(activation, shape, torch.float64)
        if ours:
            y = dense_mlp(x, gate, up, down, activation)
        else:
            y = F.linear(
                activate(None if gate is None else F.linear(x, gate), F.linear(x, up), activation), down
            )
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        results.append([y, *(t.grad for t in (x, gate, up, down) if t is not None)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-10)


def test_autocast_gives_gradients_in_the_weights_dtype():
    x, gate, up, down = operands("swiglu", (64, 48, 32), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = dense_mlp(x, gate, up, down, "swiglu")
    y.float().sum().backward()
    assert y.dtype is torch.bfloat16
    assert x.grad.dtype is gate.grad.dtype is up.grad.dtype is down.grad.dtype is torch.float32
    wide = dense_mlp(*(t.detach().double() for t in (x, gate, up, down)), "swiglu")
    assert (y.double() - wide).norm() < 0.02 * wide.norm()


def test_it_keeps_the_input_and_the_pre_activations():
    x, gate, up, down = operands("swiglu", (64, 48, 32), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        dense_mlp(x, gate, up, down, "swiglu")
    matrices = [tuple(t.shape) for t in (gate, up, down)]
    assert sorted(kept) == sorted([(64, 48), (64, 32), (64, 32), *matrices])
