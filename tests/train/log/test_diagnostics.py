"""What an evaluation tells of routing: the likeness of a router's rows, and congestion.

Shapes: T tokens, E experts, D model.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from router_cases import normal
from scipy.optimize import fsolve

from moetrain.moe import RouterContext, build_router
from moetrain.train.log.diagnostics import RoutingDiagnostics, congestion, row_similarity


def test_likeness_is_the_mean_absolute_cosine_of_pairs() -> None:
    router = build_router("topk", d_model=5, num_experts=4)
    rows = [[float(x) for x in row] for row in router.weight_ED.detach()]
    found = []
    for i, a in enumerate(rows):
        for b in rows[:i]:
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            found.append(abs(dot) / math.hypot(*a) / math.hypot(*b))
    assert row_similarity(router) == pytest.approx(sum(found) / 6, abs=1e-12)
    with torch.no_grad():
        router.weight_ED[:] = router.weight_ED[0] * torch.tensor([1.0, -2.0, 3.0, 0.5])[:, None]
    assert row_similarity(router) == pytest.approx(1.0)


def test_routers_without_rows_or_with_one_tell_nothing() -> None:
    assert row_similarity(build_router("hash", d_model=5, num_experts=4)) is None
    assert row_similarity(build_router("topk", d_model=5, num_experts=1)) is None
    cosine = build_router("cosine", d_model=5, num_experts=4)
    assert row_similarity(cosine) is not None
    cosine.centers_Ed.data = torch.empty(0)  # as DeepSpeed's stage 3 leaves it between passes
    assert row_similarity(cosine) is None


@pytest.mark.parametrize("gamma", [0.0, 7.5, 40.0])
def test_congestion_is_found_again_in_loads_that_were_made_by_it(gamma: float) -> None:
    """r = softmax(q - gamma r), solved by scipy."""
    q = [0.4, -0.2, 0.1, 0.9, -0.7]

    def residual(r):
        weights = [math.exp(a - gamma * b) for a, b in zip(q, r, strict=True)]
        return [b - w / sum(weights) for b, w in zip(r, weights, strict=True)]

    r = fsolve(residual, [0.2] * 5, xtol=1e-13)
    assert congestion(torch.tensor(r) * 1e6, torch.tensor(q)) == pytest.approx(gamma, abs=1e-6)


def test_where_congestion_is_not_defined_it_is_left_out() -> None:
    q_E = torch.tensor([0.1, 0.2, 0.3])
    assert congestion(torch.tensor([5, 5, 5]), q_E) is None
    assert congestion(torch.tensor([5, 3, 0]), q_E) is None
    assert congestion(torch.tensor([5, 3, 1]), torch.tensor([0.1, math.inf, 0.3])) is None
    assert congestion(torch.zeros(3), q_E) is None


def test_batches_add_up_and_padding_has_no_part() -> None:
    router = build_router("topk", d_model=5, num_experts=4).double()
    x_TD, valid_T = normal(0, 12, 5), torch.arange(12) % 5 > 0
    ctx = replace(RouterContext.default(1, 12), valid_T=valid_T)
    diagnostics = RoutingDiagnostics()
    for rows in (slice(0, 4), slice(4, 12)):
        part = replace(RouterContext.default(1, len(x_TD[rows])), valid_T=valid_T[rows])
        diagnostics.add({2: router(x_TD[rows], part)})
    row = diagnostics.row({2: router})
    whole = router(x_TD, ctx)
    right = congestion(whole.demand_E, router.logits(x_TD[valid_T]).mean(0))
    assert row["moe/2/congestion"] == pytest.approx(right, rel=1e-9)
    assert row["moe/2/router_similarity"] == row_similarity(router)
    assert RoutingDiagnostics().row({2: router}) == {"moe/2/router_similarity": row_similarity(router)}
