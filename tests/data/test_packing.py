"""Windows against a token-by-token reference, across shards, with and without borders between documents."""

import numpy as np
import pytest
import torch
from data_cases import EOS, TOKEN_BYTES, make_split, make_stream
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data.batch import IGNORE


def reference(documents, domains, seq_len, keep, reset, pad):
    """One dict of lists per window, built token by token."""
    flat = [(token, doc) for doc, ids in enumerate(documents) for token in [*ids, EOS]]
    windows = []
    for start in range(0, len(flat) - 1, seq_len):
        if not pad and start + seq_len + 1 > len(flat):
            break
        window = {name: [] for name in ("input", "label", "doc", "position", "domain", "bytes", "valid")}
        position, before = 0, None
        for place in range(start, start + seq_len):
            here = flat[place] if place < len(flat) else (EOS, len(documents))
            after = flat[place + 1] if place + 1 < len(flat) else None
            position = 0 if reset and before not in (None, here[1]) else position
            label = IGNORE if after is None or (keep and after[1] != here[1]) else after[0]
            owner = here[1] if label == IGNORE else after[1]
            window["input"].append(here[0])
            window["label"].append(label)
            window["doc"].append(here[1])
            window["position"].append(position)
            window["domain"].append(domains[min(owner, len(documents) - 1)])
            window["bytes"].append(0 if label == IGNORE else int(TOKEN_BYTES[label]))
            window["valid"].append(place < len(flat))
            position, before = position + 1, here[1]
        windows.append(window)
    return windows


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=9), min_size=1, max_size=7),
    seq_len=st.integers(1, 7),
    shard_tokens=st.integers(1, 13),
    keep=st.booleans(),
    reset=st.booleans(),
    pad=st.booleans(),
)
def test_windows_equal_the_reference(tmp_path_factory, documents, seq_len, shard_tokens, keep, reset, pad):
    domains = [index % 3 for index in range(len(documents))]
    stream = make_stream(tmp_path_factory.mktemp("s"), documents, domains, shard_tokens)
    split = make_split([stream], seq_len, keep, reset, pad)
    expected = reference(documents, domains, seq_len, keep, reset, pad)
    assert len(split) == len(expected)
    for index, window in enumerate(expected):
        rows = split.sequence(index)
        assert rows.input_ids_BS.tolist() == window["input"]
        assert rows.labels_BS.tolist() == window["label"]
        assert rows.doc_ids_BS.tolist() == window["doc"]
        assert rows.positions_BS.tolist() == window["position"]
        assert rows.domain_ids_BS.tolist() == window["domain"]
        of_tokens = [domains[min(doc, len(documents) - 1)] for doc in window["doc"]]
        assert rows.token_domains_BS.tolist() == of_tokens
        assert rows.byte_counts_BS.tolist() == window["bytes"]
        assert rows.valid_BS.tolist() == window["valid"]


@pytest.mark.parametrize("seq_len", [1, 5, 11, 23])
def test_every_held_out_token_but_the_first_is_scored_once(tmp_path, seq_len):
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 1], [2, 2]]
    split = make_split([make_stream(tmp_path, documents)], seq_len, keep=False)
    labels = split.rows(np.arange(len(split))).labels_BS
    stream = [token for ids in documents for token in [*ids, EOS]]
    assert labels[labels != IGNORE].tolist() == stream[1:]


def test_the_borders_of_documents_lose_exactly_one_label_each(tmp_path):
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 1], [2, 2]]
    split = make_split([make_stream(tmp_path, documents)], 4, keep=True)
    labels = split.rows(np.arange(len(split))).labels_BS
    assert labels[labels != IGNORE].tolist() == [2, 3, EOS, EOS, 6, 7, 8, 1, EOS, 2, EOS]


def test_parts_are_numbered_one_after_the_other(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    streams = [make_stream(folders[0], [[1, 2, 3, 4]]), make_stream(folders[1], [[5, 6], [7, 8, 5]])]
    split = make_split(streams, seq_len=2)
    alone = [make_split([stream], seq_len=2) for stream in streams]
    assert split.part_lengths == [len(one) for one in alone] == [2, 3]
    order = np.array([4, 0, 2, 1])
    for field, left in zip(split.rows(order)._fields, split.rows(order), strict=True):
        right = [getattr(alone[i // 2 if i < 4 else 1].sequence(i if i < 2 else i - 2), field) for i in order]
        assert left.tolist() == [row.tolist() for row in right], field
    assert (split.num_tokens, split.num_documents) == (12, 3)


def test_a_sequence_that_does_not_exist_is_refused(tmp_path):
    split = make_split([make_stream(tmp_path, [[1, 2, 3, 4]])], seq_len=2)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            split.sequence(index)


def test_batches_leave_out_what_the_model_need_not_look_at(tmp_path):
    stream = make_stream(tmp_path, [[1, 2, 3], [4, 5]])
    indices = np.array([0, 1])
    batch = make_split([stream], 3).batch(indices, indices + 10)
    assert batch.doc_ids_BS.tolist() == [[0, 0, 0], [0, 1, 1]]
    assert batch.positions_BS.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert batch.sample_ids_B.tolist() == [10, 11]
    assert batch.valid_BS is None
    assert batch.num_targets == 5
    assert batch.documents == 2
    assert {x.dtype for x in (batch.input_ids_BS, batch.labels_BS, batch.byte_counts_BS)} == {torch.int64}
    crossing = make_split([stream], 3, keep=False, reset=False).batch(indices, indices)
    assert crossing.doc_ids_BS is None
    assert crossing.positions_BS is None
    assert crossing.num_targets == 6


def test_blank_rows_score_nothing(tmp_path):
    split = make_split([make_stream(tmp_path, [[1, 2, 3], [4, 5]])], 3)
    batch = split.batch(np.array([0, 0]), np.array([0, 0]), blank_B=np.array([False, True]))
    assert batch.num_targets == 3
    assert batch.byte_counts_BS.sum(1).tolist() == [4, 0]
    assert batch.valid_BS.tolist() == [[True] * 3, [False] * 3]


def test_moving_a_batch_keeps_all_of_it(tmp_path):
    split = make_split([make_stream(tmp_path, [[1, 2, 3], [4, 5]])], 3)
    batch = split.batch(np.array([1]), np.array([4]))
    moved = batch.to("meta")
    assert moved.input_ids_BS.device.type == moved.sample_ids_B.device.type == "meta"
    assert (moved.num_targets, moved.documents, moved.valid_BS) == (batch.num_targets, 2, None)
