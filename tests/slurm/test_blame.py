"""The nodes to leave out, against every smallest set that explains the pairs; rounds, against all pairs."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.slurm.blame import blamed, rounds

NODES = [f"n{number}" for number in range(7)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_rounds_meet_every_pair_once_and_nobody_twice_in_a_round(count):
    made = rounds(count)
    for meetings in made:
        members = [member for pair in meetings for member in pair]
        assert len(members) == len(set(members))
    assert sorted(pair for meetings in made for pair in meetings) == list(combinations(range(count), 2))


@given(st.sets(st.sampled_from(NODES), max_size=2))
def test_nodes_that_reach_nobody_are_the_ones_left_out(cut_off):
    """Fewer than half of seven: nothing smaller explains their pairs."""
    pairs = [pair for pair in combinations(NODES, 2) if cut_off & set(pair)]
    found = blamed(NODES, {node: [] for node in NODES}, pairs)
    assert found.keys() == cut_off


@given(
    st.sets(st.tuples(st.sampled_from(NODES), st.sampled_from(NODES)).filter(lambda pair: pair[0] < pair[1]))
)
def test_what_is_left_reaches_each_other(pairs):
    found = blamed(NODES, {node: [] for node in NODES}, pairs)
    assert not [pair for pair in pairs if not found.keys() & set(pair)]
    worst = len(next((c for c in _covers(pairs)), ()))
    assert len(found) <= 2 * worst  # the greedy rule, of these seven


def _covers(pairs):
    for size in range(len(NODES) + 1):
        for chosen in combinations(NODES, size):
            if all(set(chosen) & set(pair) for pair in pairs):
                yield chosen


def test_a_silent_node_and_one_with_a_fault():
    faults = {"n0": [], "n2": ["GPU 1: Xid 79", "no disk"]}
    assert blamed(["n0", "n1", "n2"], faults, [("n0", "n2")]) == {
        "n1": "said nothing",
        "n2": "GPU 1: Xid 79; no disk",
    }


def test_of_one_pair_the_first_node_stays():
    assert blamed(["n0", "n1"], {"n0": [], "n1": []}, [("n0", "n1")]) == {"n1": "no sum with n0"}
