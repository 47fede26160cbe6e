"""The samples of a run depend on the seed alone; errors and shutdown of the prefetching thread."""

import threading

import numpy as np
import pytest
from data_cases import make_split, make_stream
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.batch import IGNORE
from moetrain.data.loader import TrainLoader, val_batches
from moetrain.data.order import MixtureOrder, SampleOrder
from moetrain.errors import UserError


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """53 sequences of 3 tokens, told apart by their tokens."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 9, size=size).tolist() for size in (40, 7, 61, 50)]
    return make_split([make_stream(tmp_path_factory.mktemp("s"), documents)], seq_len=3, pad=False)


def run(split, steps, micro, G, world, seed=0, start=0):
    """The rows (sample id, tokens) of each step over all ranks, in order."""
    loaders = [
        TrainLoader(split, SampleOrder(len(split), seed), micro, G, rank, world) for rank in range(world)
    ]
    rows = []
    for loader in loaders:
        loader.load_state_dict(loader.state_dict() | {"samples": start})
    for _ in range(steps):
        for loader in loaders:
            for batch in loader.next_step():
                assert len(batch.sample_ids_B) <= micro
                rows += zip(batch.sample_ids_B.tolist(), batch.input_ids_BS.tolist(), strict=True)
    for loader in loaders:
        loader.close()
    return rows


@settings(max_examples=25, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4, 6]),
    micro=st.integers(1, 13),
    stop=st.integers(0, 4),
    seed=st.integers(0, 5),
)
def test_samples_ignore_ranks_micro_batches_and_interruptions(split, world, micro, stop, seed):
    G = 12
    plain = run(split, steps=5, micro=G, G=G, world=1, seed=seed)
    other_world = {1: 4, 2: 3, 3: 6, 4: 1, 6: 2}[world]
    before = run(split, stop, micro, G, world, seed)
    after = run(split, 5 - stop, max(1, micro - 2), G, other_world, seed, start=stop * G)
    assert before + after == plain
    assert [sample for sample, _ in plain] == list(range(5 * G))


def test_another_seed_is_another_run(split):
    assert run(split, 2, 4, 12, 1, seed=1) != run(split, 2, 4, 12, 1, seed=2)


def test_a_step_larger_than_the_split_wraps_around(split):
    G = 2 * len(split) + 5
    rows = run(split, 1, 16, G, 1)
    epochs = [rows[: len(split)], rows[len(split) : 2 * len(split)]]
    tokens = [sorted(tokens for _, tokens in epoch) for epoch in epochs]
    assert tokens[0] == tokens[1] == sorted(split.rows(np.arange(len(split))).input_ids_BS.tolist())
    assert len({sample for sample, _ in rows}) == G


def test_state_counts_batches_handed_out_not_prefetched(split):
    loader = TrainLoader(split, SampleOrder(len(split), 0), 4, 8)
    assert loader.state_dict()["samples"] == 0
    loader.next_step()
    assert loader.state_dict()["samples"] == loader.samples == 8
    resumed = TrainLoader(split, SampleOrder(len(split), 0), 8, 8)
    resumed.load_state_dict(loader.state_dict())
    assert resumed.next_step()[0].sample_ids_B.tolist() == list(range(8, 16))


def test_loading_a_state_discards_the_step_prepared_before_it(split):
    loader = TrainLoader(split, SampleOrder(len(split), 0), 8, 8)
    loader.next_step()
    loader.load_state_dict(loader.state_dict() | {"samples": 40})
    assert loader.next_step()[0].sample_ids_B.tolist() == list(range(40, 48))


def test_the_global_batch_may_change_between_runs(split):
    loader = TrainLoader(split, SampleOrder(len(split), 0), 8, 8)
    loader.next_step()
    grown = TrainLoader(split, SampleOrder(len(split), 0), 8, 16)
    grown.load_state_dict(loader.state_dict())
    assert [i for batch in grown.next_step() for i in batch.sample_ids_B.tolist()] == list(range(8, 24))


def test_a_state_of_another_seed_corpus_or_mixture_is_refused(split, tmp_path):
    n = len(split)
    state = TrainLoader(split, SampleOrder(n, 3), 4, 8).state_dict()
    with pytest.raises(UserError, match=r"train\.seed=3, this run has 4"):
        TrainLoader(split, SampleOrder(n, 4), 4, 8).load_state_dict(state)
    other = make_split([make_stream(tmp_path, [[1] * 40])], seq_len=3)
    other.fingerprint = "another"
    with pytest.raises(UserError, match="other data"):
        TrainLoader(other, SampleOrder(n, 3), 4, 8).load_state_dict(state)
    with pytest.raises(UserError, match="other data"):
        TrainLoader(split, MixtureOrder([n - 4, 4], [1.0, 1.0], 3), 4, 8).load_state_dict(state)


def test_a_batch_that_ranks_cannot_share_is_refused(split):
    with pytest.raises(UserError, match="8 sequences a step, which 3 ranks"):
        TrainLoader(split, SampleOrder(len(split), 0), 4, 8, rank=0, world=3)
    with pytest.raises(UserError, match="micro_batch_size=0"):
        TrainLoader(split, SampleOrder(len(split), 0), 0, 8)


class FailingOrder(SampleOrder):
    """Breaks at position ``at`` once, as a disk may."""

    def __init__(self, n, at):
        super().__init__(n, 0)
        self.at = at

    def __call__(self, positions):
        if self.at in positions:
            self.at = -1
            raise OSError("the disk went away")
        return super().__call__(positions)


def test_an_error_of_the_thread_reaches_the_step_it_belongs_to(split):
    loader = TrainLoader(split, FailingOrder(len(split), at=8), 8, 8)
    loader.next_step()
    with pytest.raises(OSError, match="the disk went away"):
        loader.next_step()
    assert loader.samples == 8
    assert loader.next_step()[0].sample_ids_B.tolist() == list(range(8, 16))


class BlockingOrder(SampleOrder):
    """Never answers after its first step."""

    def __init__(self, n):
        super().__init__(n, 0)
        self.entered = threading.Event()
        self.release = threading.Event()

    def __call__(self, positions):
        if positions[0] >= 8:
            self.entered.set()
            self.release.wait()
        return super().__call__(positions)


def test_closing_never_waits_for_the_thread(split):
    order = BlockingOrder(len(split))
    loader = TrainLoader(split, order, 8, 8)
    try:
        loader.next_step()
        assert order.entered.wait(timeout=60)
        workers = [thread for thread in threading.enumerate() if thread.name == "moetrain-data"]
        assert workers
        assert all(thread.daemon for thread in workers)  # so the interpreter's exit does not wait either
        loader.close()
    finally:
        order.release.set()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_ranks_together_score_every_held_out_label_once(tmp_path, world, batch_size, limit):
    documents = [[1, 2, 3, 4, 5, 6, 7], [8, 1, 2], [3, 4, 5, 6, 7, 8, 1, 2, 3]]
    split = make_split([make_stream(tmp_path, documents)], seq_len=2)  # 11 sequences
    ranks = [list(val_batches(split, batch_size, limit, rank, world)) for rank in range(world)]
    assert len({tuple(len(batch.sample_ids_B) for batch in batches) for batches in ranks}) == 1
    total = 11 if limit is None else limit
    scored = [
        int(sample)
        for batches in ranks
        for batch in batches
        for sample, labels in zip(batch.sample_ids_B, batch.labels_BS, strict=True)
        if (labels != IGNORE).any()
    ]
    assert sorted(scored) == [i * 11 // total for i in range(total)]
    labels = split.rows(np.array(sorted(scored))).labels_BS
    assert sum(batch.num_targets for batches in ranks for batch in batches) == (labels != IGNORE).sum()
