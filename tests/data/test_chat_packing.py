"""Conversations in windows: whole ones, cut ones, their labels and loss; and what the store keeps of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from chat_cases import CHATML, chat_data, conversations, read, tokenizer_folder
from data_cases import jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from moetrain.data import PackedSplit, Packing, TrainLoader, prepare, val_batches
from moetrain.data.batch import IGNORE
from moetrain.data.chat.settings import Overlong, TrainOn
from moetrain.data.manifest import write_manifest
from moetrain.data.shards import open_store
from moetrain.data.stream_writer import Mask, StreamWriter
from moetrain.errors import UserError

PAD = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer"), CHATML)


def masked_stream(folder, documents, shard_tokens):
    """``documents``: lists of (token, whether it trains)."""
    writer = StreamWriter(folder, "s", "<u2", shard_tokens, masked=True)
    for number, document in enumerate(documents):
        ids_N, trains_N = (np.array(column) for column in zip(*document, strict=True))
        trains_N[0] = False
        writer.add(ids_N, len(ids_N), len(ids_N), number % 3, Mask(trains_N, 0, number))
    write_manifest(folder, {"dtype": "<u2", "streams": {"s": writer.close()}})
    return open_store(folder)[1]["s"]


def reference(documents, seq_len, overlong):
    """Windows as lists of (number of the document, token, trains, place), token by token."""
    windows = [[]]
    for number, document in enumerate(documents):
        if overlong is Overlong.drop and len(document) > seq_len + 1:
            continue
        kept = [
            (number, token, trains and place > 0, place) for place, (token, trains) in enumerate(document)
        ]
        kept = kept[: seq_len + 1]
        if not any(trains for _, _, trains, _ in kept):
            continue
        if len(windows[-1]) + len(kept) > seq_len + 1:
            windows.append([])
        windows[-1] += kept
    return [window for window in windows if window]


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=7
    ),
    seq_len=st.integers(1, 7),
    shard_tokens=st.integers(1, 13),
    reset=st.booleans(),
    overlong=st.sampled_from([Overlong.truncate, Overlong.drop]),
)
def test_windows_equal_the_reference(tmp_path_factory, documents, seq_len, shard_tokens, reset, overlong):
    stream = masked_stream(tmp_path_factory.mktemp("s"), documents, shard_tokens)
    split = PackedSplit([stream], Packing(seq_len, PAD, True, reset, False, overlong), np.arange(10), "f")
    expected = reference(documents, seq_len, overlong)
    assert len(split) == len(expected)
    trained = 0
    for index, window in enumerate(expected):
        rows, blank = split.sequence(index), seq_len + 1 - len(window)
        docs, tokens, trains, places = ([each[i] for each in window] for i in range(4))
        labels = [token if train else IGNORE for token, train in zip(tokens, trains, strict=True)]
        assert rows.input_ids_BS.tolist() == (tokens + [PAD] * blank)[:-1]
        assert rows.labels_BS.tolist() == (labels + [IGNORE] * blank)[1:]
        assert rows.doc_ids_BS.tolist() == (docs + [len(documents)] * blank)[:-1]
        assert rows.valid_BS.tolist() == ([True] * len(window) + [False] * blank)[:-1]
        positions = places + list(range(blank)) if reset else list(range(seq_len + 1))
        assert rows.positions_BS.tolist() == positions[:-1]
        assert rows.byte_counts_BS.tolist() == [0 if label == IGNORE else label for label in rows.labels_BS]
        trained += sum(trains)
    sums = split.parts[0].sums
    assert (sums.trained, sums.windows) == (trained, len(expected))
    assert sums.documents + sums.overlong + sums.untrained == len(documents)


def test_a_split_of_nothing_that_trains_is_refused(folder, tmp_path):
    rows = [{"messages": row} for row in conversations(12, seed=3, system=False)]
    with pytest.raises(UserError, match=r"no conversation is left on the train side .*raise data\.seq_len"):
        prepare(chat_data(tmp_path, rows, folder, seq_len=2))


def test_what_is_overlong_is_cut_dropped_or_refused(folder, tmp_path):
    long = [{"role": "user", "content": "x"}, {"role": "assistant", "content": " fox" * 90}]
    rows = [{"messages": row} for row in conversations(30, seed=4, longest=1)] + [{"messages": long}] * 2
    cfg = chat_data(tmp_path, rows, folder, seq_len=64)
    cut, dropped = prepare(cfg), prepare(replace(cfg, overlong=Overlong.drop))
    assert cut.folder == dropped.folder  # the choice is made where windows are
    assert cut.fingerprint != dropped.fingerprint
    sums = [[side.parts[0].sums for side in (corpus.train, corpus.val)] for corpus in (cut, dropped)]
    assert sum(side.cut for side in sums[0]) == sum(side.overlong for side in sums[1]) == 2
    with pytest.raises(
        UserError, match=r"rows\.jsonl, row 30: it has \d+ tokens; .* set data\.overlong=trunc"
    ):
        prepare(replace(cfg, overlong=Overlong.refuse))
    prepare(replace(cfg, overlong=Overlong.refuse, seq_len=256))


def test_a_row_s_texts_are_on_one_side(folder, tmp_path):
    rows = [{"messages": row} for row in conversations(40, seed=6)]
    corpus = prepare(chat_data(tmp_path, rows, folder, train_on=TrainOn.each))
    sides = [set(split.parts[0].stream.mask.rows_M.tolist()) for split in (corpus.train, corpus.val)]
    assert sides[1]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(40))
    assert corpus.train.num_documents > len(sides[0])


def test_bytes_are_those_of_text_without_control_words(folder, tmp_path):
    rows = [{"messages": row} for row in conversations(40, seed=6)]
    corpus = prepare(chat_data(tmp_path, rows, folder))
    assert corpus.train.byte_scale == corpus.val.byte_scale == 1.0
    batch = next(val_batches(corpus.val, 8))
    text = [corpus.tokenizer.decode([int(label)]) for label in batch.labels_BS[batch.labels_BS != IGNORE]]
    assert batch.num_targets == len(text) > 0


def test_the_cache_is_made_once_for_a_template(folder, tmp_path, monkeypatch):
    rows = [{"messages": row} for row in conversations(30, seed=7)]
    cfg = chat_data(tmp_path, rows, folder, seq_len=256)
    first = prepare(cfg)
    other = tmp_path / "other.jinja"
    other.write_text(CHATML.replace("<|im_end|>\\n", "<|im_end|>"))
    changed = prepare(replace(cfg, chat_template=str(other)))
    assert changed.folder != first.folder
    assert changed.tokenizer.template_files.templates == {"default": other.read_text()}
    assert prepare(replace(cfg, train_on=TrainOn.last)).fingerprint != first.fingerprint
    monkeypatch.setattr("moetrain.data.corpus.write_corpus", None)
    assert prepare(replace(cfg, seq_len=128)).folder == first.folder
    again = prepare(cfg)
    assert again.fingerprint == first.fingerprint
    loader = TrainLoader(first.train, first.order, 2, 4)
    steps = [loader.next_step() for _ in range(3)]
    resumed = TrainLoader(again.train, again.order, 2, 4)
    resumed.load_state_dict({**loader.state_dict(), "samples": 8})
    for one, same in zip(steps[2], resumed.next_step(), strict=True):
        assert torch.equal(one.labels_BS, same.labels_BS)
        assert torch.equal(one.input_ids_BS, same.input_ids_BS)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    jsonl(tmp_path / "rows.jsonl", [])
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(TypeError):  # it would be made anew
        prepare(cfg)


@pytest.mark.parametrize("file", ["000-train-masks-00000.bin", "000-train-firsts.bin", "000-val-rows.bin"])
def test_a_damaged_mask_is_named(folder, tmp_path, file):
    cfg = chat_data(tmp_path, [{"messages": row} for row in conversations(20, seed=8)], folder)
    path = prepare(cfg).folder / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path} does not match its recorded hash"):
        prepare(cfg)


def test_the_loss_of_packed_rows_is_transformers_loss(folder, tmp_path, monkeypatch):
    hf_family = pytest.importorskip("hf_family")
    from hf_families import MIXTRAL

    from moetrain.train.task import NextToken, batch_arguments

    rows = [{"messages": row} for row in conversations(24, seed=9, longest=2)]
    cfg = chat_data(tmp_path, rows, folder, seq_len=128)
    corpus = prepare(cfg)
    vocab = corpus.tokenizer.vocab_size
    monkeypatch.setattr(hf_family, "VOCAB", vocab)
    theirs, ours = replace(MIXTRAL, theirs={**MIXTRAL.theirs, "vocab_size": vocab}).build(torch.float64)
    task, found, labels = NextToken(ours).eval(), 0.0, 0
    with torch.no_grad():
        for split in (corpus.train, corpus.val):
            for index in range(len(split)):
                batch = split.batch(np.array([index]), np.array([index]))
                found += float(task(**batch_arguments(batch, 0, 0)).loss_sum)
                labels += batch.num_targets
        expected = 0.0
        for each in read(cfg, tmp_path)[1]:
            ids_1S = torch.from_numpy(each.tokens_N)[None]
            trains_N = torch.from_numpy(each.mask.trains_N)
            logits_SV = theirs.eval()(input_ids=ids_1S).logits[0]
            nll_S = cross_entropy(logits_SV[:-1], ids_1S[0, 1:], reduction="none")
            expected += float(nll_S[trains_N[1:]].sum())
            labels -= int(trains_N.sum())
    assert labels == 0
    assert found == pytest.approx(expected, rel=1e-7)  # transformers rounds norms to fp32
