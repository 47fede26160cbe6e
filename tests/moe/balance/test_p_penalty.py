"""HMoE's penalty of activated parameters: by loops, and what it is where experts are of one width.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from balance_cases import balance_loss, routed, step_totals

WIDTHS = [3, 12, 6, 9, 15]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("scope", ["micro", "global_batch"])
def test_value_and_gradient_by_loops(padded: bool, scope: str) -> None:
    """E sum_e M_e P_e, M_e the mean over tokens of h_e where the expert is chosen, over the mean width."""
    torch.manual_seed(1)
    z_TE = torch.randn(14, 5, dtype=torch.float64, requires_grad=True)
    valid_T = torch.arange(14) % 7 < 5 if padded else None
    routing = replace(routed(z_TE, 2, valid_T, top_k=3), width_E=torch.tensor(WIDTHS))
    tokens = [t for t in range(14) if valid_T is None or valid_T[t]]
    want = torch.zeros((), dtype=torch.float64)
    for e in range(5):
        activated = sum(WIDTHS[e] for t in tokens if e in z_TE[t].topk(3).indices) / len(tokens)
        mean_p = sum(z_TE[t].softmax(0)[e] for t in tokens) / len(tokens)
        want = want + 5 * activated * mean_p
    totals = step_totals(float(len(tokens)), {0: routing.demand_E}, {0: routing.demand_E})
    got = balance_loss(routing, "p_penalty", scope, totals)
    torch.testing.assert_close(got * 9, want, rtol=1e-12, atol=1e-12)  # 9: the mean width
    found, wanted = torch.autograd.grad(got * 9, z_TE)[0], torch.autograd.grad(want, z_TE)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found.abs().max() > 1e-3


def test_experts_of_one_width_pay_k_times_switch() -> None:
    routing = routed(torch.randn(21, 5, dtype=torch.float64), 3, top_k=2)
    totals = step_totals(21.0)
    switch = balance_loss(routing, "switch", "micro", totals)
    for width_E in (None, torch.full((5,), 13)):
        penalty = balance_loss(replace(routing, width_E=width_E), "p_penalty", "micro", totals)
        torch.testing.assert_close(penalty, 2 * switch, rtol=1e-12, atol=0)


def test_experts_without_a_network_cost_nothing() -> None:
    z_TE = torch.zeros(12, 5, dtype=torch.float64)
    z_TE[:, 4] = 99
    routing = replace(routed(z_TE, top_k=1), width_E=torch.tensor([3, 12, 6, 9, 0]))
    assert balance_loss(routing, "p_penalty", "micro", step_totals(12.0)) == 0
