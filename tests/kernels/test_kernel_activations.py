"""The activations that kernels fuse, against torch's own and autograd in fp64.

Shapes: n elements of each pre-activation.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels import activations
from moetrain.kernels.twins import activations as twins
from moetrain.ops.activations import ACTIVATIONS, activate, gate_and_up, is_gated

NAMES = activations.GATED + activations.PLAIN


@triton.jit
def apply(gate, up, h, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = activations.activate(
        tl.load(gate + at, mask=at < n, other=0.0), tl.load(up + at, mask=at < n, other=0.0), NAME
    )
    tl.store(h + at, value, mask=at < n)


@triton.jit
def apply_backward(dh, gate, up, dgate, dup, n, NAME: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    read_dh = tl.load(dh + at, mask=at < n, other=0.0)
    read_gate = tl.load(gate + at, mask=at < n, other=0.0)
    read_up = tl.load(up + at, mask=at < n, other=0.0)
    to_gate, to_up = activations.activate_backward(read_dh, read_gate, read_up, NAME)
    tl.store(dgate + at, to_gate, mask=at < n)
    tl.store(dup + at, to_up, mask=at < n)


@pytest.fixture
def points_2n(device: torch.device) -> Tensor:
    """Gate and up: near nothing, far out, at the limit of the clamp and on both sides of it, and nothing."""
    edges = torch.tensor([0.0, -0.0, 7.0, -7.0, 6.99, -6.99, 7.01, -7.01, 30.0, -30.0, 90.0, -100.0])
    grid = torch.cartesian_prod(edges, edges)
    random = torch.randn(97, 2, generator=torch.Generator().manual_seed(3)) * 3
    return torch.cat([grid, random]).t().contiguous().to(device)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # its reciprocal is 0, as it should be
def test_an_activation_and_its_gradient(name: str, points_2n: Tensor) -> None:
    gate, up = points_2n
    n, block = up.numel(), 256
    h, dgate, dup, dh = (torch.empty_like(up) for _ in range(4))
    dh.copy_(torch.linspace(-1, 2, n))
    apply[(1,)](gate, up, h, n, NAME=name, BLOCK=block)
    apply_backward[(1,)](dh, gate, up, dgate, dup, n, NAME=name, BLOCK=block)

    columns = points_2n.double() if activations.is_gated(name) else up[None].double()
    z_nP = columns.t().requires_grad_()
    want = twins.activate(z_nP, name)
    (dz_nP,) = torch.autograd.grad((want.squeeze(1) * dh.double()).sum(), z_nP)
    got = [dgate, dup] if activations.is_gated(name) else [dup]
    torch.testing.assert_close(h.double(), want.squeeze(1).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(got, 1).double(), dz_nP, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_number_stays_none(name: str, device: torch.device) -> None:
    nan, h = torch.full((1,), torch.nan, device=device), torch.zeros(1, device=device)
    apply[(1,)](nan, nan, h, 1, NAME=name, BLOCK=16)
    assert h.isnan().all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_twin_is_the_layer_s_activation(name: str) -> None:
    assert activations.is_gated(name) == is_gated(name) == (name in twins.GATED)
    z_nP = torch.randn(7, 26, dtype=torch.float64)
    assert torch.equal(twins.activate(z_nP, name), activate(*gate_and_up(z_nP, name), name))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'tanh'; known: swiglu, "):
        activations.is_gated("tanh")
    with pytest.raises(ValueError, match=r"'tanh'; known: swiglu, "):
        twins.activate(torch.ones(1, 2), "tanh")
