"""Repair of capacity overflow: against loops over tokens, and by what each rule promises.

Shapes: T tokens, E experts, N assignments, G routing groups.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from repair_by_hand import (
    Case,
    by_token,
    cases,
    loads,
    next_expert_by_hand,
    pairs,
    rectified_by_hand,
    routed,
    some_local,
)

from moetrain.moe import RouterContext
from moetrain.moe.assign import from_mask
from moetrain.moe.options import DropOrder

quick = settings(max_examples=120, deadline=None, derandomize=True, database=None)


@quick
@given(cases())
def test_next_expert_equals_the_loop(case: Case) -> None:
    assert pairs(case.repaired("next_expert")) == pytest.approx(next_expert_by_hand(case))


@quick
@given(cases())
def test_fill_in_equals_the_loop(case: Case) -> None:
    assert pairs(case.repaired("fill_in")) == pytest.approx(rectified_by_hand(case, None, fills=True))


@quick
@given(cases(), st.integers(0, 99), st.sampled_from(["local", "local_fill_in"]))
def test_local_equals_the_loop(case: Case, seed: int, rule: str) -> None:
    local_TE = some_local(case, seed)
    want = rectified_by_hand(case, local_TE, fills=rule == "local_fill_in")
    assert pairs(case.repaired(rule, local_TE)) == pytest.approx(want)


# what the rules promise


@quick
@given(cases(), st.sampled_from(["next_expert", "fill_in"]))
def test_no_expert_exceeds_capacity_and_no_kept_one_goes(case: Case, rule: str) -> None:
    found, kept = case.repaired(rule), case.kept()
    assert all(n <= case.capacity(g) for (_, g), n in loads(case, found).items())
    assert pairs(kept).keys() <= pairs(found).keys()
    assert torch.equal(found.granted_E, kept.assignment.counts_E)


@quick
@given(cases())
def test_next_expert_loses_nothing_while_there_is_room(case: Case) -> None:
    found = case.repaired("next_expert")
    rows, load = by_token(found), loads(case, found)
    for t, wanted in by_token(case.wanted).items():
        assert len(rows[t]) <= len(wanted)
        if len(rows[t]) < len(wanted):
            unused = set(range(found.num_experts)) - rows[t].keys() - wanted.keys()
            assert all(load[e, case.group(t)] == case.capacity(case.group(t)) for e in unused)


@quick
@given(cases(), st.sampled_from(["local", "fill_in", "local_fill_in"]))
def test_a_changed_token_keeps_the_sum_of_its_weights(case: Case, rule: str) -> None:
    """And with ``local``, where all experts are, no token is left without an expert."""
    rows, kept = by_token(case.repaired(rule)), by_token(case.kept())
    for t, wanted in by_token(case.wanted).items():
        if rule != "fill_in" or rows[t].keys() - kept[t].keys():
            assert sum(rows[t].values()) == pytest.approx(sum(wanted.values()))
        if rule != "fill_in":
            assert max(rows[t].values()) > 0


@quick
@given(cases(), st.integers(0, 99))
def test_local_takes_no_place_from_fill_in(case: Case, seed: int) -> None:
    """Together they compute what each does alone, but for a next choice to which a token was sent already."""
    local_TE = some_local(case, seed)
    home, filled, both = (
        pairs(case.repaired(rule, local_TE)).keys() for rule in ("local", "fill_in", "local_fill_in")
    )
    assert home <= both
    if not home & (filled - pairs(case.kept()).keys()):
        assert both == home | filled


@quick
@given(cases())
def test_without_overflow_nothing_changes_but_what_fill_in_fills(case: Case) -> None:
    case = replace(case, tenths=10**9)
    for rule in ("next_expert", "local"):
        found = case.repaired(rule)
        for field in ("token_ids_N", "weights_N", "counts_E", "choice_N"):
            one, other = (getattr(r.assignment, field) for r in (found, case.wanted))
            assert one is other is None or torch.equal(one, other), field
    filled = by_token(case.repaired("fill_in"))
    for t, wanted in by_token(case.wanted).items():
        assert len(filled[t]) == min(len(wanted) + 1, case.wanted.num_experts)


@pytest.mark.parametrize("rule", ["next_expert", "fill_in"])
@pytest.mark.parametrize("shape", [(1, 0), (0, 5), (1, 1), (2, 3)])
def test_one_expert_has_no_other(rule: str, shape: tuple[int, int]) -> None:
    ctx = RouterContext.default(*shape)
    wanted = routed(torch.zeros(shape[0] * shape[1], 1), ctx, 1, "softmax")
    case = Case(wanted, ctx, 5, 0, DropOrder.position, 1)
    assert pairs(case.repaired(rule)) == pairs(case.kept())


def wishes(mask: list[list[int]], scores: list[list[float]]) -> Case:
    """One sequence: which token wants which expert. C is the mean demand, rounded up."""
    ctx, scores_TE = RouterContext.default(1, len(mask)), torch.tensor(scores, dtype=torch.float64)
    wanted = from_mask(torch.tensor(mask).bool(), scores_TE, ctx, scores_TE)
    return Case(wanted, ctx, 10, 0, DropOrder.position, 1)


def test_a_token_is_never_sent_where_it_is() -> None:
    """Expert 0 has a place left, but the last token has it already."""
    case = wishes([[0, 1], [0, 1], [1, 1]], [[0.5, 0.5]] * 3)
    assert pairs(case.repaired("next_expert")).keys() == {(1, 0), (1, 1), (0, 2)}


def test_the_earlier_token_goes_first_whoever_refused_it() -> None:
    case = replace(wishes([[1, 0, 0], [0, 1, 0], [0, 1, 0], [1, 0, 0]], [[0.3, 0.3, 0.4]] * 4), tenths=7)
    assert pairs(case.repaired("next_expert")).keys() == {(0, 0), (1, 1), (2, 2)}


def test_scores_that_underflow_share_alike() -> None:
    case = wishes([[1, 0, 0], [1, 0, 0], [1, 0, 0]], [[1.0, 0.0, 0.0]] * 3)
    local_TE = torch.tensor([[False, True, True]] * 3)
    assert pairs(case.repaired("local", local_TE)) == {(0, 0): 1.0, (1, 1): 1.0, (1, 2): 1.0}
