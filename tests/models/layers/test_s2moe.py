"""S2MoE: tokens and their noisy copies through one layer, against a loop over tokens and experts.

Shapes: B batch, S sequence, D model, E experts.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from layer_cases import inputs, layer
from model_cases import TINY
from torch import Tensor, nn

from moetrain.models.layer_options import S2MoEConfig
from moetrain.models.layers.s2moe import contrast_T, with_noise
from moetrain.moe import RouterContext

B, S, D = 2, 7, TINY.d_model
TAU = 0.7


def made(training: bool) -> nn.Module:
    return layer("s2moe", s2moe=S2MoEConfig(temperature=TAU)).train(training)


def context(padded: bool = False) -> RouterContext:
    valid_T = torch.arange(B * S) < 9 if padded else None
    return replace(RouterContext.default(B, S), valid_T=valid_T, seed=3, step=4, layer=1)


def mixture(moe: nn.Module, x_D: Tensor) -> Tensor:
    """Top-2 of softmax, weights of sum 1, gated networks: a token by hand."""
    logits_E = moe.router.weight_ED @ x_D
    best = logits_E.argsort(descending=True)[:2].tolist()
    total = sum(logits_E[e].exp() for e in best)
    out = []
    for e in best:
        gate_F, up_F = (x_D @ w_DF for w_DF in moe.experts.w_gate_up_EDCF[e].unbind(1))
        hidden_F = gate_F / (1 + torch.exp(-gate_F)) * up_F
        out.append(logits_E[e].exp() / total * (hidden_F @ moe.experts.w_down_EFD[e]))
    return sum(out)


def normals(ctx: RouterContext) -> Tensor:
    """[B, S, 2, D]: the draws, by the standard library's inverse."""
    noise = ctx.uniform((B * S, 2 * D), 0x52E0).flatten().tolist()
    inverse = statistics.NormalDist().inv_cdf
    return torch.tensor([inverse(u) for u in noise], dtype=torch.float64).view(B, S, 2, D)


def by_hand(moe: nn.Module, x_BSD: Tensor, ctx: RouterContext) -> tuple[Tensor, Tensor]:
    """(y [B, S, D], the contrast)."""
    n_BS2D, y, noisy = normals(ctx), {}, {}
    places = [(b, s) for b in range(B) for s in range(S) if ctx.valid_T is None or ctx.valid_T[b * S + s]]
    for b, s in places:
        x_D = x_BSD[b, s]
        mean = x_D.sum() / D
        deviation = (((x_D - mean) ** 2).sum() / D).sqrt()
        noisy[b, s] = (1 + deviation * n_BS2D[b, s, 0]) * x_D + mean + deviation * n_BS2D[b, s, 1]
        g = 1 / (1 + torch.exp(-(moe.w_mix_1D[0] @ x_D + moe.b_mix_1[0])))
        y[b, s] = g * mixture(moe, x_D) + (1 - g) * mixture(moe, noisy[b, s])
    contrast = []
    for b, s in places:
        x_D = x_BSD[b, s]
        alike = {t: x_D @ noisy[b, t] / x_D.norm() / noisy[b, t].norm() / TAU for c, t in places if c == b}
        contrast.append(torch.stack(list(alike.values())).exp().sum().log() - alike[s])
    rows = [y.get((b, s), 0 * x_BSD[b, s]) for b in range(B) for s in range(S)]
    return torch.stack(rows).view(B, S, D), sum(contrast) / len(contrast)


@pytest.mark.parametrize("padded", [False, True])
def test_training_is_the_loop_forward_and_gradient(padded: bool) -> None:
    moe, x_BSD, ctx = made(training=True), inputs(B, S), context(padded)
    y_BSD, routing = moe(x_BSD, ctx)
    hand_BSD, contrast = by_hand(moe, x_BSD, ctx)
    valid_BS = torch.ones(B, S, dtype=torch.bool) if ctx.valid_T is None else ctx.valid_T.view(B, S)
    # draws are fp32 here and fp64 by hand
    torch.testing.assert_close(y_BSD[valid_BS], hand_BSD[valid_BS], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.penalty, contrast, rtol=1e-5, atol=1e-6)
    weight_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = [x_BSD, *moe.parameters()]
    losses = [(y[valid_BS] * weight_BSD[valid_BS]).sum() + c for y, c in
              ((y_BSD, routing.penalty), (hand_BSD, contrast))]  # fmt: skip
    ours, theirs = (torch.autograd.grad(loss, wanted) for loss in losses)
    for mine, hand in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-4, atol=1e-4 * float(hand.abs().max()))


def test_evaluation_is_the_layer_alone_and_draws_nothing() -> None:
    moe, x_BSD = made(training=False), inputs(B, S)
    y_BSD, routing = moe(x_BSD, context())
    hand_TD = torch.stack([mixture(moe, x_D) for x_D in x_BSD.flatten(0, 1)])
    torch.testing.assert_close(y_BSD.flatten(0, 1), hand_TD, rtol=1e-10, atol=1e-10)
    assert torch.equal(y_BSD, moe(x_BSD, replace(context(), step=9, seed=1))[0])
    assert routing.penalty == 0
    assert int(routing.demand_E.sum()) == 2 * B * S


def test_a_token_of_equal_elements_has_a_copy_without_noise() -> None:
    """Their deviation is 0, so that it is x plus their mean; and the gradient is finite."""
    x_BSD = (torch.arange(B * S, dtype=torch.float64).view(B, S, 1) + torch.zeros(D)).requires_grad_()
    noisy_BSD = with_noise(x_BSD, context())
    torch.testing.assert_close(noisy_BSD, 2 * x_BSD)
    assert torch.autograd.grad(noisy_BSD.sum(), x_BSD)[0].isfinite().all()


def test_the_contrast_of_orthogonal_tokens_is_the_least() -> None:
    """Cosines of 1 with its own copy and 0 with the others."""
    x_BSD = torch.eye(S, D, dtype=torch.float64).expand(B, S, D)
    least = math.log(math.exp(1 / TAU) + S - 1) - 1 / TAU
    found_T = contrast_T(x_BSD, x_BSD, context(), TAU)
    torch.testing.assert_close(found_T, torch.full((B * S,), least, dtype=torch.float64))
    assert (contrast_T(x_BSD, x_BSD.roll(1, 1), context(), TAU) > found_T).all()


def test_the_contrast_goes_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x_BSD, noisy_BSD, ctx = inputs(B, S), inputs(B, S, seed=8), context(padded=True)
    whole_T = contrast_T(x_BSD, noisy_BSD, ctx, TAU)
    monkeypatch.setattr("moetrain.models.layers.s2moe._CHUNK_ELEMENTS", 3 * B * S)
    parts_T = contrast_T(x_BSD, noisy_BSD, ctx, TAU)
    torch.testing.assert_close(parts_T, whole_T)
    valid_T = ctx.valid_T
    gradients = [torch.autograd.grad(t[valid_T].sum(), (x_BSD, noisy_BSD)) for t in (whole_T, parts_T)]
    torch.testing.assert_close(*gradients)
    assert not gradients[0][1].flatten(0, 1)[~valid_T].any()  # padding is in no token's way
