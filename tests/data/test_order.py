"""The order of samples is a seeded bijection per epoch, computed position by position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.order import BLOCK, MixtureOrder, SampleOrder


def positions(start, stop):
    return np.arange(start, stop, dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), seed=st.integers(-5, 2**63), epoch=st.integers(0, 9))
def test_each_epoch_visits_every_sequence_once(n, seed, epoch):
    visited = SampleOrder(n, seed)(positions(epoch * n, epoch * n + n))
    assert sorted(visited.tolist()) == list(range(n))


def test_an_epoch_of_a_large_split_is_a_bijection():
    n = 100_003
    visited = SampleOrder(n, seed=3)(positions(n, 2 * n))
    assert np.array_equal(np.sort(visited), np.arange(n))


def test_epochs_and_seeds_differ_and_are_shuffled():
    n = 1009
    first, second = SampleOrder(n, 0)(positions(0, n)), SampleOrder(n, 0)(positions(n, 2 * n))
    other = SampleOrder(n, 1)(positions(0, n))
    for a, b in ((first, second), (first, other), (first, positions(0, n))):
        assert (a == b).mean() < 0.02  # a random pair agrees in 1 of 1009 places
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.15  # 4.7 standard deviations
    neighbours = np.corrcoef(first[:-1], first[1:])[0, 1]
    assert abs(neighbours) < 0.15


def test_any_position_can_be_asked_alone_and_far_ahead():
    order = SampleOrder(97, seed=5)
    together = order(positions(0, 500))
    assert [int(order(positions(i, i + 1))[0]) for i in (0, 96, 97, 499)] == together[
        [0, 96, 97, 499]
    ].tolist()
    assert 0 <= int(order(np.array([2**61]))[0]) < 97


def test_the_order_is_the_same_on_every_machine_and_release():
    assert SampleOrder(13, seed=7)(positions(0, 13)).tolist() == [9, 7, 4, 8, 0, 11, 12, 10, 3, 2, 1, 6, 5]
    assert MixtureOrder([5, 11], [1.0, 3.0], seed=7)(positions(0, 12)).tolist() == [
        10,
        5,
        1,
        5,
        13,
        4,
        4,
        1,
        14,
        5,
        3,
        2,
    ]


def test_an_order_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        SampleOrder(0, 0)


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=7),
    seed=st.integers(0, 99),
    block=st.integers(0, 50),
)
def test_every_block_holds_each_part_in_its_exact_quota(weights, seed, block):
    lengths = [7 + 3 * index for index in range(len(weights))]
    order = MixtureOrder(lengths, weights, seed)
    drawn = order(positions(block * BLOCK, (block + 1) * BLOCK))
    part = np.searchsorted(np.cumsum(lengths), drawn, side="right")
    assert np.bincount(part, minlength=len(weights)).tolist() == order.quotas
    assert sum(order.quotas) == BLOCK
    assert min(order.quotas) >= 1


def test_quotas_follow_the_weights():
    assert MixtureOrder([3, 3, 3], [2.0, 1.0, 1.0], 0).quotas == [512, 256, 256]
    assert MixtureOrder([3, 3, 3], [1.0, 1.0, 1.0], 0).quotas == [342, 341, 341]
    assert MixtureOrder([3, 3], [1e9, 1.0], 0).quotas == [1023, 1]


def test_parts_of_a_mixture_wrap_on_their_own_and_visit_all():
    lengths = [5, 1500]
    drawn = MixtureOrder(lengths, [1.0, 1.0], seed=2)(positions(0, 3 * BLOCK))
    small, large = drawn[drawn < 5], drawn[drawn >= 5] - 5
    assert len(large) == 3 * BLOCK // 2
    # 512 positions a block: after 1536 of them the large part is complete and has begun anew.
    assert len(np.unique(large)) == 1500
    assert np.bincount(small).max() - np.bincount(small).min() <= 1


def test_a_mixture_is_spread_within_a_block():
    drawn = MixtureOrder([400, 400], [1.0, 1.0], seed=4)(positions(0, BLOCK))
    halves = [(drawn[half] < 400).sum() for half in (slice(0, 512), slice(512, 1024))]
    assert min(halves) > 200
