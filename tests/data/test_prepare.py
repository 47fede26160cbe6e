"""prepare: what ends up on which side, what is made anew and what is not, and refusals of bad input."""

import json
import os
import shutil
from dataclasses import replace

import pytest
from data_cases import BYTES, documents, stored_documents, text_folder, with_key

from moetrain.data import (
    MixtureOrder,
    SampleOrder,
    TrainLoader,
    bpe,
    prepare,
    val_batches,
)
from moetrain.data.batch import IGNORE
from moetrain.data.documents import content_key
from moetrain.data.heldout import scan
from moetrain.data.options import (
    LocalData,
    MixtureData,
    MixturePart,
    SourceKind,
    TokenizerConfig,
    TokenizerKind,
)
from moetrain.data.shards import open_store
from moetrain.data.sources import build_parts
from moetrain.data.tokenizer import EOS
from moetrain.errors import UserError


@pytest.fixture
def cfg(tmp_path):
    """40 documents in jsonl with two domains, tokenised as bytes."""
    path = tmp_path / "text/rows.jsonl"
    path.parent.mkdir()
    rows = [{"text": text, "kind": "odd" if i % 2 else "even"} for i, text in enumerate(documents(40))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LocalData(
        path=str(path),
        seq_len=16,
        tokenizer=BYTES,
        val_fraction=0.2,
        cache_dir=str(tmp_path / "cache"),
        domain_key="kind",
    )


def test_every_document_is_on_one_side_and_comes_back_whole(cfg):
    corpus = prepare(cfg)
    trained, held = stored_documents(corpus, "train"), stored_documents(corpus, "val")
    assert sorted(trained + held) == sorted(documents(40))
    assert held
    assert corpus.domains == ("even", "odd")
    assert corpus.train.num_documents == len(trained)
    assert corpus.train.num_bytes == sum(len(text.encode()) for text in trained)
    assert corpus.train.num_tokens == corpus.train.num_bytes + len(trained)
    assert corpus.train.byte_scale == corpus.val.byte_scale == 1.0
    assert isinstance(corpus.order, SampleOrder)


def test_bytes_are_counted_exactly_per_domain(cfg):
    corpus = prepare(replace(cfg, cross_document_attention=True))
    counted, first = {}, None
    for batch in val_batches(corpus.val, 4):
        first = batch if first is None else first
        for index, name in enumerate(corpus.domains):
            chosen = (batch.domain_ids_BS == index) & (batch.labels_BS != IGNORE)
            counted[name] = counted.get(name, 0) + int(batch.byte_counts_BS[chosen].sum())
    held = stored_documents(corpus, "val")
    sizes = {"even": 0, "odd": 0}
    for text in held:
        sizes["odd" if int(text.split(":")[0]) % 2 else "even"] += len(text.encode())
    sizes["even" if first.domain_ids_BS[0, 0] == 0 else "odd"] -= 1  # the split's first byte is no label
    assert counted == sizes


def test_the_second_call_reads_the_cache_and_never_the_text(cfg, monkeypatch):
    first = prepare(cfg)
    monkeypatch.setattr("moetrain.data.corpus.write_corpus", None)
    again = prepare(replace(cfg, seq_len=8, cross_document_attention=True), seed=3)
    assert again.folder == first.folder
    assert again.fingerprint != first.fingerprint
    assert prepare(cfg).fingerprint == first.fingerprint
    assert again.order.seed == 3


def test_text_prepared_elsewhere_has_the_same_fingerprint(cfg, tmp_path):
    copy = tmp_path / "copy.jsonl"
    shutil.copy(cfg.path, copy)
    moved = prepare(replace(cfg, path=str(copy), cache_dir=str(tmp_path / "other")))
    here = prepare(cfg)
    assert moved.folder.name != here.folder.name
    assert moved.fingerprint == here.fingerprint
    state = TrainLoader(here.train, here.order, 4, 4).state_dict()
    TrainLoader(moved.train, moved.order, 4, 4).load_state_dict(state)


def test_changed_text_is_prepared_anew(cfg):
    before = prepare(cfg)
    with open(cfg.path, "a") as out:
        out.write('{"text": "one more", "kind": "even"}\n')
    after = prepare(cfg)
    assert after.folder != before.folder
    assert after.train.num_documents + after.val.num_documents == 41
    assert after.fingerprint != before.fingerprint


def test_bpe_learns_from_the_training_side_only(tmp_path):
    trained = [with_key(f"alpha beta gamma {i} " * 20, held=False) for i in range(6)]
    cfg = text_folder(tmp_path, [*trained, with_key("zzzzqqqq " * 300, held=True)])
    corpus = prepare(replace(cfg, tokenizer=TokenizerConfig(vocab_size=300)))
    assert corpus.val.num_documents == 1
    assert len(corpus.tokenizer.encode("zzzzqqqq")) == 8
    assert len(corpus.tokenizer.encode("alpha")) == 1


def test_bpe_samples_a_small_corpus_whole_and_a_large_in_part(tmp_path, monkeypatch):
    texts = [f"{number} " * 200 for number in range(200)]
    parts = build_parts(text_folder(tmp_path, texts), tmp_path)
    scanned = scan(parts, 0.02)
    everything = list(bpe.sample(parts, scanned))
    assert everything == [text for text in texts if not scanned.held_out(content_key(text.encode()))]
    monkeypatch.setattr(bpe, "SAMPLE_BYTES", scanned.train_bytes // 4)
    some = list(bpe.sample(parts, scanned))
    assert set(some) < set(everything)
    assert 0.15 < sum(map(len, some)) / scanned.train_bytes < 0.35
    monkeypatch.setattr(bpe, "SAMPLE_BYTES", 10**9)
    monkeypatch.setattr(bpe, "_PIECE", 64)
    assert "".join(bpe.sample(parts, scanned)) == "".join(everything)


def test_bpe_is_trained_once_for_the_same_text(cfg, tmp_path, monkeypatch):
    cfg = replace(cfg, tokenizer=TokenizerConfig(vocab_size=280))
    first = prepare(cfg)
    os.utime(cfg.path, ns=(5, 5))
    monkeypatch.setattr("moetrain.data.bpe.train_bpe", None)
    second = prepare(cfg)
    assert second.folder != first.folder
    assert second.fingerprint == first.fingerprint
    assert second.tokenizer.vocab_size == 280


def test_inexact_lengths_of_a_tokenizer_are_scaled_to_the_split(tmp_path):
    import tokenizers
    from tokenizers import models, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    cfg = text_folder(tmp_path, ["a b a b a", "b a b a b a c", "a a a a b", "b b b b a"])
    kind = TokenizerConfig(kind=TokenizerKind.file, path=str(tmp_path / "tokenizer.json"))
    corpus = prepare(replace(cfg, tokenizer=kind, seq_len=2, val_fraction=0.5))
    for split in (corpus.train, corpus.val):
        counted = sum(int(corpus.tokenizer.token_bytes()[row].sum()) for row in _all_tokens(corpus, split))
        assert split.byte_scale == pytest.approx(split.num_bytes / counted)
        assert split.byte_scale != 1.0


def _all_tokens(corpus, split):
    side = "train" if split is corpus.train else "val"
    stream = open_store(corpus.folder)[1][f"000-{side}"]
    return [stream.read(0, stream.num_tokens)]


@pytest.mark.parametrize("kept", [1, 2])
def test_one_distinct_document_cannot_be_split(tmp_path, kept):
    cfg = text_folder(tmp_path, ["all the same text"] * kept)
    with pytest.raises(UserError, match=rf"{kept} documents give {kept} to train on and 0 held out"):
        prepare(cfg)
    assert [path.suffix for path in (tmp_path / "cache/corpora").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 0}, r"data\.seq_len=0"),
        ({"seq_len": 5000}, r"tokens, fewer than one sequence of data\.seq_len=5000"),
        ({"val_fraction": 0.0}, r"val_fraction=0\.0"),
        ({"val_fraction": 1.0}, r"val_fraction=1\.0"),
        ({"tokenizer": TokenizerConfig(vocab_size=256)}, r"vocab_size=256 must be 257 or more: 256 bytes"),
        ({"tokenizer": TokenizerConfig(kind=TokenizerKind.file)}, r"kind=file needs data\.tokenizer\.path"),
        (
            {"tokenizer": TokenizerConfig(kind=TokenizerKind.file, path="/no/such")},
            r"data\.tokenizer\.path=/no/such does not exist",
        ),
        ({"path": "/no/such/*.txt"}, r"matches no file"),
        ({"text_key": "body"}, r"no column 'body' \(data\.text_key\); it has: kind, text"),
    ],
)
def test_impossible_requests_are_refused(cfg, change, message):
    with pytest.raises(UserError, match=message):
        prepare(replace(cfg, **change))


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no text"):
        prepare(text_folder(tmp_path, ["", " \n"]))


@pytest.fixture
def mixture(tmp_path):
    folders = {"big": documents(60, "b"), "small": documents(9, "s")}
    parts = {}
    for name, texts in folders.items():
        path = text_folder(tmp_path, texts, name).path
        parts[name] = MixturePart(kind=SourceKind.local, path=path, weight=1.0 if name == "big" else 3.0)
    return MixtureData(parts=parts, seq_len=16, tokenizer=BYTES, cache_dir=str(tmp_path / "cache"))


def test_a_mixture_draws_its_parts_by_weight_and_labels_them(mixture):
    corpus = prepare(mixture, seed=1)
    assert corpus.domains == ("big", "small")
    assert isinstance(corpus.order, MixtureOrder)
    assert corpus.order.quotas == [256, 768]
    loader = TrainLoader(corpus.train, corpus.order, 64, 1024)
    drawn = [int(row[0]) for batch in loader.next_step() for row in batch.domain_ids_BS]
    assert [drawn.count(domain) for domain in (0, 1)] == [256, 768]
    held = {int(x) for batch in val_batches(corpus.val, 4) for x in batch.domain_ids_BS.flatten()}
    assert held == {0, 1}


def test_weights_change_the_order_but_not_the_prepared_text(mixture, monkeypatch):
    first = prepare(mixture)
    monkeypatch.setattr("moetrain.data.corpus.write_corpus", None)
    parts = {name: replace(part, weight=1.0) for name, part in mixture.parts.items()}
    second = prepare(replace(mixture, parts=parts))
    assert second.folder == first.folder
    state = TrainLoader(first.train, first.order, 4, 4).state_dict()
    with pytest.raises(UserError, match="other data"):
        TrainLoader(second.train, second.order, 4, 4).load_state_dict(state)


def test_a_part_that_cannot_fill_one_sequence_is_named(mixture):
    with pytest.raises(
        UserError, match=r"data\.parts\.small .* tokens, fewer than one sequence of data\.seq_len=900"
    ):
        prepare(replace(mixture, seq_len=900))
