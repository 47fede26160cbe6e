"""Balanced assignment against scipy's optimum, and its certificate; the auction's gap; Sinkhorn's margins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moetrain.moe.solvers import auction, balanced_assignment, capacities, sinkhorn_plan
from moetrain.moe.solvers.sinkhorn import NotConvergedError


def optimum(scores_TE: np.ndarray) -> float:
    """The best total where experts' counts are T // E or one more: scipy, on one column a place."""
    tokens, num_experts = scores_TE.shape
    share, extra = divmod(tokens, num_experts)
    columns = np.concatenate([np.tile(np.arange(num_experts), share), np.arange(num_experts)])
    matrix = scores_TE[:, columns]
    if extra or not share:  # rows that stand for the places left empty, which must be additional ones
        empty = np.zeros((num_experts - extra, len(columns)))
        empty[:, : num_experts * share] = -1e12
        matrix = np.vstack([matrix, empty])
    else:
        matrix = matrix[:, : num_experts * share]
    rows, places = linear_sum_assignment(matrix, maximize=True)
    return float(sum(matrix[r, c] for r, c in zip(rows, places, strict=True) if r < tokens))


def draw(seed: int, tokens: int, num_experts: int) -> np.ndarray:
    """Normal scores of several scales; every third is rounded, so that many are equal."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(tokens, num_experts)) * 10.0 ** rng.integers(-3, 4)
    return np.round(scores) if seed % 3 == 0 else scores


@pytest.mark.parametrize("block", range(10))
def test_exact_equals_scipy_and_proves_it(block):
    """200 instances, up to 512 tokens x 64 experts."""
    rng = np.random.default_rng(block)
    for i in range(20):
        tokens, num_experts = (
            int(rng.integers(1, 513 if i < 3 else 140)),
            int(rng.integers(1, 65 if i < 3 else 24)),
        )
        scores = draw(20 * block + i, tokens, num_experts)
        solution = balanced_assignment(scores)
        counts = np.bincount(solution.expert_T, minlength=num_experts)
        assert counts.max() - counts.min() <= 1
        total = scores[np.arange(tokens), solution.expert_T].sum()
        size = np.abs(scores).sum() + 1e-30
        assert abs(total - optimum(scores)) <= 1e-11 * size
        assert -1e-11 * size <= solution.gap(scores) <= 1e-11 * size


@given(st.integers(0, 9), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_exact_on_tiny_and_equal_scores(tokens, num_experts, seed):
    scores = np.random.default_rng(seed).integers(-1, 2, size=(tokens, num_experts)).astype(float)
    solution = balanced_assignment(scores)
    counts = np.bincount(solution.expert_T, minlength=num_experts)
    assert counts.sum() == tokens
    assert counts.max() - counts.min() <= 1
    assert abs(solution.gap(scores)) < 1e-12
    if tokens:
        assert scores[np.arange(tokens), solution.expert_T].sum() == optimum(scores)


def test_the_certificate_can_fail():
    scores = draw(1, 31, 5)
    solution = balanced_assignment(scores)
    solution.expert_T[[0, 1]] = (
        solution.expert_T[[1, 0]] if solution.expert_T[0] != solution.expert_T[1] else 0
    )
    worst = balanced_assignment(-scores)
    assert type(solution)(worst.expert_T, solution.price_E).gap(scores) > 1.0


@given(st.lists(st.integers(0, 37), min_size=1, max_size=3), st.integers(1, 7), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_auction_fills_and_stays_within_its_gap(lengths, num_experts, seed):
    """Groups of uneven length in one call; the gap is tokens * eps for the capacities that it was given."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    valid_GL = torch.arange(longest) < torch.tensor(lengths)[:, None]
    scores_GLE = torch.randn(len(lengths), longest, num_experts, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        scores_GLE = scores_GLE.round()
    if not longest:
        return
    eps = 0.05
    expert_GL, _ = auction(scores_GLE, valid_GL, eps)
    room_GE = capacities(scores_GLE, valid_GL)
    assert (expert_GL[~valid_GL] == num_experts).all()
    for scores_LE, expert_L, room_E, n in zip(
        scores_GLE.numpy(), expert_GL.numpy(), room_GE.numpy(), lengths, strict=True
    ):
        assert np.bincount(expert_L[:n], minlength=num_experts).tolist() == room_E.tolist()
        assert room_E.sum() == n
        assert not n or room_E.max() - room_E.min() <= 1
        places = np.repeat(np.arange(num_experts), room_E)
        rows, columns = linear_sum_assignment(scores_LE[:n][:, places], maximize=True)
        best = scores_LE[:n][:, places][rows, columns].sum()
        assert best - scores_LE[np.arange(n), expert_L[:n]].sum() <= n * eps + 1e-9


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("tolerance", [1e-2, 1e-6])
def test_sinkhorn_marginals(scale, tolerance):
    torch.manual_seed(1)
    logits_GLE = scale * torch.randn(3, 41, 7, dtype=torch.float64)
    valid_GL = torch.arange(41) < torch.tensor([41, 0, 13])[:, None]
    plan_GLE = sinkhorn_plan(logits_GLE, valid_GL, tolerance).exp()
    assert (plan_GLE[~valid_GL] == 0).all()
    for plan_LE, n in zip(plan_GLE, (41, 0, 13), strict=True):
        if n:
            torch.testing.assert_close(plan_LE[:n].sum(1), torch.full((n,), 1 / n, dtype=torch.float64))
            assert (plan_LE.sum(0) * 7 - 1).abs().max() <= tolerance
    # the plan is the logits' own up to a factor per row and per column: what is left has rank one
    residue = plan_GLE[0].log() - logits_GLE[0]
    residue = residue - residue.mean(0) - residue.mean(1, keepdim=True) + residue.mean()
    assert residue.abs().max() < 1e-9


def test_a_groups_plan_knows_no_other_group():
    """An easy group beside one that takes many more iterations, at a tolerance that can be seen."""
    generator = torch.Generator().manual_seed(4)
    logits_GLE = torch.randn(3, 11, 5, generator=generator, dtype=torch.float64)
    logits_GLE *= torch.tensor([0.5, 9.0, 2.0])[:, None, None]
    valid_GL = torch.arange(11) < torch.tensor([11, 9, 4])[:, None]
    together = sinkhorn_plan(logits_GLE, valid_GL, 0.05)
    for g in range(3):
        alone = sinkhorn_plan(logits_GLE[g : g + 1], valid_GL[g : g + 1], 0.05)[0]
        torch.testing.assert_close(together[g], alone, rtol=0, atol=1e-12)


def test_sinkhorn_says_where_it_does_not_converge():
    logits_GLE = torch.full((1, 4, 2), -1e4)
    logits_GLE[..., 0] = 0
    with pytest.raises(NotConvergedError, match=r"still .* off after 3 iterations.*router.tolerance"):
        sinkhorn_plan(torch.randn(1, 50, 7) * 9, torch.ones(1, 50, dtype=torch.bool), 1e-12, max_iterations=3)
    assert sinkhorn_plan(logits_GLE, torch.ones(1, 4, dtype=torch.bool), 1e-3).isfinite().all()
