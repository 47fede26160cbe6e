"""Text of which a tokenizer leaves nothing, or only unknown tokens: said in a line, never a loss of zero."""

import json
import logging
from dataclasses import replace

import pytest
import tokenizers
import torch
from data_cases import with_key
from invariance import batch, build, terms
from tokenizers import Regex, models, normalizers, pre_tokenizers

from moetrain.data import (
    IGNORE,
    Packing,
    Part,
    TrainLoader,
    load_tokenizer,
    prepare,
    val_batches,
    whole_files,
)
from moetrain.data.options import LocalData, TokenizerConfig, TokenizerKind
from moetrain.data.sources.local import LocalSource
from moetrain.errors import TrainingError, UserError
from moetrain.parallel.mesh import Meshes
from moetrain.train.engine import NativeEngine
from moetrain.train.evaluate import evaluate
from moetrain.train.log.monitor import LossMonitor
from moetrain.train.step import TrainStep


def letters():
    """Knows the letters a to h and drops all else without a word."""
    return tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate("abcdefgh")}, merges=[]))


def nothing():
    tokenizer = letters()
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    return tokenizer


def words():
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture
def corpus_of(tmp_path):
    """A config of these documents and this tokenizer."""

    def made(texts, tokenizer, name="rows"):
        tokenizer.add_special_tokens(["</s>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        kind = TokenizerConfig(kind=TokenizerKind.file, path=str(tmp_path))
        return LocalData(path=str(path), seq_len=4, tokenizer=kind, cache_dir=str(tmp_path / "cache"))

    return made


@pytest.mark.parametrize("tokenizer", [letters, nothing], ids=["no letter known", "all text dropped"])
def test_text_that_comes_to_nothing_is_refused(corpus_of, tokenizer, tmp_path):
    with pytest.raises(UserError) as caught:
        prepare(corpus_of([f"zz {i:03}" for i in range(200)], tokenizer()))
    line = str(caught.value)
    assert f"data.path={tmp_path}/rows.jsonl: nothing is left to train on" in line
    assert f"tokenizer {tmp_path}/tokenizer.json makes no token of 200 of 200 documents (0 tokens of" in line
    assert f"{200 * 6:,} bytes" in line
    assert "\n" not in line


def test_a_held_out_side_that_comes_to_nothing_is_refused(corpus_of):
    texts = [*(with_key(f"abc {i}", held=False) for i in range(20)), with_key("zzz", held=True)]
    with pytest.raises(UserError, match=r"nothing is left to hold out: .* no token of 1 of 21 documents"):
        prepare(corpus_of(texts, letters()))


def test_documents_that_come_to_nothing_are_left_out_and_counted(corpus_of, caplog):
    texts = ["zzz " * 5 + str(i) for i in range(500)] + [f"abc{'abcdefgh' * (i % 3)}{i}" for i in range(100)]
    with caplog.at_level(logging.WARNING, "moetrain.data"):
        corpus = prepare(replace(corpus_of(texts, letters()), val_fraction=0.1))
    assert "makes no token of 500 of 600 documents" in caplog.text
    assert corpus.train.num_documents + corpus.val.num_documents == 100
    loader = TrainLoader(corpus.train, corpus.order, 1, len(corpus.train))
    for made in (*loader.next_step(), *val_batches(corpus.val, 1)):
        assert made.num_targets
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moetrain.data"):
        prepare(
            replace(corpus_of([text for text in texts if "a" in text], letters(), "few"), val_fraction=0.1)
        )
    assert not caplog.text


@pytest.mark.parametrize(
    ("text", "said"), [("a zebra", "50%"), ("zebra", "100%"), ("a " * 20 + "zebra", None)]
)
def test_unknown_tokens_are_said_where_they_are_many(corpus_of, text, said, caplog):
    with caplog.at_level(logging.WARNING, "moetrain.data"):
        prepare(replace(corpus_of([text + " " * i for i in range(40)], words()), val_fraction=0.3))
    if said is None:
        assert not caplog.text
    else:
        assert f"{said} of the tokens are tokenizer" in caplog.text


def test_files_to_score_that_come_to_nothing_are_told(corpus_of, tmp_path, caplog):
    cfg = corpus_of(["zzz"], letters())
    packing = Packing(4, 8, keep_documents=True, reset_positions=True, pad_last=True)
    tokenizer = load_tokenizer(tmp_path)
    parts = [Part(LocalSource(str(tmp_path / "rows.jsonl")))]
    with pytest.raises(UserError, match=r"none of the 1 files holds text: tokenizer .* no token of 1 of 1"):
        whole_files(parts, tokenizer, packing)
    (tmp_path / "more.jsonl").write_text('{"text": "abc"}\n')
    with caplog.at_level(logging.WARNING, "moetrain.data"):
        more = Part(LocalSource(str(tmp_path / "more.jsonl")))
        split = whole_files([*parts, more], tokenizer, packing).split
    assert "no token of 1 of 2 documents" in caplog.text
    assert split.num_tokens == 4
    assert cfg.seq_len == split.seq_len


def blank():
    whole = batch()
    return replace(whole, labels_BS=torch.full_like(whole.labels_BS, IGNORE), num_targets=0)


def test_a_step_without_a_target_is_no_step():
    task = build(False, Meshes())
    before = [p.detach().clone() for p in task.parameters()]
    optimizer = torch.optim.SGD(task.parameters(), 1.0)
    engine = NativeEngine(task, optimizer)
    step = TrainStep(engine, terms("switch", "global_batch"), [], LossMonitor(), None, seed=0)
    with pytest.raises(TrainingError, match=r"step 8: none of its \d+ tokens is to be predicted"):
        step.run(7, [blank()])
    assert all(torch.equal(p, old) for p, old in zip(task.parameters(), before, strict=True))


def test_an_evaluation_without_a_target_has_no_figures():
    with pytest.raises(UserError, match="evaluation: none of the tokens is to be predicted"):
        evaluate(build(False, Meshes()), [blank()], ["one"], seed=0)
