"""Masked copies: each expert is the dense network but for entries of its own, which are 0."""

from __future__ import annotations

import pytest
import torch
from upcycle_cases import SEED, dense_matrices, dense_state, gate_up_down, target, worst

from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import DiversifyOptions, upcycle

EXPERTS = 5


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.6, 1.0])
def test_experts_are_the_network_where_they_are_not_masked(fraction: float) -> None:
    state = dense_state(d_model=48, head_dim=8, d_ff=113)
    goal = target(TopKOptions(top_k=1), num_experts=EXPERTS, d_model=48, head_dim=8, d_ff_expert=113)
    result = upcycle(state, goal, DiversifyOptions(mask_fraction=fraction), SEED)
    assert result.preserves is (fraction == 0)
    for experts_EFD, dense_FD in zip(
        gate_up_down(result.state, 0, 2), dense_matrices(state, 0, 2), strict=True
    ):
        masked_EFD = experts_EFD == 0
        assert torch.equal(experts_EFD, dense_FD.expand_as(experts_EFD).masked_fill(masked_EFD, 0.0))
        bound = 4 * (fraction * (1 - fraction) / masked_EFD.numel()) ** 0.5
        assert abs(masked_EFD.double().mean() - fraction) <= bound
        if 0 < fraction < 1:  # the masks are drawn by themselves: two share what chance makes them share
            for e in range(1, EXPERTS):
                both = (masked_EFD[0] & masked_EFD[e]).double().mean()
                assert abs(both - fraction**2) < 4 * fraction / dense_FD.numel() ** 0.5


def test_what_is_promised_is_what_happens() -> None:
    for fraction in (0.0, 0.3):
        error, result = worst(
            target(TopKOptions(top_k=2)), dense_state(), DiversifyOptions(mask_fraction=fraction)
        )
        assert (error < 1e-12) is result.preserves is (fraction == 0)
    assert "0.3 of each expert's entries were masked" in result.reason


def test_another_seed_masks_other_entries() -> None:
    state, goal = dense_state(), target(TopKOptions(top_k=1))
    found = [upcycle(state, goal, DiversifyOptions(), seed).state for seed in (1, 1, 2)]
    one, again, other = (gate_up_down(result, 0, 2)[0] for result in found)
    assert one.equal(again)
    assert not one.equal(other)
