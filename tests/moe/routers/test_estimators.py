"""Gradient estimators, by enumeration: the expected gradient over all draws equals the exact one.

One token, E experts with outputs w * v_e, and a scalar loss f of the layer's output; the exact objective is
sum_e p_e f(p_e v_e). Draws are forced by noise that the test chooses, and weighted by their probability.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moetrain.moe import RouterContext, build_router
from moetrain.moe.routers import sparsemixer

E = 4
V_E = torch.tensor([0.9, -0.4, 1.7, 0.6], dtype=torch.float64)
Z_E = torch.tensor([0.5, 0.45, 0.52, 0.48], dtype=torch.float64)  # close: none is masked


class Forced(RouterContext):
    """Noise that makes the router draw ``drawn``, and its coin fall as ``heads`` says."""

    def __init__(self, drawn: int, heads: bool) -> None:
        super().__init__(1, 1, torch.zeros(1, dtype=torch.int64))
        object.__setattr__(self, "drawn", drawn)
        object.__setattr__(self, "heads", heads)

    def uniform(self, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.01 if self.heads else 0.99, dtype=torch.float64)
        noise = torch.full(shape, 1e-9, dtype=torch.float64)
        noise[:, self.drawn] = 1 - 1e-9
        return noise


def build(name: str, **options: object) -> torch.nn.Module:
    router = build_router(name, d_model=E, num_experts=E, **options).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(E))
    return router


def expected_gradient(router: torch.nn.Module, f: Callable[[Tensor], Tensor], coin: float) -> Tensor:
    """E over draws and coins of d f(output) / d logits; the layer applies weight and forward scale."""
    total = torch.zeros(E, dtype=torch.float64)
    for drawn, heads in itertools.product(range(E), (True, False)):
        z_1E = Z_E.clone()[None].requires_grad_()
        routing = router(z_1E, Forced(drawn, heads))
        assert routing.assignment.expert_ids_N().tolist() == [drawn]
        h = routing.assignment.weights_N[0] * V_E[drawn]
        if routing.assignment.forward_scale_N is not None:
            h = h + (h * (routing.assignment.forward_scale_N[0] - 1)).detach()
        f(h).backward()
        p = float(routing.scores_TE.detach()[0, drawn])
        if getattr(router.options, "corrected", False):
            p = float(torch.softmax(Z_E / 2, -1)[drawn])
        total += p * (coin if heads else 1 - coin) * z_1E.grad[0]
    return total


def exact_gradient(f: Callable[[Tensor], Tensor], temperature: float = 1.0) -> Tensor:
    z_E = Z_E.clone().requires_grad_()
    p_E = torch.softmax(z_E / temperature, -1)
    sum(p_E[e] * f(p_E[e] * V_E[e]) for e in range(E)).backward()
    return z_E.grad


def linear(h: Tensor) -> Tensor:
    return 3.0 * h + 0.7


def quadratic(h: Tensor) -> Tensor:
    return 2.0 * h**2 - 3.0 * h + 0.7


def cubic(h: Tensor) -> Tensor:
    return 5.0 * h**3 + quadratic(h)


@pytest.fixture
def no_exception_for_the_best(monkeypatch):
    """The best expert's draw is treated like any other: nothing equals the reported best."""
    plain = sparsemixer.first_max
    monkeypatch.setattr(
        sparsemixer, "first_max",
        lambda z: torch.full(z.shape[:-1], -1) if torch.equal(z.double(), Z_E[None]) else plain(z),
    )  # fmt: skip


@pytest.mark.parametrize("f", [linear, quadratic])
def test_the_midpoint_rule_is_exact_for_quadratics(f, no_exception_for_the_best):
    found = expected_gradient(build("sparsemixer"), f, coin=0.5)
    torch.testing.assert_close(found, exact_gradient(f), rtol=1e-12, atol=1e-12)


def test_the_midpoint_rule_is_not_exact_for_cubics(no_exception_for_the_best):
    found = expected_gradient(build("sparsemixer"), cubic, coin=0.5)
    assert (found - exact_gradient(cubic)).abs().max() > 1e-3


def test_the_midpoint_rule_is_exact_for_linear_functions():
    found = expected_gradient(build("sparsemixer"), linear, coin=0.5)
    torch.testing.assert_close(found, exact_gradient(linear), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f", [linear, quadratic, cubic])
def test_heuns_rule_is_exact_for_cubics(f, monkeypatch):
    """Algorithm 2, with delta forced to 0: the best expert is one that is never drawn."""
    router = build("sparsemixer2", top_k=1, corrected=True)
    plain = sparsemixer.best_left
    calls = iter(range(10**6))
    # the first call of a step is for the best expert, the second for the draw
    monkeypatch.setattr(
        sparsemixer, "best_left",
        lambda z, taken: torch.full(z.shape[:-1], -1) if next(calls) % 2 == 0 else plain(z, taken),
    )  # fmt: skip
    found = expected_gradient(router, f, coin=5 / 8)
    torch.testing.assert_close(found, exact_gradient(f, temperature=2.0), rtol=1e-12, atol=1e-12)


def test_algorithm_2_is_exact_for_linear_functions_with_delta():
    found = expected_gradient(build("sparsemixer2", top_k=1, corrected=True), linear, coin=5 / 8)
    torch.testing.assert_close(found, exact_gradient(linear, temperature=2.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_forward_is_whole_or_a_third_gradients_are_kept(corrected):
    router = build("sparsemixer2", top_k=1, corrected=corrected)
    temperature, gain = (2.0, 2.0) if corrected else (1.0, 1.0)
    p_E = torch.softmax(Z_E / temperature, -1)
    for drawn, heads in itertools.product(range(E), (True, False)):
        routing = router(Z_E[None].clone(), Forced(drawn, heads))
        value = (routing.assignment.weights_N[0] * routing.assignment.forward_scale_N[0]).item()
        share = 1.0 if heads or drawn == int(Z_E.argmax()) else 1 / 3
        assert value == pytest.approx(share * float(p_E[drawn]), abs=1e-12)
        assert routing.assignment.weights_N[0].item() == pytest.approx(gain * float(p_E[drawn]), abs=1e-12)


def test_draws_follow_the_probabilities_without_replacement():
    router = build_router("sparsemixer2", d_model=E, num_experts=E, top_k=3, eps=1.0).double()
    with torch.no_grad():
        router.weight_ED.copy_(torch.eye(E))
    tokens = 4000
    ctx = RouterContext.default(1, tokens)
    routing = router(Z_E.expand(tokens, E), ctx)
    routing.check()
    first_E = (
        torch.bincount(routing.assignment.expert_ids_N()[routing.assignment.choice_N == 0], minlength=E)
        / tokens
    )
    p_E = torch.softmax(Z_E, -1)
    assert (first_E - p_E).abs().max() < 5 * (0.25 / tokens) ** 0.5


def test_experts_far_below_the_best_are_never_drawn():
    for name in ("sparsemixer", "sparsemixer2"):
        router = build(name)
        z_1E = torch.tensor([[1.0, 0.99, -1.0, 0.2]], dtype=torch.float64)
        ctx = RouterContext.default(1, 500)
        routing = router(z_1E.expand(500, E), ctx)
        chosen = set(routing.assignment.expert_ids_N()[routing.assignment.choice_N == 0].tolist())
        assert chosen == {0, 1}


@pytest.mark.parametrize("name", ["sparsemixer", "sparsemixer2"])
def test_evaluation_is_deterministic_and_keeps_the_masked_weight(name):
    router = build(name).eval()
    routing = router(Z_E[None].clone(), Forced(1, False))
    assert routing.assignment.expert_ids_N()[routing.assignment.choice_N == 0].tolist() == [2]
    first = routing.assignment.weights_N[routing.assignment.choice_N == 0]
    torch.testing.assert_close(first, torch.softmax(Z_E, -1)[2:3])


def test_straight_through_is_constant_forward_and_dense_backward():
    router = build("straight_through", top_k=2)
    z_1E = Z_E[None].clone().requires_grad_()
    routing = router(z_1E, RouterContext.default(1, 1))
    assert routing.assignment.weights_N.tolist() == [0.5, 0.5]
    (routing.assignment.weights_N * torch.tensor([2.0, 3.0])).sum().backward()
    z_E = Z_E.clone().requires_grad_()
    (2.0 * torch.softmax(z_E, -1)[0] + 3.0 * torch.softmax(z_E, -1)[2]).backward()
    torch.testing.assert_close(z_1E.grad[0], z_E.grad)
