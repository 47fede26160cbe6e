"""RMSNorm and rotary embedding against their formulas."""

import math

import pytest
import torch
from model_cases import decoder, tokens
from torch.autograd import gradcheck

from moetrain.errors import UserError
from moetrain.models.norm import RMSNorm
from moetrain.models.rope import apply_rope, rope_table
from moetrain.models.rope_options import RopeKind, RopeScaling


def norm_of(width: int, dtype: torch.dtype, eps: float = 1e-3) -> RMSNorm:
    norm = RMSNorm(width, eps).to(dtype)
    with torch.no_grad():
        norm.weight_D.copy_(torch.randn(width, dtype=dtype))
    return norm


def test_norm_equals_its_formula_and_its_gradient_is_right() -> None:
    torch.manual_seed(0)
    norm, x = norm_of(11, torch.float64), torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    rows = x.detach().reshape(-1, 11).tolist()
    rms = [math.sqrt(sum(v * v for v in row) / 11 + 1e-3) for row in rows]
    expected = torch.tensor(rows, dtype=torch.float64) / torch.tensor(rms, dtype=torch.float64)[:, None]
    torch.testing.assert_close(norm(x).reshape(-1, 11), expected * norm.weight_D, rtol=1e-13, atol=1e-13)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight_D": weight}, (x,))

    assert gradcheck(run, (x, norm.weight_D.detach().requires_grad_()))


def test_norm_of_a_strided_slice_and_of_zeros() -> None:
    torch.manual_seed(0)
    norm = norm_of(7, torch.float64)
    base = torch.randn(3, 5, 2, 7, dtype=torch.float64, requires_grad=True)
    norm(base[:, :, 1]).square().sum().backward()
    strided = base.grad.clone()
    copy = base.detach()[:, :, 1].clone().requires_grad_()
    norm(copy).square().sum().backward()
    # Other strides may take another kernel: two sums of seven and ten operations more, on terms below 22, err
    # by at most 24 * 22 * 2^-53 on either side.
    torch.testing.assert_close(strided[:, :, 1], copy.grad, rtol=0, atol=2 * 24 * 22 * 2**-53)
    assert not strided[:, :, 0].any()
    zeros = torch.zeros(2, 7, dtype=torch.float64, requires_grad=True)
    norm(zeros).sum().backward()
    torch.testing.assert_close(zeros.grad, norm.weight_D.detach().expand(2, 7) / math.sqrt(1e-3))


def test_norm_computes_in_fp32_for_bf16_input() -> None:
    torch.manual_seed(0)
    norm, wide = norm_of(257, torch.bfloat16), norm_of(257, torch.float32)
    wide.weight_D.data.copy_(norm.weight_D)
    x = (torch.randn(5, 257) * 30).bfloat16()
    assert norm(x).dtype is torch.bfloat16
    assert torch.equal(norm(x), wide(x).bfloat16())
    assert torch.equal(norm(x), norm(x.float()))  # whatever x is, the weight's dtype comes out
    norm, x = wide, torch.randn(5, 257) * 30
    exact = norm.double()(x.double())
    torch.testing.assert_close(norm.float()(x), exact.float(), rtol=1e-6, atol=1e-6)


def test_a_norm_around_one_adds_its_weight_in_fp32() -> None:
    """A bf16 sum with 1 would lose most of what a small weight says."""
    torch.manual_seed(0)
    norm = RMSNorm(257, 1e-3, zero_centered=True).to(torch.bfloat16)
    norm.weight_D.data.normal_(0, 1e-3)
    x = torch.randn(5, 257).bfloat16().requires_grad_()
    wide = x.detach().double()
    rms = (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = wide / rms * (1 + norm.weight_D.detach().double())
    out = norm(x)
    assert out.dtype is torch.bfloat16
    others = (out != expected.bfloat16()).double().mean()
    assert others < 0.01, "rounded once; with the sum rounded too, one in seven differs"
    out.float().square().sum().backward()
    assert x.grad.dtype is norm.weight_D.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("shared", [True, False])
def test_rope_turns_pairs_as_complex_numbers(shared: bool) -> None:
    torch.manual_seed(0)
    batch, seq, heads, width, theta = 2, 5, 3, 14, 71.0
    positions = torch.tensor([[3, 0, 7, 1, 100]]) if shared else torch.randint(50, (batch, seq))
    x = torch.randn(batch, seq, heads, width, dtype=torch.float64, requires_grad=True)
    y = apply_rope(x, rope_table(positions, width, theta, torch.float64))
    inverse = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions[..., None, None] * inverse)
    z = torch.complex(x[..., : width // 2], x[..., width // 2 :]) * turn
    torch.testing.assert_close(y, torch.cat([z.real, z.imag], -1), rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(y)
    mine = torch.autograd.grad((y * weight).sum(), x)[0]
    theirs = torch.autograd.grad((torch.cat([z.real, z.imag], -1) * weight).sum(), x)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_rope_rotates_bf16_in_fp32() -> None:
    torch.manual_seed(0)
    table = rope_table(torch.arange(1000, 1007)[None], 8, 1e4, torch.float32)
    x = torch.randn(1, 7, 3, 8).bfloat16()
    assert torch.equal(apply_rope(x, table), apply_rope(x.float(), table).bfloat16())


def test_the_gradient_of_a_scaled_rotation_that_also_lengthens() -> None:
    torch.manual_seed(0)
    scaling = RopeScaling(RopeKind.yarn, factor=3.0, original_max_positions=5)
    table = rope_table(torch.arange(4, 9)[None], 6, 71.0, torch.float64, scaling)
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64, requires_grad=True)
    y = apply_rope(x, table)
    torch.testing.assert_close(y.norm(), x.norm() * (0.1 * math.log(3) + 1))
    assert gradcheck(lambda x: apply_rope(x, table), (x,))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("turned", [2, 6, 10])
def test_the_first_elements_of_a_head_turn(turned: int, interleaved: bool) -> None:
    """As complex numbers, of halves or of neighbours; the others stay, and so does their gradient."""
    torch.manual_seed(0)
    positions, theta, width = torch.tensor([[3, 0, 7, 1, 100]]), 71.0, 10
    x = torch.randn(2, 5, 3, width, dtype=torch.float64, requires_grad=True)
    y = apply_rope(x, rope_table(positions, turned, theta, torch.float64), interleaved)
    inverse = torch.tensor([theta ** (-2 * i / turned) for i in range(turned // 2)], dtype=torch.float64)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions[..., None, None] * inverse)
    one, other = (x[..., 0:turned:2], x[..., 1:turned:2])
    if not interleaved:
        one, other = x[..., : turned // 2], x[..., turned // 2 : turned]
    z = torch.complex(one, other) * turn
    pairs = torch.stack([z.real, z.imag], -1).flatten(-2) if interleaved else torch.cat([z.real, z.imag], -1)
    expected = torch.cat([pairs, x[..., turned:]], -1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad((t * weight).sum(), x)[0] for t in (y, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_a_part_of_a_head_turns_in_the_model_too() -> None:
    """A whole turn differs from a half, and from neighbours; what cannot turn is refused."""
    models = [decoder(head_dim=12, **c) for c in ({}, {"rope_fraction": 0.5}, {"rope_interleaved": True})]
    hidden = []
    for model in models:
        model.load_state_dict(models[0].state_dict())
        hidden.append(model(tokens(2, 7)).hidden_BSD)
    assert [a.rope_dim for a in models[1].attentions()] == [6] * 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (hidden[one] - hidden[other]).abs().max() > 1e-3
    for fraction, words in ((0.25, "is 3 element"), (0.05, "is 0 element"), (1.5, "rope_fraction=1.5")):
        with pytest.raises(UserError, match=words):
            decoder(head_dim=12, rope_fraction=fraction)
    with pytest.raises(UserError, match=r"rope_fraction=0\.5 is read by model.attention=grouped_query"):
        decoder(attention="other", head_dim=12, rope_fraction=0.5)
