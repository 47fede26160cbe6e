"""The byte tokenizer as a tokenizer.json: the ids of our own, in transformers too."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data import ByteTokenizer, load_tokenizer
from moetrain.data.tokenizer_bytes import bytes_as_json

TEXTS = ["", " ", "don't stop .  \n\n\t x", "ünï 語 🙂 \x00\x7f\xad", "".join(map(chr, range(0x180)))]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_the_ids_are_the_bytes(text: str) -> None:
    ours, plain = bytes_as_json(), ByteTokenizer()
    assert ours.encode(text) == plain.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert (ours.vocab_size, ours.eos_id) == (plain.vocab_size, plain.eos_id)


def test_transformers_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: hf)")
    bytes_as_json().save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = ByteTokenizer()
    assert (len(theirs), theirs.eos_token_id) == (plain.vocab_size, plain.eos_id)
    for text in TEXTS:
        ids = plain.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    again = load_tokenizer(tmp_path)
    assert (again.token_bytes() == plain.token_bytes()).all()
