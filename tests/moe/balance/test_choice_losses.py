"""DynMoE's losses of choices, against the released formulas by loops, and however a batch is cut.

Shapes: T tokens, D model, E experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.moe import Router, RouterContext, Routing, build_router
from moetrain.moe.balance import LossTerm, StepTotals, count_ahead, total_loss

B, S, D, E = 4, 7, 5, 6
NAMES = ("choice_balance", "choice_share")


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def router_of(threshold: float = 0.5) -> Router:
    torch.manual_seed(0)
    router = build_router("dynmoe", d_model=D, num_experts=E, initial_experts=5).double().train()
    with torch.no_grad():
        router.threshold_E.normal_(std=0.1).add_(threshold)
        router.log_tau_1.fill_(0.7)
    return router


def inputs() -> tuple[Tensor, Tensor]:
    """Tokens, and which of them are valid; one sequence has none."""
    generator = torch.Generator().manual_seed(2)
    valid_BS = torch.arange(S) < torch.tensor([7, 3, 0, 5])[:, None]
    return torch.randn(B, S, D, dtype=torch.float64, generator=generator), valid_BS


def route(router: Router, x_BSD: Tensor, valid_BS: Tensor) -> Routing:
    ctx = replace(RouterContext.default(len(x_BSD), S), valid_T=valid_BS.flatten())
    return router(x_BSD.flatten(0, 1), ctx)


def losses(router: Router, cuts: list[slice]) -> Tensor:
    """[2]: the losses of a step in these micro-batches."""
    x_BSD, valid_BS = inputs()
    terms = [LossTerm(name, 1.0, "global_batch") for name in NAMES]
    records = [{0: route(router, x_BSD[cut], valid_BS[cut])} for cut in cuts]
    totals = StepTotals(float(valid_BS.sum()), count_ahead(records, terms))
    return torch.stack(
        [sum(total_loss(r, [term], totals)[0] for r in records) for term in terms]  # type: ignore[misc]
    )


def by_hand(router: Router) -> Tensor:
    """[2]: choices by a step function that passes gradients straight through; tokens one after another."""
    x_BSD, valid_BS = inputs()
    tau, asleep = router.log_tau_1.exp(), ~router.awake_E
    chosen, total = [], torch.zeros((), dtype=torch.float64)
    for x_D in x_BSD[valid_BS]:
        cosine_E = torch.stack([(x_D @ w_D) / (x_D.norm() * w_D.norm()) for w_D in router.weight_ED])
        scores_E = (tau * cosine_E).sigmoid() * router.awake_E
        choices_E = Sign.apply((scores_E - (tau * router.threshold_E).sigmoid()).relu())
        assert not choices_E[asleep].any()
        total = total + choices_E.sum()
        if choices_E.sum() > 0:
            chosen.append(choices_E)
    assert 0 < len(chosen) < int(valid_BS.sum())
    balance = torch.zeros((), dtype=torch.float64)
    for e in range(E):
        share = sum(float(c_E[e].detach()) for c_E in chosen) / len(chosen)
        part = torch.stack([c_E[e] / c_E.sum() for c_E in chosen]).mean()
        balance = balance + share * part / E
    return torch.stack([balance * E * E, total / int(valid_BS.sum()) / E])


WHOLE, EACH = [slice(0, B)], [slice(b, b + 1) for b in range(B)]


@pytest.mark.parametrize("cuts", [WHOLE, EACH, [slice(0, 3), slice(3, 4)]])
@pytest.mark.parametrize("loss", range(2))
def test_values_and_gradients_are_the_released_formulas(cuts: list[slice], loss: int) -> None:
    router = router_of()
    leaves = [router.weight_ED, router.threshold_E, router.log_tau_1]
    found, expected = losses(router, cuts)[loss], by_hand(router)[loss]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_nobody_chosen_is_no_loss() -> None:
    router = router_of(30.0)
    found = losses(router, EACH)
    assert found.tolist() == [0.0, 0.0]
    assert not torch.autograd.grad(found.sum(), router.threshold_E)[0].any()


@pytest.mark.parametrize("step", [0, 9])
def test_choices_follow_the_order_of_experts(step: int) -> None:
    """That a search for it has reached, or is on its way to."""
    router = build_router("dynmoe", d_model=D, num_experts=E, permutation_steps=5).double().train()
    with torch.no_grad():
        router.threshold_E.copy_(torch.linspace(-1, 1, E))
        router.order_EE.copy_(torch.eye(E).flip(0) * 3)
    x_BSD, _ = inputs()
    ctx = replace(RouterContext.default(B, S), step=step)
    routing = router(x_BSD.flatten(0, 1), ctx)
    assert torch.equal(routing.choices_TE.sum(0).long(), routing.demand_E)
    plain = build_router("dynmoe", d_model=D, num_experts=E).double().train()
    plain.load_state_dict({k: v for k, v in router.state_dict().items() if k != "order_EE"})
    of_plain = plain(x_BSD.flatten(0, 1), ctx).choices_TE
    assert torch.equal(routing.choices_TE, of_plain.flip(1))


def test_a_router_without_choices_has_none_of_them() -> None:
    x_TD = torch.zeros(3, D)
    routing = build_router("topk", d_model=D, num_experts=E)(x_TD, RouterContext.default(1, 3))
    with pytest.raises(ValueError, match="makes no choices with a gradient"):
        count_ahead([{0: routing}], [LossTerm("choice_balance", 1.0, "global_batch")])
