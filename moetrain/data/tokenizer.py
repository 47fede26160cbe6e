"""Tokenizers: raw bytes, and any ``tokenizer.json`` (our own BPE included). All is JSON on disk.

Shapes: V = vocab_size. Text never yields a special token: ``<|endoftext|>`` in a document is plain text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tokenizers

from moetrain.data.chat.files import TemplateFiles, read_template_files
from moetrain.data.chat.words import Words
from moetrain.data.documents import Spans, digest_of
from moetrain.data.tokenizer_control import ControlEncoder, Placed, placed_bytes
from moetrain.data.tokenizer_spec import for_control_words, for_text, is_byte, library_errors, read_spec
from moetrain.errors import UserError
from moetrain.files import MB, parse_json, read_bytes

EOS = "<|endoftext|>"
OWN_WORDS = Words(frozenset({EOS}), EOS)  # of the tokenizers that are made here
_BYTES_CLASS = "moetrain.bytes"
_LARGEST = 500 * MB  # of a tokenizer.json; those of 256,000 tokens have 35 MB
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


@dataclass(frozen=True)
class _Named:
    content: str


@dataclass(frozen=True)
class _Settings:
    """What is read of a tokenizer_config.json or a special_tokens_map.json."""

    tokenizer_class: str | None = None
    eos_token: str | _Named | None = None


class Tokenizer(Protocol):
    """``encode`` adds no special tokens; ``decode`` leaves them out.

    ``token_bytes`` (int64 [V]) is how many bytes of text each id stands for, specials 0: exact for bytes and
    for byte-level vocabularies. ``unk_id`` stands for text outside the vocabulary, ``label`` names the
    tokenizer in messages, and ``fingerprint`` the mapping from text to ids. ``words`` are the special ones,
    and ``template_files`` the chat templates that came with it. ``encode_marked`` takes texts and the places
    of those special words in them that are control tokens; the same words elsewhere are text.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def unk_id(self) -> int | None: ...
    @property
    def label(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def words(self) -> Words: ...
    @property
    def template_files(self) -> TemplateFiles: ...

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]: ...
    def encode_marked(self, texts: Sequence[str], control: Sequence[Spans]) -> list[Placed]: ...
    def with_templates(self, template_files: TemplateFiles) -> Tokenizer: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self) -> npt.NDArray[np.int64]: ...
    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 ends a document."""

    vocab_size = 257
    eos_id = 256
    unk_id = None
    label = "the byte tokenizer"
    fingerprint = digest_of("bytes", 1)
    words = OWN_WORDS

    def __init__(self, template_files: TemplateFiles | None = None) -> None:
        self.template_files = template_files or TemplateFiles()

    def encode(self, text: str) -> list[int]:
        return list(text.encode(errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        return [np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64) for text in texts]

    def encode_marked(self, texts: Sequence[str], control: Sequence[Spans]) -> list[Placed]:
        return [placed_bytes(text, spans, self.eos_id) for text, spans in zip(texts, control, strict=True)]

    def with_templates(self, template_files: TemplateFiles) -> ByteTokenizer:
        return ByteTokenizer(template_files)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> npt.NDArray[np.int64]:
        sizes = np.ones(self.vocab_size, np.int64)
        sizes[self.eos_id] = 0
        return sizes

    def save(self, folder: Path) -> None:
        _write_json(folder / "tokenizer_config.json", {"tokenizer_class": _BYTES_CLASS})
        self.template_files.save(folder)


class JsonTokenizer:
    """A ``tokenizers`` tokenizer with a known end-of-document token; ``label`` names it in messages.

    Saved in Hugging Face's layout, so that the folder loads there too.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_token: str,
        label: str = "tokenizer",
        template_files: TemplateFiles | None = None,
    ) -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise UserError(f"{label}: the end-of-text token {eos_token!r} is not in its vocabulary")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # in the library's words: special tokens are encoded as text
        content = tokenizer.to_str()
        spec = read_spec(content, label)
        self.label = label
        self._tokenizer, self._for_text = tokenizer, for_text(tokenizer, spec, eos_token)
        self._eos_token, self._spec = eos_token, spec
        self.template_files = template_files or TemplateFiles()
        self._added = {token.id: token for token in spec.added_tokens or ()}
        self._byte_level = spec.byte_level
        self.eos_id, self.unk_id = int(eos_id), spec.unk_id
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids) + 1
        if len(set(ids)) < len(ids):
            raise UserError(
                f"{label}: {len(ids)} tokens share {len(set(ids))} ids, so that some mean two things"
            )
        self._forbidden_V = self._special()
        self.fingerprint = digest_of(content, eos_token)

    def _special(self) -> npt.NDArray[np.bool_]:
        """The ids that no text may yield: not the one of unknown text, nor bytes that are marked so."""
        special_V = np.zeros(self.vocab_size, bool)
        for token in self._added.values():
            special_V[token.id] = token.special and token.id != self.unk_id and not is_byte(token.content)
        special_V[self.eos_id] = True
        return special_V

    @cached_property
    def words(self) -> Words:
        special = {
            token.content for token in self._added.values() if token.special and not is_byte(token.content)
        }
        before = self._tokenizer.encode("", add_special_tokens=True).ids[:1]  # what it puts before a text
        bos = self._tokenizer.id_to_token(before[0]) if before and before[0] != self.eos_id else None
        return Words(frozenset(special | {self._eos_token}), self._eos_token, bos if bos in special else None)

    def encode(self, text: str) -> list[int]:
        return [int(index) for index in self.encode_batch([text])[0]]

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        plain = [text.encode(errors="replace").decode() for text in texts]  # half a surrogate has no UTF-8
        with library_errors(f"{self.label} cannot encode a text"):
            encodings = self._for_text.encode_batch_fast(plain, add_special_tokens=False)
        found = [np.array(encoding.ids, np.int64) for encoding in encodings]
        for ids_N in found:
            if (wrong_N := ids_N[self._forbidden_V[ids_N]]).size:
                token = self._tokenizer.id_to_token(int(wrong_N[0]))
                raise UserError(
                    f"{self.label} makes its special token {token!r} out of text, so that text could end a "
                    "document; give unknown text a token of its own (unk_token)"
                )
        return found

    @cached_property
    def _control(self) -> ControlEncoder:
        twin, names_of = for_control_words(self._tokenizer, self._spec, self.words.special)
        return ControlEncoder(twin, names_of, self._forbidden_V, self.label)

    def encode_marked(self, texts: Sequence[str], control: Sequence[Spans]) -> list[Placed]:
        return self._control.encode(texts, control)

    def with_templates(self, template_files: TemplateFiles) -> JsonTokenizer:
        other = copy(self)
        other.template_files = template_files
        return other

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> npt.NDArray[np.int64]:
        sizes = np.zeros(self.vocab_size, np.int64)
        for token, index in self._tokenizer.get_vocab(with_added_tokens=True).items():
            if index in self._added:
                sizes[index] = 0 if self._added[index].special else len(token.encode())
            else:
                # In a byte-level vocabulary every character stands for one byte.
                sizes[index] = len(token) if self._byte_level else _piece_bytes(token)
        sizes[self.eos_id] = 0
        return sizes

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self._eos_token}
        _write_json(folder / "tokenizer_config.json", config)
        self.template_files.save(folder)


def _piece_bytes(token: str) -> int:
    """SentencePiece's and WordPiece's spellings; a word boundary that was no space makes it inexact."""
    if is_byte(token):
        return 1
    return len(token.replace("▁", " ").removeprefix("##").encode())


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load what ``save`` wrote, a Hugging Face folder, or a ``tokenizer.json``.

    The end-of-text token is the one that ``tokenizer_config.json`` or ``special_tokens_map.json`` beside it
    names, else a special token of a well-known name. Raises UserError for anything else.
    """
    where = Path(os.path.expanduser(path))
    folder = where if where.is_dir() else where.parent
    file = where / "tokenizer.json" if where.is_dir() else where
    if where.is_dir() and _settings(folder / "tokenizer_config.json").tokenizer_class == _BYTES_CLASS:
        return ByteTokenizer(read_template_files(folder))
    if not file.is_file():
        others = sorted(found.name for found in folder.glob("*token*")) if where.is_dir() else []
        hint = f" (it has {', '.join(others)})" if others else ""
        raise UserError(f"unknown tokenizer {path}: there is no file {file}{hint}; give a tokenizer.json")
    content = read_bytes(file, _LARGEST)
    with library_errors(f"unknown tokenizer: {file} is not a tokenizer.json"):
        read_spec(content, "as such")
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    eos_token = _eos_token(tokenizer, folder, file)
    return JsonTokenizer(tokenizer, eos_token, f"tokenizer {file}", read_template_files(folder))


def _eos_token(tokenizer: tokenizers.Tokenizer, folder: Path, file: Path) -> str:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _settings(folder / name).eos_token
        if token is not None:
            return token if isinstance(token, str) else token.content
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    known = [name for name in _EOS_NAMES if name in special]
    if known:
        return known[0]
    raise UserError(
        f"tokenizer {file}: which token ends a text? Its special tokens are {special[:8]}; put "
        '{"eos_token": "..."} into a tokenizer_config.json beside it'
    )


def _settings(file: Path) -> _Settings:
    if not file.exists():
        return _Settings()
    return parse_json(read_bytes(file, _LARGEST), _Settings, f"cannot read {file}")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
