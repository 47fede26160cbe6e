"""The router's kernels against plain torch: ids exactly, ties included; values and gradients in fp64.

Shapes: T tokens, E experts, K chosen.
"""

from __future__ import annotations

import interpreted  # noqa: F401
import pytest
import torch
from fused_router_cases import FEW, Case, draw
from torch import Tensor

from moetrain.kernels.router.route import route
from moetrain.kernels.router.rule import Rule
from moetrain.kernels.twins import router as twin
from moetrain.moe.token_choice import choose_experts

NAN, INF = float("nan"), float("inf")


def close(got: Tensor, want: Tensor, scale: float = 1.0) -> None:
    """Within 1e-5 of the larger of the value and ``scale``, which rounding is relative to."""
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)


def compare(case: Case, device: torch.device) -> None:
    logits_TE, bias_E = case.inputs(device)
    rule, wide_TE = case.rule, logits_TE.double().requires_grad_()
    wide_E = None if bias_E is None else bias_E.double()
    logits_TE.requires_grad_()
    ids_TK, weights_TK, scores_TE = route(logits_TE, bias_E, rule)
    want_ids_TK, want_weights_TK, want_scores_TE = twin.route(wide_TE, wide_E, rule)
    assert ids_TK.dtype is torch.int64
    assert torch.equal(ids_TK, twin.choose(scores_TE.detach(), bias_E, rule)), "of the kernel's own scores"
    assert torch.equal(ids_TK, want_ids_TK)
    close(scores_TE, want_scores_TE)
    close(weights_TK, want_weights_TK, rule.route_scale)
    made = torch.Generator().manual_seed(case.seed)
    dweights_TK = torch.randn(weights_TK.shape, generator=made).to(device)
    dscores_TE = torch.randn(scores_TE.shape, generator=made).to(device)
    for weighed, scored in ((1, 1), (1, 0), (0, 1)):
        loss, want_loss = logits_TE.new_zeros(()), wide_TE.new_zeros(())
        if weighed:
            loss = loss + (weights_TK * dweights_TK).sum()
            want_loss = want_loss + (want_weights_TK * dweights_TK).sum()
        if scored:
            loss = loss + (scores_TE * dscores_TE).sum()
            want_loss = want_loss + (want_scores_TE * dscores_TE).sum()
        (got,) = torch.autograd.grad(loss, logits_TE, retain_graph=True)
        (want,) = torch.autograd.grad(want_loss, wide_TE, retain_graph=True)
        close(got, want, rule.route_scale)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_router_equals_its_twin(case: Case, device: torch.device) -> None:
    compare(case, device)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(120))
def test_drawn_routers_equal_their_twins(seed: int, device: torch.device) -> None:
    compare(draw(seed), device)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_twin_is_torch_s_way(case: Case, dtype: torch.dtype) -> None:
    logits_TE, bias_E = case.inputs(torch.device("cpu"))
    logits_TE = logits_TE.to(dtype)
    bias_E = torch.zeros(case.experts, dtype=dtype) if bias_E is None else bias_E.to(dtype)
    want = twin.route(logits_TE, bias_E, case.rule)
    for got, wanted in zip(choose_experts(logits_TE, bias_E, case.rule, "torch"), want, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("score", ["softmax", "softmax_after", "sigmoid"])
@pytest.mark.parametrize("top_groups", [1, 3])
def test_logits_without_a_number_choose_as_the_twin(
    score: str, top_groups: int, device: torch.device
) -> None:
    rows = [[0.0, -0.0, -INF, 2, 2, 1], [-INF] * 6, [NAN, 0, 1, 2, 3, 4], [0, INF, 1, 1, -INF, 3]]
    rows += [[-1e30, 1e30, 1e30, 0, 0, 0], [3.4e38, -3.4e38, 0, 1, 2, 3], [NAN] * 6]
    logits_TE = torch.tensor(rows, device=device)
    bias_E = torch.tensor([0.0, -INF, -0.0, 0, -1, -INF], device=device)
    rule = Rule(4 if top_groups == 3 else 2, score, num_groups=3, top_groups=top_groups)
    logits_TE.requires_grad_()
    ids_TK, weights_TK, scores_TE = route(logits_TE, bias_E, rule)
    plain_TE = logits_TE.detach().clone().requires_grad_()
    want_ids_TK, want_weights_TK, want_scores_TE = twin.route(plain_TE, bias_E, rule)
    assert torch.equal(ids_TK, want_ids_TK)
    close(scores_TE, want_scores_TE.double())
    close(weights_TK, want_weights_TK.double())
    (got_TE,) = torch.autograd.grad(scores_TE[:, 0].sum() + weights_TK[:, 1].sum(), logits_TE)
    (want_TE,) = torch.autograd.grad(want_scores_TE[:, 0].sum() + want_weights_TK[:, 1].sum(), plain_TE)
    numbers = [0, 1, 4, 5]
    close(got_TE[numbers], want_TE[numbers].double())
    if score != "sigmoid":
        assert not got_TE[1].any(), "experts that are out have no gradient"


def test_a_negative_nan_is_the_largest_too(device: torch.device) -> None:
    bias_E = torch.tensor([0.0, 1.0, -NAN, 0.5, NAN], device=device)
    assert bias_E[2].view(torch.int32) < 0, "its sign is set"
    ids_TK, _, _ = route(torch.zeros(2, 5, device=device), bias_E, Rule(4))
    assert ids_TK.tolist() == [[2, 4, 1, 3]] * 2


def test_a_column_without_an_expert_is_never_chosen(device: torch.device) -> None:
    """Though every expert's score, with its bias, is below that of padding."""
    logits_TE, bias_E = torch.arange(5.0, device=device)[None], torch.full((5,), -2.0, device=device)
    ids_TK, _, _ = route(logits_TE, bias_E, Rule(3))
    assert ids_TK.tolist() == [[4, 3, 2]]


def test_no_token_and_any_layout(device: torch.device) -> None:
    rule = Rule(3)
    ids_TK, weights_TK, scores_TE = route(torch.zeros(0, 7, device=device, requires_grad=True), None, rule)
    assert (ids_TK.shape, weights_TK.shape, scores_TE.shape) == ((0, 3), (0, 3), (0, 7))
    (weights_TK.sum() + scores_TE.sum()).backward()
    logits_TE = torch.randn(7, 5, generator=torch.Generator().manual_seed(3)).to(device).t()
    for got, want in zip(
        route(logits_TE, None, rule), route(logits_TE.contiguous(), None, rule), strict=True
    ):
        assert torch.equal(got, want)


def test_one_renormalized_choice_has_no_gradient(device: torch.device) -> None:
    logits_TE = torch.randn(11, 5, generator=torch.Generator().manual_seed(5)).to(device)
    logits_TE[:, 3] = -70  # its score is far below what divisors are kept from zero with
    logits_TE.requires_grad_()
    _, weights_TK, _ = route(
        logits_TE, torch.tensor([0.0, 0, 0, 9, 0], device=device), Rule(1, route_scale=2.0)
    )
    assert torch.equal(weights_TK, torch.full((11, 1), 2.0, device=device))
    weights_TK.sum().backward()
    assert logits_TE.grad is not None
    assert not logits_TE.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: route(torch.zeros(2, 3).double(), None, Rule(1)), "logits in fp32, not torch.float64"),
        (lambda: route(torch.zeros(2, 3), torch.zeros(3).half(), Rule(1)), "bias in fp32, not torch.float16"),
        (lambda: route(torch.zeros(2, 3), torch.zeros(2), Rule(1)), r"\(2,\), 3 experts need \(3,\)"),
        (lambda: route(torch.zeros(2, 513), None, Rule(1)), "1 to 512 experts, not 513"),
        (lambda: route(torch.zeros(2, 6), None, Rule(1, num_groups=5)), "5 does not divide 6"),
        (lambda: route(torch.zeros(2, 6), None, Rule(3, num_groups=3)), "exceeds the 2 experts of 1 groups"),
        (lambda: route(torch.zeros(2, 40), None, Rule(33)), "choose 1 to 32 experts, not 33"),
        (lambda: Rule(0), "top_k=0 must be at least 1"),
        (lambda: Rule(1, "best"), "unknown score 'best'"),
        (lambda: Rule(1, group_score="best"), "unknown group_score 'best'"),
        (lambda: Rule(1, num_groups=2, top_groups=3), "top_groups=3 must lie in 1 to num_groups=2"),
    ],
)
def test_what_no_kernel_computes_is_refused(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()
