"""Quantile balancing against a sort of all tokens, in plain Python.

Shapes: T tokens, E experts, D model.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

import pytest
import torch
from router_cases import looking_at_logits, normal
from torch import Tensor

from moetrain.moe import Router, RouterContext, Routing, build_router
from moetrain.moe.balance import LossTerm, QuantileController, build_controllers, chosen_controllers
from moetrain.moe.balance.controllers.quantile import quantile_place
from moetrain.moe.balance.rules import controllers_refusal

CASES = [(11, 3, 331, 1.3), (2, 1, 97, 0.8), (7, 6, 211, 2.0), (13, 1, 401, 0.0), (5, 2, 1, 1.0)]


def sigmoid_router(num_experts: int, top_k: int) -> Router:
    return looking_at_logits("topk", num_experts, top_k=top_k, score="sigmoid")


def skewed(num_experts: int, tokens: int, skew: float, seed: int = 0) -> Tensor:
    """Logits [T, E], some experts of which every token likes more."""
    return normal(seed, tokens, num_experts) + skew * normal(seed + 99, num_experts)


def routed(router: Router, logits_TE: Tensor, valid_T: Tensor | None = None) -> Routing:
    ctx = RouterContext(1, len(logits_TE), torch.arange(1), valid_T=valid_T)
    return router(logits_TE, ctx)


def updated(router: Router, logits_TE: Tensor, bins: int = 1000, decay: float = 0.0) -> None:
    controller = QuantileController({4: router}, bins, decay)
    controller.follow({4: controller.measure(4, routed(router, logits_TE).detach())})


def needed(logits_TE: Tensor, bias_E: Tensor, top_k: int) -> list[list[float]]:
    """Each expert's sorted list, a number a token: the bias with which the token would just take it."""
    lists: list[list[float]] = [[] for _ in range(logits_TE.shape[1])]
    for row in logits_TE.tolist():
        scores = [1 / (1 + math.exp(-z)) for z in row]
        biased = sorted((s + b for s, b in zip(scores, bias_E.tolist(), strict=True)), reverse=True)
        for expert, score in enumerate(scores):
            lists[expert].append(biased[top_k] - score)
    return [sorted(values) for values in lists]


def exact(lists: list[list[float]], top_k: int) -> list[float]:
    """The least bias of each expert with which at least T k / E tokens would take it."""
    place = math.ceil(Fraction(top_k, len(lists)) * len(lists[0])) - 1
    return [values[place] for values in lists]


@pytest.mark.parametrize(("num_experts", "top_k", "tokens", "skew"), CASES)
@pytest.mark.parametrize("bins", [1000, 37])
def test_the_histogram_agrees_with_a_sort_to_a_bin(
    num_experts: int, top_k: int, tokens: int, skew: float, bins: int
) -> None:
    router, logits_TE = sigmoid_router(num_experts, top_k), skewed(num_experts, tokens, skew)
    for _ in range(3):  # from no bias, and from two that were solved for
        before_E = router.bias_E.double()
        right = torch.tensor(exact(needed(logits_TE, before_E, top_k), top_k), dtype=torch.float64)
        updated(router, logits_TE, bins)
        width = float(before_E.max() - before_E.min() + 2) / bins
        shift_E = router.bias_E.double() - right
        assert float(shift_E.max() - shift_E.min()) <= 2 * width + 1e-6  # both are known up to a constant
        assert abs(float(router.bias_E.double().mean())) < 1e-7


@pytest.mark.parametrize(("num_experts", "top_k", "tokens", "skew"), CASES)
def test_one_step_admits_an_even_share_to_within_one_bin(
    num_experts: int, top_k: int, tokens: int, skew: float
) -> None:
    """The tokens whose cutoff an expert passes with its new bias, before that is centred."""
    router, logits_TE = sigmoid_router(num_experts, top_k), skewed(num_experts, tokens, skew)
    if skew:
        router.bias_E.copy_(0.1 * normal(5, num_experts))
    lists = needed(logits_TE, router.bias_E.double(), top_k)
    low = float(router.bias_E.min()) - 1
    width = (float(router.bias_E.max()) + 1 - low) / 1000
    counts_EQ = QuantileController({0: router}).measure(0, routed(router, logits_TE).detach())
    bias_E = low + width * quantile_place(counts_EQ, top_k / num_experts)
    for values, bias in zip(lists, bias_E.tolist(), strict=True):
        admitted = sum(value < bias for value in values)
        bin_of = min(math.floor((bias - low) / width), 999)
        mass = sum(low + bin_of * width - 1e-9 <= v <= low + (bin_of + 1) * width + 1e-9 for v in values)
        assert abs(admitted - tokens * top_k / num_experts) <= max(mass, 1)
    updated(router, logits_TE)
    torch.testing.assert_close(router.bias_E, (bias_E - bias_E.mean()).float(), rtol=0, atol=1e-7)


def test_a_quantile_is_interpolated_inside_its_bin() -> None:
    counts_EQ = torch.tensor([[0, 4, 0, 6], [10, 0, 0, 0], [5, 5, 0, 0], [0, 0, 0, 0]])
    assert quantile_place(counts_EQ, 0.5).tolist() == [3 + 1 / 6, 0.5, 1.0, 0.0]


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (13, 3), (37, 5)])
def test_a_skewed_router_is_even_on_fresh_tokens_after_some_steps(num_experts: int, top_k: int) -> None:
    router = sigmoid_router(num_experts, top_k)
    worst = []
    for step in range(9):
        logits_TE = skewed(num_experts, 4099, 0.0, seed=step) + torch.linspace(-1.5, 1.5, num_experts)
        load_E = routed(router, logits_TE).demand_E.double()
        worst.append(float(load_E.max() / load_E.mean()))
        updated(router, logits_TE)
    assert worst[0] > 2.4
    assert worst[1] < 1.5
    assert worst[-1] < 1.16


def test_without_a_skew_the_bias_is_noise() -> None:
    router = sigmoid_router(7, 2)
    updated(router, skewed(7, 4099, 0.0))
    assert float(router.bias_E.abs().max()) < 0.03


def test_a_constant_in_the_bias_changes_nothing() -> None:
    logits_TE, found = skewed(7, 211, 1.0), []
    for constant in (0.0, 3.0):
        router = sigmoid_router(7, 2)
        router.bias_E.add_(constant)
        updated(router, logits_TE)
        found.append(router.bias_E.clone())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_decay_keeps_a_share_of_the_last_bias() -> None:
    logits_TE, before_E = skewed(7, 211, 1.0), 0.1 * normal(3, 7).float()
    biases = []
    for decay in (0.0, 0.9):
        router = sigmoid_router(7, 2)
        router.bias_E.copy_(before_E)
        updated(router, logits_TE, decay=decay)
        biases.append(router.bias_E.clone())
    torch.testing.assert_close(biases[1], 0.9 * before_E + 0.1 * biases[0], rtol=0, atol=1e-6)


def test_padding_and_the_split_have_no_part_in_it() -> None:
    """One micro-batch of valid tokens, or two padded ones of other content: the same counts, to the unit."""
    router = sigmoid_router(7, 2)
    logits_TE, other_TE = skewed(7, 60, 1.0), skewed(7, 60, 3.0, seed=8)
    valid_T = torch.arange(60) % 3 > 0
    controller = QuantileController({0: router})
    alone = controller.measure(0, routed(router, logits_TE[valid_T]).detach())
    parts = []
    for rows in (slice(0, 17), slice(17, 60)):
        mixed_TE = logits_TE[rows].where(valid_T[rows, None], other_TE[rows])
        parts.append(controller.measure(0, routed(router, mixed_TE, valid_T[rows]).detach()))
    assert int(alone.sum()) == 7 * int(valid_T.sum())
    assert torch.equal(alone, parts[0] + parts[1])


@pytest.mark.parametrize("valid", [False, True])
def test_a_layer_without_a_token_keeps_its_bias(valid: bool) -> None:
    router = sigmoid_router(7, 2)
    router.bias_E.copy_(normal(1, 7))
    before_E = router.bias_E.clone()
    controller = QuantileController({0: router})
    logits_TE = normal(2, 0 if valid else 5, 7)
    routing = routed(router, logits_TE, None if valid else torch.zeros(5, dtype=torch.bool))
    controller.follow({0: controller.measure(0, routing.detach())})
    assert torch.equal(router.bias_E, before_E)


def test_scores_that_are_not_finite_break_no_count() -> None:
    router = sigmoid_router(3, 1)
    routing = routed(router, torch.tensor([[float("nan"), 0.0, 1.0], [9e9, -9e9, float("inf")]]).double())
    counts_EQ = QuantileController({0: router}).measure(0, routing.detach())
    assert counts_EQ.sum(-1).tolist() == [2, 2, 2]


def test_the_bias_changes_choices_and_no_weight_or_gradient_of_a_choice() -> None:
    router, logits_TE = sigmoid_router(7, 2), skewed(7, 211, 0.3)
    found = []
    for _ in range(2):
        leaf_TE = logits_TE.clone().requires_grad_()
        routing = routed(router, leaf_TE)
        weights_N, a = routing.assignment.weights_N, routing.assignment
        (grad_TE,) = torch.autograd.grad(weights_N.square().sum(), leaf_TE)
        dense_TE = torch.zeros(211, 7, dtype=torch.float64)
        dense_TE[a.token_ids_N, a.expert_ids_N()] = weights_N.detach()
        found.append((dense_TE, grad_TE))
        updated(router, logits_TE)
    same_T = ((found[0][0] > 0) == (found[1][0] > 0)).all(-1)
    assert 0 < int((~same_T).sum()) < 211
    assert torch.equal(found[0][0][same_T], found[1][0][same_T])
    assert torch.equal(found[0][1][same_T], found[1][1][same_T])
    assert not router.bias_E.requires_grad


@pytest.mark.parametrize(
    ("router", "options", "line"),
    [
        ("sigmoid", {"num_groups": 2, "top_groups": 1, "top_k": 2}, "router=sigmoid does not take the best"),
        ("grouped", {}, "router=grouped does not take the best"),
        ("relu", {}, r"\(cosine, sigmoid, straight_through, switch, topk do\): take balance.controllers.qu"),
        ("topk", {"top_k": 8}, "router=topk takes all of its 8 experts for every token"),
    ],
)
def test_routers_that_it_cannot_solve_for_are_refused(
    router: str, options: dict[str, object], line: str
) -> None:
    built = build_router(router, d_model=4, num_experts=8, **options)
    chosen = chosen_controllers({"quantile": {}}, [])
    assert re.search(line, str(controllers_refusal(chosen, [built])))
    fits = build_router("topk", d_model=4, num_experts=8)
    assert controllers_refusal(chosen, [built, fits]) is None
    (controller,) = build_controllers({"quantile": {}}, [], {1: built, 2: fits})
    assert list(controller.routers) == [2]


def test_one_controller_moves_the_bias() -> None:
    with pytest.raises(ValueError, match=r"^controllers: bias and quantile would each move the selection"):
        chosen_controllers({"quantile": {}, "bias": {}}, [LossTerm("switch", 1.0, "micro")])
