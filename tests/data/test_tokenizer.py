"""Tokenizers: round trips, exact byte lengths, no special token out of text, and clear refusals."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from moetrain.data.bpe import train_bpe
from moetrain.data.tokenizer import EOS, ByteTokenizer, JsonTokenizer, load_tokenizer
from moetrain.errors import UserError

TEXT = ["def add(a, b):\n    return a + b  # naïve\n" * 40, "Où est l'été ? 東京 🙂 " * 30, "x" * 50]
TRAINED = train_bpe(TEXT, 300)


@settings(max_examples=80, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=60))
def test_text_survives_a_round_trip_and_its_bytes_are_counted(text):
    for tokenizer in (ByteTokenizer(), TRAINED):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
        assert tokenizer.encode_batch([text, "b"])[0].tolist() == ids
        assert tokenizer.eos_id not in ids


def test_the_end_of_text_cannot_be_written_in_text():
    ids = TRAINED.encode(f"a{EOS}b")
    assert TRAINED.eos_id not in ids
    assert TRAINED.decode([*ids, TRAINED.eos_id]) == f"a{EOS}b"
    assert TRAINED.token_bytes()[TRAINED.eos_id] == 0


def test_sizes_and_ids():
    assert (ByteTokenizer().vocab_size, ByteTokenizer().eos_id) == (257, 256)
    assert ByteTokenizer().encode("é") == [195, 169]
    assert ByteTokenizer().decode([195, 256]) == "\ufffd"
    assert TRAINED.vocab_size == 300
    assert len(TRAINED.encode(TEXT[0])) < len(TEXT[0]) / 2


def test_a_text_with_few_pairs_gives_a_smaller_vocabulary():
    assert train_bpe(["ab"], 4096).vocab_size == 258  # the bytes, the end of text, "ab"


def test_training_again_gives_the_same_merges_in_any_threads(monkeypatch):
    for parallel in ("true", "false"):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
        assert train_bpe(TEXT, 300).fingerprint == TRAINED.fingerprint


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), TRAINED], ids=["bytes", "bpe"])
def test_saved_tokenizers_load_as_they_were(tmp_path, tokenizer):
    tokenizer.save(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json"}
    loaded = load_tokenizer(tmp_path)
    assert (loaded.fingerprint, loaded.eos_id) == (tokenizer.fingerprint, tokenizer.eos_id)
    assert loaded.encode(TEXT[1]) == tokenizer.encode(TEXT[1])


def word_level(specials=()):
    vocab = {"▁hello": 0, "▁world": 1, "<0x0A>": 2, "<unk>": 3}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def test_a_foreign_tokenizer_json_has_padding_and_truncation_off(tmp_path):
    tokenizer = word_level(["</s>"])
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.encode("hello world hello") == [0, 1, 0]
    assert loaded.eos_id == 4
    assert loaded.token_bytes().tolist() == [6, 6, 1, 5, 0]


@pytest.mark.parametrize("eos", ["<stop>", {"content": "<stop>", "special": True}])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_the_end_of_text_is_the_one_that_the_folder_names(tmp_path, eos, file):
    word_level(["</s>", "<stop>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(json.dumps({"eos_token": eos}))
    assert load_tokenizer(tmp_path).eos_id == 5


def test_vocabularies_with_holes_count_up_to_their_largest_id():
    vocab = {"a": 0, "b": 7, "</s>": 3}
    tokenizer = JsonTokenizer(tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a")), "</s>")
    assert tokenizer.vocab_size == 8
    assert tokenizer.token_bytes().tolist() == [1, 0, 0, 0, 0, 0, 0, 1]


def test_unknown_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"unknown tokenizer .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(UserError, match=r"it has tokenizer\.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "broken.json")


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    word_level(["<mask>"]).save(str(file))
    with pytest.raises(UserError, match=r"which token ends a text\? .*<mask>"):
        load_tokenizer(file)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(UserError, match=r"'<gone>' is not in its vocabulary"):
        load_tokenizer(file)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*tokenizer_config\.json"):
        load_tokenizer(file)


def test_batches_are_int64_whatever_the_tokenizer():
    for tokenizer in (ByteTokenizer(), TRAINED):
        assert [array.dtype for array in tokenizer.encode_batch(["", "a"])] == [np.int64] * 2
