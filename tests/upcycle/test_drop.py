"""Drop-Upcycling: what is kept is kept whole, what is new looks like what it replaces.

Shapes: E experts, M matrices (gate, up, down), F hidden, D model.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from upcycle_cases import SEED, dense_matrices, dense_state, gate_up_down, target, worst

from moetrain.moe.routers.topk import TopKOptions
from moetrain.upcycle import DropOptions, upcycle

COLUMNS = {"swiglu": 2, "relu2": 1}


def kept_from(expert_EFD: Tensor, dense_FD: Tensor) -> Tensor:
    """int64 [E, F]: the dense unit whose row this is, bit for bit; -1 where there is none."""
    same_EFN = (expert_EFD[:, :, None] == dense_FD).all(-1)
    return torch.where(same_EFN.any(-1), same_EFN.long().argmax(-1), -1)


def kept(activation: str, options: DropOptions, d_ff: int = 29) -> Tensor:
    """int64 [M, E, F] of layer 0."""
    state = dense_state(activation, d_ff=d_ff)
    goal = target(activation=activation, d_ff=d_ff, d_ff_expert=d_ff, num_experts=5)
    result = upcycle(state, goal, options, SEED).state
    columns = COLUMNS[activation]
    pairs = zip(gate_up_down(result, 0, columns), dense_matrices(state, 0, columns), strict=True)
    return torch.stack([kept_from(expert, dense) for expert, dense in pairs])


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(list(COLUMNS)), st.floats(0, 1), st.sampled_from([2, 13, 29]))
def test_units_are_kept_whole_or_drawn_whole(activation: str, ratio: float, d_ff: int) -> None:
    units_MEF = kept(activation, DropOptions(drop_ratio=ratio), d_ff)
    assert (units_MEF == units_MEF[0]).all()
    assert ((units_MEF >= 0).sum(-1) == d_ff - round(ratio * d_ff)).all()
    for units_F in units_MEF[0]:
        of_old = units_F[units_F >= 0]
        assert len(of_old.unique()) == len(of_old)


def test_every_expert_has_a_permutation_of_its_own() -> None:
    units_MEF = kept("swiglu", DropOptions(drop_ratio=0.0))
    assert torch.equal(units_MEF.sort(-1).values, torch.arange(29).expand(3, 5, 29))
    assert len(units_MEF[0].unique(dim=0)) == 5


def test_a_ratio_of_one_keeps_nothing() -> None:
    assert (kept("swiglu", DropOptions(drop_ratio=1.0)) == -1).all()


def test_independent_sets_differ_by_matrix_and_share_the_order() -> None:
    units_MEF = kept("swiglu", DropOptions(drop_ratio=0.5, independent_sets=True))
    old_MEF = units_MEF >= 0
    assert (old_MEF.sum(-1) == 29 - round(14.5)).all()
    assert (old_MEF[0] != old_MEF[1]).any(-1).all()
    assert (old_MEF[1] != old_MEF[2]).any(-1).all()
    both = old_MEF[0] & old_MEF[1]
    assert both.any()
    assert torch.equal(units_MEF[0][both], units_MEF[1][both])


@pytest.mark.parametrize("activation", list(COLUMNS))
@pytest.mark.parametrize("top_k", [1, 3])
def test_only_a_ratio_of_zero_keeps_the_function(activation: str, top_k: int) -> None:
    goal, state = target(TopKOptions(top_k=top_k), activation), dense_state(activation)
    error, result = worst(goal, state, DropOptions(drop_ratio=0.0))
    assert error < 1e-12
    assert result.preserves
    error, result = worst(goal, state, DropOptions(drop_ratio=0.5))
    assert error > 1e-3
    assert not result.preserves
    assert "14 of 29" in result.reason


@pytest.mark.parametrize("independent", [False, True])
def test_new_values_have_the_mean_and_deviation_of_the_old(independent: bool) -> None:
    """Of each expert's own, by matrix: the dense units are given means of their own to tell them apart."""
    state = dense_state(d_ff=113, d_model=120, head_dim=8)
    means_CF = torch.linspace(-3, 3, 226, dtype=torch.float64).view(2, 113)
    for leaf, means_F in zip(("w_gate_FD", "w_up_FD"), means_CF, strict=True):
        name = f"blocks.0.feed_forward.{leaf}"
        state[name] = state[name] + means_F[:, None]
    goal = target(d_ff=113, d_ff_expert=113, d_model=120, head_dim=8, num_experts=5)
    options = DropOptions(drop_ratio=0.4, independent_sets=independent)
    result = upcycle(state, goal, options, SEED).state
    for expert_EFD, dense_FD in zip(gate_up_down(result, 0, 2), dense_matrices(state, 0, 2), strict=True):
        for expert_FD, units_F in zip(expert_EFD, kept_from(expert_EFD, dense_FD), strict=True):
            lost = torch.ones(113, dtype=torch.bool)
            lost[units_F[units_F >= 0]] = False
            new, old = expert_FD[units_F < 0], dense_FD[lost]
            assert new.shape == old.shape
            std = old.std(correction=0)
            assert abs(new.mean() - old.mean()) < 4 * std / new.numel() ** 0.5
            assert abs(new.std() / std - 1) < 4 / (2 * new.numel()) ** 0.5


def test_the_dtype_stays() -> None:
    state = {name: t.bfloat16() for name, t in dense_state().items()}
    result = upcycle(state, target(), DropOptions(), SEED).state
    assert {t.dtype for name, t in result.items() if "bias_E" not in name} == {torch.bfloat16}
