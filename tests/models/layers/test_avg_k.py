"""Avg-K: logits are means of pre-activations; the layer by hand; one block of a network is that network's.

Shapes: B batch, S sequence, D model, E experts, F hidden, C columns a hidden unit.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from layer_cases import inputs, layer
from model_cases import TINY
from torch import Tensor, nn

from moetrain.models.feed_forward import build_feed_forward
from moetrain.models.layer_options import AvgKConfig, BlockWeight
from moetrain.moe import RouterContext
from moetrain.moe.options import Activation, Backend, ExpertsConfig
from moetrain.moe.routers.topk import TopKOptions

E, K = TINY.num_experts, 2


def built(weight: BlockWeight, activation: Activation = Activation.relu, **options: object) -> nn.Module:
    torch.manual_seed(1)
    cfg = replace(TINY, feed_forward="avg_k", avg_k=AvgKConfig(weight))
    experts = ExpertsConfig(activation=activation, backend=Backend.loop)
    return build_feed_forward("avg_k", cfg, TopKOptions(**options), experts, 0).double()  # type: ignore[arg-type]


def keys(made: nn.Module) -> list[Tensor]:
    """Each expert's keys [D, F]; of a gated one the gate's."""
    return list(made.experts.w_gate_up_EDCF[:, :, 0])


def expert(made: nn.Module, e: int, x_D: Tensor, activation: Activation) -> Tensor:
    first_F = x_D @ made.experts.w_gate_up_EDCF[e, :, 0]
    if activation is Activation.relu:
        hidden_F = torch.relu(first_F)
    else:
        hidden_F = first_F * torch.sigmoid(first_F) * (x_D @ made.experts.w_gate_up_EDCF[e, :, 1])
    return hidden_F @ made.experts.w_down_EFD[e]


def by_hand(made: nn.Module, x_D: Tensor, weight: BlockWeight, activation: Activation) -> Tensor:
    logits = [(x_D @ keys_DF).mean() for keys_DF in keys(made)]
    best = sorted(range(E), key=lambda e: -logits[e].item())[:K]
    total = sum(logits[e].exp() for e in best)
    shares = [logits[e].exp() / total if weight is BlockWeight.score else 1.0 for e in best]
    return sum(share * expert(made, e, x_D, activation) for share, e in zip(shares, best, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [Activation.relu, Activation.swiglu])
@pytest.mark.parametrize("weight", list(BlockWeight))
def test_output_and_gradients_are_the_formulas(
    weight: BlockWeight, activation: Activation, training: bool
) -> None:
    made, x = built(weight, activation).train(training), inputs()
    y, routing = made(x)
    for x_D, logits_E in zip(x.flatten(0, 1).tolist(), routing.logits_TE.tolist(), strict=True):
        for keys_DF, ours in zip(keys(made), logits_E, strict=True):
            units = [sum(a * b for a, b in zip(x_D, key, strict=True)) for key in keys_DF.t().tolist()]
            assert ours == pytest.approx(statistics.fmean(units), rel=1e-11, abs=1e-12)
    expected = torch.stack([by_hand(made, x_D, weight, activation) for x_D in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    direction, wanted = torch.randn_like(y), [x, *made.parameters()]
    ours = torch.autograd.grad((y * direction).sum(), wanted)
    theirs = torch.autograd.grad((expected * direction).sum(), wanted)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert [name for name, _ in made.named_parameters()] == ["experts.w_gate_up_EDCF", "experts.w_down_EFD"]


@pytest.mark.parametrize("training", [True, False])
def test_all_blocks_together_are_one_network(training: bool) -> None:
    """With k = E and weights of 1 nothing is left of the choice: a dense network E times as wide."""
    made, x = built(BlockWeight.one, top_k=E).train(training), inputs()
    up_DH = torch.cat(keys(made), 1)
    expected = torch.relu(x @ up_DH) @ made.experts.w_down_EFD.flatten(0, 1)
    torch.testing.assert_close(made(x)[0], expected, rtol=1e-11, atol=1e-12)


def test_a_weight_of_one_has_no_gradient_and_a_scale() -> None:
    """So a task's gradient reaches keys through the blocks alone, and a loss of scores all keys."""
    made, x = built(BlockWeight.one, top_k=1, route_scale=2.5), inputs()
    _, routing = made(x)
    assert routing.assignment.weights_N.tolist() == [2.5] * 14
    assert not routing.assignment.weights_N.requires_grad
    (gradient,) = torch.autograd.grad(routing.scores_TE.square().sum(), made.experts.w_gate_up_EDCF)
    assert bool(gradient.flatten(1).any(1).all())
    assert torch.equal(gradient[..., :1].expand_as(gradient), gradient)  # of a mean: all units alike


def test_forced_experts_keep_their_weight() -> None:
    made, x = built(BlockWeight.one, top_k=K), inputs()
    forced_TK = torch.stack([torch.arange(14) % E, (torch.arange(14) + 2) % E], 1)
    a = made(x, replace(RouterContext.default(2, 7), forced={0: forced_TK}))[1].assignment
    taken_TK = torch.empty_like(forced_TK)
    taken_TK[a.token_ids_N, a.choice_N] = a.expert_ids_N()
    assert torch.equal(taken_TK, forced_TK)
    assert a.weights_N.tolist() == [1.0] * 28


def test_it_follows_its_experts_and_needs_its_layer() -> None:
    made = layer("avg_k")
    before = made(inputs())[1].logits_TE
    with torch.no_grad():
        made.experts.w_gate_up_EDCF.neg_()
    torch.testing.assert_close(made(inputs())[1].logits_TE, -before)
    assert not list(made.router.parameters())
    with pytest.raises(ValueError, match="Avg-K's router is asked without its layer"):
        made.router(inputs().flatten(0, 1), RouterContext.default(2, 7))
