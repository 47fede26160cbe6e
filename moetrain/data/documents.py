"""What a source yields, and how documents are told apart: cleaned text, a domain label, a content hash."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moetrain.data.chat.settings import Overlong

REMEMBERED_BYTES = 2**26  # of a source's text, which preparing a corpus reads three times
_SPAN_BYTES = 128  # of a pair of numbers


Spans = tuple[tuple[int, int], ...]  # characters: from the first of each pair, up to the second


class Marks(NamedTuple):
    """What a text says about itself where it trains in part: the characters that do, and its control words.

    ``key`` decides on which side it is, for all the texts of one row. ``file`` and ``row`` are where it came
    from: a place among the source's files, and one among the file's rows.
    """

    trained: Spans
    control: Spans
    key: int
    file: int
    row: int


class Document(NamedTuple):
    """Without ``marks`` all of the text trains, and none of it is a control word."""

    text: str
    domain: str
    marks: Marks | None = None


class Source(Protocol):
    """A re-readable stream of documents.

    ``label`` names the source in messages. ``fingerprint`` changes when the text may have changed and is
    cheap: it never reads the text. ``documents`` yields the same documents in the same order every time.
    """

    @property
    def label(self) -> str: ...

    def fingerprint(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...


class Remembered:
    """A source that is read once where its text is small: what it gave is kept in memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._kept: list[Document] | None = None

    @property
    def label(self) -> str:
        return self._source.label

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def documents(self) -> Iterator[Document]:
        if self._kept is not None:
            yield from self._kept
            return
        kept, room = [], REMEMBERED_BYTES
        for document in self._source.documents():
            room -= sys.getsizeof(document.text)
            if (marks := document.marks) is not None:
                room -= _SPAN_BYTES * (len(marks.trained) + len(marks.control))
            if room >= 0:
                kept.append(document)
            else:
                kept.clear()
            yield document
        if room >= 0:
            self._kept = kept


@dataclass(frozen=True)
class Part:
    """One source of a corpus. A mixture has several; ``name`` then replaces the source's domain labels.

    ``overlong``: what becomes of a document that is longer than a sequence, where documents have marks; None:
    they have none, and all of the text trains.
    """

    source: Source
    name: str | None = None
    weight: float = 1.0
    overlong: Overlong | None = None

    @property
    def key(self) -> str:
        """Where its settings stand."""
        return "data" if self.name is None else f"data.parts.{self.name}"

    @property
    def masked(self) -> bool:
        """Whether its documents have marks."""
        return self.overlong is not None

    @property
    def label(self) -> str:
        if self.source.label.startswith(f"{self.key}."):
            return self.source.label
        return f"{self.key} ({self.source.label})" if self.name is not None else self.source.label

    def cleaned(self) -> Iterator[CleanDocument]:
        """The documents that hold something; lone surrogates, which have no UTF-8 form, become ``?``."""
        for text, domain, marks in self.source.documents():
            if not text.strip():
                continue
            try:
                raw = text.encode()
            except UnicodeEncodeError:
                raw = text.encode(errors="replace")
                text = raw.decode()
            yield CleanDocument(text, self.name or domain, raw, marks)


class CleanDocument(NamedTuple):
    text: str
    domain: str
    raw: bytes  # the text in UTF-8
    marks: Marks | None = None

    @property
    def key(self) -> int:
        """64 bits of the content, the same on every machine and for every seed."""
        return content_key(self.raw) if self.marks is None else self.marks.key

    @property
    def num_bytes(self) -> int:
        """Of the text in UTF-8, without control words: those cost bits and stand for no text."""
        spans = () if self.marks is None else self.marks.control
        return len(self.raw) - sum(len(self.text[start:stop].encode()) for start, stop in spans)


def content_key(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def digest_of(*parts: object) -> str:
    """A sha256 of the parts' representations: for keys made of strings, numbers and nested lists of them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
