"""Text stays text: no kind of tokenizer makes a special token of it; odd tokenizer files are one line."""

import json
import math

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from moetrain.data.tokenizer import JsonTokenizer, load_tokenizer
from moetrain.errors import UserError

SPECIAL = ["</s>", "<pad>", "§"]
CHARS = "ab</s>pd§ "
BYTES = {f"<0x{byte:02X}>": 300 + byte for byte in range(256)}
PIECES = [
    ("<unk>", 0.0),
    ("</s>", 0.0),
    ("<pad>", 0.0),
    ("§", 0.0),
    (" ", -2.0),
    ("ab", -2.5),
    ("</", -4.0),
    ("s>", -4.5),
]
PIECES += [(char, -3.0) for char in "ab</s>pd"]


def dressed(model, special=SPECIAL):
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def unigram():
    return dressed(models.Unigram(PIECES, unk_id=0))


def bpe(**options):
    vocab = {token: index for index, token in enumerate([*CHARS, "</", "s>", "</s>", "ab", "<pad>", *BYTES])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("a", "b")]
    return dressed(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, **options))


def word_level():
    tokenizer = dressed(
        models.WordLevel({"</s>": 0, "a": 1, "<unk>": 2, "<pad>": 3, "§": 4}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def word_piece():
    vocab = {
        token: index for index, token in enumerate(["</s>", "[UNK]", "a", "<", "##/s>", "##b", "§", "<pad>"])
    }
    tokenizer = dressed(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {
    "unigram": unigram,
    "bpe": bpe,
    "bpe whole words": lambda: bpe(ignore_merges=True),
    "word level": word_level,
    "word piece": word_piece,
}


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*CHARS, *SPECIAL, "<unk>", "é"]), max_size=12).map("".join))
def test_no_text_yields_a_special_token(kind, text):
    plain = KINDS[kind]()
    tokenizer = JsonTokenizer(KINDS[kind](), "</s>")
    special = {plain.token_to_id(token) for token in SPECIAL}
    ids = tokenizer.encode(text)
    assert not special & set(ids)
    assert tokenizer.encode_batch([text])[0].tolist() == ids
    if not any(token in text for token in [*SPECIAL, "<unk>"]):
        assert ids == plain.encode(text, add_special_tokens=False).ids


def best(text):
    """The likeliest pieces by trying all, the special ones left out; unknown characters cost ten more."""
    scores = {piece: (index, score) for index, (piece, score) in enumerate(PIECES) if index > 3}
    lowest = min(score for _, score in PIECES)
    found = [(0.0, [])] + [(-math.inf, [])] * len(text)
    for end in range(1, len(text) + 1):
        for start in range(end):
            piece = text[start:end]
            index, score = scores.get(piece, (0, lowest - 10) if len(piece) == 1 else (0, -math.inf))
            total = found[start][0] + score
            if total > found[end][0] + 1e-9:
                found[end] = (total, [*found[start][1], index])
    return found[-1][1]


@pytest.mark.parametrize("text", ["ab </s> ab", "</s>", "<pad>", "a</s></s>b", "<<//ss>>", "ab<pad>"])
def test_a_unigram_model_reads_special_tokens_as_sentencepiece(text):
    assert JsonTokenizer(unigram(), "</s>").encode(text) == best(text)


def test_byte_fallback_and_added_words_are_kept():
    tokenizer = bpe()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<0xC3>"])  # some files mark bytes as special
    tokenizer.add_tokens(["<call>"])
    ours = JsonTokenizer(tokenizer, "</s>")
    assert ours.encode("é<call>") == [
        tokenizer.token_to_id(token) for token in ("<0xC3>", "<0xA9>", "<call>")
    ]
    assert tokenizer.token_to_id("</s>") == ours.eos_id not in ours.encode("§</s>")


def test_an_end_that_is_not_marked_special_is_text_too(tmp_path):
    tokenizer = bpe()
    tokenizer.add_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == tokenizer.token_to_id("<end>")
    assert loaded.eos_id not in loaded.encode("a<end>b")
    loaded.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert (again.fingerprint, again.encode("a<end></s>")) == (
        loaded.fingerprint,
        loaded.encode("a<end></s>"),
    )
    assert json.loads((tmp_path / "again/tokenizer.json").read_text()) == json.loads(tokenizer.to_str())


def test_a_normalizer_that_writes_a_special_token_writes_text():
    tokenizer = unigram()
    tokenizer.normalizer = normalizers.NFKC()
    assert JsonTokenizer(tokenizer, "</s>").encode("\uff1c/s\uff1e") == best("</s>")


def test_half_a_surrogate_becomes_a_question_mark():
    tokenizer = JsonTokenizer(bpe(), "</s>")
    assert tokenizer.encode("a\ud83d") == tokenizer.encode("a?")


def broken(model, **added):
    base = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None}
    base |= {"post_processor": None, "decoder": None}
    token = {"id": 0, "content": "</s>", "special": True, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False} | added
    return base | {"added_tokens": [token], "model": model}


BPE = {"type": "BPE", "vocab": {"</s>": 0, "a": 1, "b": 2}, "merges": []}
FILES = {
    "merge of no token": (broken(BPE | {"merges": [["a", "c"]]}), "the merge of 'a' and 'c' names no token"),
    "merge to no token": (broken(BPE | {"merges": [["a", "b"]]}), r"names no token \('ab'\)"),
    "merge in one string": (broken(BPE | {"merges": ["a  b"]}), "names no token"),
    "huge id": (broken(BPE | {"vocab": {"</s>": 0, "a": 2**32 - 1}}), "its largest id is 4294967295, though"),
    "negative id": (broken(BPE | {"vocab": {"</s>": 0, "a": -1}}), "greater than or equal to 0"),
    "huge added id": (broken(BPE, id=2**32), "less than 4294967296"),
    "shared id": (broken(BPE | {"vocab": {"</s>": 0, "a": 1, "b": 1}}), "3 tokens share 2 ids"),
    "text for an id": (broken(BPE | {"vocab": {"a": "1"}}), "valid integer"),
    "no model": ({"added_tokens": []}, "model: Field required"),
    "a list": ([1], "as such: "),
    "unk beyond": (
        broken({"type": "Unigram", "vocab": [["</s>", 0.0]], "unk_id": 9}),
        "UnkIdNotInVocabulary",
    ),
    "deep": ("[" * 100_000, "recursion limit"),
}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_odd_tokenizer_files_are_one_line(tmp_path, kind):
    content, message = FILES[kind]
    file = tmp_path / "tokenizer.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["[1]", '{"eos_token": 3}', '{"eos_token": {"content": 3}}', "[" * 100_000], ids=range(4)
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_odd_settings_are_one_line(tmp_path, file, content):
    bpe().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=rf"cannot read .*{file}: ") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordLevel({"</s>": 0, "a": 1}, unk_token="<unk>"), r"cannot encode a text .*Missing \[UNK\]"),
        (models.Unigram([("</s>", 0.0), ("a", -1.0)]), "cannot encode a text .*unk_id"),
        (models.WordPiece({"</s>": 0, "a": 1}, unk_token="[UNK]"), r"cannot encode a text .*Missing \[UNK\]"),
        (models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"), "special token '</s>' out of text"),
    ],
    ids=["word level", "unigram", "word piece", "unknown is the end"],
)
def test_text_outside_a_vocabulary_without_unk_is_one_line(model, message):
    tokenizer = JsonTokenizer(dressed(model, ["</s>"]), "</s>", "tokenizer /some/file")
    assert tokenizer.encode("a") == [1]
    with pytest.raises(UserError, match=f"tokenizer /some/file .*{message}") as caught:
        tokenizer.encode_batch(["a", "zebra"])
    assert "\n" not in str(caught.value)


def test_unknown_text_has_its_id():
    assert [JsonTokenizer(KINDS[kind](), "</s>").unk_id for kind in ("unigram", "bpe", "word level")] == [
        0,
        None,
        2,
    ]
    assert np.array_equal(JsonTokenizer(word_level(), "</s>").encode("zebra a"), [2, 1])
