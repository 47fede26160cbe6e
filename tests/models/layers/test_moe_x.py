"""MoE-X: logits by the standard library's erf, the layer by the loop oracle, and what the logits predict.

Shapes: T tokens, D model, E experts, F hidden.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from layer_cases import inputs, layer
from model_cases import TINY
from torch import Tensor, nn

from moetrain.models.layers.moe_x import MoEX
from moetrain.moe import RouterContext
from moetrain.moe.routers.topk import TopKOptions


def logit(x_D: Tensor, up_DF: Tensor) -> Tensor:
    """Of one expert, for its value: numbers, and no tensor operation."""
    s, spread = 0.0, 0.0
    for value, column in zip(x_D.tolist(), up_DF.tolist(), strict=True):
        mean = statistics.fmean(column)
        s += value * mean
        spread += value * value * statistics.fmean((w - mean) ** 2 for w in column)
    return torch.tensor(-math.erf(s / math.sqrt(2 * spread)), dtype=torch.float64)


def by_hand(x_TD: Tensor, made: nn.Module, top_k: int) -> Tensor:
    """The layer in plain torch, a token and an expert at a time; differentiable."""
    out = []
    for x_D in x_TD:
        logits = []
        for up_DF in made.experts.w_gate_up_EDCF[:, :, 0]:
            mean_D = up_DF.mean(1)
            variance_D = ((up_DF - mean_D[:, None]) ** 2).mean(1)
            logits.append(-torch.erf((mean_D @ x_D) / (2 * (variance_D @ x_D**2)).sqrt()))
        best = sorted(range(len(logits)), key=lambda e: -logits[e].item())[:top_k]
        total = sum(logits[e].exp() for e in best)
        out.append(
            sum(
                logits[e].exp()
                / total
                * (torch.relu(x_D @ made.experts.w_gate_up_EDCF[e, :, 0]) @ made.experts.w_down_EFD[e])
                for e in best
            )
        )
    return torch.stack(out)


@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_the_formulas(training: bool) -> None:
    made, x = layer("moe_x").train(training), inputs()
    y, routing = made(x)
    for x_D, logits_E in zip(x.flatten(0, 1), routing.logits_TE, strict=True):
        for up_DF, ours in zip(made.experts.w_gate_up_EDCF[:, :, 0], logits_E, strict=True):
            torch.testing.assert_close(ours, logit(x_D, up_DF), rtol=1e-12, atol=1e-12)
    expected = by_hand(x.flatten(0, 1), made, 2).view_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction, wanted = torch.randn_like(y), [x, *made.parameters()]
    ours = torch.autograd.grad((y * direction).sum(), wanted)
    theirs = torch.autograd.grad((expected * direction).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert [name for name, _ in made.named_parameters()] == ["experts.w_gate_up_EDCF", "experts.w_down_EFD"]


def test_logits_predict_how_many_units_are_positive() -> None:
    """Of normal weights the share of positive units is (1 - logit) / 2, up to sampling F units."""
    made = MoEX(TopKOptions(top_k=1), d_model=31, d_ff=20_000, num_experts=4, activation="relu").double()
    with torch.no_grad():
        made.experts.w_gate_up_EDCF.normal_().add_(0.3 * torch.randn(4, 31, 1, 1, dtype=torch.float64))
    x = torch.randn(1, 9, 31, dtype=torch.float64)
    _, routing = made(x)
    positive = (torch.einsum("td,edf->tef", x[0], made.experts.w_gate_up_EDCF[:, :, 0]) > 0).double().mean(-1)
    torch.testing.assert_close((1 - routing.logits_TE) / 2, positive, rtol=0, atol=0.02)
    assert torch.equal(routing.assignment.expert_ids_N(), positive.argmin(-1).sort().values)


def test_a_token_of_zeros_is_safe() -> None:
    made = layer("moe_x")
    x = torch.zeros(1, 3, TINY.d_model, dtype=torch.float64, requires_grad=True)
    y, routing = made(x)
    assert not routing.logits_TE.any()
    gradients = torch.autograd.grad(y.sum() + routing.logits_TE.sum(), [x, *made.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_the_router_keeps_no_weights_and_follows_its_layers() -> None:
    made = layer("moe_x")
    before = made.router(inputs().flatten(0, 1), RouterContext.default(2, 7)).logits_TE
    with torch.no_grad():
        made.experts.w_gate_up_EDCF.neg_()
    after = made.router(inputs().flatten(0, 1), RouterContext.default(2, 7)).logits_TE
    torch.testing.assert_close(after, -before)
    assert not list(made.router.parameters())
