"""phi-balancing: the estimate of the population's load, its prices, and the loss at them.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from balance_cases import routed
from router_cases import normal
from scipy.optimize import minimize
from torch import Tensor

from moetrain.moe import build_router
from moetrain.moe.balance import (
    LossTerm,
    PopulationLoad,
    StepTotals,
    build_controllers,
    chosen_controllers,
    make_terms,
)
from moetrain.moe.balance.phi import PhiOptions, Potential
from moetrain.moe.balance.settings import LossConfig

POTENTIALS = list(Potential)


def by_hand(potential: Potential, p: list[float]) -> float:
    """phi(p)."""
    if potential is Potential.euclidean:
        return len(p) / 2 * sum(x * x for x in p)
    return sum(x * math.log(len(p) * x) for x in p)


def conjugate(potential: Potential, y: list[float]) -> float:
    """phi*(y), the largest <y, p> - phi(p) over distributions p, where none of them is 0."""
    if potential is Potential.euclidean:
        away = [x - sum(y) / len(y) for x in y]  # p = 1 / E + away / E
        return sum(y) / len(y) + (sum(a * a for a in away) - 1) / (2 * len(y)) - 0.5 + 0.5 / len(y)
    return math.log(sum(math.exp(x) for x in y) / len(y))


def loss(logits_TE: Tensor, mean_E: Tensor, potential: Potential, **more: object) -> Tensor:
    """The loss of a batch of these logits at the estimate ``mean_E``."""
    totals = StepTotals(float(len(logits_TE)), signals={"phi": {0: mean_E}})
    term = LossTerm("phi", 1.0, "global_batch", options=PhiOptions(potential))
    return term.value(routed(logits_TE, score="softmax", **more), totals, 0)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_loss_is_mean_scores_at_the_prices(potential: Potential) -> None:
    logits_TE, mean_E = normal(0, 11, 5), normal(1, 5).softmax(-1)
    rows = [[math.exp(z) / sum(map(math.exp, row)) for z in row] for row in logits_TE.tolist()]
    prices = [math.log(5 * m) if potential is Potential.negative_entropy else 5 * m for m in mean_E.tolist()]
    right = sum(p * y for row in rows for p, y in zip(row, prices, strict=True)) / 11
    assert float(loss(logits_TE, mean_E, potential).detach()) == pytest.approx(right, abs=1e-12)
    even_E = torch.full((5,), 0.2, dtype=torch.float64)
    assert float(loss(logits_TE, even_E, potential).detach()) == pytest.approx(
        float(potential is Potential.euclidean), abs=1e-12
    )


@pytest.mark.parametrize("potential", POTENTIALS)
def test_where_the_estimate_is_right_its_gradient_is_phis(potential: Potential) -> None:
    """At m = E[p] the price is the gradient of phi there, by automatic differentiation of phi itself."""
    logits_TE = normal(2, 13, 7).requires_grad_()
    mean_E = logits_TE.softmax(-1).mean(0)
    value = (
        (7 / 2 * mean_E.square()).sum()
        if potential is Potential.euclidean
        else torch.special.xlogy(mean_E, 7 * mean_E).sum()
    )
    (right_TE,) = torch.autograd.grad(value, logits_TE)
    (found_TE,) = torch.autograd.grad(loss(logits_TE, mean_E.detach(), potential), logits_TE)
    assert float(right_TE.abs().max()) > 1e-3
    torch.testing.assert_close(found_TE, right_TE, rtol=0, atol=1e-14)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_the_price_solves_the_dual_problem(potential: Potential) -> None:
    """<y, m> - phi*(y) is largest at the price of m, and phi(m) there: scipy looks for a larger one."""
    mean = torch.tensor([0.4, 0.25, 0.2, 0.15], dtype=torch.float64)

    def dual(y: list[float]) -> float:
        return sum(a * b for a, b in zip(y, mean.tolist(), strict=True)) - conjugate(potential, list(y))

    price = potential.price(mean).tolist()
    assert dual(price) == pytest.approx(by_hand(potential, mean.tolist()), abs=1e-12)
    best = minimize(lambda y: -dual(y), [0.3, -0.1, 0.2, 0.0], method="BFGS", options={"gtol": 1e-10})
    assert -best.fun == pytest.approx(dual(price), abs=1e-9)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_the_estimate_is_an_exponential_mean_of_the_steps(rate: float) -> None:
    router = build_router("topk", d_model=5, num_experts=5)
    controller, right = PopulationLoad({3: router}, rate), [0.2] * 5
    for step in range(4):
        logits_TE = normal(step, 12, 5)
        valid_T = torch.arange(12) % 4 > 0
        sums = [
            controller.measure(3, routed(logits_TE[rows], valid_T=valid_T[rows]).detach())
            for rows in (slice(0, 5), slice(5, 12))
        ]
        assert controller.measure(4, routed(logits_TE).detach()) is None
        controller.follow({3: sums[0] + sums[1]})
        now = logits_TE.softmax(-1)[valid_T].mean(0).tolist()
        right = [(1 - rate) * m + rate * p for m, p in zip(right, now, strict=True)]
    found_E = controller.signals()["phi"][3]
    torch.testing.assert_close(found_E.tolist(), right, rtol=0, atol=1e-6)
    assert controller.tensors()["phi.3"] is found_E
    assert float(found_E.sum()) == pytest.approx(1, abs=1e-5)


def test_a_step_without_tokens_leaves_the_estimate() -> None:
    controller = PopulationLoad({0: build_router("topk", d_model=5, num_experts=5)}, 0.5)
    controller.follow({0: torch.zeros(5, dtype=torch.float64)})
    assert controller.means[0].tolist() == pytest.approx([0.2] * 5)


def test_the_loss_switches_its_controller_on_and_neither_works_alone() -> None:
    terms = make_terms([LossConfig("phi", 0.01, options={"potential": "euclidean"})])
    assert [spec.name for spec, _ in chosen_controllers({}, terms)] == ["phi"]
    assert terms[0].key == "phi"
    with pytest.raises(
        ValueError, match=r"^controllers\.phi\.rate=0\.5 is not used by balance\.losses=\['z'\]"
    ):
        chosen_controllers({"phi": {"rate": 0.5}}, [LossTerm("z", 1.0, "micro")])
    with pytest.raises(ValueError, match="no controller gives"):
        terms[0].value(routed(normal(0, 3, 5)), StepTotals(3.0), 0)
    routers = {
        1: build_router("topk", d_model=4, num_experts=3),
        2: build_router("hash", d_model=4, num_experts=3),
    }
    (controller,) = build_controllers({}, terms, routers)
    assert list(controller.tensors()) == ["phi.1"]


@pytest.mark.parametrize("potential", POTENTIALS)
def test_descent_on_it_evens_the_population(potential: Potential) -> None:
    """Logits that are shared by all tokens, on fresh noise each step: the mean scores become even."""
    shared_E = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64).requires_grad_()
    controller = PopulationLoad({0: build_router("topk", d_model=6, num_experts=6)}, 0.2)

    def spread() -> float:
        mean_E = (normal(77, 999, 6) + shared_E.detach()).softmax(-1).mean(0)
        return float(mean_E.max() / mean_E.min())

    before = spread()
    for step in range(60):
        logits_TE = normal(step, 31, 6) + shared_E
        (grad_E,) = torch.autograd.grad(loss(logits_TE, controller.means[0], potential), shared_E)
        with torch.no_grad():
            shared_E -= 2.0 * grad_E
        controller.follow({0: controller.measure(0, routed(logits_TE.detach()).detach())})
    assert before > 8
    assert spread() < 1.4
