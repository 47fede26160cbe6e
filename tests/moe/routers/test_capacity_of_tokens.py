"""XMoE's capacity: a multiple of the tokens over E, first choices first, by loops over tokens.

Shapes: B sequences of S positions, T = B S, D model, E experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from moetrain.moe import Router, RouterContext, Routing, build_router
from moetrain.moe.options import DropOrder, Repair

B, S, D, E = 4, 9, 6, 5
FACTOR = 0.7


def router_of(training: bool, **options: object) -> Router:
    torch.manual_seed(2)
    given = {"capacity_factor": FACTOR, "eval_capacity_factor": FACTOR, "min_capacity": 0, **options}
    made = build_router("threshold", d_model=D, num_experts=E, threshold=0.8, **given).double()
    with torch.no_grad():
        made.weight_ED.mul_(3)
    return made.train(training)


def routed(router: Router) -> tuple[Routing, Tensor, Tensor]:
    """The routing, each token's probabilities, and which tokens are valid."""
    generator = torch.Generator().manual_seed(4)
    x_TD = torch.randn(B * S, D, dtype=torch.float64, generator=generator)
    valid_BS = torch.arange(S) < torch.tensor([9, 4, 0, 7])[:, None]
    ctx = replace(RouterContext.default(B, S), valid_T=valid_BS.flatten())
    p_TE = (x_TD @ router.weight_ED.t()).softmax(-1).detach()
    return router(x_TD, ctx), p_TE, valid_BS


def choices(p_E: Tensor) -> list[int]:
    """By falling probability until those before sum to the threshold."""
    chosen: list[int] = []
    for e in sorted(range(E), key=lambda e: -float(p_E[e])):
        if chosen and sum(float(p_E[i]) for i in chosen) >= 0.8:
            break
        chosen.append(e)
    return chosen


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("group", [1, 2])
def test_what_is_kept_is_a_share_of_the_tokens(training: bool, group: int) -> None:
    routing, p_TE, valid_BS = routed(router_of(training, group=str(group), drop_order=DropOrder.choice))
    kept: set[tuple[int, int]] = set()
    dropped = 0
    for first in range(0, B, group):
        tokens = [b * S + s for b in range(first, first + group) for s in range(S) if valid_BS[b, s]]
        capacity = math.ceil(Fraction(str(FACTOR)) * len(tokens) / E)
        for e in range(E):
            wanting = [(choices(p_TE[t]).index(e), t) for t in tokens if e in choices(p_TE[t])]
            kept |= {(t, e) for _, t in sorted(wanting)[:capacity]}
            dropped += max(0, len(wanting) - capacity)
    found = zip(
        routing.assignment.token_ids_N.tolist(), routing.assignment.expert_ids_N().tolist(), strict=True
    )
    assert set(found) == kept
    assert dropped > 5
    weights = [float(p_TE[t, e]) for e in range(E) for t in range(B * S) if (t, e) in kept]
    assert routing.assignment.weights_N.tolist() == pytest.approx(weights)


@pytest.mark.parametrize("rule", [Repair.next_expert, Repair.fill_in])
def test_a_repair_fills_the_same_places(rule: Repair) -> None:
    routing, _, valid_BS = routed(router_of(True, repair=rule))
    capacity = [math.ceil(FACTOR * int(n) / E - 1e-9) for n in valid_BS.sum(1)]
    used = torch.zeros(B, E, dtype=torch.int64)
    for t, e in zip(routing.assignment.token_ids_N, routing.assignment.expert_ids_N(), strict=True):
        used[t // S, e] += 1
    assert (used <= torch.tensor(capacity)[:, None]).all()
    assert (used.max(1).values == torch.tensor(capacity)).all()
