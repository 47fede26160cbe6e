"""The Dirichlet prior of the scores: its distribution function, and where its loss is least.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from shaping_cases import draw, routing_of, softmax, value

from moetrain.moe.balance import LossTerm
from moetrain.moe.balance.dirichlet import DirichletOptions, beta_cdf


@pytest.mark.parametrize("a", [0.01, 0.3, 1.0, 1.7, 10.0])
@pytest.mark.parametrize("b", [0.01, 0.7, 1.0, 6.0, 63.0, 511.0])
def test_the_cdf_is_scipys(a: float, b: float) -> None:
    prior = stats.beta(a, b)
    points = [*torch.linspace(-1, 2, 61).tolist(), *prior.ppf([1e-9, 1e-3, 0.1, 0.5, 0.9, 1 - 1e-9]), 1e-30]
    for dtype, atol in ((torch.float64, 1e-11), (torch.float32, 2e-7)):
        x = torch.tensor(points, dtype=dtype, requires_grad=True)
        got = beta_cdf(x, a, b)
        want = torch.from_numpy(prior.cdf(x.detach().double().numpy()))
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)
        (slope,) = torch.autograd.grad(got.sum(), x)
        inside = (x.detach() > 0) & (x.detach() < 1)
        density = torch.from_numpy(prior.pdf(x.detach()[inside].double().numpy()))
        torch.testing.assert_close(slope[inside].double(), density, rtol=50 * atol, atol=50 * atol)
        assert not slope[~inside].any()


def test_the_cdf_has_the_density_as_its_derivative() -> None:
    x = torch.tensor([0.02, 0.2, 0.5, 0.93], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: beta_cdf(x, 0.7, 4.2), x)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("num_experts", [2, 7])
def test_draws_of_the_prior_have_the_least_dirichlet_loss(alpha: float, num_experts: int) -> None:
    """1 / (6 n) on average, where any other prior's draws have much more."""

    def loss(drawn_from: float) -> float:
        p = stats.dirichlet([drawn_from] * num_experts).rvs(997, random_state=0)
        routing = routing_of(torch.from_numpy(p), score=torch.Tensor.clone)
        return float(value(LossTerm("dirichlet", 1.0, "sequence", options=DirichletOptions(alpha)), routing))

    own = loss(alpha)
    assert own < 5 / (6 * 997)
    assert all(loss(other * alpha) > 5 * own for other in (0.3, 3.0))


def test_a_router_learns_the_prior() -> None:
    logits_TE = draw(97, 3, seed=2).requires_grad_()
    optimizer = torch.optim.Adam([logits_TE], lr=0.05)
    term = LossTerm("dirichlet", 1.0, "sequence", options=DirichletOptions(0.3))
    losses = []
    for _ in range(150):
        loss = value(term, routing_of(logits_TE, score=softmax))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 50


@pytest.mark.parametrize("scope", ["sequence", "micro"])
def test_one_expert_has_no_prior(scope: str) -> None:
    logits_TE = draw(6, 1).requires_grad_()
    loss = value(LossTerm("dirichlet", 1.0, scope), routing_of(logits_TE, 2, score=softmax))
    loss.backward()
    assert float(loss.detach()) == 0
    assert not logits_TE.grad.any()


@pytest.mark.parametrize("alpha", [0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_idle_and_saturated_experts_have_finite_gradients(alpha: float, dtype: torch.dtype) -> None:
    """Scores of exactly 0 and 1, where the density of a sparse prior is infinite."""
    for logits, score in (([[3.0, -1.0, -2.0]], torch.relu), ([[0.0, -300.0, -80.0]], softmax)):
        logits_TE = torch.tensor(logits * 5, dtype=dtype).requires_grad_()
        for term in (
            LossTerm("dirichlet", 1.0, "sequence", options=DirichletOptions(alpha)),
            LossTerm("chunk_sparsity", 1.0, "micro"),
        ):
            (grad_TE,) = torch.autograd.grad(value(term, routing_of(logits_TE, score=score)), logits_TE)
            assert grad_TE.isfinite().all()


def test_the_gradient_takes_a_density_between_two_bounds() -> None:
    """Beta(0.2, 1.2) has a density beyond 100 near 0, and Beta(40, 3) one below 0.001."""
    x = torch.tensor([1e-12, 0.3, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    for a, b in ((0.2, 1.2), (40.0, 3.0)):
        density = torch.from_numpy(stats.beta(a, b).pdf(x.detach().numpy()))
        (slope,) = torch.autograd.grad(beta_cdf(x, a, b, (1e-3, 100.0)).sum(), x)
        torch.testing.assert_close(slope, density.clamp(1e-3, 100.0))
        assert not torch.equal(density, density.clamp(1e-3, 100.0))
        (free,) = torch.autograd.grad(beta_cdf(x, a, b).sum(), x)
        torch.testing.assert_close(free, density)


def test_the_loss_clips_by_its_options() -> None:
    logits_TE = torch.tensor([[40.0, 0.0, 0.0], [0.0, 30.0, 0.0]], dtype=torch.float64)
    found = []
    for options in (DirichletOptions(0.2), DirichletOptions(0.2, 0.0, 1e30)):
        z_TE = logits_TE.clone().requires_grad_()
        term = LossTerm("dirichlet", 1.0, "micro", options=options)
        value(term, routing_of(z_TE, score=softmax)).backward()
        found.append(z_TE.grad)
    assert not torch.allclose(*found, rtol=1e-3, atol=0)
