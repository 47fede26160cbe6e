"""Tokenizers: raw bytes, and any ``tokenizer.json`` (our own BPE included). All is JSON on disk.

Shapes: V = vocab_size. Text never yields a special token: ``<|endoftext|>`` in a document is plain text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from moetrain.data.documents import digest_of
from moetrain.errors import UserError

EOS = "<|endoftext|>"
_BYTES_CLASS = "moetrain.bytes"
_EOS_NAMES = (
    EOS,
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
)


class Tokenizer(Protocol):
    """``encode`` adds no special tokens; ``decode`` leaves them out.

    ``token_bytes`` (int64 [V]) is how many bytes of text each id stands for, specials 0: exact for bytes and
    for byte-level vocabularies. ``fingerprint`` names the mapping from text to ids.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self) -> npt.NDArray[np.int64]: ...
    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = digest_of("bytes", 1)

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        return [np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        sizes = np.ones(self.vocab_size, np.int64)
        sizes[self.eos_id] = 0
        return sizes

    def save(self, folder: Path) -> None:
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": _BYTES_CLASS})


class JsonTokenizer:
    """A ``tokenizers`` tokenizer with a known end-of-document token.

    Saved in Hugging Face's layout, so that the folder loads there too.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_token: str) -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"tokenizer: the end-of-text token {eos_token!r} is not in its vocabulary")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # in the library's words: special tokens are encoded as text
        self._tokenizer = tokenizer
        self._eos_token = eos_token
        self.eos_id = int(eos_id)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = digest_of(tokenizer.to_str(), eos_token)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> npt.NDArray[np.int64]:
        spec = json.loads(self._tokenizer.to_str())
        added = {token["id"]: token for token in spec.get("added_tokens") or ()}
        byte_level = "ByteLevel" in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in added:
                sizes[index] = 0 if added[index]["special"] else len(token.encode())
            else:
                # In a byte-level vocabulary every character stands for one byte.
                sizes[index] = len(token) if byte_level else _piece_bytes(token)
        sizes[self.eos_id] = 0
        return sizes

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos_token}
        _write_json(folder / "tokenizer_config.json", config)


def _piece_bytes(token: str) -> int:
    """SentencePiece's and WordPiece's spellings; a word boundary that was no space makes it inexact."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").removeprefix("##").encode())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load what ``save`` wrote, a Hugging Face folder, or a ``tokenizer.json``.

    The end-of-text token is the one that ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it
    names, else a special token of a well-known name. Raises UserError for anything else.
    """
    where = Path(path).expanduser()
    folder = where if where.is_dir() else where.parent
    file = where / "tokenizer.json" if where.is_dir() else where
    if where.is_dir() and _read_json(folder / "tokenizer_config.json").get("tokenizer_class") == _BYTES_CLASS:
        return ByteTokenizer()
    if not file.is_file():
        others = sorted(found.name for found in folder.glob("*token*")) if where.is_dir() else []
        hint = f" (it has {', '.join(others)})" if others else ""
        raise UserError(f"unknown tokenizer {path}: there is no file {file}{hint}; give a tokenizer.json")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"unknown tokenizer: {file} is not a tokenizer.json ({error})") from error
    return JsonTokenizer(tokenizer, _eos_token(tokenizer, folder, file))


def _eos_token(tokenizer: tokenizers.Tokenizer, folder: Path, file: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _read_json(folder / name).get("eos_token")
        if token is not None:
            return str(token["content"] if isinstance(token, dict) else token)
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    known = [name for name in _EOS_NAMES if name in special]
    if known:
        return known[0]
    raise UserError(
        f"tokenizer {file}: which token ends a text? Its special tokens are {special[:8]}; put "
        '{"eos_token": "..."} into a tokenizer_config.json beside it'
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    return content if isinstance(content, dict) else {}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
