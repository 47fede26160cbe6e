"""The tokenizer that a model of other people's files goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moetrain.data import Tokenizer, load_tokenizer
from moetrain.data.chat.files import TemplateFiles
from moetrain.errors import UserError

_FILE = "tokenizer.json"
_GGUF_TEMPLATE = "tokenizer.chat_template"
_GGUF_WORDS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "sep_token": "seperator",  # spelled so in the format
}


def folder_tokenizer(folder: Path, advice: str) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. Raises UserError, with ``advice`` where it has none."""
    try:
        return load_tokenizer(folder)
    except UserError as error:
        if (folder / _FILE).is_file():
            raise
        raise UserError(f"{error}; the weights alone are enough: {advice}") from None


def fitted(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """``tokenizer`` without special tokens that have no row of the embedding, such as an added ``[PAD]``.

    Text never yields one, so nothing is encoded otherwise. Returned as it is where others have none either.
    """
    if tokenizer.vocab_size <= vocab_size:
        return tokenizer
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(folder)
        file = folder / _FILE
        words: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        beyond = {token["content"] for token in words["added_tokens"] if token["id"] >= vocab_size}
        special = {token["content"] for token in words["added_tokens"] if token["special"]}
        words["added_tokens"] = [token for token in words["added_tokens"] if token["id"] < vocab_size]
        vocab = words["model"].get("vocab")
        if isinstance(vocab, dict):
            words["model"]["vocab"] = {token: i for token, i in vocab.items() if token not in beyond}
        file.write_text(json.dumps(words), encoding="utf-8")
        try:
            found = load_tokenizer(folder)
        except UserError:  # its end of text was one of them, or its template names one
            return tokenizer
    fits = found.vocab_size <= vocab_size and beyond <= special and found.eos_id == tokenizer.eos_id
    return found if fits else tokenizer


def gguf_templates(metadata: Mapping[str, object]) -> TemplateFiles:
    """The chat template of a GGUF file and the words that it may ask for; none where the file has none."""
    template, tokens = metadata.get(_GGUF_TEMPLATE), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(template, str) or not isinstance(tokens, list):
        return TemplateFiles()
    words: dict[str, str] = {}
    for name, key in _GGUF_WORDS.items():
        place = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(place) is int and 0 <= place < len(tokens):
            words[name] = str(tokens[place])
    return TemplateFiles({"default": template}, words)
