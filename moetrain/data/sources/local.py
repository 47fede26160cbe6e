"""Source ``local``: the user's own files. A text file is one document; a row of jsonl or parquet is one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from moetrain.data.documents import Document, digest_of
from moetrain.data.options import TextFormat
from moetrain.data.sources.json_rows import json_rows
from moetrain.data.sources.opening import SUFFIXES, opened
from moetrain.data.sources.parquet_rows import listed, parquet_rows
from moetrain.data.sources.paths import find_files, identity
from moetrain.errors import UserError

__all__ = ["LocalSource", "find_files"]

DOMAIN = "local"
log = logging.getLogger(__name__)
_FORMATS = {
    ".jsonl": TextFormat.jsonl,
    ".ndjson": TextFormat.jsonl,
    ".json": TextFormat.jsonl,
    ".parquet": TextFormat.parquet,
}
_INFLATED = 100  # times its size on disk that a compressed text may have: text never does, a bomb does
_SMALL = 2**28  # bytes that it may have in any case
_FIRST_ROWS = 100_000  # that may lack the column of the text before the name is taken for a mistake


class LocalSource:
    """A file, a folder (all its files, hidden ones excepted) or a glob (``**`` crosses folders).

    ``format=auto`` goes by the suffix of each file (.jsonl .ndjson .json .parquet, all else is text), after
    .gz .bz2 .xz or .zst where it has one. Rows without text (null) are left out, and counted in a warning.
    Raises UserError for a path that matches nothing, and for a file or a row that cannot be read as text.
    """

    def __init__(
        self,
        path: str,
        format: TextFormat = TextFormat.auto,
        text_key: str = "text",
        domain_key: str | None = None,
    ) -> None:
        self.path, self.format, self.text_key, self.domain_key = path, format, text_key, domain_key
        self.files = find_files(path)
        self._told: set[Path] = set()  # documents are read several times

    @property
    def label(self) -> str:
        return f"data.path={self.path}"

    def fingerprint(self) -> str:
        listing = [(str(file.absolute()), identity(file)) for file in find_files(self.path)]
        return digest_of("local", self.format.value, self.text_key, self.domain_key, listing)

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            format = self._format_of(file)
            if format is TextFormat.text:
                yield self._text_document(file)
            else:
                yield from self._rows(file, format)

    def _format_of(self, file: Path) -> TextFormat:
        return format_of(file) if self.format is TextFormat.auto else self.format

    def _text_document(self, file: Path) -> Document:
        if self.domain_key is not None:
            raise UserError(
                f"data.domain_key={self.domain_key}: {file} is plain text, which has no such column"
            )
        raw = _whole(file)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (byte {error.start}: {raw[error.start]:#04x}); "
                "convert it, or let data.path leave it out"
            ) from error
        if "\0" in text:
            raise UserError(f"{file} is binary (NUL byte at character {text.index(chr(0))}), not text")
        return Document(text, DOMAIN)

    def _rows(self, file: Path, format: TextFormat) -> Iterator[Document]:
        rows = parquet_rows(file, self._columns()) if format is TextFormat.parquet else json_rows(file)
        lacking = dict(self._columns())
        number, empty, first = 0, 0, dict[str, object]()
        for number, row in enumerate(rows, 1):
            if lacking:
                first = first or row
                lacking = {name: option for name, option in lacking.items() if name not in row}
                if number > _FIRST_ROWS:
                    break
            text = row.get(self.text_key)
            if text is None:
                empty += 1
                continue
            if not isinstance(text, str):
                kind = type(text).__name__
                raise UserError(f"{file}, row {number - 1}: {self.text_key!r} holds {kind}, not text")
            yield Document(text, self._domain(row))
        for name, option in lacking.items() if number else ():
            raise UserError(f"{file} has no column {name!r} ({option}); it has: {listed(list(first))}")
        if empty and file not in self._told:
            self._told.add(file)
            log.warning("%s: %d of %d rows have no %r: left out", file, empty, number, self.text_key)

    def _columns(self) -> dict[str, str]:
        """The columns wanted: name -> the option that names it."""
        columns = {self.text_key: "data.text_key"}
        return columns if self.domain_key is None else columns | {self.domain_key: "data.domain_key"}

    def _domain(self, row: dict[str, object]) -> str:
        if self.domain_key is None:
            return DOMAIN
        return str(row.get(self.domain_key)).encode(errors="replace").decode()


def format_of(file: Path) -> TextFormat:
    """By the suffix, before one of compression where there is one; text where it is not known."""
    suffixes = [suffix.lower() for suffix in file.suffixes if suffix.lower() not in SUFFIXES]
    return _FORMATS.get(suffixes[-1], TextFormat.text) if suffixes else TextFormat.text


def _whole(file: Path) -> bytes:
    with opened(file) as (data, compression, size):
        if compression is None:
            return data.read()
        limit = max(_SMALL, _INFLATED * size)
        content = data.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{file}: its {size} bytes are more than {limit} bytes of text once decompressed")
        return content
